"""Patterns: text, equality, units; masks and SparseGPT in pairs against all six choices."""

import copy
import itertools
import math
import pickle

import pytest
import torch

import sparsekern as sk
from sparsekern.prune import (
    Hessian,
    Pattern,
    magnitude_mask,
    nm_mask,
    refine,
    sparsegpt,
    wanda_mask,
)

PAIRS = Pattern.of("4:8 in pairs")
# The six ways to keep two of four pairs, as bool [6, 8].
SIX = torch.tensor(
    [[column // 2 in kept for column in range(8)] for kept in itertools.combinations(range(4), 2)]
)


def best_of_six(scores):
    """Of each 8 columns the two pairs of largest sum of float64 scores; ties to higher pairs."""
    groups = scores.double().reshape(-1, 8)
    totals = groups @ SIX.double().t()
    # Later choices keep higher pairs: of equal totals the last one is taken.
    best = len(SIX) - 1 - totals.flip(1).argmax(1)
    return SIX[best].view(scores.shape)


def test_pattern_is_its_tuple_and_pairs_are_none():
    assert Pattern.of("2:4") == (2, 4) == Pattern(2, 4) and hash(Pattern(2, 4)) == hash((2, 4))
    assert str(Pattern(1, 4)) == "1:4" and repr(Pattern(4, 8)) == "(4, 8)"
    for text in ("4:8 in pairs", "4:8-in-pairs", "4:8 pairs", " 4:8-pairs "):
        assert Pattern.of(text) == PAIRS == Pattern(4, 8, 2)
    assert PAIRS != (4, 8) and (4, 8) != PAIRS and PAIRS != Pattern(4, 8)
    assert str(PAIRS) == "4:8 in pairs" and tuple(PAIRS) == (4, 8) and PAIRS.in_units() == (2, 4)
    for pattern in (PAIRS, Pattern(2, 4)):
        assert Pattern.of(pattern.described()) == pattern
        for same in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
            assert same == pattern and same.unit == pattern.unit
    assert torch.equal(PAIRS.choices(), SIX)
    assert len(Pattern(2, 4).choices()) == 6 and Pattern(1, 4).choices().sum(1).tolist() == [1] * 4


@pytest.mark.parametrize(
    "pattern, text",
    [
        ("4:8 in threes", r"\"n:m in pairs\", got '4:8 in threes'"),
        ("8:4", r"1 <= n < m, got \(8, 4\)"),
        ("3:8 in pairs", "multiples of 2 columns, got 3:8"),
        ((2, 4, 2), r"got \(2, 4, 2\)"),
        ((2.0, 4), "integers"),
    ],
)
def test_what_is_no_pattern_is_said(pattern, text):
    with pytest.raises(ValueError, match=f"^sparsekern.prune.sparsegpt: expected .*{text}"):
        sparsegpt(torch.randn(4, 8), torch.eye(8), pattern=pattern)


def test_masks_in_pairs_are_the_best_of_six():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 40, generator=generator)
    norm = torch.rand(40, generator=generator)
    coarse = torch.randint(0, 3, (64, 40), generator=generator).float()  # ties everywhere
    for scores in (w, coarse, coarse.bfloat16()):
        assert torch.equal(nm_mask(scores, 4, 8, 2), best_of_six(scores))
    for weight in (w, coarse, coarse.to(torch.int8), w.to(torch.float8_e4m3fn)):
        mask = magnitude_mask(weight, 4, 8, 2)
        assert torch.equal(mask, best_of_six(weight.double().square()))
    mask = wanda_mask(w, norm, 4, 8, 2)
    assert torch.equal(mask, best_of_six((w.double() * norm.double()).square()))
    assert not torch.equal(mask, magnitude_mask(w, 4, 8, 2))
    assert mask.view(-1, 8).sum(1).eq(4).all() and not PAIRS.broken(mask).any()
    assert Pattern(2, 4).broken(mask).any()  # in general not 2:4
    halves = magnitude_mask(w)
    assert PAIRS.broken(halves).any() and not Pattern(2, 4).broken(halves).any()
    assert PAIRS.most(halves) > 4 and PAIRS.most(w) == 8
    huge = torch.tensor([[3e30, 0.0, 1e30, 1e30, 2e30, 2e30, 0.0, 0.0]])
    assert magnitude_mask(huge, 4, 8, 2).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_mistakes_of_masks_in_pairs():
    with pytest.raises(
        ValueError, match=r"in_features % 8 == 0 for pattern 4:8 in pairs, got .*12"
    ):
        magnitude_mask(torch.randn(2, 12), 4, 8, 2)
    with pytest.raises(ValueError, match=r"unit in \(1, 2\), got 4"):
        nm_mask(torch.randn(2, 8), 4, 8, 4)
    with pytest.raises(ValueError, match="sums of pairs of scores without NaN"):
        nm_mask(torch.tensor([[math.inf, -math.inf, 0, 0, 0, 0, 0, 0]]), 4, 8, 2)


def oracle(w, h, damp=0.01):
    """SparseGPT in pairs by explicit inverses in float64: at each group the two pairs are dropped
    that, of the six choices, cost least in sum, a pair costing min ‖δX‖² over changes δ of itself
    and of the columns to its right that make it zero."""
    w, h = w.double().clone(), h.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    kept = torch.zeros(w.shape, dtype=torch.bool)
    for begin in range(0, w.shape[1], 8):
        costs = []
        for column in range(begin, begin + 8, 2):
            block = torch.linalg.inv(h[column:, column:])[:2, :2]
            pair = w[:, column : column + 2]
            costs.append((pair @ torch.linalg.inv(block) * pair).sum(1))
        dropped = (torch.stack(costs, 1) @ (~SIX[:, ::2]).double().t()).argmin(1)
        kept[:, begin : begin + 8] = SIX[dropped]
        for column in range(begin, begin + 8):
            row = torch.linalg.inv(h[column:, column:])[0]
            error = w[:, column] * ~kept[:, column] / row[0]
            w[:, column:] -= error[:, None] * row
    return w * kept, kept


@pytest.mark.parametrize("columns, blocksize", [(8, 128), (40, 8), (40, 128)])
def test_sparsegpt_in_pairs_is_the_best_of_six(columns, blocksize):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    w = torch.randn(24, columns, generator=generator)
    hessian = Hessian(columns)
    hessian.add(x)
    pruned, mask, report = sparsegpt(w, hessian, pattern="4:8 in pairs", blocksize=blocksize)
    expected, kept = oracle(w, hessian.matrix)
    assert torch.equal(mask, kept) and report.backend == "torch"
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)
    # The pairs are scored together: the sum of the columns' own scores chooses others.
    _, apart, _ = sparsegpt(
        w, hessian, pattern=PAIRS, blocksize=blocksize, score=lambda a, d: a.square() / d.square()
    )
    assert not PAIRS.broken(apart).any() and (columns == 8 or not torch.equal(apart, mask))
    better = refine(w, pruned, mask, hessian)
    error = sk.prune.relative_error
    assert error(w, better, hessian) < error(w, pruned, hessian)
    assert error(w, pruned, hessian) < error(w, w * magnitude_mask(w, 4, 8, 2), hessian)


def test_sparsegpt_in_pairs_wants_groups_of_8():
    w, h = torch.randn(4, 12), torch.eye(12)
    with pytest.raises(ValueError, match="in_features % 8 == 0 for pattern 4:8 in pairs"):
        sparsegpt(w, h, pattern=PAIRS)
    with pytest.raises(ValueError, match="blocksize % 8 == 0 .* blocksize = 4"):
        sparsegpt(torch.randn(4, 8), torch.eye(8), pattern=PAIRS, blocksize=4)
    with pytest.raises(NotImplementedError, match=r"pattern \(2, 4\)"):
        sparsegpt(torch.randn(4, 8), torch.eye(8), pattern=PAIRS, backend="triton")
