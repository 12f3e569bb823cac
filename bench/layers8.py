"""One linear layer with a quantised 2:4 weight as every provider takes it: called, checked, timed.

    w8a16           ours, x of 16 bits (backend "cuda-a16"), weight widened in the kernel, with more
                    than 64 tokens in memory
    w8a8            ours, x quantised before and not timed, scales of tokens and channels applied
    w8a8+quantize   the same with the quantisation of x
    w8a8 precise    w8a8 with sums of e4m3 in float32 (backend "cuda-precise")
    w4a16           ours, int4 weights with groups of 128, widened in the same way
    cuda            ours, 2:4 weight of 16 bits
    dense           torch, that is cuBLAS in 16 bits, on the weight before it was pruned
    scaled_mm       torch._scaled_mm, dense e4m3, scales of tokens and channels
    scaled_mm fast  the same with use_fast_accum
    int_mm          torch._int_mm, dense int8, to int32 and without any scale; x padded to 32 rows
    cusparselt      the vendor's library on the same levels, algorithm searched (ours, as its own
                    misses the best), with the scales of the channels and none of the tokens
    marlin          vLLM's dense int4 kernels on the weight before it was pruned, groups of 128,
    machete         x of 16 bits (vllm_int4.py)

Weights rotate and are checked as in layers.py. Exact: levels and x of whole numbers and scales that
are powers of two must give the float64 result, rounded once. Bounded: quantised x and weight as
they are timed, against the float64 product of what they stand for; sums of e4m3 are allowed what
peers are allowed, because the tensor cores keep fewer bits of them. With more than CHECKED tokens
the first and the last of them are checked. A weight that is widened in memory, or by the narrow
kernel, is bounded as its numbers rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekern import _native, prune_compress, quantize
from sparsekern.backends.quantize_rows import quantize as quantize_x
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24, decompress
from sparsekern.formats.tile64 import pack
from sparsekern.ops import linear_op
from sparsekern.ops.quantized_linear import explain_quantized, linear_quantized

from . import timing, vllm_int4
from .layers import (
    MAX_COPIES,
    OURS_SLACK,
    PEER_SLACK,
    ROUNDOFF,
    WrongResult,
    packed_linear,
    reference_blocks,
)
from .shapes import Shape

INT_MM_ROWS = 32  # torch._int_mm wants more than 16
CHECKED = 1024  # tokens
GROUP = 128  # of int4
# In the config of what multiplies numbers of 16 bits: a copy of the weight, and int4 in registers.
ROUNDED = ("(widen + ", "(narrow ")
# Up to so many tokens cuSPARSELt's search tries to split in_features; with more it tries its
# algorithms whole and in "segment-K", because there are tiles for every multiprocessor.
FEW_TOKENS, WHOLE = 1024, ((1, 0), (-1, 0))
OURS = ("w8a16", "w8a8", "w8a8+quantize", "w8a8 precise", "w4a16", "cuda")
PROVIDERS = {
    "float8_e4m3fn": (
        "w8a16",
        "w8a8",
        "w8a8+quantize",
        "w8a8 precise",
        "cuda",
        "dense",
        "scaled_mm",
        "scaled_mm fast",
        "cusparselt",
    ),
    "int8": ("w8a16", "w8a8", "w8a8+quantize", "cuda", "dense", "int_mm", "cusparselt"),
    "int4": ("w4a16", "cuda", "dense", *vllm_int4.NAMES),
}


@dataclass
class Provider:
    """One way to compute the layer.

    call(ready, copy) -> y [>= tokens, out_features] with that copy of the weights; prepare(x) ->
    ready, not timed; numbers(x) -> the x that it multiplies, for the check; weight: dense, of the
    same result; bytes: of one copy of the weights; most: tokens that it takes.
    """

    name: str
    call: Callable[[Any, int], Tensor]
    weight: Tensor
    bytes: int
    prepare: Callable[[Tensor], Any] = lambda x: x
    numbers: Callable[[Tensor], Tensor] = lambda x: x
    config: Callable[[Tensor], str] = lambda x: ""
    most: int = 1 << 30


@dataclass
class Layer8:
    """Weights of one shape for all providers; x and y have `dtype`.

    Args:
        storage: "float8_e4m3fn", "int8" or "int4".   names: of the providers.
        copies: of every weight; None for as many as 3 x L2 wants (1 on the CPU).

    `refused`: providers of vLLM that do not take the shape, and why.
    """

    shape: Shape
    storage: str
    dtype: torch.dtype
    device: torch.device
    names: tuple[str, ...]
    copies: int | None = None
    providers: dict[str, Provider] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._generator = torch.Generator(self.device).manual_seed(0)
        size = (self.shape.out_features, self.shape.in_features)
        weight = torch.empty(size, dtype=self.dtype, device=self.device)
        weight.normal_(0, self.shape.in_features**-0.5, generator=self._generator)
        self.kind = dtypes.element(self.storage)
        self.plain24 = prune_compress(weight, layout=ROWMAJOR)
        group = GROUP if self.kind.scale == "group" else None
        self.rows24 = quantize(self.plain24, self.storage, group=group, layout=ROWMAJOR)
        numbers = self.rows24.numbers(torch.float32)
        self.pruned = decompress(Sparse24(numbers, self.rows24.metadata, size))
        self.best24 = self._best(self.rows24)
        if self.copies is None:
            on_gpu = self.device.type == "cuda"
            self.copies = min(MAX_COPIES, timing.rotations(self.rows24.nbytes)) if on_gpu else 1
        self._weights: dict[str, list] = {}
        for name in self.names:
            try:
                self.providers[name] = self._make(name, weight)
            except vllm_int4.Refused as error:
                self.refused[name] = str(error)
        if {"w8a16", "w8a8", "w8a8+quantize", "w4a16"} & set(self.names):
            self._whole()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # kernels may read weights before queued work has ended

    def inputs(self, tokens: int) -> Tensor:
        """x [tokens, in_features], normal."""
        x = torch.empty(tokens, self.shape.in_features, dtype=self.dtype, device=self.device)
        return x.normal_(generator=self._generator)

    def takes(self, name: str, tokens: int) -> bool:
        return name not in self.refused and tokens <= self.providers[name].most

    def calls(self, name: str, x: Tensor) -> list[timing.Call]:
        """One call per copy of the weights, for timing.compare."""
        provider = self.providers[name]
        ready = provider.prepare(x)
        return [lambda copy=copy: provider.call(ready, copy) for copy in range(self.copies)]

    # ------------------------------------------------------------------ providers

    def _best(self, w24: Sparse24) -> Sparse24:
        """In the layout that kernels read here."""
        from sparsekern.backends import registry

        return w24.to_layout(registry.best_layout(w24.spec, w24.device))

    def _copies(self, key: str, first: Any) -> list:
        """`copies` of a weight, shared by the providers that read the same."""
        if key not in self._weights:
            self._weights[key] = [first, *(first.clone() for _ in range(self.copies - 1))]
        return self._weights[key]

    def _x8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_x(x, self.storage)

    def _dequantized(self, x: Tensor) -> Tensor:
        q, scale = self._x8(x)
        return q.float() * scale[:, None]

    def _make(self, name: str, weight: Tensor) -> Provider:
        makers = {
            "w8a16": self._w8a16,
            "w4a16": self._w8a16,
            "w8a8": self._w8a8,
            "w8a8 precise": self._w8a8,
            "w8a8+quantize": self._w8a8_quantize,
            "cuda": self._cuda,
            "dense": self._dense,
            "scaled_mm": self._scaled_mm,
            "scaled_mm fast": self._scaled_mm,
            "int_mm": self._int_mm,
            "cusparselt": self._cusparselt,
            **dict.fromkeys(vllm_int4.NAMES, self._dense_int4),
        }
        if name not in makers:
            raise ValueError(f"bench: expected a provider in {sorted(makers)}, got {name!r}.")
        return makers[name](name, weight)

    def _w8a16(self, name, weight) -> Provider:
        weights, backend = self._copies("ours", self.best24), self._backend_a16(name)

        def config(x):
            return str(linear_op.explain(x, self.best24, backend=backend)).partition(":")[0]

        return Provider(
            name,
            lambda x, copy: linear_op.linear(x, weights[copy], backend=backend),
            self.pruned,
            self.best24.nbytes,
            config=config,
        )

    def _backend_a16(self, name: str) -> str | None:
        """W8A16 is asked for, W4A16 is what int4 is given; the CPU has one backend."""
        return "cuda-a16" if name == "w8a16" and self.device.type == "cuda" else None

    def _rounded(self) -> Tensor:
        """`pruned` with its numbers rounded to 16 bits, as they are when widened in memory."""
        size = (self.shape.out_features, self.shape.in_features)
        numbers = self.rows24.numbers(self.dtype)
        return decompress(Sparse24(numbers, self.rows24.metadata, size))

    def _w8a8(self, name, weight) -> Provider:
        weights, backend = self._copies("ours", self.best24), _backend(name)
        return Provider(
            name,
            lambda ready, copy: linear_quantized(*ready, weights[copy], backend=backend),
            self.pruned,
            self.best24.nbytes,
            self._x8,
            self._dequantized,
            lambda x: self._config(x, backend),
        )

    def _config(self, x: Tensor, backend: str | None = None) -> str:
        explained = explain_quantized(self._x8(x)[0], self.best24, backend=backend)
        return str(explained).partition(":")[0]

    def _w8a8_quantize(self, name, weight) -> Provider:
        weights = self._copies("ours", self.best24)
        return Provider(
            name,
            lambda x, copy: linear_quantized(*quantize_x(x, self.storage), weights[copy]),
            self.pruned,
            self.best24.nbytes,
            numbers=self._dequantized,
            config=self._config,
        )

    def _cuda(self, name, weight) -> Provider:
        if not _native.available():
            raise RuntimeError(f"bench: {_native.reason()}.")
        first = pack(self.plain24)
        weights = self._copies("cuda", first)
        linear, config_of = packed_linear("cuda")
        return Provider(
            name,
            lambda x, copy: linear(x, weights[copy], None, None),
            decompress(self.plain24),
            first.nbytes,
            config=lambda x: config_of(x, first),
        )

    def _dense(self, name, weight) -> Provider:
        weights = self._copies("dense", weight)
        return Provider(
            name,
            lambda x, copy: torch.nn.functional.linear(x, weights[copy]),
            weight,
            weight.nbytes,
        )

    def _dense_int4(self, name, weight) -> Provider:
        first = vllm_int4.make(name, weight)
        weights = self._copies(name, first)
        call, config = lambda x, copy: weights[copy](x), lambda x: f"vLLM {first.version}"
        return Provider(name, call, first.numbers, first.nbytes, config=config)

    def _dense8(self, weight) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of the dense weight, their scales, and the numbers."""
        levels, scale = quantize_x(weight, self.storage)
        return levels, scale, (levels.float() * scale[:, None])

    def _scaled_mm(self, name, weight) -> Provider:
        levels, scale, numbers = self._dense8(weight)
        weights, of_channels = self._copies("dense8", levels), scale[None, :]
        fast = name.endswith("fast")

        def call(ready, copy):
            x8, x_scale = ready
            return torch._scaled_mm(
                x8,
                weights[copy].t(),
                scale_a=x_scale,
                scale_b=of_channels,
                out_dtype=self.dtype,
                use_fast_accum=fast,
            )

        def prepare(x):
            x8, x_scale = self._x8(x)
            return x8, x_scale[:, None].contiguous()

        return Provider(name, call, numbers, levels.nbytes, prepare, self._dequantized)

    def _int_mm(self, name, weight) -> Provider:
        levels, _, _ = self._dense8(weight)
        weights = self._copies("dense8", levels)

        def prepare(x):
            return _padded_to(self._x8(x)[0], max(INT_MM_ROWS, x.shape[0]))

        return Provider(
            name,
            lambda x8, copy: torch._int_mm(x8, weights[copy].t()),
            levels.float(),
            levels.nbytes,
            prepare,
            lambda x: self._x8(x)[0].float(),
        )

    def _cusparselt(self, name, weight) -> Provider:
        from sparsekern.backends.cusparselt import linear as library
        from sparsekern.backends.cusparselt.library import scales_channels
        from sparsekern.backends.cusparselt.search import SPLITS, search

        first = library.pack(self.rows24)
        weights, found = self._copies("cusparselt", first), {}
        numbers = self.pruned
        if not scales_channels(self.kind.storage):
            numbers = numbers / self.rows24.tensors[SCALE].view(-1, 1)

        def prepare(x):
            rows = library.padded_tokens(x.shape[0], self.kind.storage)
            if rows not in found:
                splits = SPLITS if rows <= FEW_TOKENS else WHOLE
                found[rows] = search(first, rows, store=False, splits=splits).algorithm
            return _padded_to(self._x8(x)[0], rows)

        def config(x):
            return str(found.get(library.padded_tokens(x.shape[0], self.kind.storage), ""))

        return Provider(
            name,
            lambda x8, copy: library.product(x8, weights[copy]),
            numbers,
            first.nbytes,
            prepare,
            lambda x: self._x8(x)[0].float(),
            config,
        )

    # ------------------------------------------------------------------ checks

    def _whole(self) -> None:
        """A weight of whole levels and scales that are powers of two, for the exact check."""
        size = (self.shape.out_features, self.shape.in_features)
        integers = torch.empty(size, dtype=self.dtype, device=self.device)
        integers.random_(0, 5, generator=self._generator).sub_(2)
        plain = prune_compress(integers, layout=ROWMAJOR)
        spec = self.rows24.spec
        scale = torch.empty_like(self.rows24.tensors[SCALE])
        scale.random_(0, 5, generator=self._generator).sub_(2).exp2_()
        levels = dtypes.scaled_codec(self.storage).pack(plain.values.float())
        tensors = {"values": levels, "metadata": plain.metadata, SCALE: scale}
        whole = Sparse24.from_tensors(WeightSpec.parse(spec.text), tensors)
        self._whole_dense, self._whole24 = decompress(whole), self._best(whole)

    def check(self, name: str, x: Tensor) -> str:
        """Checks one provider for this number of tokens; returns what a record says of it.

        Raises:
            WrongResult: with the worst element.
        """
        provider, tokens = self.providers[name], x.shape[0]
        y = provider.call(provider.prepare(x), self.copies - 1)[:tokens]
        some, ours = _ends(tokens, x.device), name in OURS
        e4m3 = self.storage == "float8_e4m3fn" and name in ("w8a8", "w8a8+quantize")
        strict = ours and not e4m3
        rounded = any(kind in provider.config(x) for kind in ROUNDED)
        weight = self._rounded() if rounded else provider.weight
        _check_bounded(name, y[some], provider.numbers(x)[some], weight, strict)
        if not ours or name == "cuda":
            return "bounded"
        x = self.inputs(tokens).random_(0, 5, generator=self._generator).sub_(2)
        if name in ("w8a16", "w4a16"):
            y, factor = linear_op.linear(x, self._whole24, backend=self._backend_a16(name)), 1.0
        else:
            factor = torch.empty(tokens, dtype=torch.float32, device=x.device)
            factor.random_(0, 3, generator=self._generator).sub_(1).exp2_()
            x8 = x.to(self.kind.storage)
            y = linear_quantized(x8, factor, self._whole24, backend=_backend(name))
            factor = factor.double()[some, None]
        for columns, y64 in reference_blocks(x[some], self._whole_dense):
            _require(name, y[some][:, columns], y64 * factor, columns)
        return "exact+bounded"


def _backend(name: str) -> str | None:
    return "cuda-precise" if name == "w8a8 precise" else None


def _ends(tokens: int, device) -> Tensor | slice:
    """Which tokens are checked."""
    if tokens <= CHECKED:
        return slice(None)
    half = CHECKED // 2
    return torch.cat((torch.arange(half), torch.arange(tokens - half, tokens))).to(device)


def _padded_to(x: Tensor, rows: int) -> Tensor:
    """x with zero rows up to so many; torch pads no e4m3."""
    if x.shape[0] == rows:
        return x
    wide = torch.zeros(rows, x.shape[1], dtype=torch.uint8, device=x.device)
    wide[: x.shape[0]] = x.view(torch.uint8)
    return wide.view(x.dtype)


def _check_bounded(name: str, y: Tensor, x: Tensor, weight: Tensor, strict: bool) -> None:
    """As layers.check_bounded, also for the integers of torch._int_mm."""
    slack = OURS_SLACK if strict else PEER_SLACK
    roundoff = (1.01 * ROUNDOFF[y.dtype] if strict else slack) if y.is_floating_point() else 0.0
    for columns, y64 in reference_blocks(x, weight):
        part = y[:, columns].double()
        bound = roundoff * y64.abs() + slack * y64.square().mean().sqrt()
        good = (part - y64).abs() <= bound
        if not bool(good.all()):
            _raise(name, part, y64, good, columns)


def _require(name: str, y: Tensor, y64: Tensor, columns: slice) -> None:
    good = y64.to(y.dtype) == y
    if not bool(good.all()):
        _raise(name, y, y64, good, columns)


def _raise(name: str, y: Tensor, y64: Tensor, good: Tensor, columns: slice) -> None:
    row, column = (~good).nonzero()[0].tolist()
    raise WrongResult(
        f"bench: {name} is wrong in {int((~good).sum())} of {good.numel()} elements; first at "
        f"checked token {row}, out_feature {columns.start + column}: {y[row, column].item()} "
        f"instead of {y64[row, column].item()}."
    )
