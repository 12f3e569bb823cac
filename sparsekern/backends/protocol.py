"""What a backend is: three questions about a problem, and the function that computes it.

A `Problem` says everything that may decide how a call is computed, and nothing of the data.
`sparsekern.linear` asks the backends of the device in order (backends/registry.py): the first one
whose `supports` has nothing against the problem binds it, and the bound function, a `Launch`, is
kept for every call like it (ops/linear_op.py). So what depends on shapes, a plan or a kernel's
config, is found once, and a later call does only what depends on addresses.

A backend outside the package needs `name`, `supports`, `bind` and `explain`; see `Backend` for the
two attributes that it may have beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparsekern.formats import dtypes
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24

# (x, weight, bias) -> y; a gated pair: (x, gate, up) -> y; quantised x: (x, weight, bias, scale of
# its tokens) -> y. Or None: see `Backend.bind`.
Launch = Callable[..., "Tensor | None"]

ALIGNMENT = 16  # bytes of an address that `Problem.aligned` speaks of


class Problem(NamedTuple):
    """A linear layer's call without its data: y = activation(x · Wᵀ + bias).

    spec: of the weight.
    x_shape, x_stride: of x [..., in_features]; x_stride is None when x is contiguous.
    dtype, device, gpu: of x (and of bias and y, and of the weight's numbers and tensors); gpu is
        the index of the GPU, -1 on the CPU.
    aligned: the address of x is a multiple of ALIGNMENT bytes; problems are bound as if it were,
        and as they are where that launch returns None.
    activation: None, "relu", "gelu" or "silu".
    bias: whether there is one. It is [out_features], of dtype and device, contiguous.
    gated: the spec of the second weight of a gated pair, silu(x · Wᵀ) · (x · Gatedᵀ); else None.
    quantized: None, or the 8-bit dtype of x, with a float32 scale for each token; it is that of the
        weight's values, and `dtype` is then of y, bias and the numbers alone.
    """

    spec: WeightSpec
    x_shape: torch.Size
    x_stride: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    gpu: int
    aligned: bool = True
    activation: str | None = None
    bias: bool = False
    gated: WeightSpec | None = None
    quantized: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.spec.shape[0], self.spec.shape[1]

    @property
    def tokens(self) -> int:
        return self.x_shape[:-1].numel()

    @property
    def out_features(self) -> int:
        return self.spec.shape[0]

    @property
    def in_features(self) -> int:
        return self.spec.shape[1]


class Explained(NamedTuple):
    """What `sparsekern.explain` shows of a problem that a backend supports."""

    config: str
    why: str
    expected_us: float | None = None


@runtime_checkable
class Backend(Protocol):
    """One way to compute linear layers.

    It may have three attributes more: `layout`, the name of the one layout that it reads (a weight
    that has it is offered to this backend first), and `gated = True` when it takes problems with
    `gated`, which no other backend is ever asked about; `quantized = True` says the same of
    problems with `quantized`. And a method `prefers(spec, device)`: the
    layout in which such a weight is best kept there, because its kernels read it, or None.
    """

    @property
    def name(self) -> str:
        """What `backend=` and `explain` call it."""

    def supports(self, problem: Problem) -> str | None:
        """Why this backend cannot compute the problem, as a sentence; None when it can."""

    def bind(self, problem: Problem) -> Launch:
        """The function that computes calls like this one; `supports` has nothing against it.

        It is called as launch(x, weight, bias) with arguments for which every field of the problem
        holds, and returns a new contiguous y [..., out_features]. `aligned`, and that the GPU of x
        is the current one, may not hold in a later call: where its work depends on them the launch
        looks itself, and may return None without having done anything. The problem is then bound
        anew, as it is, with the GPU of x as the current one. A launch keeps no tensor.
        """

    def explain(self, problem: Problem) -> Explained:
        """What `bind` would choose, and why; computes nothing."""


def problem_of(
    x: Tensor,
    spec: WeightSpec,
    activation: str | None = None,
    bias: bool = False,
    gated: WeightSpec | None = None,
) -> Problem:
    """The problem of one call."""
    plain = x.dtype in dtypes.PLAIN
    return Problem(
        spec,
        x.shape,
        None if x.is_contiguous() else x.stride(),
        x.dtype if plain else spec.dtype,
        x.device,
        x.get_device() if x.is_cuda else -1,
        x.is_meta or x.data_ptr() % ALIGNMENT == 0,
        activation,
        bias,
        gated,
        None if plain else x.dtype,
    )


def folded(compute: Callable[..., Tensor]) -> Launch:
    """The launch of a function that takes x [tokens, in_features] and returns [tokens, out]."""

    def launch(x: Tensor, weight: Sparse24, bias: Tensor | None, *more: Any) -> Tensor:
        if x.dim() == 2:
            return compute(x, weight, bias, *more)
        rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        return compute(rows, weight, bias, *more).view(*x.shape[:-1], weight.spec.shape[0])

    return launch
