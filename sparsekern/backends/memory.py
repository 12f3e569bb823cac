"""Whether memory that a call takes may stay allocated after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

depth = 0  # calls under way in `nothing_kept`


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """For calls within a registered op: no memory that they take stays allocated.

    torch.compile(mode="reduce-overhead") records ops in CUDA graphs whose memory pool it owns, and
    refuses tensors in it that it does not know.
    """
    global depth
    depth += 1
    try:
        yield
    finally:
        depth -= 1
