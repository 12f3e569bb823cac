"""gptq and rtn: against scalar code, better than rounding, monotone passes, masks kept."""

import math
import os
import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from sparsekern.formats import dtypes
from sparsekern.prune import Hessian, PruneError, gptq, relative_error, rtn, sparsegpt
from sparsekern.prune import quantize as loops
from sparsekern.prune.masks import nm_mask

KINDS = [("fp8", None), ("int8", None), ("int4", 64), ("int4", 128), ("int4", 192)]


def problem(out_features=24, in_features=192, tokens=600, seed=0, dead=()):
    """(dense weight, pruned weight, mask, Hessian) of inputs that share eight factors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator)
    x += torch.randn(tokens, 8, generator=generator) @ torch.randn(
        8, in_features, generator=generator
    )
    x *= torch.exp(0.5 * torch.randn(in_features, generator=generator))
    x[:, list(dead)] = 0
    hessian = Hessian(in_features)
    hessian.add(x)
    w = torch.randn(out_features, in_features, generator=generator)
    pruned, mask, _ = sparsegpt(w, hessian)
    return w, sk.prune.refine(w, pruned, mask, hessian, steps=16), mask, hessian


def added(pruned, w24, hessian):
    """tr((W' − Q) H (W' − Q)ᵀ)."""
    difference = (pruned - w24.to_dense()).double()
    return float(((difference @ hessian.matrix.double()) * difference).sum())


def by_hand(w, mask, hessian, w24, damp=0.01, passes=0):
    """The sweep and the passes column by column in float64, with the scales that w24 has."""
    codec = dtypes.scaled_codec(w24.spec.storage)
    in_features, group = w.shape[1], w24.spec.group or w.shape[1]
    h = hessian.matrix.double()
    a = h + damp * h.diagonal().mean() * torch.eye(in_features, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(a), upper=True)
    scale = w24.tensors["weight_scale"].repeat_interleave(group, dim=1).double()
    work, q = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)

    def nearest(column, i):
        level = codec.round((column / scale[:, i]).float()).double()
        return torch.where(mask[:, i], level * scale[:, i], 0.0)

    for i in range(in_features):
        q[:, i] = nearest(work[:, i], i)
        error = (work[:, i] - q[:, i]) / u[i, i]
        work[:, i:] -= error[:, None] * u[i, i:]
    for _ in range(passes):
        for i in range(in_features):
            slope = (q - w.double()) @ a[:, i]
            q[:, i] = nearest(q[:, i] - slope / a[i, i], i)
    return q


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("name, group", KINDS)
def test_gptq_is_the_text_book(name, group, passes):
    _, pruned, mask, hessian = problem()
    w24, report = gptq(pruned, hessian, name, mask=mask, group=group, passes=passes)
    expected = by_hand(pruned, mask, hessian, w24, passes=passes)
    # Another rounding of a sum may move a level that is near a tie, and those after it.
    same = (w24.to_dense().double() - expected).abs() <= 1e-6 * expected.abs()
    assert float(same.double().mean()) > 0.97
    dense = w24.to_dense().double()
    a = hessian.matrix.double()
    worth = [
        float((((q - pruned.double()) @ a) * (q - pruned.double())).sum())
        for q in (dense, expected)
    ]
    assert worth[0] == pytest.approx(worth[1], rel=0.02)
    assert (report.method, report.dtype, report.group) == ("gptq", w24.spec.storage, w24.spec.group)
    assert report.relative_error == pytest.approx(relative_error(pruned, dense.float(), hessian))
    assert (report.moved > 0) == (passes > 0) and report.damp == 0.01


@pytest.mark.parametrize("dead", [(), (5, 64, 65)])
@pytest.mark.parametrize("name, group", KINDS)
def test_gptq_is_better_than_rounding_and_passes_lower_the_error(name, group, dead):
    _, pruned, mask, hessian = problem(dead=dead)
    rounded, report = rtn(pruned, name, mask=mask, hessian=hessian, group=group)
    assert report.method == "rtn" and report.damp is None and report.moved == 0
    worth = [added(pruned, rounded, hessian)]
    for passes in (0, 1, 2, 5):
        w24, _ = gptq(pruned, hessian, name, mask=mask, group=group, passes=passes)
        sk.verify(w24)
        assert not w24.to_dense()[~mask].any(), "a pruned weight never becomes non-zero"
        worth.append(added(pruned, w24, hessian))
    assert worth[1] < 0.7 * worth[0], "the published sweep"
    assert worth[2] < 0.95 * worth[1]
    assert worth[3] <= 1.01 * worth[2] and worth[4] <= 1.01 * worth[3]


@pytest.mark.parametrize("name, group", KINDS)
def test_inputs_that_are_always_zero_leave_the_nearest_levels(name, group):
    """A layer that the calibration feeds zeros alone: no level is better than another there."""
    _, pruned, mask, hessian = problem()
    empty = torch.zeros_like(hessian.matrix)
    swept, _ = gptq(pruned, empty, name, mask=mask, group=group, passes=0, damp=0.01)
    passed, _ = gptq(pruned, empty, name, mask=mask, group=group, passes=2, damp=0.01)
    assert torch.equal(passed.to_dense(), swept.to_dense())
    assert (swept.to_dense() != 0).any()


def test_no_pass_raises_the_damped_error():
    _, pruned, mask, hessian = problem(out_features=6)
    h = hessian.matrix / hessian.matrix.diagonal().mean()
    a = h + 0.01 * torch.eye(192)
    previous = float("inf")
    for passes in range(4):
        w24, _ = gptq(pruned, hessian, "int4", mask=mask, passes=passes)
        difference = w24.to_dense() - pruned
        worth = float(((difference @ a) * difference).sum())
        assert worth <= previous * (1 + 1e-5)
        previous = worth


def test_the_dense_weight_as_target():
    """Where refinement has left something, the passes take it."""
    w, _, mask, hessian = problem()
    pruned = w.masked_fill(~mask, 0)
    alone, _ = gptq(pruned, hessian, "int8", mask=mask)
    aimed, _ = gptq(pruned, hessian, "int8", mask=mask, target=w)
    errors = [relative_error(w, w24.to_dense(), hessian) for w24 in (alone, aimed)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name, group", KINDS)
def test_joint_sweep(name, group):
    w, pruned, _, hessian = problem()
    w24, report = gptq(w, hessian, name, group=group)
    kept = (w24.to_dense() != 0).view(24, -1, 4).sum(2)
    assert report.method == "joint" and int(kept.max()) <= 2 and kept.double().mean() > 1.5
    swept, _, _ = sparsegpt(w, hessian)
    after = gptq(swept, hessian, name, mask=swept != 0, group=group, passes=0)[0]
    assert report.relative_error < relative_error(w, after.to_dense(), hessian)
    first = gptq(w, hessian, "fp8", passes=0)[0].mask()
    same = first == sparsegpt(w, hessian)[1]
    assert float(same.double().mean()) > 0.9, "nearly the mask of the sweep without rounding"


def test_dtypes_and_repetition():
    w, pruned, mask, hessian = problem()
    for dtype in (torch.float16, torch.bfloat16):
        some, _ = gptq(pruned.to(dtype), hessian, "int4", mask=mask)
        again, _ = gptq(pruned.to(dtype), hessian.matrix, "int4", mask=mask)
        assert some.dtype == dtype and torch.equal(some.values, again.values)
        assert rtn(pruned.to(dtype), "int4", mask=mask)[0].dtype == dtype
    scaled = Hessian.from_matrix(hessian.matrix * 2.0**-60)
    small, _ = gptq(pruned, scaled, "int4", mask=mask)
    usual, _ = gptq(pruned, hessian, "int4", mask=mask)
    assert torch.equal(small.to_dense(), usual.to_dense())


def test_masks_with_fewer_than_two_kept():
    w, _, _, hessian = problem()
    mask = nm_mask(torch.rand(w.shape), 1, 4)
    w24, _ = gptq(w, hessian, "int4", mask=mask)
    assert not w24.to_dense()[~mask].any()
    w24, report = gptq(w, hessian, "int4", mask=torch.zeros_like(mask))
    assert not w24.to_dense().any() and report.relative_error == 1.0


REFUSALS = [
    (dict(dtype="int3"), ValueError, "one of 'fp8'"),
    (dict(mask=torch.ones(24, 192, dtype=torch.bool)), ValueError, "at most 2 of 4.*got 4"),
    (dict(mask=torch.ones(24, 4, dtype=torch.bool)), ValueError, "mask.shape == w.shape"),
    (dict(scale="max"), ValueError, "scale in"),
    (dict(passes=-1), ValueError, "passes from 0 to"),
    (dict(damp=float("nan")), ValueError, "finite damp"),
    (dict(group=32), ValueError, "group in"),
    (dict(target=torch.ones(3, 3)), ValueError, "a target"),
    (dict(hessian=torch.ones(3, 3)), ValueError, "a Hessian of shape"),
    (dict(w=torch.full((24, 192), float("nan"))), ValueError, "a finite w, got nan at row 0"),
    (dict(w=torch.ones(24, 192, dtype=torch.float64)), TypeError, "float64"),
    (dict(hessian=-torch.eye(192)), PruneError, "positive definite"),
    (dict(backend="cuda"), ValueError, "backend None, 'torch' or 'triton', got 'cuda'"),
]


@pytest.mark.parametrize("change, kind, text", REFUSALS, ids=[text for _, _, text in REFUSALS])
def test_refusals(change, kind, text):
    _, pruned, mask, hessian = problem()
    given = dict(w=pruned, hessian=hessian, dtype="int4", mask=mask) | change
    with pytest.raises(kind, match=text):
        gptq(**given)


def test_rtn_refuses_dense_weights():
    w, *_ = problem()
    with pytest.raises(ValueError, match="at most 2 non-zeros.*Prune first"):
        rtn(w, "fp8")


def test_triton_is_refused_without_a_gpu_or_the_interpreter():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs the Triton interpreter")
    _, pruned, mask, hessian = problem()
    with pytest.raises(NotImplementedError, match="w is on cpu"):
        gptq(pruned, hessian, "int4", mask=mask, backend="triton")


def numbers_of_every_kind(codec):
    """[4, rows]: every level, the ties between neighbours, what lies beside them, and extremes."""
    if codec.storage.is_floating_point:
        bits = torch.arange(256, dtype=torch.uint8).view(codec.storage).float()
        levels = bits[bits.isfinite()].unique()
    else:
        levels = torch.arange(codec.low, codec.top + 1)
    ties = (levels[1:] + levels[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(sign * 1e9)) for sign in (1, -1)]
    extremes = torch.tensor([1e-30, -1e-30, 464.0, 480.0, -1e20, 3e38, -3e38, 1e-3, 0.0])
    numbers = torch.cat([levels, ties, *beside, extremes, torch.randn(100) * 200])
    return numbers[: len(numbers) // 4 * 4].view(4, -1).contiguous()


# (columns, rows): a whole tile and rows beyond one; a part of one; more columns than a tile has.
SIZES = ((128, 19), (44, 16), (140, 20))
EVERYWHERE = dict.fromkeys(("fp8", "int8", "int4"), SIZES)


def compare_kernels_with_torch(device, sizes_of=EVERYWHERE):
    """Each kernel against its oracle: levels to the bit, then tails of rows and columns."""
    from sparsekern.backends.triton import gptq as kernels

    for name, sizes in sizes_of.items():
        codec = dtypes.scaled_codec(dtypes.quantized("test", name).name)
        block = numbers_of_every_kind(codec).to(device)
        rows = block.shape[1]
        scale, ranks = torch.ones(rows, device=device), torch.ones(4, device=device)
        keep = torch.ones_like(block, dtype=torch.bool)
        expected, removed = codec.round(block), torch.empty_like(block)
        still = torch.eye(4, device=device)
        kernels.sweep_block(codec, scale, False, block, keep, removed, still, ranks)
        assert torch.equal(block, expected)
        nothing = torch.full((4, 3), math.nan, device=device)
        three = scale[:3], False, nothing, keep[:, :3].contiguous(), torch.empty_like(nothing)
        kernels.sweep_block(codec, *three, still, ranks)
        assert nothing.isnan().all(), "NaN is not hidden"

        for columns, rows in sizes:
            generator = torch.Generator().manual_seed(columns)
            wt = torch.randn(columns, rows, generator=generator)
            wt[:, 0] = 0
            x = torch.randn(3 * columns, columns, generator=generator)
            a = x.t() @ x / columns
            keep = nm_mask(wt.t().contiguous(), 2, 4).t().contiguous()
            worth = a.diagonal().contiguous()
            wt, a, keep, worth = (tensor.to(device) for tensor in (wt, a, keep, worth))
            wanted = codec.least_squares((wt * keep).t(), 0, worth.expand(rows, columns))[:, 0]
            scale = kernels.fit(codec, wt, keep, worth)
            # Two scales may be worth the same but for rounding.
            close = (scale - wanted).abs() <= 1e-6 * wanted
            assert (
                close.double().mean() > 0.9 and (scale - wanted).abs().max() <= 0.1 * wanted.max()
            )
            assert scale[0] == 1, "nothing but zeros"
            if columns > 128:
                continue
            u = torch.linalg.cholesky(torch.linalg.inv(a), upper=True)
            v, ranks = (u / u.diagonal()[:, None]).contiguous(), u.diagonal() ** -2
            for choose in (False, True):
                found = []
                for of in (loops._sweep_block_torch, kernels.sweep_block):
                    block, kept, removed = wt.clone(), keep.clone(), torch.empty_like(wt)
                    of(codec, wanted, choose, block, kept, removed, v, ranks)
                    found.append((block, kept, removed))
                same = (found[0][1] == found[1][1]).all(dim=0)
                same &= found[0][0].isclose(found[1][0], rtol=1e-6, atol=0).all(dim=0)
                assert float(same.double().mean()) >= 0.9, (name, columns, choose)
                gap = (found[0][2] - found[1][2])[:, same].abs().max()
                assert gap <= 1e-3 * float(wanted.max())
            old, found = found[0][0], []
            keep = old != 0
            for of in (loops._descend_block_torch, kernels.descend_block):
                block, slope = old.clone(), a @ (old - wt)
                moved = of(codec, wanted, block, keep, slope, a, 1 / worth)
                torch.testing.assert_close(block - old, moved, rtol=1e-4, atol=1e-5)
                assert not block[~keep].any()
                found.append(block)
            same = found[0].isclose(found[1], rtol=1e-6, atol=0).all(dim=0)
            assert float(same.double().mean()) >= 0.9, (name, columns)
            assert (found[1] != old).any()


def compare_gptq_with_torch(device, kinds=KINDS, choose=(False, True), passes=2, **options):
    """The whole of gptq with the kernels: as good as with the torch loops. choose: mask, too."""
    w, pruned, mask, hessian = problem(**{"out_features": 20, "dead": (5, 64)} | options)
    matrix = hessian.to(device)
    for name, group in kinds:
        for kept, start in [((mask, pruned), (None, w))[chosen] for chosen in choose]:
            on = None if kept is None else kept.to(device)
            results = []
            for backend in ("torch", "triton"):
                w24, report = gptq(
                    start.to(device),
                    matrix,
                    name,
                    mask=on,
                    group=group,
                    backend=backend,
                    passes=passes,
                )
                sk.verify(w24)
                assert report.backend == backend
                results.append(added(start, w24.to(device="cpu"), hessian))
            assert results[1] == pytest.approx(results[0], rel=0.03 if kept is not None else 0.1)


@pytest.mark.slow
def test_triton_kernels_through_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined.

    A program of the interpreter takes some 10 ms a column. So a tile of rows and a part of
    another once, and sizes at which blocks and groups end early; int8 is int4 with another range.
    """
    pytest.importorskip("triton")
    code = (
        "from python_tests.prune import test_quantize as t; "
        "t.compare_kernels_with_torch('cpu', "
        "{'fp8': ((20, 19), (140, 3)), 'int4': ((28, 5), (140, 3))}); "
        "few = dict(out_features=6, in_features=132, dead=(5, 64), passes=1); "
        "t.compare_gptq_with_torch('cpu', [('fp8', None)], [True], **few); "
        "t.compare_gptq_with_torch('cpu', [('int4', 64)], [False], **few)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_triton_kernels_on_the_gpu():
    pytest.importorskip("triton")
    compare_kernels_with_torch("cuda")
    compare_gptq_with_torch("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name, group", KINDS)
def test_the_gpu_finds_as_good_levels(name, group, backend):
    w, pruned, mask, hessian = problem(out_features=64)
    ours, _ = gptq(pruned, hessian, name, mask=mask, group=group)
    options = dict(group=group, backend=backend)
    theirs, report = gptq(pruned.cuda(), hessian.to("cuda"), name, mask=mask.cuda(), **options)
    assert report.backend == (backend or "triton")
    assert added(pruned, theirs.to(device="cpu"), hessian) == pytest.approx(
        added(pruned, ours, hessian), rel=0.02
    )
    sk.verify(theirs)
    again, _ = gptq(pruned.cuda(), hessian.to("cuda"), name, mask=mask.cuda(), **options)
    assert torch.equal(again.to_dense(), theirs.to_dense())
    joint, _ = gptq(w.cuda(), hessian.to("cuda"), name, **options)
    sk.verify(joint)
