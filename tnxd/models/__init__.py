"""What a model is, and where models come from."""
