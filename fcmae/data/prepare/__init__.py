"""The command ``prepare``."""
