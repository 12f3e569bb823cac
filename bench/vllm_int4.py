"""Dense int4 layers by the kernels that vLLM serves with: Marlin and Machete, as its custom ops.

    python -m bench.vllm_int4 marlin bfloat16 4096 4096 16       what `probe` runs in a child

Levels are symmetric (vLLM's uint4b8: stored as level + 8) with a scale in the dtype of x for each
GROUP of in_features, absmax / 7. Which of their tiles run is vLLM's own choice, as when it serves.
Layouts, for a weight [out_features, in_features]:

    GPTQ words      int32 [in_features / 8, out_features]: the nibbles of a word, lowest first, are
                    8 successive in_features
    Marlin          gptq_marlin_repack of these words; scales [groups, out_features], of each 64
                    successive out_features the one at 8·i + j stands at 8·j + i
    Machete         machete_prepack_B of these words in column-major order; scales as they are

vLLM is imported by the first layer, which takes seconds. Source: vLLM 0.24, _custom_ops.py and
model_executor/kernels/linear/mixed_precision/{marlin,machete}.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cusparselt import tried
from .vllm_child import SETTINGS

NAMES = ("marlin", "machete")
GROUP = 128  # in_features that share a scale
BIAS = 8  # of the stored levels
PER_WORD = 8
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Refused(RuntimeError):
    """vLLM does not compute this layer; the message says why."""


@dataclass(frozen=True)
class DenseInt4:
    """A packed weight that multiplies x [tokens, in_features]; numbers: float32, dense, for checks;
    product: (x, packed, scales) -> y."""

    packed: Tensor
    scales: Tensor
    numbers: Tensor
    version: str
    product: Product

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def clone(self) -> DenseInt4:
        return replace(self, packed=self.packed.clone(), scales=self.scales.clone())

    def __call__(self, x: Tensor) -> Tensor:
        try:
            return self.product(x, self.packed, self.scales)
        except RuntimeError as error:
            raise Refused(_first_line(error)) from error


def make(name: str, weight: Tensor) -> DenseInt4:
    """The weight [out_features, in_features], float16 or bfloat16, as one of NAMES takes it.

    Raises:
        Refused: vLLM cannot be imported, or does not take this shape.
    """
    pack = {"marlin": _marlin, "machete": _machete}[name]
    try:
        levels, scales = quantise(weight)
        packed, ready, product = pack(levels, scales)
        version = sys.modules["vllm"].__version__
    except (RuntimeError, ValueError, AttributeError, ImportError) as error:
        raise Refused(_first_line(error)) from error
    numbers = levels.float() * scales.float().repeat_interleave(GROUP, 1)
    return DenseInt4(packed, ready, numbers, version, product)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(levels int32 [out_features, in_features] from -8 to 7, scales [out_features, groups])."""
    if weight.shape[1] % GROUP:
        raise ValueError(f"expected in_features in groups of {GROUP}, got {weight.shape[1]}")
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).to(weight.dtype)
    scales.masked_fill_(scales == 0, 1)
    levels = (groups / scales.float()[..., None]).round_().clamp_(-BIAS, BIAS - 1)
    return levels.flatten(1).int(), scales


def gptq_words(levels: Tensor) -> Tensor:
    """The transpose of GPTQ's words: int32 [out_features, in_features / 8], contiguous."""
    stored = (levels + BIAS).unflatten(1, (-1, PER_WORD))
    words = torch.zeros_like(stored[..., 0])
    for nibble in range(PER_WORD):
        words |= stored[..., nibble] << (4 * nibble)
    return words


def marlin_scales(scales: Tensor) -> Tensor:
    """Scales [out_features, groups] in Marlin's order, [groups, out_features]."""
    if scales.shape[0] % 64 or scales.shape[1] < 2:  # one group is a scale of the channel there
        raise ValueError(f"expected scales [64 · n, groups > 1], got {list(scales.shape)}")
    blocks = scales.t().unflatten(1, (-1, 8, 8))
    return blocks.transpose(-1, -2).reshape(scales.shape[1], scales.shape[0]).contiguous()


def _vllm() -> tuple[Any, Any]:
    """(its custom ops, its name of the type of levels)."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import _custom_ops
    from vllm.scalar_type import scalar_types

    return _custom_ops, scalar_types.uint4b8


def _marlin(levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Product]:
    ops, kind = _vllm()
    out_features, in_features = levels.shape
    ready = marlin_scales(scales)
    none = torch.empty(0, dtype=torch.int32, device=levels.device)
    words = gptq_words(levels).t().contiguous()
    packed = ops.gptq_marlin_repack(words, none, in_features, out_features, 4)
    blocks = 1
    if levels.is_cuda:
        blocks = torch.cuda.get_device_properties(levels.device).multi_processor_count
    locks = torch.zeros(blocks, dtype=torch.int32, device=levels.device)
    # After the scales: no scales of x, no global scale, no zero points, no order of activations.
    rest = (None, None, none, none, none, locks, kind)
    sizes = dict(size_n=out_features, size_k=in_features, use_fp32_reduce=True)

    def product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return ops.marlin_gemm(x, None, packed, None, scales, *rest, size_m=x.shape[0], **sizes)

    return packed, ready, product


def _machete(levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Product]:
    ops, kind = _vllm()
    packed = ops.machete_prepack_B(gptq_words(levels).t(), scales.dtype, kind, scales.dtype)

    def product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return ops.machete_mm(x, packed, b_type=kind, b_group_scales=scales, b_group_size=GROUP)

    return packed, scales.t().contiguous(), product


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def probe(names: Sequence[str], dtype: str, timeout: float = 120) -> dict[str, str]:
    """Tries these kernels at once, each in a child process; of each empty when it computes, else
    what happened."""
    if importlib.util.find_spec("vllm") is None:
        return dict.fromkeys(names, "vLLM is not installed")

    def child(name: str) -> str:
        return tried("bench.vllm_int4", (name, dtype, 4096, 4096, 16), round(timeout))

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return dict(zip(names, pool.map(child, names)))


def main(arguments: Sequence[str]) -> int:
    dtype, (out_features, in_features, tokens) = arguments[1], map(int, arguments[2:])
    if not torch.cuda.is_available():
        print("Error: no CUDA GPU that torch can use", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device="cuda") * in_features**-0.5
    x = torch.randn(tokens, in_features, device="cuda").to(getattr(torch, dtype))
    layer = make(arguments[0], weight.to(x.dtype))
    y, wanted = layer(x).double(), x.double() @ layer.numbers.double().t()
    error = ((y - wanted).abs().max() / wanted.abs().max()).item()
    print(f"largest error {error:.3g} of the largest output", file=sys.stderr)
    return 0 if error < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
