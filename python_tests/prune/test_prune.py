"""Masks and Hessians: every rule against a brute-force statement of it."""

import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch

from sparsekern.prune import Hessian, magnitude_mask, nm_mask, relative_error, wanda_mask
from sparsekern.prune import hessian as hessian_module
from sparsekern.utils.exact import exact_float32

PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (5, 7), (70, 140)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def brute_force_mask(scores, n, m):
    """Per group, a stable sort of the columns by rising score, of which the first are pruned."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        values = scores[row].tolist()
        for start in range(0, len(values), m):
            order = sorted(range(start, start + m), key=lambda j: values[j])
            mask[row, order[m - n :]] = True
    return mask


def tied_scores(rows, columns, dtype=torch.float32, seed=0):
    """Scores with many ties, both zeros and both infinities."""
    choice = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf]).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    return choice[torch.randint(len(choice), (rows, columns), generator=generator)]


@pytest.mark.parametrize("n, m", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nm_mask_is_a_stable_sort(n, m, dtype):
    for scores in (tied_scores(13, 6 * m, dtype), torch.randn(13, 6 * m).to(dtype)):
        mask = nm_mask(scores, n, m)
        assert mask.dtype == torch.bool and mask.is_contiguous()
        assert torch.equal(mask, brute_force_mask(scores, n, m))


def test_24_keeps_the_best_of_the_six_pairs_for_every_order_and_tie():
    """All 4^4 groups over four levels: the kept sum is the best, the pair the last such one."""
    groups = torch.tensor(list(itertools.product([0.0, 1.0, 2.0, 3.0], repeat=4)))
    mask = nm_mask(groups)
    pairs = list(itertools.combinations(range(4), 2))
    seen = set()
    for group, kept in zip(groups.tolist(), mask.tolist()):
        best = max(reversed(pairs), key=lambda pair: group[pair[0]] + group[pair[1]])
        assert [j for j in range(4) if kept[j]] == list(best)
        seen.add(best)
    assert seen == set(pairs)


def test_ties_go_to_the_higher_column_and_minus_zero_is_zero():
    """As in the published code on CUDA: topk(largest=False) prunes the lower column first."""
    assert nm_mask(torch.zeros(1, 8)).tolist() == [[False, False, True, True] * 2]
    assert nm_mask(torch.tensor([[0.0, -0.0, 0.0, -0.0]])).tolist() == [[False, False, True, True]]
    assert nm_mask(torch.tensor([[7.0, 7.0, 7.0, 0.0]])).tolist() == [[False, True, True, False]]
    assert magnitude_mask(torch.tensor([[-3.0, 3.0, -3.0, 1.0]])).tolist() == [
        [False, True, True, False]
    ]
    assert wanda_mask(
        torch.tensor([[2.0, -1.0, 2.0, 1.0]]), torch.tensor([1.0, 2.0, 1.0, 2.0])
    ).tolist() == [[False, False, True, True]]


def test_masks_of_integer_and_8_bit_weights():
    scores = torch.tensor([[3, -128, 127, 5], [0, 0, 0, 1]], dtype=torch.int8)
    assert nm_mask(scores).tolist() == [[False, False, True, True]] * 2
    assert magnitude_mask(scores).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]
    eighth = torch.tensor([[0.5, -2.0, 1.0, -0.25]])
    assert torch.equal(magnitude_mask(eighth.to(torch.float8_e4m3fn)), magnitude_mask(eighth))


def test_masks_of_non_contiguous_empty_and_batched_weights():
    base = tied_scores(24, 16)
    for view in (base.t(), base[::2, 4:12], base.flip(0)):
        packed = view.clone(memory_format=torch.contiguous_format)
        assert torch.equal(nm_mask(view), nm_mask(packed))
    assert nm_mask(torch.empty(0, 8)).shape == (0, 8)
    assert nm_mask(torch.empty(3, 0)).shape == (3, 0)
    experts = torch.randn(3, 5, 8)
    assert torch.equal(nm_mask(experts)[1], nm_mask(experts[1]))


def test_masks_do_not_modify_their_input():
    w, norm = torch.randn(4, 8, requires_grad=True), torch.rand(8)
    before = w.detach().clone()
    for mask in (nm_mask(w), magnitude_mask(w), wanda_mask(w, norm)):
        assert not mask.requires_grad
    assert torch.equal(w, before)


def test_wanda_scores_are_weight_times_norm():
    w = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    assert wanda_mask(w, torch.tensor([10.0, 10.0, 1.0, 1.0])).tolist() == [
        [True, True, False, False]
    ]
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(9, 24, generator=generator).bfloat16()
    norm = torch.rand(24, generator=generator)
    expected = brute_force_mask(w.double().abs() * norm.double(), 2, 4)
    assert torch.equal(wanda_mask(w, norm), expected)
    assert not torch.equal(expected, magnitude_mask(w))


@pytest.mark.parametrize(
    "call, exception, text",
    [
        (lambda: nm_mask(torch.randn(2, 6)), ValueError, r"in_features % 4 == 0.*in_features = 6"),
        (lambda: nm_mask(torch.randn(2, 8), 4, 4), ValueError, r"1 <= n < m, got \(4, 4\)"),
        (lambda: nm_mask(torch.randn(2, 8), 0, 4), ValueError, r"1 <= n < m, got \(0, 4\)"),
        (lambda: nm_mask(torch.randn(2, 8), 2.0, 4), ValueError, r"integers"),
        (lambda: nm_mask(torch.tensor(1.0)), ValueError, r"scalar"),
        (lambda: nm_mask(torch.zeros(2, 8, dtype=torch.complex64)), TypeError, r"complex64"),
        (lambda: magnitude_mask(torch.zeros(2, 8, dtype=torch.complex64)), TypeError, r"complex64"),
        (lambda: wanda_mask(torch.randn(2, 8), torch.rand(4)), ValueError, r"act_norm.*\[4\]"),
        (lambda: wanda_mask(torch.randn(2, 8), -torch.rand(8) - 1), ValueError, r"negative"),
        (lambda: wanda_mask(torch.randn(2, 8), torch.rand(8, device="meta")), ValueError, r"meta"),
        (
            lambda: wanda_mask(torch.zeros(2, 8), torch.full((8,), math.inf)),
            ValueError,
            r"NaN at row 0, column 0 \(16 of 16",
        ),
    ],
)
def test_mask_errors(call, exception, text):
    with pytest.raises(exception, match=text):
        call()


def test_nan_is_refused_by_position():
    w = torch.randn(5, 12)
    w[3, 7] = math.nan
    for call in (nm_mask, magnitude_mask, lambda w: wanda_mask(w, torch.ones(12))):
        with pytest.raises(ValueError, match=r"NaN at row 3, column 7 \(1 of 60 elements\)"):
            call(w)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("n, m", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_agree_between_cpu_and_gpu(n, m, dtype):
    norm = torch.rand(64 * m)
    for scores in (tied_scores(70, 64 * m, dtype), torch.randn(70, 64 * m).to(dtype)):
        assert torch.equal(nm_mask(scores, n, m), nm_mask(scores.cuda(), n, m).cpu())
        assert torch.equal(magnitude_mask(scores, n, m), magnitude_mask(scores.cuda(), n, m).cpu())
        w = scores.nan_to_num(posinf=3.0, neginf=-3.0)
        assert torch.equal(wanda_mask(w, norm, n, m), wanda_mask(w.cuda(), norm.cuda(), n, m).cpu())


def one_shot(xs, sequences):
    x = torch.cat([x.double().reshape(-1, x.shape[-1]) for x in xs])
    return 2 / sequences * x.t() @ x


def assert_close_to(h, expected):
    """Within float32 rounding of sums whose terms are bounded by the diagonal."""
    bound = expected.diagonal().sqrt()
    assert bool(((h.cpu().double() - expected).abs() <= 2e-6 * bound[:, None] * bound).all())


@pytest.mark.parametrize("in_features", [24, 600])
def test_running_hessian_equals_one_shot(in_features):
    """600 columns: several blocks of the symmetric update, and a last one that is not full."""
    generator = torch.Generator().manual_seed(0)
    xs = [
        torch.randn(*lead, in_features, generator=generator)
        for lead in ((2, 7), (5, 3), (11,), (1, 20), (4, 1, 2))
    ]
    hessian = Hessian(in_features)
    for i, x in enumerate(xs):
        before = x.clone()
        hessian.add(x)
        assert torch.equal(x, before)
        assert hessian.samples == [2, 7, 8, 9, 13][i]
        assert torch.equal(hessian.matrix, hessian.matrix.t())  # read between two updates as well
    expected = one_shot(xs, 13)
    assert_close_to(hessian.matrix, expected)
    norm = (expected.diagonal() / 2).sqrt()
    torch.testing.assert_close(hessian.act_norm, norm.float(), rtol=2e-6, atol=0)


def test_hessian_counts_two_and_three_dimensions_as_published():
    x = torch.randn(6, 8)
    flat, batched, single = Hessian(8), Hessian(8), Hessian(8)
    flat.add(x)
    batched.add(x.view(2, 3, 8))
    single.add(x[0])
    assert (flat.samples, batched.samples, single.samples) == (1, 2, 1)
    torch.testing.assert_close(flat.matrix, 2 * x.t() @ x)
    torch.testing.assert_close(batched.matrix, x.t() @ x)
    torch.testing.assert_close(single.matrix, 2 * torch.outer(x[0], x[0]))


def test_hessian_of_16_bit_and_empty_inputs():
    x = torch.randn(3, 5, 8).bfloat16().requires_grad_()
    hessian = Hessian(8)
    hessian.add(x[:0])
    hessian.add(x[:, :0])
    assert hessian.samples == 0 and not hessian.matrix.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hessian.add(x)
    assert hessian.matrix.dtype == torch.float32 and not hessian.matrix.requires_grad
    assert_close_to(hessian.matrix, one_shot([x.detach()], 3))
    assert "in_features=8, samples=3" in repr(hessian)
    clone = copy.deepcopy(hessian)
    clone.add(x)
    assert (hessian.samples, clone.samples) == (3, 6)


@pytest.mark.parametrize("in_features", [24, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_products_give_the_same_h_and_drift(monkeypatch, in_features, dtype):
    """The way of a GPU, with a float32 product in the place of the tensor cores'; where the dense
    inputs have another dtype, and parts of the blocks alone."""

    def add(xs, parts=None):
        hessian = Hessian(in_features)
        hessian.parts = parts
        for x, dense in xs:
            hessian.add(x, dense)
        return hessian

    called = []

    def product(a, b):
        assert a.dtype == b.dtype == dtype
        called.append(a.shape[1])
        return a.float().t() @ b.float()

    xs = [torch.randn(*lead, in_features).to(dtype) for lead in ((2, 7), (5, 3), (11,))]
    pairs = [(x, x + (0.1 * torch.randn(x.shape)).to(dtype)) for x in xs]
    plain, matched = add([(x, None) for x in xs]), add(pairs)
    part = add(pairs, {256}) if in_features == 600 else None
    monkeypatch.setattr(hessian_module, "sums_in_float32", lambda device, kind: kind == dtype)
    monkeypatch.setattr(hessian_module, "product16", product)
    monkeypatch.setattr(hessian_module, "TOKENS", 4)  # several parts, the last a shorter one
    fast = add([(x, None) for x in xs])
    assert called and torch.equal(fast.matrix, fast.matrix.t())
    assert_close_to(fast.matrix, one_shot(xs, 8))
    torch.testing.assert_close(fast.matrix, plain.matrix, rtol=1e-5, atol=1e-5)
    fast = add(pairs)
    torch.testing.assert_close(fast.matrix, plain.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.drift, matched.drift, rtol=1e-4, atol=1e-5)
    if part is not None:
        some = add(pairs, {256})
        torch.testing.assert_close(some._h, part._h, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(some.drift, part.drift, rtol=1e-4, atol=1e-5)
    count = len(called)
    other = add([(x, dense.float()) for x, dense in pairs])
    assert len(called) == count
    torch.testing.assert_close(other.drift, matched.drift)


def test_hessian_errors():
    with pytest.raises(ValueError, match="in_features >= 1, got 0"):
        Hessian(0)
    with pytest.raises(ValueError, match=r"x.shape\[-1\] == 8, got x of shape \[2, 7\]"):
        Hessian(8).add(torch.randn(2, 7))
    with pytest.raises(TypeError, match="int64"):
        Hessian(8).add(torch.zeros(2, 8, dtype=torch.int64))


def test_relative_error_is_the_ratio_of_outputs():
    w, x = torch.randn(6, 8), torch.randn(2, 9, 8)
    pruned = w * magnitude_mask(w)
    hessian = Hessian(8)
    hessian.add(x)
    lost, whole = (float((v @ x.view(-1, 8).t()).square().sum()) for v in (w - pruned, w))
    assert relative_error(w, pruned, hessian) == pytest.approx(lost / whole, rel=1e-5)
    tiny = hessian.matrix * 1e-38
    assert relative_error(w, pruned, tiny) == pytest.approx(lost / whole, rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(w, pruned, hessian) == pytest.approx(lost / whole, rel=1e-5)
    assert relative_error(w, w, hessian) == 0.0
    zero = torch.zeros_like(w)
    assert relative_error(zero, zero, hessian) == 0.0
    assert relative_error(zero, w, hessian) == math.inf


def test_relative_error_refuses_what_does_not_fit():
    w = torch.randn(6, 8)
    with pytest.raises(ValueError, match="one shape"):
        relative_error(w, w[:5], torch.eye(8))
    with pytest.raises(ValueError, match="one with none"):
        relative_error(w, w, Hessian(8))
    with pytest.raises(ValueError, match=r"shape \[8, 8\].*shape \[4, 4\]"):
        relative_error(w, w, torch.eye(4))
    with pytest.raises(ValueError, match="Hessian on cpu"):
        relative_error(w, w, torch.eye(8, device="meta"))
    bad = torch.eye(8)
    bad[2, 5] = bad[5, 2] = math.inf
    with pytest.raises(ValueError, match="NaN or Inf in column 2"):
        relative_error(w, w, bad)


_SWITCHES = """
import torch
from sparsekern.utils.exact import exact_float32
cuda = torch.backends.cuda.matmul
mkldnn = torch.backends.mkldnn.matmul

def seen(read):
    try:
        return read()
    except RuntimeError:
        return "refused"

def state():
    return [seen(lambda: cuda.fp32_precision), seen(lambda: mkldnn.fp32_precision),
            seen(lambda: torch.backends.fp32_precision), seen(torch.get_float32_matmul_precision)]

def set_new(cuda_value, mkldnn_value, everywhere):
    cuda.fp32_precision, mkldnn.fp32_precision = cuda_value, mkldnn_value
    torch.backends.fp32_precision = everywhere

def old_flag():
    cuda.allow_tf32 = True

settings = [lambda: None, old_flag]
settings += [lambda p=p: torch.set_float32_matmul_precision(p)
             for p in ("medium", "high", "highest")]
settings += [lambda v=v: set_new(*v) for v in (("tf32", "none", "none"), ("none", "bf16", "none"),
             ("none", "none", "tf32"), ("ieee", "none", "tf32"), ("tf32", "bf16", "ieee"))]
changed = 0
for apply in settings:
    apply()
    before = state()
    with exact_float32("cpu"):
        inside = state()
        assert inside[0] in ("none", "ieee") and inside[1] in ("none", "ieee"), (before, inside)
        changed += inside != before
    assert state() == before, (before, state())
assert changed >= 6, changed
"""


def test_exact_float32_restores_every_setting():
    """In a process of its own: torch refuses some mixtures of its old and new switches."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the old switches only")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SWITCHES],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr


def test_exact_float32_restores_after_an_error():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), exact_float32("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hessian_of_16_bits_on_gpu_has_float32_sums(dtype):
    assert hessian_module.sums_in_float32(torch.device("cuda", 0), dtype)
    xs = [torch.rand(2, 700, 300).to(dtype).cuda() for _ in range(3)]
    hessian, matched = Hessian(300, "cuda:0"), Hessian(300, "cuda:0")
    for x in xs:
        hessian.add(x)
        matched.add(x, x / 2)
    expected = one_shot([x.cpu() for x in xs], 6).float().cuda()
    torch.testing.assert_close(hessian.matrix, expected, rtol=3e-5, atol=0)
    torch.testing.assert_close(matched.drift, expected * -0.5, rtol=3e-4, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_hessian_on_gpu_is_true_float32():
    x = torch.randn(4, 512, 256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        hessian = Hessian(256, "cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hessian.add(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_close_to(hessian.matrix, one_shot([x], 4))
