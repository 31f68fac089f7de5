"""Versions of models: which one serves, and how they come and go. No torch, no socket."""
