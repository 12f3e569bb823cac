"""The cuSPARSELt backend: NVIDIA's 2:4 library, loaded at run time."""
