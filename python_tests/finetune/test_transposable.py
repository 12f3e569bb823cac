"""Transposable masks against a search over all patterns of a tile."""

import itertools

import pytest
import torch

from sparsekern.finetune.transposable import (
    is_transposable,
    transposable_mask,
    transposable_patterns,
)


def brute_force(tile):
    """The largest total over all 2^16 patterns with sums of exactly 2."""
    best = -float("inf")
    values = tile.double().tolist()
    pairs = list(itertools.combinations(range(4), 2))
    for choice in itertools.product(pairs, repeat=4):
        columns = [sum(c in pair for pair in choice) for c in range(4)]
        if columns == [2, 2, 2, 2]:
            best = max(best, sum(values[r][c] for r, pair in enumerate(choice) for c in pair))
    return best


def test_there_are_ninety_patterns():
    patterns = transposable_patterns()
    assert patterns.shape == (90, 4, 4)
    assert len({tuple(p.flatten().tolist()) for p in patterns}) == 90
    assert (patterns.sum(1) == 2).all() and (patterns.sum(2) == 2).all()


@pytest.mark.parametrize("method", ["best", "greedy"])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "half"])
def test_masks_are_valid_in_both_directions(method, kind, device):
    w = torch.randn(32, 48)
    w = {"normal": w, "ties": w.round(), "zeros": w * 0, "half": w.half()}[kind].to(device)
    mask = transposable_mask(w.abs(), method)
    assert mask.device == w.device and mask.dtype == torch.bool
    for rows in (mask, mask.t()):
        assert (rows.reshape(-1, 4).sum(1) == 2).all()
    assert is_transposable(w * mask)
    assert torch.equal(mask.cpu(), transposable_mask(w.cpu().abs(), method))
    strided = transposable_mask(w.t().abs().contiguous().t(), method)
    assert torch.equal(strided, mask)


def test_best_is_the_best():
    w = torch.randn(8, 12).abs()
    mask = transposable_mask(w)
    for i, j in itertools.product(range(0, 8, 4), range(0, 12, 4)):
        tile = w[i : i + 4, j : j + 4]
        total = float((tile.double() * mask[i : i + 4, j : j + 4]).sum())
        assert total == pytest.approx(brute_force(tile), rel=1e-12)


def test_greedy_keeps_nearly_as_much_and_completes_stuck_tiles():
    w = torch.randn(256, 256).abs()
    best, greedy = transposable_mask(w), transposable_mask(w, "greedy")
    assert float((w * greedy).sum()) > 0.97 * float((w * best).sum())
    # The diagonal block order makes greedy fill 3 x 3 first and leaves the corner: 7 of 8.
    tile = torch.tensor(
        [[9.0, 8.0, 0.1, 0.1], [8.0, 0.1, 9.0, 0.1], [0.1, 9.0, 8.0, 0.1], [0.1, 0.1, 0.1, 0.2]]
    )
    mask = transposable_mask(tile, "greedy")
    assert (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all()
    assert torch.equal(mask, transposable_mask(tile))
    assert not is_transposable(torch.tril(torch.ones(4, 4)))


def test_errors():
    with pytest.raises(ValueError, match="both multiples of 4"):
        transposable_mask(torch.ones(6, 8))
    with pytest.raises(ValueError, match='"best" or "greedy"'):
        transposable_mask(torch.ones(4, 4), "fast")
    with pytest.raises(ValueError, match="NaN at row 1, column 2"):
        scores = torch.ones(4, 4)
        scores[1, 2] = float("nan")
        transposable_mask(scores)
