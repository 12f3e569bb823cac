"""SparseGPT against a plain-loop float64 transcription of the published algorithm; its failures."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sparsekern.prune import Hessian, magnitude_mask, relative_error, sparsegpt, wanda_mask
from sparsekern.prune.sparsegpt import damping_steps, inverse_factor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def make_layer(out_features, in_features, seed=0, tokens=None):
    """A weight and the Hessian of correlated inputs whose features differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator) / math.sqrt(in_features)
    mix += 0.5 * torch.eye(in_features)
    scale = torch.exp(torch.randn(in_features, generator=generator))
    x = torch.randn(2, (tokens or 2 * in_features) // 2, in_features, generator=generator)
    hessian = Hessian(in_features)
    hessian.add(x @ mix * scale)
    return torch.randn(out_features, in_features, generator=generator), hessian


def transcribe(w, h, n=2, m=4, damp=0.01, mask=None):
    """The published algorithm row by row in float64, without blocks. Returns (w', mask, loss)."""
    w, h = w.double().numpy().copy(), h.double().numpy().copy()
    rows, columns = w.shape
    for j in range(columns):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    h += damp * np.mean(np.diag(h)) * np.eye(columns)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    kept = np.zeros((rows, columns), dtype=bool) if mask is None else mask.numpy()
    loss = 0.0
    for r in range(rows):
        for j in range(columns):
            if mask is None and j % m == 0:
                saliency = [(w[r, k] / u[k, k]) ** 2 for k in range(j, j + m)]
                for k in sorted(range(m), key=lambda k: saliency[k])[m - n :]:
                    kept[r, j + k] = True
            if not kept[r, j]:
                error = w[r, j] / u[j, j]
                loss += error**2 / 2
                w[r, j + 1 :] -= error * u[j, j + 1 :]
                w[r, j] = 0
    return torch.from_numpy(w), torch.from_numpy(kept), loss


def assert_pattern(mask, n, m):
    """Exactly n of m in every group of every block, not only in the first."""
    assert mask.dtype == torch.bool and mask.is_contiguous()
    counts = mask.view(mask.shape[0], -1, m).sum(dim=-1)
    assert torch.equal(counts, torch.full_like(counts, n))


def assert_same_pruning(got, got_mask, expected, expected_mask):
    """Equal masks and weights. A tie within rounding may send one row another way, not more."""
    same = (got_mask == expected_mask).all(dim=1)
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(got[same].double(), expected[same].double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "n, m, in_features, blocksize",
    [
        (2, 4, 260, 128),  # three blocks, the last of one group
        (2, 4, 256, 256),  # one block
        (4, 8, 272, 128),
        (1, 4, 256, 64),
        (2, 3, 258, 126),
    ],
)
def test_equals_the_float64_transcription(n, m, in_features, blocksize):
    w, hessian = make_layer(12, in_features)
    before = w.clone(), hessian.matrix.clone()
    pruned, mask, report = sparsegpt(w, hessian, pattern=(n, m), blocksize=blocksize)
    assert torch.equal(w, before[0]) and torch.equal(hessian.matrix, before[1])
    expected, expected_mask, loss = transcribe(w, hessian.matrix, n, m)
    assert_pattern(mask, n, m)
    assert_same_pruning(pruned, mask, expected, expected_mask)
    assert torch.equal(pruned != 0, mask)
    # The weight update is real: nearly every kept weight differs from the input.
    assert float((pruned[mask] != w[mask]).float().mean()) > 0.95
    # Not worse than the algorithm in float64, and the loss is the one it reports.
    assert report.relative_error <= 1.001 * relative_error(w, expected, hessian)
    assert report.relative_error == relative_error(w, pruned, hessian)
    assert report.loss == pytest.approx(loss, rel=1e-3)


def test_report_is_plain_data():
    w, hessian = make_layer(8, 64)
    report = sparsegpt(w, hessian)[2]
    fields = json.loads(json.dumps(dataclasses.asdict(report)))
    assert (report.damp, report.dtype, report.backend) == (0.01, "float32", "torch")
    assert fields["attempts"] == [[0.01, "float32", "ok"]]
    assert report.dead_columns == 0 and report.seconds > 0


def test_error_is_below_wanda_and_wanda_below_magnitude():
    for seed in range(3):
        w, hessian = make_layer(64, 256, seed)
        magnitude = relative_error(w, w * magnitude_mask(w), hessian)
        wanda = relative_error(w, w * wanda_mask(w, hessian.act_norm), hessian)
        assert 0 < sparsegpt(w, hessian)[2].relative_error < 0.8 * wanda < 0.8 * magnitude


def test_the_mask_is_chosen_on_compensated_weights():
    """Lazily, group by group: a mask from the first weights alone is another one, and is worse."""
    w, hessian = make_layer(32, 256)
    _, lazy, report = sparsegpt(w, hessian)
    u, _ = inverse_factor(hessian.matrix, 0.01)
    early = magnitude_mask(w / u.diagonal())
    assert torch.equal(lazy[:, :4], early[:, :4]) and not torch.equal(lazy, early)
    assert report.relative_error < sparsegpt(w, hessian, mask=early)[2].relative_error


def test_fixed_mask_runs_the_update_alone():
    w, hessian = make_layer(10, 262)  # neither a multiple of 4 nor of the block
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    before = mask.clone()
    pruned, returned, report = sparsegpt(w, hessian, mask=mask)
    assert torch.equal(returned, before) and torch.equal(mask, before)
    assert returned.data_ptr() != mask.data_ptr()
    expected, _, loss = transcribe(w, hessian.matrix, mask=mask)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)
    assert report.loss == pytest.approx(loss, rel=1e-3)
    assert report.relative_error < relative_error(w, w * mask, hessian)


def test_own_mask_passed_back_gives_the_same_weights():
    w, hessian = make_layer(10, 256)
    pruned, mask, _ = sparsegpt(w, hessian)
    torch.testing.assert_close(sparsegpt(w, hessian, mask=mask)[0], pruned, rtol=1e-5, atol=1e-6)


def test_custom_score_sees_compensated_weights_and_the_factor():
    w, hessian = make_layer(10, 256)
    pruned, mask, _ = sparsegpt(w, hessian)
    seen = []

    def published(w_block, hinv_diag_block):
        assert w_block.shape == (10, 4) and hinv_diag_block.shape == (4,)
        seen.append((w_block.clone(), hinv_diag_block.clone()))
        scores = w_block.square() / hinv_diag_block.square()
        w_block.zero_()  # a score function may use its arguments as scratch
        return scores

    again, again_mask, _ = sparsegpt(w, hessian, score=published)
    assert torch.equal(again_mask, mask) and torch.equal(again, pruned)
    u, _ = inverse_factor(hessian.matrix, 0.01)
    torch.testing.assert_close(torch.cat([d for _, d in seen]), u.diagonal())
    assert torch.equal(seen[0][0], w[:, :4]) and not torch.equal(seen[40][0], w[:, 160:164])
    lowest, lowest_mask, _ = sparsegpt(w, hessian, score=lambda w, d: -w.abs())
    assert_pattern(lowest_mask, 2, 4)
    assert torch.equal(lowest != 0, lowest_mask)
    assert torch.equal(lowest_mask[:, :4], ~magnitude_mask(w[:, :4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_weight_dtypes(dtype):
    w, hessian = make_layer(16, 256)
    w = w.to(dtype)
    pruned, mask, report = sparsegpt(w, hessian)
    assert pruned.dtype == dtype and pruned.is_contiguous()
    full, full_mask, _ = sparsegpt(w.float(), hessian)
    assert torch.equal(mask, full_mask) and torch.equal(pruned, full.to(dtype))
    assert_pattern(mask, 2, 4)
    assert report.relative_error < relative_error(w, w * magnitude_mask(w), hessian)


def test_dead_columns_are_pruned_and_counted():
    w, _ = make_layer(12, 256)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(5))
    dead = [0, 3, 130, 131, 132, 255]
    x[:, dead] = 0
    hessian = Hessian(256)
    hessian.add(x)
    pruned, mask, report = sparsegpt(w, hessian)
    assert report.dead_columns == 6 and report.attempts == [(0.01, "float32", "ok")]
    assert not pruned[:, dead].any() and not pruned.isnan().any()
    assert not mask[:, dead].any()
    expected, expected_mask, _ = transcribe(w, hessian.matrix)
    assert_same_pruning(pruned, mask, expected, expected_mask)
    assert_pattern(mask, 2, 4)
    # More dead columns in a group than pruned ones: ties go to the higher columns, as ever.
    alive = torch.zeros(256, 256)
    alive[1, 1] = 1.0
    mask = sparsegpt(w, alive)[1]
    assert mask[:, :8].tolist() == [[False, True, False, True, False, False, True, True]] * 12


def check_ties(device, backend):
    """With H = I the mask is that of the magnitudes, and of equal ones the higher column."""
    eye = torch.eye(8, device=device)
    pruned, mask, _ = sparsegpt(torch.ones(3, 8, device=device), eye, backend=backend)
    assert mask.tolist() == [[False, False, True, True] * 2] * 3
    assert torch.equal(pruned, mask.float())
    zeros = sparsegpt(torch.full((3, 8), -0.0, device=device), eye, backend=backend)
    assert torch.equal(zeros[1], mask) and zeros[2].relative_error == 0.0
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0], device=device)
    w = torch.cartesian_prod(*[levels] * 4).view(128, 8)  # every group over the four levels
    pruned, mask, _ = sparsegpt(w, eye, backend=backend)
    assert torch.equal(mask, magnitude_mask(w)) and torch.equal(pruned, w * mask)


def test_ties_go_to_the_higher_column():
    check_ties("cpu", "torch")


def test_non_contiguous_weight_and_gradients():
    w, hessian = make_layer(12, 64)
    strided = w.t().contiguous().t().requires_grad_()
    pruned, mask, _ = sparsegpt(strided, hessian)
    assert torch.equal(pruned, sparsegpt(w, hessian)[0]) and not pruned.requires_grad
    assert torch.equal(strided.detach(), w) and torch.equal(mask, pruned != 0)
    empty, empty_mask, report = sparsegpt(w[:0], hessian)
    assert empty.shape == empty_mask.shape == (0, 64) and report.relative_error == 0.0


def test_blocksize_and_threads_change_nothing_but_rounding():
    w, hessian = make_layer(16, 256)
    pruned, mask, _ = sparsegpt(w, hessian)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for blocksize in (4, 100, 512):
            other, other_mask, _ = sparsegpt(w, hessian, blocksize=blocksize)
            assert torch.get_num_threads() == 2
            assert_same_pruning(other, other_mask, pruned, mask)
    finally:
        torch.set_num_threads(threads)


def test_damping_steps_are_tenfold_up_to_one():
    assert damping_steps(0.01) == pytest.approx([0.01, 0.1, 1.0])
    assert damping_steps(0.003) == pytest.approx([0.003, 0.03, 0.3, 1.0])
    assert damping_steps(0) == pytest.approx([0.0, 0.01, 0.1, 1.0])
    assert damping_steps(2.5) == [2.5]


def test_indefinite_hessian_raises_the_damping_and_says_so():
    w, hessian = make_layer(12, 256)
    basis, _ = torch.linalg.qr(torch.randn(256, 256, generator=torch.Generator().manual_seed(2)))
    spectrum = torch.linspace(0.5, 1.5, 256)
    spectrum[7] = -0.05  # more negative than damping 0.01, less than 0.1
    h = basis * spectrum @ basis.t()
    pruned, mask, report = sparsegpt(w, h)
    assert (report.damp, report.dtype) == (pytest.approx(0.1), "float32")
    assert [(round(d, 6), t) for d, t, _ in report.attempts] == [
        (0.01, "float32"),
        (0.1, "float32"),
    ]
    assert "Cholesky of H stopped at column" in report.attempts[0][2]
    assert report.attempts[1][2] == "ok"
    expected, expected_mask, _ = transcribe(w, h, damp=0.1)
    assert_same_pruning(pruned, mask, expected, expected_mask)
    assert (pruned[mask] != w[mask]).any()  # not the identity in place of the inverse


def test_rank_deficient_hessian_without_damping():
    """Fewer tokens than features and damp=0: only the ladder makes it invertible."""
    w, hessian = make_layer(12, 256, tokens=16)
    pruned, mask, report = sparsegpt(w, hessian, damp=0)
    assert report.attempts[0][:2] == (0.0, "float32") and report.attempts[0][2] != "ok"
    assert (report.damp, report.attempts[-1][2]) == (0.01, "ok")
    expected, expected_mask, _ = transcribe(w, hessian.matrix, damp=0.01)
    assert_same_pruning(pruned, mask, expected, expected_mask)


@pytest.mark.parametrize("scale", [1e-39, 3e37])
def test_hessian_beyond_float32_is_inverted_in_float64(scale):
    """Its inverse, or its trace, overflows float32 at every damping."""
    w, hessian = make_layer(12, 64)
    h = hessian.matrix / hessian.matrix.diagonal().max() * scale
    h.diagonal().clamp_(min=scale / 4)
    pruned, mask, report = sparsegpt(w, h)
    assert [t for _, t, _ in report.attempts] == ["float32"] * 3 + ["float64"]
    assert (report.damp, report.dtype) == (0.01, "float64")
    expected, expected_mask, _ = transcribe(w, h)
    assert_same_pruning(pruned, mask, expected, expected_mask)


def test_hopeless_hessian_is_an_error_that_lists_every_attempt():
    w = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="positive definite") as caught:
        sparsegpt(w, -torch.eye(8))
    for step in (
        "damp 0.01 in float32",
        "damp 1 in float32",
        "damp 0.1 in float64",
        "damp 1 in float64",
    ):
        assert step in str(caught.value)


def test_overflow_of_the_updated_weights_is_an_error():
    h = torch.eye(4)
    h[0, 1] = h[1, 0] = 0.99
    w = torch.tensor([[0.0, 60000.0, 50000.0, 0.0]]).half()
    mask = torch.tensor([[True, False, True, False]])
    w[0, 2] = 60000.0
    h[1, 2] = h[2, 1] = 0.1
    h[0, 2] = h[2, 0] = 0.0
    with pytest.raises(RuntimeError, match="finite in torch.float16"):
        sparsegpt(w, h, mask=mask)


W, EYE = torch.randn(4, 8), torch.eye(8)


@pytest.mark.parametrize(
    "arguments, exception, text",
    [
        (dict(w=torch.randn(8)), ValueError, r"shape \[8\]"),
        (dict(w=torch.ones(4, 8, dtype=torch.int8)), TypeError, "int8"),
        (dict(w=torch.empty(4, 0)), ValueError, "in_features >= 1"),
        (dict(w=torch.tensor([[1.0, math.nan, 0.0, 0.0]])), ValueError, "nan at row 0, column 1"),
        (dict(w=torch.tensor([[1.0, 0.0, math.inf, 0.0]])), ValueError, "inf at row 0, column 2"),
        (dict(w=torch.randn(4, 6)), ValueError, "in_features = 6"),
        (dict(pattern=(4, 4)), ValueError, "1 <= n < m"),
        (dict(pattern=4), ValueError, r"pattern \(n, m\), .* got 4"),
        (dict(blocksize=6), ValueError, r"blocksize % 4 == 0 .* blocksize = 6"),
        (dict(blocksize=0), ValueError, "blocksize >= 1"),
        (dict(damp=-0.1), ValueError, "damp >= 0"),
        (dict(damp=math.nan), ValueError, "damp >= 0"),
        (dict(mask=torch.ones(4, 8)), TypeError, "float32"),
        (dict(mask=torch.ones(4, 4, dtype=torch.bool)), ValueError, r"\[4, 4\]"),
        (
            dict(mask=torch.ones(4, 8, dtype=torch.bool), score=lambda w, d: w),
            ValueError,
            "not both",
        ),
        (dict(score=lambda w, d: w[:, :2]), ValueError, r"shape \(4, 4\), got \(4, 2\)"),
        (dict(score=lambda w, d: 1.0), ValueError, "float"),
        (dict(score=lambda w, d: w * math.nan), ValueError, "NaN at row 0, column 0"),
        (dict(hessian=Hessian(8)), ValueError, "one with none"),
        (dict(hessian=torch.eye(4)), ValueError, r"shape \[4, 4\]"),
        (dict(hessian=EYE * math.nan), ValueError, "NaN or Inf in column 0"),
        (dict(hessian=EYE.to("meta")), ValueError, "meta"),
        (dict(backend="cuda"), ValueError, "'cuda'"),
        (dict(backend="triton", pattern=(1, 4)), NotImplementedError, r"pattern \(2, 4\)"),
    ],
)
def test_errors(arguments, exception, text):
    arguments = {"w": W, "hessian": EYE} | arguments
    with pytest.raises(exception, match=text):
        sparsegpt(arguments.pop("w"), arguments.pop("hessian"), **arguments)


def test_triton_is_refused_without_a_gpu_or_the_interpreter():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs the Triton interpreter")
    with pytest.raises(NotImplementedError, match="w is on cpu"):
        sparsegpt(W, EYE, backend="triton")


def compare_triton_with_torch(device):
    """The kernel against the torch sweep: tails in rows and columns, ties, dead columns."""
    for out_features, in_features, blocksize in ((37, 164, 128), (16, 64, 32), (1, 12, 128)):
        w, hessian = make_layer(out_features, in_features, tokens=2 * in_features)
        h = hessian.matrix.clone()
        h[5], h[:, 5] = 0.0, 0.0
        w, h = w.to(device), h.to(device)
        options = {"blocksize": blocksize}
        expected, expected_mask, oracle = sparsegpt(w, h, backend="torch", **options)
        pruned, mask, report = sparsegpt(w, h, backend="triton", **options)
        assert (report.backend, oracle.backend) == ("triton", "torch")
        assert_pattern(mask, 2, 4)
        assert torch.equal(mask[:, :4], expected_mask[:, :4])  # no rounding before the first group
        assert torch.equal(pruned != 0, mask)
        assert_same_pruning(pruned, mask, expected, expected_mask)
        assert abs(report.loss - oracle.loss) <= 1e-3 * oracle.loss
        assert abs(report.relative_error / oracle.relative_error - 1) <= 1e-3
    check_ties(device, "triton")


def test_triton_kernel_through_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton")
    code = (
        "from python_tests.prune import test_sparsegpt; "
        "test_sparsegpt.compare_triton_with_torch('cpu')"
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
@needs_gpu
def test_triton_kernel_on_the_gpu():
    pytest.importorskip("triton")
    compare_triton_with_torch("cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["torch", None])
def test_gpu_agrees_with_cpu(backend):
    w, hessian = make_layer(300, 576)
    on_gpu = hessian.matrix.cuda()
    expected, expected_mask, cpu_report = sparsegpt(w, hessian)
    pruned, mask, report = sparsegpt(w.cuda(), on_gpu, backend=backend)
    assert_pattern(mask.cpu(), 2, 4)
    # Rounding differs between the devices, so a near tie may send a row another way.
    same = (mask.cpu() == expected_mask).all(dim=1)
    assert float(same.float().mean()) > 0.9
    torch.testing.assert_close(pruned.cpu()[same], expected[same], rtol=1e-3, atol=1e-4)
    assert report.relative_error == pytest.approx(cpu_report.relative_error, rel=1e-3)
    again, again_mask, _ = sparsegpt(w.cuda(), on_gpu, backend=backend)
    assert torch.equal(again, pruned) and torch.equal(again_mask, mask)
