"""What computes y = x · Wᵀ for a 2:4 weight: one module or package per backend."""
