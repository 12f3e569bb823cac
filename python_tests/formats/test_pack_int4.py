"""int4 in layout "tile64": the bytes of the drawing, and the way back."""

import pytest
import torch

from python_tests.linear_cases import random_weight
from python_tests.tile64_by_formula import tiles
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import compress, of_levels
from sparsekern.formats.tile64 import pack, packable, scale_group, unpack

# (out_features, in_features), with what each is there for.
SHAPES = (
    (7, 4),  # one group of 4 columns
    (64, 256),  # one whole tile
    (65, 260),  # one row and one group past it
    (200, 132),  # a row group of four panels, the last ragged
    (330, 520),  # a last row group of two panels
)


def weight(shape, group):
    w = random_weight(*shape, torch.float32, integers=True)
    plain, spec = compress(w), WeightSpec.of(shape, "int4", dtype=torch.bfloat16, group=group)
    count = -(-shape[1] // spec.group)
    scale = 2.0 ** (torch.arange(shape[0] * count).view(shape[0], count) % 3 - 1)
    return w, of_levels(spec, plain.values, scale, plain.metadata)


@pytest.mark.parametrize("group", [64, 128, 1024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_the_drawing_and_has_an_inverse(shape, group):
    w, w24 = weight(shape, group)
    packed = pack(w24)
    of_metadata = scale_group(w24.spec)
    assert of_metadata == (group if group < shape[1] else 0)
    values, metadata = tiles(w, "int4", of_metadata, w24.tensors["weight_scale"])
    assert torch.equal(packed.values, values) and torch.equal(packed.metadata, metadata)
    assert packed.tensors["weight_scale"] is w24.tensors["weight_scale"]
    back = unpack(packed)
    assert back.spec is w24.spec
    assert all(torch.equal(back.tensors[name], w24.tensors[name]) for name in w24.tensors)
    assert torch.equal(packed.to_dense(), w24.to_dense())


def test_other_groups_do_not_fit():
    _, w24 = weight((64, 256), 32)
    assert not packable(w24) and packable(weight((64, 256), 64)[1])
    with pytest.raises(TypeError, match="int4 in groups of 64 or 128.*got int4, group 32"):
        pack(w24)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_empty_weights(shape):
    _, w24 = weight(shape, 128)
    packed = pack(w24)
    assert packed.values.shape == (0, 4096) and unpack(packed).values.shape == w24.values.shape
