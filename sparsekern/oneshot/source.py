"""Where the weights of a model's blocks are that is too large to be in memory as a whole.

prune_model asks a Source for a block when its stage begins and hands it back when it ends; what has
become of it is in the resume folder by then. checkpoint/stream.py has the one that reads a folder.
"""

from __future__ import annotations

import contextlib
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Source(Protocol):
    """The blocks of a model, which are on meta while nobody needs them."""

    def holds(self, module: nn.Module) -> bool:
        """Whether this module lies in a block, so that its weights may be absent."""
        ...

    def present(
        self, block: nn.Module, device: torch.device
    ) -> contextlib.AbstractContextManager[None]:
        """Within: the block's weights are in memory, on `device`. At its end they are gone, those
        of layers that have become SparseLinear, too."""
        ...

    def lazily(self) -> contextlib.AbstractContextManager[None]:
        """Within: each block has its weights while it is called."""
        ...

    def fingerprint(self) -> str:
        """What changes when a weight does."""
        ...
