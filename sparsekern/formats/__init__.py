"""Weights in 2:4 form: element types, layouts, the codec, and their form on disk."""

from sparsekern.formats import tile64

__all__ = ["tile64"]  # imported for its registration
