"""Quantisers: the kept weights of a 2:4 mask as fp8, int8 or int4 levels, with the Hessian.

    rtn     every weight to its nearest level
    gptq    a sweep over the columns that feeds the error of each weight back to later ones, then
            passes that move each level where it lowers the error of the layer's outputs

Both take a weight that is pruned (and refined) already: prune, refine, quantise. `gptq` without a
mask also chooses it, on the way: the joint sweep of SparseGPT, whose error of a column is
w − mask ⊙ q(w).

The sweep is SparseGPT's (prune/sparsegpt.py) with another q. The error goes to all later columns,
pruned ones too: what one of them receives is its own error when the sweep reaches it, and goes on
to the kept columns after it. The passes know the mask exactly.

The loops over the columns of a block have two implementations, torch operations on any device and
Triton kernels (backends/triton/gptq.py) on a GPU; what a block leaves to the others is a matmul.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sparsekern.errors import check
from sparsekern.formats import codec as slots
from sparsekern.formats import dtypes, scaled, sparse24
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.scaled import ScaledCodec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.ops import quantize as weights
from sparsekern.prune.hessian import Hessian, as_matrix, relative_error
from sparsekern.prune.masks import rank_mask
from sparsekern.prune.methods import PruneError, is_count, is_number
from sparsekern.prune.sparsegpt import _few_threads, _sweep, inverse_factor
from sparsekern.utils.arguments import checked
from sparsekern.utils.exact import exact_float32

BLOCK = 128  # columns between two updates of the whole remainder
PASSES = 2
METHODS = ("gptq", "rtn")


@dataclass
class QuantizeReport:
    """What one call did. Plain values.

    Attributes:
        method: "gptq", "rtn" or "joint" (gptq that chose the mask).
        dtype, group: as in the weight's spec; group 0 is one scale a row.
        relative_error: ‖(W − Q)X‖² / ‖WX‖² of the weight that was given; None without a Hessian.
        damp: multiple of mean(diag H) that was added to the diagonal; None for rtn.
        attempts: [(damp, dtype, outcome), ...] of the factorisation, as in SparseGPTReport.
        moved: share of the kept weights whose level the passes changed.
        seconds: wall time of the call.
        backend: "torch" or "triton", which ran the loops.
    """

    method: str
    dtype: str
    group: int
    relative_error: float | None
    damp: float | None
    attempts: list[tuple[float, str, str]]
    moved: float
    seconds: float
    backend: str = "torch"


@checked("sparsekern.prune.rtn")
def rtn(
    w: Tensor,
    dtype: str,
    *,
    mask: Tensor | None = None,
    hessian: Hessian | Tensor | None = None,
    group: int | None = None,
    scale: str = "mse",
) -> tuple[Sparse24, QuantizeReport]:
    """Round every kept weight to its nearest level: Q = s · level(W / s).

    Args:
        w: [out_features, in_features] float16 | bfloat16 | float32, 2:4, or with
        mask: bool [out_features, in_features], True = kept, at most two of each four.
        dtype, group, scale: as in sparsekern.quantize.
        hessian: its diagonal weighs the errors that scale="mse" minimises.
    Returns:
        (Sparse24 row-major, QuantizeReport).
    Raises:
        ValueError, TypeError: as sparsekern.compress and sparsekern.quantize.
    """
    start = time.perf_counter()
    op = "sparsekern.prune.rtn"
    matrix = None if hessian is None else as_matrix(op, hessian, w)
    importance = None if matrix is None or scale != "mse" else matrix.diagonal()
    w24 = weights.quantize(
        sparse24.compress(w, mask),
        dtype,
        group=group,
        scale=scale,
        importance=importance,
        layout=ROWMAJOR,
    )
    error = None if hessian is None else relative_error(w, w24.to_dense(), hessian)
    seconds = time.perf_counter() - start
    spec = w24.spec
    return w24, QuantizeReport("rtn", spec.storage, spec.group, error, None, [], 0.0, seconds)


@checked("sparsekern.prune.gptq", passes=(0, 10**4))
def gptq(
    w: Tensor,
    hessian: Hessian | Tensor,
    dtype: str,
    *,
    mask: Tensor | None = None,
    target: Tensor | None = None,
    group: int | None = None,
    scale: str = "mse",
    damp: float = 0.01,
    passes: int = PASSES,
    backend: str | None = None,
) -> tuple[Sparse24, QuantizeReport]:
    """Levels and scales that lower ‖(T − Q)X‖² + λ‖T − Q‖² over the weights that the mask keeps.

    The sweep: with the upper Cholesky factor U of (H + λI)⁻¹, column by column, q_i = mask_i ⊙
    s·level(w_i / s), e = (w_i − q_i) / U_ii, w_j −= e·U_ij for j > i. A scale of a row is fixed at
    the start, one of a group when the sweep reaches it. Then `passes` times, column by column,
    q_i ← mask_i ⊙ s·level((q_i − G_i / A_ii) / s) with A = H + λI, G = (Q − T)A: the best level
    with all others as they are, so that no step raises the sum.

    Args:
        w: [out_features, in_features] float16 | bfloat16 | float32, zero where mask is False.
        hessian: Hessian of the layer's inputs or its matrix, on the same device.
        dtype, group, scale: as in sparsekern.quantize; scale="mse" weighs by diag(H).
        mask: bool [out_features, in_features], True = kept, at most two of each four. None: w is
            dense, and the sweep chooses the mask as `sparsegpt` does, two of each four columns when
            it reaches them (the joint sweep); a group's scale is then fitted to the mask as it
            stands when the group begins.
        target: T, the weights to come close to, of w's shape; None: w. The weights before pruning
            let the passes make up for what refinement has left.
        damp: λ as a multiple of mean(diag H); it grows where the factorisation fails, as in
            `sparsegpt`.
        passes: over all columns; 0 is the published sweep.
        backend: of the loops; None picks, "torch" or "triton" insists. They differ by rounding,
            which may move a weight that is near a tie to its other level.
    Returns:
        (Sparse24 row-major of w's dtype, QuantizeReport).
    Raises:
        ValueError: shapes, devices or options that do not fit; NaN or Inf; a mask that keeps more
            than two of four.   TypeError: dtypes.   PruneError: H cannot be inverted.
        NotImplementedError: backend="triton" where its kernels cannot run.
    Source: Frantar et al. 2022, "GPTQ" (arXiv:2210.17323); the joint sweep: Frantar and Alistarh
    2023 (arXiv:2301.00774), section 3.4; the passes: Behdin et al. 2023, "QuantEase"
    (arXiv:2309.01885).
    """
    start = time.perf_counter()
    op = "sparsekern.prune.gptq"
    spec = _checked(op, w, dtype, mask, target, group, scale, damp, passes)
    h = as_matrix(op, hessian, w)
    backend = _picked(op, backend, w)
    with exact_float32(w.device):
        # The result does not depend on the scale of H: bring it to where float32 is at home.
        h = h / h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        solver = _Solver(spec, h, scale, backend)
        wt = torch.empty(w.shape[1], w.shape[0], dtype=torch.float32, device=w.device)
        wt.copy_(w.detach().t())
        aim = wt.clone() if target is None else target.detach().t().float().contiguous()
        keep = torch.empty(wt.shape, dtype=torch.bool, device=w.device)
        if mask is not None:
            keep.copy_(mask.t())
            wt.masked_fill_(~keep, 0.0)
        attempts = solver.sweep(wt, keep, damp, choose=mask is None)
        before = wt.clone() if passes else wt
        for _ in range(passes):
            solver.descend(wt, aim, keep, attempts[-1][0])
        moved = float((before != wt).sum()) / max(1, int(keep.sum()))
        w24 = solver.weight(wt, keep)
    dense = w24.to_dense()
    finite = bool(dense.isfinite().all())
    remedy = "Raise damp."
    check(finite, op, f"levels that are finite in {w.dtype}", "NaN or Inf", remedy, PruneError)
    name = "joint" if mask is None else "gptq"
    error = relative_error(w, dense, hessian)
    used = attempts[-1][0]
    seconds = time.perf_counter() - start
    return w24, QuantizeReport(
        name, spec.storage, spec.group, error, used, attempts, moved, seconds, backend
    )


class _Solver:
    """The sweep and the passes over transposed weights [in_features, out_features], float32."""

    def __init__(self, spec: WeightSpec, h: Tensor, scale: str, backend: str) -> None:
        self.spec, self.h, self.scale = spec, h, scale
        self.codec: ScaledCodec = dtypes.scaled_codec(spec.storage)
        out_features, in_features = spec.shape
        groups = scaled.groups(in_features, spec.group)
        self.grouped = groups > 1
        # A block is a group of scales, so that all earlier errors have arrived when one is fitted.
        self.block = spec.group if self.grouped else BLOCK
        self.scales = torch.ones(groups, out_features, device=h.device, dtype=torch.float32)
        self.kernels: ModuleType | None = None
        if backend == "triton":
            from sparsekern.backends.triton import gptq as kernels

            self.kernels = kernels

    def sweep(
        self, wt: Tensor, keep: Tensor, damp: float, choose: bool
    ) -> list[tuple[float, str, str]]:
        """Quantise wt in place, and fill keep where it is to be chosen."""
        h = self.h.clone()
        dead = h.diagonal() == 0
        h.diagonal().masked_fill_(dead, 1.0)
        u, attempts = inverse_factor(h, damp)
        d = u.diagonal()
        v = (u / d[:, None]).float().contiguous()
        ranks = (d.max() / d).square().float()
        if choose:
            wt.masked_fill_(dead[:, None], 0.0)
        if not self.grouped:
            self.scales[0] = self._fit(wt, self._likely(wt, keep, ranks, choose), slice(None))

        def sweep_block(
            block: Tensor, keep: Tensor, removed: Tensor, v: Tensor, ranks: Tensor, offset: int
        ) -> None:
            if self.grouped:
                columns = slice(offset, offset + block.shape[0])
                kept = self._likely(block, keep, ranks, choose)
                self.scales[offset // self.block] = self._fit(block, kept, columns)
            of = _sweep_block_torch if self.kernels is None else self.kernels.sweep_block
            of(self.codec, self._scale(offset), choose, block, keep, removed, v, ranks)

        _sweep(wt, keep, v, ranks, self.block, sweep_block)
        return attempts

    @staticmethod
    def _likely(wt: Tensor, keep: Tensor, ranks: Tensor, choose: bool) -> Tensor:
        """The mask of wt as it stands where it is yet to be chosen, else keep."""
        if not choose:
            return keep
        return slots.mask24((wt.square() * ranks[:, None]).t()).t().contiguous()

    def _fit(self, wt: Tensor, kept: Tensor, columns: slice) -> Tensor:
        """The scales [out] of some columns of wt; kept is bool of its shape."""
        importance = self.h.diagonal()[columns].contiguous()
        if self.kernels is not None and self.scale == "mse":
            fitted: Tensor = self.kernels.fit(self.codec, wt, kept, importance)
            return fitted
        numbers = wt.t() * kept.t()
        if self.scale == "absmax":
            return self.codec.absmax(numbers, 0)[:, 0]
        return self.codec.least_squares(numbers, 0, importance.expand(numbers.shape))[:, 0]

    def descend(self, qt: Tensor, aim: Tensor, keep: Tensor, damp: float) -> None:
        """One pass of coordinate descent over the levels, in place."""
        a = self.h.clone()
        a.diagonal().add_(damp * a.diagonal().mean())
        a.diagonal().masked_fill_(a.diagonal() == 0, 1.0)  # as in the sweep
        inverse_diagonal = a.diagonal().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        slope = a @ (qt - aim)
        of = _descend_block_torch if self.kernels is None else self.kernels.descend_block
        for i in range(0, qt.shape[0], self.block):
            j = min(i + self.block, qt.shape[0])
            rows = (qt[i:j], keep[i:j], slope[i:j], a[i:j, i:j], inverse_diagonal[i:j])
            with _few_threads(qt):
                moved = of(self.codec, self._scale(i), *rows)
            if j < qt.shape[0]:
                slope[j:].addmm_(a[j:, i:j], moved)

    def _scale(self, offset: int) -> Tensor:
        return self.scales[offset // self.block if self.grouped else 0]

    def weight(self, qt: Tensor, keep: Tensor) -> Sparse24:
        """The Sparse24 of quantised numbers."""
        scale = self.scales.t().contiguous()
        group, in_features = self.spec.group, self.spec.shape[1]
        wide = scale.repeat_interleave(group, dim=1)[:, :in_features] if self.grouped else scale
        levels = self.codec.round(qt.t() / wide)
        plain = sparse24.compress(levels.contiguous(), keep.t().contiguous())
        return sparse24.of_levels(self.spec, plain.values, scale, plain.metadata)


def _sweep_block_torch(
    codec: ScaledCodec,
    scale: Tensor,
    choose: bool,
    block: Tensor,
    keep: Tensor,
    removed: Tensor,
    v: Tensor,
    ranks: Tensor,
) -> None:
    """The sweep of one block; the oracle of the Triton kernel, which says what the tensors are."""
    inverse = scale.reciprocal()
    vt = v.t().contiguous()
    levels, steps = torch.empty_like(block), torch.empty_like(block)
    for i in range(0, block.shape[0], 4):
        j = min(i + 4, block.shape[0])
        group = block[i:j]
        if i > 0:
            group.addmm_(vt[i:j, :i], removed[:i], alpha=-1)
        if choose:
            keep[i:j] = rank_mask(group.square() * ranks[i:j, None], 2)
        torch.mul(keep[i:j], scale, out=steps[i:j])
        rows = (group, levels[i:j], steps[i:j], removed[i:j])
        columns = zip(*(tensor.unbind() for tensor in rows))
        for c, (column, level, step, error) in enumerate(columns):
            if c > 0:
                column.addmv_(removed[i : i + c].t(), vt[i + c, i : i + c], alpha=-1)
            codec.round_(torch.mul(column, inverse, out=level))
            torch.addcmul(column, level, step, value=-1, out=error)
    torch.mul(levels, steps, out=block)


def _descend_block_torch(
    codec: ScaledCodec,
    scale: Tensor,
    block: Tensor,
    keep: Tensor,
    slope: Tensor,
    a: Tensor,
    inverse_diagonal: Tensor,
) -> Tensor:
    """One pass over a block, in place; the oracle of the Triton kernel, whose arguments it has."""
    inverse, steps = scale.reciprocal(), keep * scale
    moved, levels = torch.empty_like(block), torch.empty_like(block)
    inner = a.contiguous()
    # A level's best place is q / s − G / (A_ii · s).
    starts, factors = block * inverse, inverse_diagonal[:, None] * inverse
    rows = (slope, starts, factors, levels, steps, -block, moved)
    for c, row in enumerate(zip(*(tensor.unbind() for tensor in rows))):
        g, start, factor, level, step, negative, move = row
        if c > 0:
            g.addmv_(moved[:c].t(), inner[c, :c])
        codec.round_(torch.addcmul(start, g, factor, value=-1, out=level))
        torch.addcmul(negative, level, step, out=move)
    torch.mul(levels, steps, out=block)
    return moved


def _picked(op: str, backend: str | None, w: Tensor) -> str:
    """The backend of the loops for w."""
    known = backend in (None, "torch", "triton")
    check(known, op, "backend None, 'torch' or 'triton'", repr(backend))
    if backend == "torch" or (backend is None and not w.is_cuda):
        return "torch"
    reason: str | None
    try:
        from sparsekern.backends.triton import gptq as kernels
    except ImportError as error:
        reason = f"Triton cannot be imported: {error}"
    else:
        reason = kernels.refusal(w, BLOCK)
    expected, remedy = "a case that backend='triton' can run", "Leave backend=None."
    fits = backend is None or reason is None
    check(fits, op, expected, reason, remedy, NotImplementedError)
    return "torch" if reason else "triton"


def _checked(
    op: str,
    w: Tensor,
    dtype: str,
    mask: Tensor | None,
    target: Tensor | None,
    group: int | None,
    scale: str,
    damp: float,
    passes: int,
) -> WeightSpec:
    w = slots.checked_weight(w, op)
    slots.checked_mask(mask, w, op)
    finite = w.isfinite()
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        where = f"{w[row, column].item()} at row {row}, column {column}"
        check(False, op, "a finite w", where)
    if mask is not None:
        most = int(mask.reshape(-1, 4).sum(1).max()) if mask.numel() else 0
        check(most <= 2, op, "a mask that keeps at most 2 of 4 columns", most, "Prune first.")
    if target is not None:
        check(target.shape == w.shape, op, f"a target {list(w.shape)}", list(target.shape))
        check(target.device == w.device, op, f"target on {w.device} like w", target.device)
    known = weights.SCALES
    check(scale in known, op, f"scale in {known}", repr(scale))
    check(is_number(damp, 0), op, "a finite damp >= 0", repr(damp))
    check(is_count(passes), op, "passes, an int >= 0", repr(passes))
    kind = dtypes.quantized(op, dtype)
    columns = weights.checked_group(op, dtype, group, w.shape[1])
    return WeightSpec.of(w.shape, kind.name, ROWMAJOR, w.dtype, None, columns)
