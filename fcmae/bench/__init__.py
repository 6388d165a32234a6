"""Measurements of kernels and training steps on the machine at hand."""
