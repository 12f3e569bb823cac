"""Weights as Masked holds them: in wrappers, in shards of several processes, masks as bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsekern.nn.wrappers import is_dtensor


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer that takes the steps of a wrapper, under whatever name it is there:
    `.optimizer` (accelerate, a schedule of rates), `.base_optimizer` (SAM, Lookahead). One that has
    a part of its wrapper's Parameters alone (ZeRO) is not it."""
    while True:
        held = getattr(optimizer, "__dict__", {}).values()
        inner = [one for one in held if isinstance(one, Optimizer)]
        whole = not hasattr(optimizer, "param_groups") or any(
            _parameters(one) == _parameters(optimizer) for one in inner
        )
        if len(inner) != 1 or not whole:
            return optimizer
        optimizer = inner[0]


def _parameters(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def local(tensor: Tensor) -> Tensor:
    """The shard of this process, sharing memory; a plain tensor as it is."""
    if is_dtensor(tensor):
        shard_of: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return shard_of
    return tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that belongs to this process' shard of `like`."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placed = tensor.to(mesh.device_type)
    # Every process has the whole tensor: nothing is sent.
    return local(distribute_tensor(placed, mesh, like.placements, src_data_rank=None))  # type: ignore[attr-defined]


def unshard(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `shard`, gathered from all processes."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor

    bits = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    whole: Tensor = DTensor.from_local(
        bits.to(local(like).device),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()
    return whole.to(tensor.dtype)


def pack_bits(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(elements / 8)], bit b of byte j = element 8j + b."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The inverse of pack_bits."""
    size = list(shape)
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flat = ((packed.view(-1, 1) >> bits) & 1).bool().reshape(-1)
    return flat[: math.prod(size)].view(size)
