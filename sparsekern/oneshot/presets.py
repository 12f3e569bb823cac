"""Presets: what prune_model does beyond the layers' own solver, as one table.

A preset fills in what the caller leaves out; an argument that is given wins. Rounds of
reconstruction, a rotation and a permutation need calibration data and a model that allows them.

An epoch over a block takes time in proportion to its weights, of which a large model's block has a
hundred times as many as a small one's. Where the largest block has LARGE or more, a preset's rounds
inside the walk have LARGE_SHARE of their epochs, rounded up: 3 of 5, 5 of 8. The report's options
and its summary say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from sparsekern.errors import check
from sparsekern.oneshot.rounds import Reconstruction

LARGE = 2**27  # weights of a block
LARGE_SHARE = 0.6


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        help: one line, for the command line.
        method: of prune_model.
        rotate: change the basis first, where the architecture allows it (oneshot/rotation.py).
        permute: change the order of channels first, where it does (oneshot/permutation.py).
        rounds: of reconstruction (oneshot/rounds.py).
        samples: calibration windows of 2048 tokens that the command line draws, and whether they
            lie side by side (no token twice) or begin at random places, as published.
    """

    help: str
    method: str = "admm"
    rotate: bool = False
    permute: bool = False
    rounds: tuple[Reconstruction, ...] = ()
    samples: int = 128
    side_by_side: bool = False


PRESETS = {
    "fast": Preset("the layer-wise solver ADMM alone", side_by_side=True),
    "default": Preset(
        "channels in a better order first, and each pruned block by gradient descent on its output "
        "before the next one",
        permute=True,
        rounds=(Reconstruction(span=1, epochs=5),),
        samples=256,
        side_by_side=True,
    ),
    "best": Preset(
        "a rotation first of all, then as by default with more passes over each block",
        rotate=True,
        permute=True,
        rounds=(Reconstruction(span=1, epochs=8),),
        samples=256,
        side_by_side=True,
    ),
}


def find_preset(op: str, name: str | None) -> Preset:
    """The preset of that name; None is no preset: SparseGPT alone.

    Raises:
        ValueError: there is none of that name.
    """
    if name is None:
        return Preset("", "sparsegpt")
    known = isinstance(name, str) and name in PRESETS
    check(known, op, f"preset in {tuple(PRESETS)}", repr(name))
    return PRESETS[name]


def for_blocks(
    round_: Reconstruction, blocks: Iterable[nn.Module]
) -> tuple[Reconstruction, str | None]:
    """A preset's round inside the walk as it is for blocks of this size, and what was changed."""
    size = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    epochs = math.ceil(LARGE_SHARE * round_.epochs)
    if size < LARGE or epochs == round_.epochs:
        return round_, None
    text = f"{epochs} of {round_.epochs} epochs of reconstruction: a block has {size:,} weights"
    return replace(round_, epochs=epochs), text
