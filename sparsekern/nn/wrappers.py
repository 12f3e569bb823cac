"""What torch.compile, DistributedDataParallel and their like put around a model or its parts: the
names of layers, and the model that a config builds, are those inside. FSDP and DTensor leave only a
shard of each weight in a process."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsekern.errors import check
from sparsekern.nn.replace import replace_module

_KEYS = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile, of checkpoint_wrapper
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers of torch.compile, (Distributed)DataParallel, AveragedModel and
    activation checkpointing, one in the other; any other module as it is."""
    if isinstance(model, torch.jit.ScriptModule):
        return model
    found = (model._modules.get(key) for key in _KEYS)
    inner = next((module for module in found if module is not None), None)
    if inner is None and isinstance(model, _WRAPPERS):
        inner = model.module
    return model if inner is None else unwrapped(inner)


def named_modules(model: nn.Module, every: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules() of the model without wrappers around it or its parts. every: under each
    name that a module has, not under the first alone."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        inner = unwrapped(module)
        if inner in seen:
            return
        seen.add(inner)
        yield name, inner
        for key, child in inner._modules.items():
            if child is not None:
                yield from walk(f"{name}.{key}" if name else key, child)
        if every:
            seen.remove(inner)

    return walk("", model)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a torch.distributed DTensor, asked without importing that."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def whole(op: str, model: nn.Module) -> nn.Module:
    """`unwrapped`, of a model that has all of its weights.   ValueError: it is sharded."""
    inner = unwrapped(model)
    expected = "a model with whole weights"
    remedy = (
        "Do this before it is sharded, or to a whole model that has loaded get_model_state_dict("
        "sharded, options=StateDictOptions(full_state_dict=True)), of "
        "torch.distributed.checkpoint.state_dict."
    )
    for name, module in inner.named_modules():
        held = type(module).__name__ == "FullyShardedDataParallel"
        held = held or any(is_dtensor(p) for p in module.parameters(recurse=False))
        check(not held, op, expected, f"shards of FSDP or DTensors in {name or 'it'}", remedy)
    return inner


def bare(model: nn.Module) -> nn.Module:
    """A model without wrappers around it or its parts: of the modules above such a wrapper shallow
    copies, the others themselves."""
    made: dict[nn.Module, nn.Module] = {}

    def view(module: nn.Module) -> nn.Module:
        if module not in made:
            inner = unwrapped(module)
            children = {k: None if m is None else view(m) for k, m in inner._modules.items()}
            if any(m is not children[k] for k, m in inner._modules.items()):
                inner = copy.copy(inner)
                inner._modules = children
            made[module] = inner
        return made[module]

    return view(model)


@contextlib.contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Within: a model that is `unwrapped` has no wrappers around its parts, either. Afterwards they
    are back, around what stands in those places then. For what changes a model by names."""
    places = [
        (parent, key, child)
        for parent in list(model.modules())
        if unwrapped(parent) is parent
        for key, child in parent._modules.items()
        if child is not None and unwrapped(child) is not child
    ]
    for parent, key, child in places:
        parent._modules[key] = unwrapped(child)
    try:
        yield
    finally:
        for parent, key, child in places:
            before, now = unwrapped(child), parent._modules[key]
            parent._modules[key] = child
            if now is not None and now is not before:
                replace_module(child, before, now)
