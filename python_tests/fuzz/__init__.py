"""Damaged checkpoints, counted: see python_tests/fuzz/__main__.py."""
