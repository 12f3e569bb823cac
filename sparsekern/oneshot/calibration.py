"""Calibration data: whatever the caller has becomes batches, and batches become Hessians by hooks
on the Linear layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sparsekern.errors import check
from sparsekern.oneshot.discovery import Layer, is_transformers
from sparsekern.prune import Hessian

OP = "sparsekern.prune_model"
# Tokens per forward when batch_size is not given: large enough to fill an accelerator, small enough
# for a CPU's caches.
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}
PROBE_TOKENS = 16


@dataclass
class Batch:
    """One forward call of the model: model(*args, **kwargs)."""

    args: tuple
    kwargs: dict
    samples: int
    tokens: int

    def run(self, model: nn.Module, device: torch.device):
        return model(*move(self.args, device), **move(self.kwargs, device))

    def probe(self) -> Batch:
        """A short version of a batch of token ids: one sample, at most PROBE_TOKENS tokens. Other
        batches as they are."""
        ids = self.kwargs.get("input_ids")
        if ids is None or set(self.kwargs) - {"input_ids", "use_cache"}:
            return self
        return Batch((), {**self.kwargs, "input_ids": ids[:1, :PROBE_TOKENS]}, 1, PROBE_TOKENS)


def make_batches(
    calibration, model: nn.Module, batch_size: int | None, device: torch.device
) -> list[Batch]:
    """Turn whatever the caller has into batches.

    Args:
        calibration: for a Transformers model token ids, int64 [samples, tokens] or a list of such
            or of 1-D tensors (equal lengths are batched together), or an iterable of keyword dicts,
            each one batch. For a plain module a tensor (split along dim 0) or an iterable of
            tensors, tuples or dicts, each one batch.
        batch_size: samples per forward; None: as many as TOKENS_PER_BATCH holds, at least one.
        device: where the forwards run, for the default batch size.
    Raises:
        ValueError: no samples, ids outside the vocabulary, batch_size < 1.
        TypeError: ids that are not integers.
    """
    check(
        batch_size is None or batch_size >= 1,
        OP,
        "batch_size >= 1",
        batch_size,
        "Leave it out for the default.",
    )
    items = [calibration] if isinstance(calibration, torch.Tensor) else list(calibration)
    check(
        len(items) > 0,
        OP,
        "calibration with at least one sample",
        "none",
        "Pass token ids [samples, tokens].",
    )
    budget = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "cuda"]
    if is_transformers(model) and not isinstance(items[0], dict):
        return _token_batches(items, model, batch_size, budget)
    if isinstance(calibration, torch.Tensor):
        check(
            calibration.dim() > 0 and len(calibration),
            OP,
            "calibration [samples, ...]",
            tuple(calibration.shape),
        )
        per_sample = max(
            1, calibration[0].numel() // (calibration.shape[-1] if calibration.dim() > 2 else 1)
        )
        size = batch_size or max(1, budget // (per_sample if calibration.dim() > 2 else 1))
        items = list(calibration.split(size))
    return [_plain_batch(item, is_transformers(model)) for item in items]


def _token_batches(
    items: list, model: nn.Module, batch_size: int | None, budget: int
) -> list[Batch]:
    rows: list[torch.Tensor] = []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for item in items:
        ids = torch.as_tensor(item)
        integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        check(
            integer,
            OP,
            "integer token ids as calibration",
            ids.dtype,
            "Tokenise the text first.",
            TypeError,
        )
        shape = tuple(ids.shape)
        check(
            ids.dim() in (1, 2) and ids.numel(),
            OP,
            "token ids [samples, tokens]",
            shape,
            "Reshape the calibration.",
        )
        low, high = int(ids.min()), int(ids.max())
        check(
            low >= 0 and high < vocabulary,
            OP,
            f"token ids within the vocabulary, 0..{vocabulary - 1}",
            f"{low}..{high}",
            "Use the model's own tokenizer.",
        )
        rows.extend(ids.to(torch.int64).reshape(-1, ids.shape[-1]).unbind())
    batches: list[Batch] = []
    while rows:
        length = len(rows[0])
        size = batch_size or max(1, budget // length)
        count = next(
            (i for i, row in enumerate(rows[:size]) if len(row) != length), min(size, len(rows))
        )
        ids = torch.stack(rows[:count])
        batches.append(Batch((), {"input_ids": ids, "use_cache": False}, count, ids.numel()))
        rows = rows[count:]
    return batches


def _plain_batch(item, transformers: bool) -> Batch:
    kwargs = dict(item) if isinstance(item, dict) else {}
    args = () if kwargs else tuple(item) if isinstance(item, (tuple, list)) else (item,)
    if transformers:
        kwargs["use_cache"] = False
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    check(
        tensors,
        OP,
        "a tensor in every calibration batch",
        type(item).__name__,
        "Pass tensors, tuples or dicts.",
        TypeError,
    )
    first = tensors[0]
    samples = first.shape[0] if first.dim() else 1
    tokens = (
        first.numel() if not first.is_floating_point() else first.numel() // max(1, first.shape[-1])
    )
    return Batch(args, kwargs, samples, tokens)


def digest(batches: Iterable[Batch]) -> str:
    """sha256 over all tensors of the calibration, row by row, so that it does not depend on the
    batch size."""
    sha = hashlib.sha256()
    for batch in batches:
        for value in (*batch.args, *batch.kwargs.values()):
            if isinstance(value, torch.Tensor):
                host = value.detach().cpu().contiguous()
                for row in host if host.dim() > 1 else [host]:
                    sha.update(f"{row.dtype}{tuple(row.shape)}".encode())
                    sha.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def move(value, device: torch.device):
    """`value` with every tensor inside tuples, lists and dicts on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if type(value) in (tuple, list):
        return type(value)(move(v, device) for v in value)
    return {k: move(v, device) for k, v in value.items()} if type(value) is dict else value


# -------------------------------------------------------------------------------- Hessians by hooks


class SharingChanged(Exception):
    """Layers that shared their input in the first batch did not in a later one."""


class HessianCollector:
    """Hooks on Linear layers that add every input to a Hessian; layers that read one tensor share
    one Hessian.

    q, k and v (or gate and up) receive the same tensor object. They form a group: the first of
    them, the leader, adds the input, the others only check that it is the leader's. Call
    `end_batch` after each batch; when a group turns out not to hold, SharingChanged is raised and
    the caller starts again with share=False. Inputs that pass while `watches_dense` is set are
    the dense model's: each goes into the Hessian with the input of the same call that follows. A
    layer that gets only some of a batch's tokens (an expert) may get others in the dense model, so
    its Hessian is made without.

    Args:
        layers: layers to watch.
        device: where the Hessians live.
        share: False gives every layer its own.
    Attributes:
        hessians: layer name -> Hessian, shared within a group. Layers that were never called are
            absent.
    """

    def __init__(self, layers: list[Layer], device: torch.device, share: bool = True):
        self.layers, self.device, self.share = layers, device, share
        self.hessians: dict[str, Hessian] = {}
        self._leader: dict[str, str] = {}  # in order of first call
        self._calls: dict[str, int] = {}  # calls in this batch
        self._seen: dict[
            tuple[int, int], tuple[torch.Tensor, str]
        ] = {}  # holds the tensors, so that no id is reused
        self._first_batch = True
        # Inputs of the dense model in this batch, by layer, in order of the calls.
        self._dense: dict[str, list[torch.Tensor]] = {}
        self._dense_rows = 0  # of the first layer that was called there: the batch's tokens
        self.watches_dense = False  # what runs now is the dense model
        self._handles: list = []

    def __enter__(self) -> HessianCollector:
        for layer in self.layers:
            hook = self._make_hook(layer.name)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def groups(self) -> list[list[str]]:
        """Names of the layers that were called, grouped by input, in order of execution."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def end_batch(self) -> None:
        """Check that the groups held in this batch, and forget its inputs."""
        for name, leader in self._leader.items():
            if self._calls.get(name, 0) != self._calls.get(leader, 0):
                raise SharingChanged(name)
        self._seen.clear()
        self._calls.clear()
        self._dense.clear()
        self._dense_rows = 0
        self._first_batch = False

    def _make_hook(self, name: str):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            if self.watches_dense:
                self._dense.setdefault(name, []).append(x)
                self._dense_rows = self._dense_rows or x.numel() // x.shape[-1]
                return
            key = (id(x), x._version)
            self._calls[name] = self._calls.get(name, 0) + 1
            if self.share and name not in self._leader and self._first_batch and key in self._seen:
                leader = self._seen[key][1]
                if self._calls[leader] == 1:  # its Hessian holds this input and nothing else
                    self._leader[name] = leader
                    self.hessians[name] = self.hessians[leader]
                    return
            leader = self._leader.setdefault(name, name)
            if leader != name:
                if self._seen.get(key, (None, None))[1] != leader:
                    raise SharingChanged(name)
                return
            if name not in self.hessians:
                self.hessians[name] = Hessian(x.shape[-1], self.device)
            self.hessians[name].add(x.to(self.device), self._dense_of(name, x))
            self._seen.setdefault(key, (x, name))

        return hook

    def _dense_of(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """What the dense model fed the layer in this call; None without it, and from the first call
        on that is not of all tokens of the batch."""
        hessian = self.hessians[name]
        if not self._dense_rows or hessian.unmatched:
            return None
        waiting = self._dense.get(name)
        dense = waiting.pop(0) if waiting else None
        rows = x.numel() // x.shape[-1]  # a multiple of the tokens where a layer works on heads
        if dense is None or dense.shape != x.shape or not rows or rows % self._dense_rows:
            hessian.drop_dense()
            return None
        return dense
