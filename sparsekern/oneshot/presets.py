"""Presets: what prune_model does beyond the layers' own solver, as one table.

A preset fills in what the caller leaves out; an argument that is given wins. Rounds of
reconstruction and a rotation need a model that is a chain of decoder blocks, and calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.errors import check
from sparsekern.oneshot.rounds import Reconstruction


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        help: one line, for the command line.
        rotate: change the basis first, where the architecture allows it (oneshot/rotation.py).
        rounds: of reconstruction (oneshot/rounds.py).
        samples: calibration windows of 2048 tokens that the command line draws, and whether they
            lie side by side (no token twice) or begin at random places, as published.
    """

    help: str
    rotate: bool = False
    rounds: tuple[Reconstruction, ...] = ()
    samples: int = 128
    side_by_side: bool = False


PRESETS = {
    "fast": Preset("the layer-wise solver alone"),
    "default": Preset(
        "then each block by gradient descent on its output, before the next one is pruned",
        rounds=(Reconstruction(span=1, epochs=5),),
        samples=256,
        side_by_side=True,
    ),
    "best": Preset(
        "a rotation first, each block as by default, then all blocks together for longer",
        rotate=True,
        rounds=(
            Reconstruction(span=1, epochs=8),
            Reconstruction(span=None, epochs=10, between=1.0, recut=True, batch=4),
        ),
        samples=256,
        side_by_side=True,
    ),
}


def find_preset(op: str, name: str | None) -> Preset:
    """The preset of that name; None is no preset.

    Raises:
        ValueError: there is none of that name.
    """
    if name is None:
        return Preset("")
    known = isinstance(name, str) and name in PRESETS
    check(known, op, f"preset in {tuple(PRESETS)}", repr(name))
    return PRESETS[name]
