"""World: the processes of a data-parallel run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class World:
    """The processes of a data-parallel run; one of one without torchrun."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device | str | None) -> World:
        """The processes that torchrun started, or this one alone; its device is made current."""
        cuda = torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if parallel else 0
        size = torch.distributed.get_world_size() if parallel else 1
        if device is None or (size > 1 and cuda):
            index = int(os.environ.get("LOCAL_RANK", "0"))
            chosen = torch.device("cuda", index) if cuda else torch.device("cpu")
        else:
            chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", chosen.index or 0)
            torch.cuda.set_device(chosen)
        return cls(rank, size, chosen)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def same(self, number: float) -> float:
        """The first process' number, on all."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(value, 0)
        return float(value)

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.size
        return values

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process' tensor, on all of them."""
        if self.size == 1:
            return [tensor]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, tensor)
        return found

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()
