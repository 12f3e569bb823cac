"""One linear layer as every provider takes it, ready to be called, checked, and timed.

    cuda        sparsekern's native kernels, weight packed (sparsekern/backends/cuda/linear.py)
    cuda-mma    the same, by the mma.sp kernel on every GPU
    triton      sparsekern's Triton kernel, weight row-major
    dense       torch, that is cuBLAS, on the weight before it was pruned: what the user has today
    cusparselt  the vendor's library on the pruned weight, algorithm searched (cusparselt.py)

Weights rotate among copies that together exceed 3 times the L2 cache, because a layer inside a
model never finds its weight there. x and the outputs are shared: between layers they do stay.

Checks, before anything is timed: on integers every sum is exact in float32, so sparsekern's output
must be the float64 result rounded once, bit for bit; on the timed inputs it must lie within
a bound of the float64 result, element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekern import _native, decompress, prune_compress
from sparsekern.formats.layouts import ROWMAJOR
from sparsekern.formats.tile64 import pack
from sparsekern.ops import linear_op as ops

from . import cusparselt, timing
from .shapes import Shape

PACKED = ("cuda", "cuda-mma")
OURS = (*PACKED, "triton", "cpu")
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Of the root mean square of the output, beside the final rounding. Float32 sums of 10^4 products in
# tensor cores, which truncate, stay far below the first; one lost product is above it. Peers may
# also round partial sums to 16 bits (torch allows cuBLAS that).
OURS_SLACK, PEER_SLACK = 2.0**-9, 2.0**-5
REFERENCE_ELEMENTS = 2**27  # of float64 intermediates at a time
MAX_COPIES = 64


class WrongResult(RuntimeError):
    """A provider's output failed its check."""


@dataclass
class Provider:
    """One way to compute the layer.

    call(x, copy) -> y [>= tokens, out_features] with that copy of the weights;
    prepare(x) -> what `call` takes as x, not timed; bytes: of one copy of the weights.
    """

    name: str
    call: Callable[[Tensor, int], Tensor]
    weight: Tensor  # dense [out, in] of the same result, for the check
    bytes: int
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    config: Callable[[Tensor], str] = lambda x: ""


def packed_linear(name: str) -> tuple[Callable, Callable]:
    """(linear, config) of one of PACKED."""
    from sparsekern.backends.cuda import linear as cuda_backend

    if name == "cuda":
        return cuda_backend.linear, cuda_backend.config
    return cuda_backend.mma_linear, cuda_backend.mma_config


@dataclass
class Layer:
    """Weights of one shape and dtype for all providers.

    Args:
        shape, dtype, device: of the layer.      names: of the providers.
        copies: of every weight; None for as many as 3 x L2 wants (1 on the CPU).
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    names: tuple[str, ...]
    copies: int | None = None
    providers: dict[str, Provider] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator(self.device).manual_seed(0)
        self._generator = generator
        size = (self.shape.out_features, self.shape.in_features)
        weight = torch.empty(size, dtype=self.dtype, device=self.device)
        weight.normal_(0, self.shape.in_features**-0.5, generator=generator)
        self.w24 = prune_compress(weight, layout=ROWMAJOR)
        if self.copies is None:
            on_gpu = self.device.type == "cuda"
            self.copies = min(MAX_COPIES, timing.rotations(self.w24.nbytes)) if on_gpu else 1
        pruned = decompress(self.w24)
        for name in self.names:
            self.providers[name] = self._make(name, weight, pruned)
        self._integers()

    def inputs(self, tokens: int, integers: bool = False) -> Tensor:
        """x [tokens, in_features]: normal, or whole numbers from -2 to 2."""
        x = torch.empty(tokens, self.shape.in_features, dtype=self.dtype, device=self.device)
        if integers:
            return x.random_(0, 5, generator=self._generator).sub_(2)
        return x.normal_(generator=self._generator)

    def calls(self, name: str, x: Tensor) -> list[timing.Call]:
        """One call per copy of the weights, for timing.compare."""
        provider = self.providers[name]
        ready = provider.prepare(x)
        return [lambda copy=copy: provider.call(ready, copy) for copy in range(self.copies)]

    # ------------------------------------------------------------------ providers

    def _make(self, name: str, weight: Tensor, pruned: Tensor) -> Provider:
        makers = {
            "cuda": self._cuda,
            "cuda-mma": self._cuda,
            "triton": self._ops,
            "cpu": self._ops,
            "dense": self._dense,
            "cusparselt": self._cusparselt,
        }
        if name not in makers:
            raise ValueError(f"bench: expected a provider in {sorted(makers)}, got {name!r}.")
        return makers[name](name, weight, pruned)

    def _cuda(self, name, weight, pruned) -> Provider:
        if not _native.available():
            raise RuntimeError(f"bench: {_native.reason()}.")
        first = pack(self.w24)
        weights = [first, *(first.clone() for _ in range(self.copies - 1))]
        self.packed = first
        linear, config_of = packed_linear(name)
        torch.cuda.synchronize()  # the kernel may read weights before queued work has ended

        def call(x, copy):
            return linear(x, weights[copy], None, None)

        config = lambda x: config_of(x, first)  # noqa: E731
        return Provider(name, call, pruned, first.nbytes, config=config)

    def _ops(self, name, weight, pruned) -> Provider:
        weights = [self.w24, *(self.w24.clone() for _ in range(self.copies - 1))]

        def call(x, copy):
            return ops.linear(x, weights[copy], backend=name)

        config = lambda x: ops.explain(x, self.w24, backend=name).config  # noqa: E731
        return Provider(name, call, pruned, self.w24.nbytes, config=config)

    def _dense(self, name, weight, pruned) -> Provider:
        weights = [weight, *(weight.clone() for _ in range(self.copies - 1))]

        def call(x, copy):
            return torch.nn.functional.linear(x, weights[copy])

        return Provider(name, call, weight, weight.nbytes)

    def _cusparselt(self, name, weight, pruned) -> Provider:
        if reason := cusparselt.available():
            raise RuntimeError(f"bench: {reason}.")
        first = cusparselt.compress(pruned)
        weights = [first, *(first.clone() for _ in range(self.copies - 1))]
        found: dict[int, cusparselt.Algorithm] = {}

        def algorithm(x):
            if x.shape[0] not in found:
                found[x.shape[0]] = cusparselt.search(first, x)
            return found[x.shape[0]]

        def prepare(x):
            x = cusparselt.padded(x)
            algorithm(x)  # the search waits for the GPU: it cannot be captured
            return x

        def call(x, copy):
            return cusparselt.linear(weights[copy], x, algorithm(x))

        config = lambda x: str(algorithm(cusparselt.padded(x)))  # noqa: E731
        return Provider(name, call, pruned, first.nbytes, prepare, config)

    # ------------------------------------------------------------------ checks

    def _integers(self) -> None:
        """A second weight of whole numbers from -2 to 2, for the exact check."""
        weight = torch.empty_like(next(iter(self.providers.values())).weight)
        weight.random_(0, 5, generator=self._generator).sub_(2)
        row = prune_compress(weight, layout=ROWMAJOR)
        self._integer_weight = decompress(row)
        self._integer_rows = row
        self._integer_packed = pack(row) if set(PACKED) & set(self.providers) else None

    def check(self, name: str, x: Tensor) -> str:
        """Checks one provider for this number of tokens; returns what a record says of it.

        Raises:
            WrongResult: with the worst element.
        """
        provider, tokens = self.providers[name], x.shape[0]
        ours = name in OURS
        y = provider.call(provider.prepare(x), self.copies - 1)[:tokens]
        check_bounded(name, y, x, provider.weight, OURS_SLACK if ours else PEER_SLACK, ours)
        del y
        if not ours:
            return "bounded"
        x = self.inputs(tokens, integers=True)
        if name in PACKED:
            linear, _ = packed_linear(name)
            self.check_variant(lambda x, w24: linear(x, w24, None, None), name, x)
        else:
            self.check_variant(lambda x, w24: ops.linear(x, w24, backend=name), name, x)
        return "exact+bounded"

    def check_variant(
        self, linear: Callable, name: str, x: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """WrongResult unless linear(x, weight) is exact; x from `inputs(tokens, integers=True)`.

        Args:
            known: an output for the same x that was checked before; equal to it is exact too.
        Returns:
            The output.
        """
        w24 = self._integer_rows if name in ("triton", "cpu") else self._integer_packed
        y = linear(x, w24)
        if known is None or not torch.equal(y, known):
            check_exact(name, y, x, self._integer_weight)
        return y


def reference_blocks(x: Tensor, weight: Tensor):
    """(columns, float64 x · weightᵀ of these columns), a block of out_features at a time."""
    x64 = x.double()
    step = max(1, REFERENCE_ELEMENTS // max(x.shape))
    for start in range(0, weight.shape[0], step):
        columns = slice(start, start + step)
        yield columns, x64 @ weight[columns].double().t()


def check_exact(name: str, y: Tensor, x: Tensor, weight: Tensor) -> None:
    """WrongResult unless y is the float64 result rounded once, bit for bit."""
    for columns, y64 in reference_blocks(x, weight):
        _require(name, y[:, columns], y64, y64.to(y.dtype) == y[:, columns], columns)


def check_bounded(
    name: str, y: Tensor, x: Tensor, weight: Tensor, slack: float, ours: bool = True
) -> None:
    """WrongResult unless |y - y64| <= roundoff · |y64| + slack · rms(y64), element by element."""
    roundoff = 1.01 * ROUNDOFF[y.dtype] if ours else slack
    for columns, y64 in reference_blocks(x, weight):
        bound = roundoff * y64.abs() + slack * y64.square().mean().sqrt()
        _require(name, y[:, columns], y64, (y[:, columns].double() - y64).abs() <= bound, columns)


def _require(name: str, y: Tensor, y64: Tensor, good: Tensor, columns: slice) -> None:
    if bool(good.all()):
        return
    token, column = (~good).nonzero()[0].tolist()
    raise WrongResult(
        f"bench: {name} is wrong in {int((~good).sum())} of {good.numel()} elements; first at "
        f"token {token}, out_feature {columns.start + column}: {y[token, column].item()} instead "
        f"of {y64[token, column].item()}."
    )
