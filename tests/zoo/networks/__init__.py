"""Networks as people write them. Each file is copied into a model repository as it is: it imports torch alone."""
