"""Weights in 2:4 form: element types, layouts, the codec, and their form on disk."""
