"""Weights of other libraries in and out, as functions on state dicts. Strict both ways."""
