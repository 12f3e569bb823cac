"""Calibration statistics of one linear layer, and the error they assign to a pruned weight.

Hessian keeps the running H = 2/n Σ xᵀx that SparseGPT inverts, from which Wanda's norms and the
reconstruction error ‖(W − W')X‖² follow. All sums are true float32: TF32, bf16 matmul and autocast
are off inside and the caller's settings are put back. Inputs of 16 bits on a GPU are multiplied as
they are, by the tensor cores: a product of two such numbers is exact in float32 (`sum16`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.prune.products import Factor, product16, sums_in_float32
from sparsekern.utils.arguments import check_strided, check_tensor, checked
from sparsekern.utils.exact import exact_float32

# A CPU matmul of this many columns runs at full speed, so that half of the symmetric product can be
# skipped. A GPU needs larger ones to fill its SMs.
_CPU_COLUMNS = 256
_GPU_COLUMNS = 2048
TOKENS = 1024  # of a product by tensor cores


def sum16(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of 16-bit matrices [tokens, ...] for which `sums_in_float32`, in float32, new.

    Tensor cores cut their sums off instead of rounding them, which a few outlying columns make
    large for all that is added after them: over 16,384 tokens of SmolLM2 an emulation on a CPU has
    an error of H with eigenvalues down to -0.007 of its mean diagonal, where the damping is 0.01,
    and -0.0007 by parts of 2,048. So few tokens are summed up inside, and their sums outside.
    """
    total: Tensor | None = None
    for rows, columns in zip(a.split(TOKENS), b.split(TOKENS)):
        part = product16(rows, columns)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


class Hessian:
    """Running H = 2/n Σ xᵀx over the inputs x of a linear layer, in float32; n counts sequences.

    One Hessian serves every layer that reads the same input (q, k and v of an attention block).

    Args:
        in_features: width of the layer's input.
        device: where H is kept and updated.
    Attributes:
        samples: sequences added so far.
        unmatched: True after `drop_dense`.
        parts: first columns of the `blocks` that `add` computes; None: all. The others stay zero,
            for somebody else to compute.
    Source: Frantar and Alistarh 2023, "SparseGPT" (arXiv:2301.00774), add_batch of its code.
    """

    @checked("sparsekern.prune.Hessian", in_features=(0, 2**24))
    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        check(
            isinstance(in_features, int) and in_features >= 1,
            "sparsekern.prune.Hessian",
            "in_features >= 1",
            repr(in_features),
        )
        self.in_features = in_features
        self.device = torch.device(device)
        self.samples = 0
        self._h = torch.zeros(in_features, in_features, dtype=torch.float32, device=self.device)
        self._drift: Tensor | None = None
        self.unmatched = False
        self.parts: Container[int] | None = None
        self._symmetric = True
        self._columns = _CPU_COLUMNS if self.device.type == "cpu" else _GPU_COLUMNS

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs: H ← n/(n+b)·H + (√(2/(n+b))·x)ᵀ(√(2/(n+b))·x), and `drift` likewise.

        Args:
            x: [..., tokens, in_features] or [in_features], any float dtype and device; never
                modified. Every dimension before the tokens counts sequences: b is their product,
                and 1 for [tokens, in_features]. An input without elements changes nothing.
            dense: what the dense model feeds the layer where this one feeds x; same shape. Given
                with every input or with none.
        Raises:
            ValueError: x.shape[-1] != in_features.   TypeError: x is not floating point.
        """
        op = "sparsekern.prune.Hessian.add"
        check_tensor(op, "x", x)
        if dense is not None:
            check_tensor(op, "dense", dense)
        check(
            x.dim() >= 1 and x.shape[-1] == self.in_features,
            op,
            f"x.shape[-1] == {self.in_features}",
            f"x of shape {list(x.shape)}",
            "Hook the input of the layer this Hessian was made for.",
        )
        check(x.is_floating_point(), op, "a floating-point x", str(x.dtype), exc=TypeError)
        check(
            dense is None or dense.shape == x.shape,
            op,
            f"dense of x's shape {list(x.shape)}",
            f"{None if dense is None else list(dense.shape)}",
            "A layer that gets other tokens in the pruned model cannot be matched.",
        )
        if x.numel() == 0:
            return
        expected = "dense with every input, or with none"
        check(self.samples == 0 or (dense is None) == (self._drift is None), op, expected, "both")
        batch = math.prod(x.shape[:-2])
        keep = self.samples / (self.samples + batch)
        self.samples += batch
        if dense is not None and self._drift is None:
            self._drift = torch.zeros_like(self._h)
        mine = [i for i, _ in self.blocks() if self.parts is None or i in self.parts]
        same = dense is None or dense.dtype == x.dtype
        with exact_float32(self.device):
            if mine and same and sums_in_float32(self.device, x.dtype):
                self._add_16_bits(x, dense, mine, keep)
            elif mine:
                self._add_float32(x, dense, mine, keep)
        self._symmetric = self.in_features <= self._columns

    # Only the blocks on and above the diagonal: H is symmetric, `matrix` mirrors them.

    def _add_float32(self, x: Tensor, dense: Tensor | None, mine: list[int], keep: float) -> None:
        factor = math.sqrt(2 / self.samples)
        x = self._rows(x, torch.float32) * factor
        moved = None if dense is None else self._rows(dense, torch.float32) * factor - x
        for i in mine:
            end = i + self._columns
            if self._drift is not None and moved is not None:
                self._drift[i:end].addmm_(moved[:, i:end].t(), x, beta=keep)
            self._h[i:end, i:].addmm_(x[:, i:end].t(), x[:, i:], beta=keep)

    def _add_16_bits(self, x: Tensor, dense: Tensor | None, mine: list[int], keep: float) -> None:
        """(x_dense − x)ᵀ x as the difference of two products: of numbers, not of differences, which
        16 bits would round."""
        share = 2 / self.samples
        x = self._rows(x, x.dtype)
        dense = None if dense is None else self._rows(dense, x.dtype)
        for i in mine:
            end = i + self._columns
            first = i if dense is None else 0
            gram = sum16(x[:, i:end], x[:, first:])
            if self._drift is not None and dense is not None:
                moved = sum16(dense[:, i:end], x).sub_(gram)
                self._drift[i:end].mul_(keep).add_(moved, alpha=share)
            self._h[i:end, i:].mul_(keep).add_(gram[:, i - first :], alpha=share)

    def blocks(self) -> list[tuple[int, int]]:
        """(first column, number of columns) of the blocks that `add` computes one by one."""
        width, columns = self.in_features, self._columns
        return [(i, min(columns, width - i)) for i in range(0, width, columns)]

    def complete(self, add_up: Callable[[Tensor], None]) -> None:
        """After inputs with `parts`: H and `drift` with the parts of the others, by a function that
        replaces a tensor by its sum over all who hold some."""
        add_up(self._h)
        if self._drift is not None:
            add_up(self._drift)
        self.parts = None

    @classmethod
    def from_matrix(cls, matrix: Tensor, samples: int = 1) -> Hessian:
        """A Hessian of a matrix [in_features, in_features] that is known; it is copied.

        Raises:
            ValueError: a matrix that is not square.
        """
        op = "sparsekern.prune.Hessian.from_matrix"
        square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1]
        check(square, op, "a square matrix", list(matrix.shape))
        made = cls(matrix.shape[0], matrix.device)
        made._h.copy_(matrix.detach())
        made.samples = samples
        return made

    def to(self, device: torch.device | str) -> Hessian:
        """This Hessian on a device: itself where it is there already, else a copy."""
        if torch.device(device) == self.device:
            return self
        made = Hessian.from_matrix(self.matrix.to(device), self.samples)
        made._drift = None if self._drift is None else self._drift.to(device)
        made.unmatched = self.unmatched
        return made

    def merge(self, other: Hessian) -> Hessian:
        """Take the inputs of another Hessian in: H ← (n·H + n'·H') / (n + n'), and `drift`
        likewise; self. For a calibration that was split, over processes or over experts that saw
        few tokens.

        Raises:
            ValueError: another in_features, or one with dense inputs and one without.
        """
        op = "sparsekern.prune.Hessian.merge"
        if other is self:
            self.samples *= 2
            return self
        got = type(other).__name__
        check(isinstance(other, Hessian), op, "another Hessian", got, exc=TypeError)
        check(
            other.in_features == self.in_features,
            op,
            f"in_features {self.in_features}",
            other.in_features,
        )
        if other.samples == 0:
            return self
        both = self.samples == 0 or (self._drift is None) == (other._drift is None)
        check(both, op, "dense inputs in both, or in none", "one of each")
        total = self.samples + other.samples
        mine, theirs = self.samples / total, other.samples / total
        matrix = self.matrix.mul_(mine).add_(other.matrix.to(self.device), alpha=theirs)
        if other._drift is not None:
            drift = torch.zeros_like(matrix) if self._drift is None else self._drift
            self._drift = drift.mul_(mine).add_(other._drift.to(self.device), alpha=theirs)
        self.samples, self.unmatched = total, self.unmatched or other.unmatched
        return self

    def _rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.detach().to(device=self.device, dtype=dtype).reshape(-1, self.in_features)

    def drop_dense(self) -> None:
        """Forget what the dense model fed the layer: later inputs come without."""
        self._drift, self.unmatched = None, True

    def free_drift(self) -> None:
        """Free the memory of `drift`, which nobody needs any more."""
        self._drift = None

    @property
    def drift(self) -> Tensor | None:
        """G = 2/n Σ (x_dense − x)ᵀ x, float32 [in_features, in_features]; None without `dense`."""
        return self._drift

    @property
    def matrix(self) -> Tensor:
        """H, float32 [in_features, in_features]. The live tensor: clone it before changing it."""
        if not self._symmetric:
            for i in range(self._columns, self.in_features, self._columns):
                self._h[i : i + self._columns, :i] = self._h[:i, i : i + self._columns].t()
            self._symmetric = True
        return self._h

    @property
    def act_norm(self) -> Tensor:
        """Wanda's running ‖x_j‖₂ = √(Σ x_j² / n), float32 [in_features]."""
        return (self._h.diagonal() / 2).sqrt()

    def __repr__(self) -> str:
        return (
            f"Hessian(in_features={self.in_features}, samples={self.samples}, "
            f"device='{self.device}')"
        )


def _check_matrix(op: str, h: Tensor) -> None:
    """A matrix that a caller brings: real floating point and, up to rounding, symmetric."""
    expected = "a real floating-point Hessian"
    check(h.is_floating_point(), op, expected, str(h.dtype), exc=TypeError)
    square = h.dim() == 2 and h.shape[0] == h.shape[1] and not h.is_meta
    if square and bool(h.isfinite().all()):
        gap = float((h - h.t()).abs().max()) if h.numel() else 0.0
        fits = gap <= 1e-3 * float(h.abs().max()) if h.numel() else True
        remedy = "Pass XᵀX of the layer's inputs."
        check(
            fits,
            op,
            "a symmetric Hessian",
            f"a difference of {gap:.3g} from its own transpose",
            remedy,
        )


def as_matrix(op: str, hessian: Hessian | Tensor, w: Tensor) -> Tensor:
    """Return the float32 [in_features, in_features] matrix of a Hessian or tensor, checked for w.

    Raises:
        ValueError: no inputs were added, another shape or device than w needs, NaN or Inf.
    """
    if isinstance(hessian, Hessian):
        check(
            hessian.samples > 0,
            op,
            "a Hessian with calibration inputs",
            "one with none",
            "Call hessian.add(x) with the layer's inputs first.",
        )
        hessian = hessian.matrix
    else:
        check_strided(op, "hessian", hessian)
        _check_matrix(op, hessian)
    in_features = w.shape[1]
    check(
        tuple(hessian.shape) == (in_features, in_features),
        op,
        f"a Hessian of shape [{in_features}, {in_features}] for w of shape {list(w.shape)}",
        f"shape {list(hessian.shape)}",
        "Use the inputs of this layer.",
    )
    check(
        hessian.device == w.device,
        op,
        f"the Hessian on {w.device} like w",
        f"{hessian.device}",
        "Move one of them.",
    )
    h = hessian.detach().float()
    finite = h.isfinite().all(dim=0)
    if not bool(finite.all()):
        column = int((~finite).nonzero()[0])
        check(
            False,
            op,
            "a finite Hessian",
            f"NaN or Inf in column {column}",
            "The calibration inputs held NaN or Inf, or overflowed float32.",
        )
    return h


@checked("sparsekern.prune.relative_error")
def relative_error(w: Tensor, w_pruned: Tensor, hessian: Hessian | Tensor) -> float:
    """‖(W − W')X‖²_F / ‖WX‖²_F over the calibration inputs X, from H alone: tr(DHDᵀ) / tr(WHWᵀ).

    Args:
        w, w_pruned: [out_features, in_features] floating point, same device.
        hessian: Hessian or its matrix (undamped), same device.
    Returns:
        float >= 0; 0 when both are zero, inf when WX = 0 but W'X is not.
    Raises:
        ValueError: shapes or devices that differ; an empty or non-finite Hessian.
    """
    op = "sparsekern.prune.relative_error"
    check(
        w.dim() == 2 and w.shape == w_pruned.shape,
        op,
        "w and w_pruned of one shape [out_features, in_features]",
        f"{list(w.shape)} and {list(w_pruned.shape)}",
    )
    h = as_matrix(op, hessian, w)
    with exact_float32(w.device):
        # A ratio: the scale of H drops out, so bring it to 1 where float32 has its full precision.
        factor = Factor(h / h.diagonal().abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        w = w.detach().float()
        difference = w - w_pruned.detach().float()
        energies = [(factor.times(d) * d).sum(dtype=torch.float64) for d in (difference, w)]
        error, energy = (max(value, 0.0) for value in torch.stack(energies).tolist())
    if energy == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return float(error / energy)
