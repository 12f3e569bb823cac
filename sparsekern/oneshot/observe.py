"""A forward pass for the sake of hooks: every batch through the blocks of a model, on a device that
need not hold the whole model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.devices import home_of, looked, visiting
from sparsekern.oneshot.discovery import find_blocks
from sparsekern.oneshot.sequential import Walk, probe

Hook = Callable[[nn.Module, tuple[Any, ...]], None]  # before a layer's forward
WHOLE_BYTES = 4 * 2**30  # a model of at most these goes to the device as a whole


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: list[Batch],
    device: torch.device,
    hooks: Mapping[nn.Module, Hook],
    whole_bytes: int = WHOLE_BYTES,
) -> None:
    """Run every block of the model on every batch on `device`; hooks: called with these layers and
    their arguments, which change nothing of the model. It is where it was afterwards.

    A larger model than `whole_bytes` whose blocks are a chain is walked block by block: the device
    holds one block and the hidden states (on the host where they are large), and what stands behind
    the blocks is not run.
    """
    home = home_of(model)
    _, blocks = find_blocks(model)
    size = sum(p.nbytes for p in model.parameters())
    if home != device and blocks and size > whole_bytes:
        look = functools.partial(probe, model, blocks, [], batches[0].probe(), home)
        shown = looked(blocks, device, look)
        if shown.chained:
            walk = Walk(model, blocks, batches, shown, device, home, None)
            for _ in walk.capture():
                pass
            for index, block in enumerate(blocks):
                with visiting(block, device), _registered(hooks):
                    for _ in walk.block(index, keep=index + 1 < len(blocks)):
                        pass
            return
    with visiting(model, device), _registered(hooks):
        for batch in batches:
            batch.run(model, device)


@contextlib.contextmanager
def _registered(
    hooks: Mapping[nn.Module, Hook],
) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
