"""Fuzzing with fixed seeds: random configs, and random damage to everything that is read from a disk.

``python -m tests.fuzz [NAME ...]`` runs the targets (``make fuzz``), ``FUZZ=short`` a part of them. What goes wrong is
written to ``tests/fuzz/corpus``, one folder per finding, and ``tests/unit/test_fuzz.py`` reads the corpus.
"""
