"""The specification: every op in float64 and a few lines, with no thought of speed.

Tests, docstrings and fake kernels point here. Layout words: w is [out_features, in_features],
in_features a multiple of 4; a *group* is 4 consecutive columns of a row; *values* are the two
stored elements of each group in column order; *metadata* has one nibble idx0 | idx1 << 2 per group,
the lower group in the low nibble of its byte, and 0x4 in the unused nibble of an odd row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def nm_mask(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """True for the n largest of every m consecutive scores; of equal ones the higher column.

    The tie rule is that of the published SparseGPT and Wanda code on CUDA, see prune/masks.py.
    """
    groups = scores.double().reshape(-1, m)
    rising = groups.sort(dim=1, stable=True).indices  # of equal scores the lower column comes first
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(1, rising[:, m - n :], True)
    return kept.view_as(scores)


def stored_slots(nonzero: list[int]) -> tuple[int, int]:
    """The two columns stored for a group, given its non-zero columns (at most two, ascending).

    Free slots follow compressed-tensors 0.14.0, whose files are then byte for byte the same.
    """
    if len(nonzero) == 2:
        return nonzero[0], nonzero[1]
    return {(): (2, 3), (0,): (0, 2), (1,): (1, 3), (2,): (2, 3), (3,): (2, 3)}[tuple(nonzero)]


def compress(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w * mask -> values [out, in/2] float64 and metadata uint8 [out, ceil(in/8)]; -0.0 -> +0.0."""
    dense = w.double() if mask is None else torch.where(mask, w.double(), 0.0)
    out_features, in_features = w.shape
    values = torch.zeros(out_features, in_features // 2, dtype=torch.float64)
    metadata = torch.full((out_features, (in_features + 7) // 8), 0x44, dtype=torch.uint8)
    for row in range(out_features):
        for group in range(in_features // 4):
            four = dense[row, 4 * group : 4 * group + 4].tolist()
            slots = stored_slots([column for column in range(4) if four[column] != 0])
            for slot, column in enumerate(slots):
                values[row, 2 * group + slot] = four[column] + 0.0
            shift = 4 * (group % 2)
            byte = int(metadata[row, group // 2]) & ~(0xF << shift)
            metadata[row, group // 2] = byte | (slots[0] | slots[1] << 2) << shift
    return values, metadata


def decompress(values: Tensor, metadata: Tensor, in_features: int) -> Tensor:
    """values + metadata -> dense [out, in] float64, by indexing."""
    out_features, groups = values.shape[0], in_features // 4
    nibbles = torch.stack((metadata & 0xF, metadata >> 4), dim=2).long()
    nibbles = nibbles.reshape(out_features, -1)[:, :groups]
    dense = torch.zeros(out_features, groups, 4, dtype=torch.float64, device=values.device)
    pairs = values.double().reshape(out_features, groups, 2)
    dense.scatter_(2, torch.stack((nibbles & 3, nibbles >> 2), dim=2), pairs)
    return dense.reshape(out_features, in_features)


def fp8_numbers() -> Tensor:
    """The 253 numbers of e4m3fn in float64, ascending: ±m/8 · 2^e; at most 448, no infinity."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
    numbers = torch.tensor(positive, dtype=torch.float64)
    return torch.cat((-numbers[1:].flip(0), numbers))


def quantize(w: Tensor, scale: Tensor, storage: str, group: int = 0) -> Tensor:
    """The levels nearest to w / scale, a float32 quotient; ties to even, saturating; float64.

    w is [out, in], scale [out, ceil(in / group)] (group 0: one a row), storage "fp8", "int8" or
    "int4" with levels up to ±448, in -127..127 and in -8..7. The kept numbers are the non-zeros.
    """
    ratio = (w.float() / column_scales(scale, w.shape[1], group).float()).double()
    if storage != "fp8":
        low, top = {"int8": (-127, 127), "int4": (-8, 7)}[storage]
        return ratio.round().clamp(low, top)
    numbers = fp8_numbers().to(w.device)
    above = torch.searchsorted(numbers, ratio).clamp(1, len(numbers) - 1)
    below, distance = above - 1, numbers[above] + numbers[above - 1] - 2 * ratio
    even = torch.where((above - len(numbers) // 2) % 2 == 0, above, below)  # of the mantissa
    return numbers[torch.where(distance == 0, even, torch.where(distance < 0, above, below))] + 0.0


def dequantize(levels: Tensor, scale: Tensor, group: int = 0) -> Tensor:
    """levels * scale in float64: [out, in] and scale [out, ceil(in / group)]."""
    return levels.double() * column_scales(scale, levels.shape[1], group)


def column_scales(scale: Tensor, in_features: int, group: int) -> Tensor:
    """scale [out, groups] -> float64 [out, in], that of every dense column."""
    return scale.double().repeat_interleave(group or in_features, dim=1)[:, :in_features]


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(x @ w.T + bias) in float64: x [..., in], dense w [out, in], bias [out]."""
    y = x.double() @ w.double().T
    if bias is not None:
        y = y + bias.double()
    return ACTIVATIONS[activation](y)


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) in float64: x [..., in], dense gate and up [out, in]."""
    return linear(x, gate, activation="silu") * linear(x, up)
