"""Modules: SparseLinear, and what finds and replaces linear layers in a model."""
