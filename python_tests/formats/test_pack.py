"""Layout "tile64": packing against a slow transcription of the drawing, and the way back."""

import pytest
import torch

from python_tests.linear_cases import random_weight
from sparsekern import _native
from sparsekern.errors import FormatError
from sparsekern.formats import tile64 as packing
from sparsekern.formats.layouts import WeightSpec, layout
from sparsekern.formats.sparse24 import Sparse24, compress, decompress, verify
from sparsekern.formats.tile64 import pack, packed_shape, unpack
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.prune import magnitude_mask

F16, BF16 = torch.float16, torch.bfloat16

# (out_features, in_features), with what each is there for.
SHAPES = (
    (1, 4),  # one group in one tile
    (64, 64),  # one whole tile
    (65, 68),  # one row and one group past the tile
    (70, 84),  # an odd number of groups: half a byte of padding in the row-major metadata
    (256, 64),  # one whole tile row group
    (257, 128),  # a last tile row group of one panel
    (448, 72),  # a last tile row group of three panels
    (600, 200),  # several of everything, all ragged
)
EMPTY = ((0, 8), (8, 0), (0, 0), (300, 0))


def same(ours, theirs):
    assert tuple(ours.shape) == tuple(theirs.shape) and ours.layout == theirs.layout
    assert torch.equal(ours.values.cpu(), theirs.values.cpu())
    assert torch.equal(ours.metadata.cpu(), theirs.metadata.cpu())


def weight(shape, dtype=BF16):
    return compress(random_weight(*shape, dtype))


def transcription(w24):
    """Values and metadata of "tile64", element by element as csrc/layout/tile64.cuh draws them."""
    out_features, in_features = w24.shape
    panels, k_tiles = -(-out_features // 64), -(-in_features // 64)

    def tile(panel, k_tile):
        row_group = panel // 4
        panels_in_group = min(4, panels - 4 * row_group)
        return 4 * row_group * k_tiles + k_tile * panels_in_group + panel % 4

    values = torch.zeros(panels * k_tiles * 2048, dtype=w24.dtype)
    for row in range(out_features):
        for column in range(in_features // 2):
            r, c = row % 64, column % 32
            byte = c // 8 * 1024 + r // 8 * 128 + r % 8 * 16 + c % 8 * 2
            values[tile(row // 64, column // 32) * 2048 + byte // 2] = w24.values[row, column]

    def nibble(row, group):
        if row >= out_features or group >= in_features // 4:
            return 0x4
        return int(w24.metadata[row, group // 2]) >> 4 * (group % 2) & 0xF

    metadata = bytearray()
    order = sorted((tile(p, k), p, k) for p in range(panels) for k in range(k_tiles))
    for _, panel, k_tile in order:
        for warp in range(4):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                word = 0
                for half in range(2):
                    row = 64 * panel + 16 * warp + g + 8 * half
                    for i in range(4):
                        group = 16 * k_tile + 4 * t + i
                        word |= nibble(row, group) << 16 * half + 4 * i
                metadata += word.to_bytes(4, "little")
    shape = (panels * k_tiles, 2048), (panels * k_tiles, 512)
    packed = torch.frombuffer(metadata, dtype=torch.uint8).view(shape[1])
    return Sparse24(values.view(shape[0]), packed, w24.shape, "tile64")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_the_drawing(shape, device):
    w24 = weight(shape)
    same(pack(w24.to(device)), transcription(w24))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_unpack_is_the_inverse(shape, dtype, device):
    w24 = weight(shape, dtype).to(device)
    packed = pack(w24)
    tiles = -(-shape[0] // 64) * -(-shape[1] // 64)
    assert packed.layout == "tile64" and packed.device.type == device.type
    assert packed.values.shape == (tiles, 2048) and packed.metadata.shape == (tiles, 512)
    same(unpack(packed), w24)
    same(packed.rowmajor(), w24)
    assert pack(packed) is packed and unpack(w24) is w24


EIGHT = ("float8_e4m3fn", "int8")


def eight_bits(shape, storage):
    """(spec, row-major tensors) of a weight of 8-bit values: all bytes but 0, in turn."""
    w24 = weight(shape)
    spec = WeightSpec.of(shape, storage)
    count = w24.values.numel()
    values = (torch.arange(count) * 37 % 251 + 1).to(torch.uint8).view(w24.values.shape)
    return spec, dict(values=values.view(spec.element.storage), metadata=w24.metadata)


def transcription_8(spec, tensors):
    """As `transcription`, at 8 bits: bytes of values, metadata words of one row and two k steps."""
    out_features, in_features = spec.shape
    panels, k_tiles = -(-out_features // 64), -(-in_features // 128)
    rows, nibbles = tensors["values"].view(torch.uint8), tensors["metadata"]

    def tile(panel, k_tile):
        row_group = panel // 4
        panels_in_group = min(4, panels - 4 * row_group)
        return 4 * row_group * k_tiles + k_tile * panels_in_group + panel % 4

    values = torch.zeros(panels * k_tiles, 4096, dtype=torch.uint8)
    for row in range(out_features):
        for column in range(in_features // 2):
            r, c = row % 64, column % 64
            byte = c // 16 * 1024 + r // 8 * 128 + r % 8 * 16 + c % 16
            values[tile(row // 64, column // 64), byte] = rows[row, column]

    def nibble(row, group):
        if row >= out_features or group >= in_features // 4:
            return 0x4
        return int(nibbles[row, group // 2]) >> 4 * (group % 2) & 0xF

    metadata = torch.zeros(panels * k_tiles, 1024, dtype=torch.uint8)
    for panel in range(panels):
        for k_tile in range(k_tiles):
            for step in range(2):
                for thread in range(128):
                    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
                    row = 64 * panel + 16 * warp + g + 8 * (t % 2)
                    first = 32 * k_tile + 16 * step + 8 * (t // 2)
                    word = sum(nibble(row, first + i) << 4 * i for i in range(8))
                    at = step * 512 + thread * 4
                    data = torch.frombuffer(
                        bytearray(word.to_bytes(4, "little")), dtype=torch.uint8
                    )
                    metadata[tile(panel, k_tile), at : at + 4] = data
    return dict(values=values.view(spec.element.storage), metadata=metadata)


def assert_same_bytes(ours, theirs):
    for name in ("values", "metadata"):
        assert ours[name].dtype == theirs[name].dtype and ours[name].is_contiguous()
        assert torch.equal(ours[name].cpu().view(torch.uint8), theirs[name].view(torch.uint8))


@pytest.mark.parametrize("storage", EIGHT)
@pytest.mark.parametrize("shape", (*SHAPES, (130, 388)), ids=str)
def test_pack_of_8_bits_is_the_drawing_and_has_an_inverse(shape, storage, device):
    spec, tensors = eight_bits(shape, storage)
    tile64 = layout("tile64")
    given = {name: tensor.to(device) for name, tensor in tensors.items()} | {"more": device}
    packed = tile64.pack(spec, given)
    assert_same_bytes(packed, transcription_8(spec, tensors))
    assert packed["more"] is device
    packed_spec = spec.with_(layout="tile64")
    tile64.check("test", packed_spec, packed)
    with pytest.raises(FormatError, match="metadata of shape"):
        tile64.check("test", packed_spec, {**packed, "metadata": packed["metadata"][:, :512]})
    assert_same_bytes(tile64.unpack(packed_spec, packed), tensors)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_weights_of_8_bits(shape, device):
    spec, tensors = eight_bits(shape, "int8")
    packed = layout("tile64").pack(spec, {n: t.to(device) for n, t in tensors.items()})
    assert packed["values"].shape == (-(-shape[0] // 64) * -(-shape[1] // 128), 4096)
    assert_same_bytes(layout("tile64").unpack(spec.with_(layout="tile64"), packed), tensors)


def test_8_bit_tiles_are_the_operands_of_the_tensor_cores():
    """A product computed from the packed bytes by the fragments of the PTX ISA, thread by thread.

    mma.sp m16n8k64 and wgmma.sp m64nNk64, "Register fragments" and "Sparse matrix storage": of
    warp w, lane 4g + t holds of row g (and g + 8) the kept columns 4t..4t+3 and 16+4t..19+4t of 32;
    the metadata of row g + 8h, dense k 32j..32j+31, is in lane 4g + h + 2j.
    """
    shape = (70, 300)
    spec, tensors = eight_bits(shape, "int8")
    packed = layout("tile64").pack(spec, tensors)
    panels, k_tiles = packed_shape(*shape, 8)
    dense = torch.zeros(panels * 64, k_tiles * 128, dtype=torch.int64)
    for panel in range(panels):
        for k_tile in range(k_tiles):
            tile = k_tile * panels + panel  # one row group
            values = packed["values"][tile].view(4, 8, 8, 16)  # chunk, row group, row, byte
            words = packed["metadata"][tile].view(torch.int32).view(2, 4, 32)
            for step in range(2):
                for warp in range(4):
                    for lane in range(32):
                        g, t = lane // 4, lane % 4
                        for register in range(4):
                            half, right = register % 2, register // 2
                            kept = [16 * right + 4 * t + i for i in range(4)]
                            row = 16 * warp + g + 8 * half
                            for column in kept:
                                chunk, byte = 2 * step + column // 16, column % 16
                                value = values[chunk, row // 8, row % 8, byte]
                                group = column // 2  # of 4 dense columns, 0..15
                                word = int(words[step, warp, 4 * g + half + 2 * (group // 8)])
                                nibble = word >> 4 * (group % 8) & 0xF
                                index = nibble >> 2 * (column % 2) & 3
                                k = k_tile * 128 + step * 64 + group * 4 + index
                                dense[panel * 64 + row, k] += int(value)
    expected = torch.zeros_like(dense)
    for row in range(shape[0]):
        for column in range(shape[1] // 2):
            nibble = int(tensors["metadata"][row, column // 4]) >> 4 * (column // 2 % 2) & 0xF
            k = column // 2 * 4 + (nibble >> 2 * (column % 2) & 3)
            expected[row, k] += int(tensors["values"][row, column])
    assert torch.equal(dense, expected)


def test_bytes():
    assert pack(weight((512, 256))).nbytes == 512 * 256 * 2 * 9 // 16


def test_a_packed_weight_is_still_a_weight():
    w24 = weight((70, 84))
    packed = pack(w24)
    verify(packed)
    assert torch.equal(decompress(packed), decompress(w24))
    assert torch.equal(packed.bitmask(), w24.bitmask())
    assert torch.equal(packed.mask(), w24.mask())
    same(unpack(packed.to(F16)), w24.to(F16))
    same(unpack(packed.clone()), w24)


def test_the_tensors_must_have_the_size_of_the_layout():
    packed = pack(weight((70, 84)))
    values, metadata = packed.values, packed.metadata
    same(Sparse24(values, metadata, (70, 84), "tile64"), packed)
    wrong = (
        (values[:3], metadata, (70, 84), r"values of shape \[4, 2048\], got \[3, 2048\]"),
        (values.view(2, 4096), metadata, (70, 84), r"values of shape \[4, 2048\]"),
        (values, metadata.view(8, 256), (70, 84), r"metadata of shape \[4, 512\], got \[8, 256\]"),
        (values, metadata, (129, 84), r"values of shape \[6, 2048\]"),
        (values, metadata, (70, 64), r"values of shape \[2, 2048\]"),
    )
    for *tensors, shape, expected in wrong:
        with pytest.raises(FormatError, match=expected):
            Sparse24(*tensors, shape, "tile64")


def test_pack_wants_16_bits(device):
    with pytest.raises(TypeError, match="pack: .*float16 or bfloat16, got torch.float32"):
        pack(weight((8, 8), torch.float32).to(device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_weight_that_becomes_float32_can_be_unpacked(shape, device):
    w24 = weight(shape).to(device)
    wide = pack(w24).to(torch.float32)
    assert wide.layout == "tile64" and wide.dtype == torch.float32
    same(unpack(wide), w24.to(torch.float32))
    same(wide.to(BF16), pack(w24))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_kernel_packs_as_torch_does(dtype, monkeypatch):
    if not _native.available():
        pytest.skip(_native.reason())
    for shape in SHAPES + EMPTY + ((1000, 4096), (4096, 1032)):
        w24 = weight(shape, dtype).to("cuda")
        by_kernel = pack(w24)
        with monkeypatch.context() as patch:
            patch.setattr(packing._native, "available", lambda: False)
            same(by_kernel, pack(w24))


# ---- memory --------------------------------------------------------------------------------------

# (out_features, in_features) of the linear layers of a block.
BLOCKS = {
    "SmolLM2-135M": (
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ),
    "Llama-3-8B": (
        (4096, 4096),
        (1024, 4096),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (14336, 4096),
        (4096, 14336),
    ),
}


def packed_bytes(out_features, in_features):
    panels, k_tiles = packed_shape(out_features, in_features)
    return panels * k_tiles * (2048 * 2 + 512)


@pytest.mark.parametrize("model", BLOCKS)
def test_packed_blocks_take_little_more_than_9_16_of_the_dense_bytes(model):
    dense = sum(2 * out_features * in_features for out_features, in_features in BLOCKS[model])
    assert sum(packed_bytes(*shape) for shape in BLOCKS[model]) <= 0.57 * dense


@pytest.mark.parametrize("packed", [True, False])
def test_a_converted_block_holds_its_weights_once(packed):
    """All tensors that the modules hold, and that is what is counted above."""
    held = dense = 0
    for shape in BLOCKS["SmolLM2-135M"]:
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        weight = linear.weight.detach()
        module = SparseLinear.from_linear(linear, magnitude_mask(weight))
        module.packed = packed
        tensors = [*module.parameters(), *module.buffers()]
        assert module.weight.values is module.values, "a view, not another copy"
        bytes_held = sum(tensor.nbytes for tensor in tensors)
        assert not packed or bytes_held == packed_bytes(*shape)
        held, dense = held + bytes_held, dense + weight.nbytes
    assert held <= 0.57 * dense
