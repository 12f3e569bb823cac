"""Numbers at the edge of a type, arguments of another kind, and torch's process-wide defaults."""

import pytest
import torch
from torch import nn

import sparsekern as sk


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_smallest_integer_is_the_largest_magnitude(dtype):
    low = torch.iinfo(dtype).min
    mask = sk.prune.magnitude_mask(
        torch.tensor([[low, 1, -2, 3], [0, low, low + 1, 1]], dtype=dtype)
    )
    assert mask.tolist() == [[True, False, False, True], [False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_unsigned_integers_are_ranked(dtype):
    w = torch.tensor([[1, torch.iinfo(dtype).max, 0, 3]]).to(dtype)
    for mask in (sk.prune.magnitude_mask(w), sk.prune.nm_mask(w)):
        assert mask.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    "given, error, text",
    [
        ([1.0], TypeError, "as a Tensor, got list"),
        (torch.ones(4, 8).to_sparse(), NotImplementedError, "a dense {}, got a tensor of layout"),
        (torch.ones(4, 8, device="meta"), ValueError, "{} with data, got a meta tensor"),
    ],
)
def test_what_is_no_dense_tensor_with_data(given, error, text):
    h = torch.eye(8)
    for name, call in (
        ("x", lambda: sk.prune.Hessian(8).add(given)),
        ("dense", lambda: sk.prune.Hessian(8).add(torch.ones(4, 8), given)),
        ("w", lambda: sk.prune.magnitude_mask(given)),
        ("act_norm", lambda: sk.prune.wanda_mask(h, given)),
        ("scores", lambda: sk.prune.nm_mask(given)),
        ("w", lambda: sk.prune.sparsegpt(given, h)),
    ):
        if not isinstance(given, list) or name in ("x", "dense"):
            with pytest.raises(error, match=text.format(name)):
                call()
    with pytest.raises(NotImplementedError, match="a dense hessian"):
        sk.prune.sparsegpt(h, h.to_sparse())


def test_a_hessian_merged_with_itself_has_its_inputs_twice():
    h, twice, x = sk.prune.Hessian(8), sk.prune.Hessian(8), torch.randn(5, 8)
    h.add(x)
    for _ in range(2):
        twice.add(x)
    assert h.merge(h) is h and h.samples == twice.samples == 2
    torch.testing.assert_close(h.matrix, twice.matrix)
    with pytest.raises(TypeError, match="merge: expected another Hessian, got Tensor"):
        h.merge(h.matrix)


def test_wanda_scores_beyond_float32_keep_the_right_columns():
    w, norm = torch.tensor([[1e30, 3e30, 2e30, 1.0]]), torch.full((4,), 1e20)
    assert sk.prune.wanda_mask(w, norm).tolist() == [[False, True, True, False]]
    close = 1 + torch.tensor([[3e-12, 2e-12, 1e-12, 0.0]], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    assert sk.prune.wanda_mask(close, ones).tolist() == [[True, True, False, False]]


def test_a_hessian_that_is_none():
    w, h = torch.randn(4, 8), torch.eye(8)
    with pytest.raises(TypeError, match="real floating-point Hessian, got torch.complex64"):
        sk.prune.sparsegpt(w, h.to(torch.complex64))
    h[0, 1] = 0.5
    with pytest.raises(ValueError, match="a symmetric Hessian, got a difference of 0.5"):
        sk.prune.sparsegpt(w, h)


@pytest.mark.parametrize("wrong", [None, [[1.0, 2.0, 3.0, 4.0]], 1.5])
def test_python_objects_where_a_tensor_belongs(wrong):
    for function in (sk.compress, sk.prune_compress, sk.prune.magnitude_mask):
        with pytest.raises(TypeError, match="expected w(:| as) a [Tt]ensor, got "):
            function(wrong)


def test_a_weight_without_data():
    with pytest.raises(ValueError, match="w with data, got a meta tensor"):
        sk.compress(torch.empty(4, 8, device="meta"))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_linear_does_not_depend_on_torchs_defaults(default):
    w24, x = sk.prune_compress(torch.randn(8, 16)), torch.randn(3, 16, requires_grad=True)
    expected = sk.linear(x, w24)
    torch.set_default_dtype(default)
    try:
        y = sk.linear(x, w24)
        y.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, expected) and x.grad.dtype == torch.float32
    with torch.device("meta"):
        assert torch.equal(sk.linear(x.detach(), w24), expected)


def test_perplexity_of_a_model_that_scores_some_rows_alone():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

        def forward(self, ids):
            return self.head(self.embedding(ids))[:1]

    ids = torch.randint(0, 32, (256,))
    with pytest.raises(
        ValueError, match=r"logits of shape \[4, 64, vocabulary\], got \(1, 64, 32\)"
    ):
        sk.perplexity(Some(), ids, window=64, batch_size=4)
