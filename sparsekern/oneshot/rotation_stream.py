"""The residual stream of a pre-norm decoder: what reads and writes it, and what its readers and
writers are given (rotation.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.oneshot.calibration import Batch
from sparsekern.oneshot.discovery import before_pruning, find_blocks, input_embedding
from sparsekern.oneshot.observe import observe
from sparsekern.utils.exact import exact_float32

OP = "sparsekern.rotate"
SKIPPED_POSITIONS = 4  # of a sequence: attention sinks
OUTLIER = 3.0  # times the median norm: such tokens are left out, too


@dataclass
class Stream:
    """The residual stream of a model: what reads and writes it.

    norms: (RMSNorm, the Linears that read its output), the final one with the head included.
    writers: Linears whose output is added to the stream.   embedding: makes its first value.
    heads: (v, o, number of key-value heads, values per head) of each attention.
    """

    embedding: nn.Embedding
    norms: list[tuple[Any, list[nn.Linear]]] = field(default_factory=list)
    writers: list[nn.Linear] = field(default_factory=list)
    heads: list[tuple[nn.Linear, nn.Linear, int, int]] = field(default_factory=list)


def find_stream(model: nn.Module, probe: Batch, home: torch.device) -> Stream:
    """What reads and writes the residual stream, seen in one short forward call.

    Raises:
        ValueError: there is no such stream, with what stands in the way.
    """
    name = type(model).__name__
    embedding = input_embedding(model)
    remedy = before_pruning(model, "rotation")
    check(
        isinstance(embedding, nn.Embedding), OP, f"{name} with an nn.Embedding", embedding, remedy
    )
    assert isinstance(embedding, nn.Embedding)
    _, blocks = find_blocks(model)
    check(blocks, OP, f"{name} with decoder blocks", "none", remedy)
    width = embedding.weight.shape[1]
    made: dict[int, nn.Module] = {}  # address of a tensor's memory -> the norm that made it
    held: list[Tensor] = []  # so that no memory is used twice
    readers: dict[int, list[nn.Linear]] = {}
    norms: dict[int, nn.Module] = {}
    order: list[nn.Linear] = []

    def after_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        made[_memory(output)] = module
        held.append(output)
        norms.setdefault(id(module), module)

    def before_linear(module: nn.Linear, args: tuple[Any, ...]) -> None:
        norm = made.get(_memory(args[0])) if args else None
        if norm is not None:
            readers.setdefault(id(norm), []).append(module)
        else:
            order.append(module)

    handles = []
    for module in model.modules():
        if _is_rms_norm(module, width):
            handles.append(module.register_forward_hook(after_norm))
        elif type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(before_linear))
    try:
        probe.run(model, home)
    finally:
        for handle in handles:
            handle.remove()
    stream = Stream(embedding)
    found = [m for m in norms.values() if id(m) in readers]
    lonely = [m for m in norms.values() if id(m) not in readers]
    check(
        found and not lonely,
        OP,
        f"every norm of {name} to be read by linear layers alone",
        f"{type(lonely[0]).__name__} that is not" if lonely else "no RMSNorm",
        remedy,
    )
    stream.norms = [(norm, readers[id(norm)]) for norm in found]
    inside = {id(m) for block in blocks for m in block.modules()}
    stream.writers = [m for m in order if id(m) in inside and m.out_features == width]
    others = [m for m in order if id(m) in inside and m.out_features != width]
    check(
        len(stream.writers) == 2 * len(blocks) and not others,
        OP,
        f"two layers in each block of {name} that add to the stream",
        f"{len(stream.writers)} in {len(blocks)} blocks, and {len(others)} other layers",
        remedy,
    )
    stream.heads = _find_heads(model, blocks)
    return stream


def _memory(tensor: Tensor) -> int:
    """The same for a tensor and a slice of it, such as the last positions that a head reads."""
    return tensor.untyped_storage().data_ptr()


def _is_rms_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "RMSNorm" in type(module).__name__
        and isinstance(weight, Tensor)
        and weight.shape == (width,)
        and getattr(module, "bias", None) is None
    )


def _find_heads(
    model: nn.Module, blocks: list[nn.Module]
) -> list[tuple[nn.Linear, nn.Linear, int, int]]:
    """v and o of each attention that has them as layers of their own, else nothing."""
    config = getattr(model, "config", None)
    count = getattr(config, "num_attention_heads", None)
    kv = getattr(config, "num_key_value_heads", None) or count
    heads = []
    for block in blocks:
        for module in block.modules():
            v, o = getattr(module, "v_proj", None), getattr(module, "o_proj", None)
            if type(v) is nn.Linear and type(o) is nn.Linear and kv and count:
                size = v.out_features // kv
                if size * kv == v.out_features and size * count == o.in_features:
                    heads.append((v, o, kv, size))
    return heads if len(heads) == len(blocks) else []


def tied_head(model: nn.Module, stream: Stream) -> nn.Linear | None:
    for _, readers in stream.norms:
        for module in readers:
            if module.weight is stream.embedding.weight:
                return module
    return None


def collect_grams(
    model: nn.Module, stream: Stream, batches: list[Batch], device: torch.device
) -> dict[int, Tensor]:
    """XᵀX / tokens of the inputs of the first reader of each norm in the blocks, of o and of down,
    by id of the module, in float32 on `device`; outlying tokens left out."""
    grams: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0][..., SKIPPED_POSITIONS:, :].flatten(0, -2)
        x = x.to(device).float()
        norms = x.norm(dim=1)
        x = x[norms <= OUTLIER * norms.median()]
        with exact_float32(device):
            grams[id(module)] = grams.get(id(module), 0) + x.t() @ x
        counts[id(module)] = counts.get(id(module), 0) + len(x)

    watched = [readers[0] for _, readers in stream.norms[:-1]] + stream.writers
    observe(model, batches, device, dict.fromkeys(watched, hook))
    return {key: gram / max(1, counts[key]) for key, gram in grams.items()}
