"""Who computes a linear layer: the registered backends. See registry.py and protocol.py."""

from sparsekern.backends.cpu import CpuBackend
from sparsekern.backends.cuda.backend import (
    CudaBackend,
    MmaBackend,
    PreciseBackend,
    SixteenBitBackend,
)
from sparsekern.backends.cusparselt.backend import CusparseltBackend
from sparsekern.backends.registry import register_backend
from sparsekern.backends.triton.backend import TritonBackend

register_backend(CudaBackend(), device="cuda")
register_backend(MmaBackend())
register_backend(PreciseBackend())
register_backend(SixteenBitBackend())
register_backend(TritonBackend(), device="cuda")
register_backend(CpuBackend(), device="cpu")
register_backend(CusparseltBackend(), device="cuda")
