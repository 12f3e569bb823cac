"""Quantised weights with every code, and what widening them must give, bit for bit."""

import torch

from python_tests.linear_cases import random_weight
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24, compress, of_levels
from sparsekern.formats.tile64 import pack

E4M3, INT8, INT4 = "float8_e4m3fn", "int8", "int4"
# (storage type, columns that share a scale or 0 for one a row)
KINDS = ((E4M3, 0), (INT8, 0), (INT4, 0), (INT4, 64), (INT4, 128))

# (out_features, in_features), with what each is there for.
SHAPES = (
    (1, 4),  # one group of one row
    (7, 260),  # less than a core matrix; a group past an int4 tile
    (65, 132),  # a row and a group past a tile
    (200, 196),  # four panels, the last ragged; wide tiles that int4 has and 16 bits do not
    (320, 576),  # a second row group, of one panel
    (390, 1156),  # of three, the last ragged
)


def codes(storage):
    """All levels of the type, 0 among them."""
    if storage == INT4:
        return torch.arange(-8.0, 8.0)
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(getattr(torch, storage))
    return every.float()[every.float().isfinite()]


def packed(out_features, in_features, storage, group, dtype, smallest=1e-3, largest=2e-2):
    """A packed weight whose kept values walk through all codes, with random scales in a range."""
    plain = compress(random_weight(out_features, in_features, torch.float32))
    every = codes(storage)
    kept = plain.values
    order = torch.arange(kept.numel()).view(kept.shape)
    levels = every[(order * 7 + order // kept.shape[1]) % len(every)]
    columns = (group or in_features) if storage == INT4 else 0
    spec = WeightSpec.of((out_features, in_features), storage, dtype=dtype, group=columns)
    count = -(-in_features // columns) if columns else 1
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(out_features, count, generator=generator) * (largest - smallest) + smallest
    return pack(of_levels(spec, levels, scale, plain.metadata))


def expected(w24):
    """(values, metadata) of the packed weight of these numbers in 16 bits."""
    rows = w24.rowmajor()
    numbers = rows.numbers(w24.dtype)
    wide = pack(Sparse24(numbers, rows.metadata, tuple(rows.shape)))
    return wide.values, wide.metadata


def assert_widened(widened, w24, what=""):
    """The bytes `widened` are the values, then the metadata."""
    values, metadata = (t.view(torch.uint8).flatten() for t in expected(w24))
    widened = widened.cpu()
    assert widened.numel() == values.numel() + metadata.numel(), what
    for name, got, wanted in (
        ("values", widened[: values.numel()], values),
        ("metadata", widened[values.numel() :], metadata),
    ):
        wrong = (got != wanted).nonzero()
        assert not len(wrong), (
            f"{what}: {len(wrong)} bytes of the {name} are wrong, the first is number "
            f"{wrong[0].item()}: {got[wrong[0]].item()} instead of {wanted[wrong[0]].item()}"
        )


def rounded(v, dtype):
    """float64 in a type of 16 bits, rounded once; torch rounds to float32 on the way."""
    digits, least = {torch.bfloat16: (8, -125), torch.float16: (11, -13)}[dtype]
    exponent = torch.frexp(v).exponent.clamp(min=least) - digits
    return torch.ldexp(torch.ldexp(v, -exponent).round(), exponent).to(dtype)


def numbers_in_registers(w24, dtype):
    """The kept numbers [out, in/2] of int4 with scales of groups, as the narrow kernel widens them
    (csrc/linear/narrow_sm90.cuh, Scale): scale = high + low in 16 bits, level * low rounded, and
    level * high + that rounded once."""
    rows = w24.rowmajor()
    scale = rows.tensors["weight_scale"].float().repeat_interleave(rows.spec.group // 2, 1)
    scale = scale[:, : rows.shape[1] // 2]
    levels = (rows.numbers(torch.float32) / scale).round()
    high = scale.to(dtype)
    low = (scale - high.float()).to(dtype)
    rest = (levels * low.float()).to(dtype)
    return rounded(levels.double() * high.double() + rest.double(), dtype)
