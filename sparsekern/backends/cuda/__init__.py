"""The CUDA backend: the native kernels and how one is chosen."""
