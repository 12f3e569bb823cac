"""Sparse24 and the functions around it: masks, compress, decompress, verify, bitmask, pickle."""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsekern as sk
from sparsekern import reference
from sparsekern.backends.compress import compress, decompress, mask24, prune_compress
from sparsekern.errors import FormatError
from sparsekern.formats import codec as compression
from sparsekern.formats.sparse24 import Sparse24, verify

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = list(itertools.combinations(range(4), 2))
VALID_NIBBLES = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}

# Groups of a few levels, so that ties, zeros of both signs and all patterns are common.
LEVELS = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])


@st.composite
def matrices(draw):
    rows, groups = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    size = rows * groups * 4
    entries = draw(st.lists(LEVELS, min_size=size, max_size=size))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(entries, dtype=dtype).reshape(rows, groups * 4)


def nibbles(w24: Sparse24) -> torch.Tensor:
    return compression.unpack_nibbles(w24.metadata, w24.in_features // 4)


def brute_force_mask(scores: torch.Tensor) -> torch.Tensor:
    """The best of the six patterns of each group: higher scores first, then higher columns."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, group in itertools.product(range(scores.shape[0]), range(scores.shape[1] // 4)):
        four = scores[row, 4 * group : 4 * group + 4].tolist()
        best = max(PATTERNS, key=lambda p: sorted(((four[c], c) for c in p), reverse=True))
        mask[row, [4 * group + column for column in best]] = True
    return mask


def same_weight(a: Sparse24, b: Sparse24) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout
    return same and torch.equal(a.values, b.values) and torch.equal(a.metadata, b.metadata)


def has_negative_zero(tensor: torch.Tensor) -> bool:
    return bool(((tensor == 0) & torch.signbit(tensor)).any())


# ---- masks ---------------------------------------------------------------------------------------


@given(matrices())
def test_mask24_is_the_best_of_six_patterns(scores):
    expected = brute_force_mask(scores)
    assert torch.equal(mask24(scores), expected)
    assert torch.equal(reference.nm_mask(scores), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_mask24_of_random_scores(device, dtype):
    scores = torch.randn(65, 132, device=device).to(dtype)
    scores[0, :4] = float("-inf")
    scores[1, 2:4] = float("inf")
    assert torch.equal(mask24(scores).cpu(), brute_force_mask(scores.cpu()))


def test_mask24_errors():
    scores = torch.zeros(4, 8)
    scores[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"NaN at row 2, column 5 \(1 of 32 scores\)"):
        mask24(scores)
    with pytest.raises(TypeError, match="floating-point scores, got torch.int64"):
        mask24(torch.zeros(4, 8, dtype=torch.int64))


# ---- compress ------------------------------------------------------------------------------------


def test_documented_example():
    row = [1, 2, 0, 0, 0, 3, 0, 4, 0, 0, 5, 6, 7, 0, 0, 8]
    w24 = compress(torch.tensor([row], dtype=torch.float32))
    assert w24.values.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert w24.metadata.tolist() == [[0xD4, 0xCE]]
    assert w24.bitmask().tolist() == [[0xA3, 0x9C]]


def test_all_zero_patterns_store_the_slots_of_compressed_tensors():
    """Bitmask nibbles that compressed-tensors 0.14.0 wrote for each pattern of non-zeros."""
    golden = {0: 0xC, 1: 0x5, 2: 0xA, 3: 0x3, 4: 0xC, 5: 0x5, 6: 0x6, 8: 0xC}
    golden |= {9: 0x9, 10: 0xA, 12: 0xC}
    assert set(golden) == {p for p in range(16) if bin(p).count("1") <= 2}
    for pattern, expected in golden.items():
        w = torch.tensor([[float(c + 1) if pattern >> c & 1 else 0.0 for c in range(4)]])
        w24 = compress(w)
        assert w24.bitmask().item() == expected, bin(pattern)
        assert torch.equal(decompress(w24), w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [4, 8, 12, 132])
def test_six_patterns_against_the_reference(device, dtype, in_features):
    groups = in_features // 4
    columns = torch.tensor(PATTERNS)[torch.randint(6, (40, groups))]
    if groups * 40 >= 6:
        columns[:6, 0] = torch.tensor(PATTERNS)
    mask = torch.zeros(40, groups, 4, dtype=torch.bool).scatter(2, columns, True).flatten(1)
    w = torch.where(mask, torch.randn(40, in_features), 0).to(dtype)
    values, metadata = reference.compress(w)
    w24 = compress(w.to(device))
    assert torch.equal(w24.values.cpu().double(), values)
    assert torch.equal(w24.metadata.cpu(), metadata)
    assert set(nibbles(w24)[:6, 0].tolist()) == VALID_NIBBLES
    assert torch.equal(reference.decompress(values, metadata, in_features), w.double())
    assert torch.equal(w24.mask().cpu(), mask)
    assert torch.equal(decompress(w24).cpu(), w)


@given(matrices())
def test_round_trip_with_a_mask(w):
    mask = mask24(torch.rand(w.shape))
    w24 = compress(w, mask)
    dense = torch.where(mask, w, 0)
    assert torch.equal(decompress(w24), dense)
    assert not has_negative_zero(w24.values) and not has_negative_zero(decompress(w24))
    assert set(nibbles(w24).flatten().tolist()) <= VALID_NIBBLES
    assert w24.mask().sum() == w.numel() // 2
    assert same_weight(compress(dense), w24)
    values, metadata = reference.compress(w, mask)
    assert torch.equal(w24.values.double(), values) and torch.equal(w24.metadata, metadata)
    verify(w24)
    assert same_weight(Sparse24.from_bitmask(w24.values, w24.bitmask(), w24.shape), w24)


@given(matrices())
def test_prune_compress_is_mask_then_compress(w):
    scores = w.flip(0)
    assert same_weight(prune_compress(w), compress(w, mask24(w.abs())))
    assert same_weight(prune_compress(w, scores), compress(w, mask24(scores)))
    pruned = decompress(prune_compress(w))
    assert same_weight(prune_compress(pruned), prune_compress(w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prune_compress_of_random_weights(device, dtype):
    w = torch.randn(130, 260).to(dtype)
    scores = torch.randn(130, 260)
    for chosen in (None, scores, scores.double()):
        mask = brute_force_mask(w.abs() if chosen is None else chosen)
        w24 = prune_compress(w.to(device), None if chosen is None else chosen.to(device))
        assert torch.equal(decompress(w24).cpu(), torch.where(mask, w, 0))
        assert w24.device.type == device.type


def test_ties_keep_the_higher_column(device):
    w = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0, 3.0, 2.0, 2.0]], device=device)
    assert prune_compress(w).values.tolist() == [[1.0, -1.0, 3.0, 2.0]]
    assert prune_compress(w).metadata.tolist() == [[0xDE]]
    assert prune_compress(w, torch.zeros_like(w)).metadata.tolist() == [[0xEE]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_counts_as_zero(device, dtype):
    w = torch.tensor([[-0.0, 1, -0.0, 2, -0.0, -0.0, -0.0, 5]], dtype=dtype, device=device)
    for w24 in (compress(w), prune_compress(w), compress(w, torch.ones_like(w, dtype=torch.bool))):
        assert w24.values.tolist() == [[1, 2, 0, 5]]
        assert not has_negative_zero(w24.values)
        assert not has_negative_zero(decompress(w24))


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_not_zero(device, dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    w = torch.tensor([[0, tiny, 0, -tiny]], dtype=dtype, device=device)
    assert (w != 0).sum() == 2
    assert torch.equal(decompress(compress(w)), w)
    assert compress(w).metadata.item() == 0x4D


def test_non_contiguous_weights(device):
    base = torch.randn(24, 17, device=device)
    mask = mask24(base[:, 1:].abs())
    for w in (base[:, 1:], base[:, 1:].T.contiguous().T, base[::2, :16]):
        assert not w.is_contiguous()
        chosen = mask if w.shape == mask.shape else None
        expected = prune_compress(w.contiguous()) if chosen is None else compress(w.clone(), mask)
        assert same_weight(prune_compress(w) if chosen is None else compress(w, mask), expected)
    w, scores = base[:, 1:], base[:, :16]
    assert same_weight(prune_compress(w, scores), compress(w, mask24(scores)))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (0, 12)])
def test_empty_weights(device, shape):
    w = torch.empty(shape, device=device)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    for w24 in (compress(w), compress(w, mask), prune_compress(w), prune_compress(w, w)):
        assert tuple(w24.shape) == shape and w24.nbytes == 0
        assert decompress(w24).shape == shape and w24.mask().shape == shape
        assert same_weight(Sparse24.from_bitmask(w24.values, w24.bitmask(), shape), w24)
        verify(w24)


def test_last_nibble_of_odd_rows(device):
    w24 = prune_compress(torch.randn(5, 12, device=device))
    assert w24.metadata.shape == (5, 2)
    assert (w24.metadata[:, 1] >> 4).tolist() == [0x4] * 5
    assert (w24.bitmask()[:, 1] >> 4).tolist() == [0] * 5


def test_blocks_of_rows_join_up(monkeypatch):
    w = torch.randn(37, 20)
    whole = prune_compress(w)
    monkeypatch.setattr(compression, "BLOCK_ELEMENTS_CPU", 100)
    assert len(list(compression._row_blocks(w))) == 8
    assert same_weight(prune_compress(w), whole)
    assert torch.equal(decompress(whole), torch.where(mask24(w.abs()), w, 0))
    bad = decompress(whole)
    bad[36] = 1.0
    with pytest.raises(ValueError, match=r"4 at row 36, columns 0..3 \(5 of 185 groups"):
        compress(bad)


def test_weight_that_requires_grad():
    w = torch.nn.Parameter(torch.randn(4, 8))
    assert not prune_compress(w).values.requires_grad


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_named(device, dtype, value):
    w = torch.zeros(4, 12, dtype=dtype, device=device)
    w[2, 9] = w[3, 1] = value
    nothing = torch.zeros(4, 12, dtype=torch.bool, device=device)
    expected = rf"{value} at row 2, column 9 \(2 of 48 elements are NaN or Inf\)"
    for call in (lambda: compress(w), lambda: compress(w, nothing), lambda: prune_compress(w)):
        with pytest.raises(ValueError, match=expected):
            call()


def test_three_nonzeros_are_named(device):
    w = torch.zeros(20, 72, device=device)
    w[17, 64:67] = 1.0
    w[18] = 1.0
    expected = r"got 3 at row 17, columns 64..67 \(19 of 360 groups have more than 2\)"
    with pytest.raises(ValueError, match=expected):
        compress(w)
    with pytest.raises(ValueError, match=expected):
        compress(w, torch.ones_like(w, dtype=torch.bool))
    kept = torch.ones_like(w, dtype=torch.bool)
    kept[:, ::2] = False
    assert compress(w, kept).values.sum() == 1 + 36


def test_a_mask_of_three_over_two_nonzeros_is_accepted():
    w = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert decompress(compress(w, mask)).tolist() == [[1.0, 0.0, 2.0, 0.0]]


GOOD = torch.zeros(4, 8)
BAD_CALLS = [
    (lambda: compress(torch.zeros(4, 6)), ValueError, r"shape\[1\] % 4 == 0, got 6. Pad in_feat"),
    (lambda: prune_compress(torch.zeros(4, 7)), ValueError, r"% 4 == 0, got 7. Pad"),
    (lambda: mask24(torch.zeros(4, 5)), ValueError, r"scores.shape\[1\] % 4 == 0, got 5. Pad"),
    (lambda: compress(torch.zeros(8)), ValueError, r"shape \[out, in\], got shape \[8\]"),
    (lambda: compress(torch.zeros(2, 4, 8)), ValueError, r"got shape \[2, 4, 8\]"),
    (lambda: compress(GOOD.double()), TypeError, r"float16 \| bfloat16, got torch.float64"),
    (lambda: prune_compress(GOOD.to(torch.int8)), TypeError, "got torch.int8"),
    (lambda: compress(GOOD, torch.ones(4, 4).bool()), ValueError, r"\(\[4, 8\]\), got \[4, 4\]"),
    (lambda: compress(GOOD, torch.ones(4, 8)), TypeError, "a bool mask, got torch.float32"),
    (lambda: compress(GOOD, torch.ones(4, 8, device="meta").bool()), ValueError, "got meta"),
    (lambda: prune_compress(GOOD, GOOD[:2]), ValueError, r"scores.shape == w.shape"),
    (lambda: prune_compress(GOOD, GOOD.long()), TypeError, "floating-point scores"),
    (lambda: prune_compress(GOOD, GOOD + float("nan")), ValueError, "NaN at row 0, column 0"),
    (lambda: compress(GOOD.to_sparse()), NotImplementedError, r"a dense w, .*Call w.to_dense\(\)"),
    (lambda: prune_compress(GOOD.to_mkldnn()), NotImplementedError, "a dense w, .*_mkldnn"),
    (lambda: compress(torch.nested.nested_tensor([GOOD])), NotImplementedError, "a nested tensor"),
    (lambda: compress(GOOD, (GOOD > 0).to_sparse()), NotImplementedError, "a dense mask"),
    (lambda: prune_compress(GOOD, GOOD.to_sparse_csr()), NotImplementedError, "a dense scores"),
    (lambda: prune_compress(GOOD.to("meta")), ValueError, "w with data, got a meta tensor"),
    (lambda: prune_compress(fake()), ValueError, "w with data, got a fake tensor. Call it outside"),
    (
        lambda: sk.compress(torch.tensor([[1.0, 0, 0, -1e5]]), dtype=torch.float16),
        FormatError,
        "compress: expected finite values, got -inf .*row 0, columns 0..3. Store it in a dtype",
    ),
]


def fake():
    with FakeTensorMode():
        return torch.zeros(4, 8)


def test_scores_in_8_bits():
    scores = torch.tensor([[3.0, 2, 1, 0.5]]).to(torch.float8_e4m3fn)
    assert prune_compress(torch.ones(1, 4), scores).columns().tolist() == [[0, 1]]


def test_a_weight_of_a_subclass_is_stored_as_plain_tensors():
    class Marked(torch.Tensor):
        pass

    w = torch.tensor([[1.0, 0, 0, 2.0]]).as_subclass(Marked)
    for w24 in (compress(w), prune_compress(w), sk.quantize(prune_compress(w), "int8")):
        assert {type(tensor) for tensor in w24.tensors.values()} == {torch.Tensor}


@pytest.mark.parametrize("call, error, text", BAD_CALLS)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_numpy_meets_the_refusals_of_a_dense_weight():
    w24 = compress(GOOD)
    for call in (
        lambda: np.ones((2, 4)) @ w24,
        lambda: np.float32(2) * w24,
        lambda: w24 == np.ones((4, 8)),
        lambda: np.asarray(w24),
    ):
        with pytest.raises(TypeError, match="of a 2:4 weight. Use weight.to_dense"):
            call()


# ---- the class -----------------------------------------------------------------------------------

VALUES = torch.zeros(4, 6)
METADATA = torch.full((4, 2), 0x44, dtype=torch.uint8)
BAD_TENSORS = [
    (VALUES[:, :4], METADATA, (4, 12), r"values of shape \[4, 6\], got \[4, 4\]"),
    (VALUES, METADATA[:, :1], (4, 12), r"metadata of shape \[4, 2\], got \[4, 1\]"),
    (VALUES, METADATA, (4, 10), r"in_features % 4 == 0, got \[4, 10\]"),
    (VALUES, METADATA, (4, 12, 1), r"got \[4, 12, 1\]"),
    (VALUES, METADATA, (-4, 12), r"got \[-4, 12\]"),
    (VALUES.double(), METADATA, (4, 12), "got torch.float64"),
    (VALUES, METADATA.int(), (4, 12), "dtype uint8, got torch.int32"),
    (VALUES, METADATA.to("meta"), (4, 12), "metadata on cpu, got meta"),
    (None, METADATA, (4, 12), "a tensor as values, got NoneType"),
]


@pytest.mark.parametrize("values, metadata, shape, text", BAD_TENSORS)
def test_constructor_rejects(values, metadata, shape, text):
    with pytest.raises(FormatError, match=text):
        Sparse24(values, metadata, shape)


def test_unknown_layout():
    layouts = r"\('rowmajor', 'tile64', 'cusparselt'\)"
    with pytest.raises(FormatError, match=f"{layouts}, got 'colmajor'"):
        Sparse24(VALUES, METADATA, (4, 12), "colmajor")


def test_properties():
    w24 = prune_compress(torch.randn(64, 128, dtype=torch.bfloat16))
    assert (w24.out_features, w24.in_features) == (64, 128)
    assert w24.nbytes * 16 == 9 * 64 * 128 * 2
    assert repr(w24) == (
        "Sparse24(64 x 128, torch.bfloat16, layout='rowmajor', device='cpu', 9216 bytes)"
    )
    assert w24.rowmajor() is w24 and w24.cpu() is w24
    assert torch.equal(w24.to_dense(), decompress(w24))


def test_copies():
    w24 = prune_compress(torch.randn(4, 12))
    assert copy.copy(w24).values is w24.values
    for other in (copy.deepcopy(w24), w24.clone()):
        assert same_weight(other, w24)
        assert other.values.data_ptr() != w24.values.data_ptr()
        assert other.metadata.data_ptr() != w24.metadata.data_ptr()
    assert w24.detach().values.data_ptr() == w24.values.data_ptr()


def test_to(device):
    w = torch.randn(8, 20)
    w[0, :4] = torch.tensor([0.0, -1e-30, 0.0, 3.0])
    w24 = prune_compress(w)
    moved = w24.to(device)
    assert moved.device.type == moved.metadata.device.type == device.type
    assert same_weight(moved.cpu(), w24)
    half = w24.to(device, torch.float16)
    assert half.dtype == torch.float16 and half.device.type == device.type
    assert torch.equal(half.metadata.cpu(), w24.metadata)
    assert not has_negative_zero(half.values)
    assert torch.equal(decompress(half).cpu(), decompress(w24).half())
    assert w24.to("meta").device.type == "meta"


def test_pickle_with_weights_only():
    w24 = prune_compress(torch.randn(8, 20, dtype=torch.bfloat16))
    file = io.BytesIO()
    torch.save({"layer": w24}, file)
    file.seek(0)
    assert same_weight(torch.load(file, weights_only=True)["layer"], w24)


HOSTILE = [
    dict(tensors={"values": VALUES, "metadata": METADATA}),
    dict(tensors={"values": VALUES}),
    dict(tensors=[VALUES]),
    dict(spec="8x24 float32 float32 rowmajor - 0"),
    dict(spec="8x20 float32 float32 x - 0"),
    dict(spec="8x20"),
    dict(spec=7),
    dict(version=3),
    dict(version="2"),
    dict(more=1),
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: str(changes)[:30])
def test_hostile_pickle_is_refused(changes, monkeypatch):
    w24, state = prune_compress(torch.randn(8, 20)), Sparse24.__getstate__
    monkeypatch.setattr(Sparse24, "__getstate__", lambda self: state(self) | changes)
    file = io.BytesIO()
    torch.save(w24, file)
    file.seek(0)
    with pytest.raises(
        (FormatError, torch.serialization.pickle.UnpicklingError), match="sparsekern"
    ):
        torch.load(file, weights_only=True)


def test_every_function_takes_every_layout():
    expected = prune_compress(torch.randn(4, 12).to(torch.bfloat16))
    tiles = expected.to_layout("tile64")
    assert tiles.layout == "tile64" and tiles.to_layout("tile64") is tiles
    assert same_weight(tiles.rowmajor(), expected) and expected.to_layout("rowmajor") is expected
    assert torch.equal(decompress(tiles), decompress(expected))
    assert torch.equal(tiles.bitmask(), expected.bitmask())
    assert torch.equal(tiles.mask(), expected.mask())
    verify(tiles)
    with pytest.raises(FormatError, match="layout in .*, got 'tile63'"):
        tiles.to_layout("tile63")


def test_tensors_by_name():
    w24 = prune_compress(torch.randn(4, 12))
    assert list(w24.tensors) == ["values", "metadata"] and w24.tensors["values"] is w24.values
    again = Sparse24.from_tensors(w24.spec, w24.tensors)
    assert same_weight(again, w24) and again.spec is w24.spec
    with pytest.raises(FormatError, match=r"tensors \['values', 'metadata'\], got \['values'\]"):
        Sparse24.from_tensors(w24.spec, {"values": w24.values})
    w24.values = w24.values.half()
    assert w24.dtype == torch.float16 and w24.spec.storage == "float16"
    with pytest.raises(FormatError, match=r"values of shape \[4, 6\]"):
        w24.values = w24.values[:2]
    with pytest.raises(FormatError, match="dtype uint8"):
        w24.metadata = w24.values


def test_a_twin_is_remembered_until_the_weight_changes():
    w24 = prune_compress(torch.randn(4, 12).to(torch.bfloat16))
    assert w24.fresh_twin() is None
    twin = w24.twin("tile64")
    assert w24.twin("tile64") is twin is w24.fresh_twin() and twin.layout == "tile64"
    for other in (copy.copy(w24), copy.deepcopy(w24), w24.clone(), w24.detach()):
        assert other.fresh_twin() is None
    w24.values.mul_(2)
    assert w24.fresh_twin() is None
    assert torch.equal(w24.twin("tile64").to_dense(), w24.to_dense())
    w24.metadata.fill_(0x44)
    assert w24.fresh_twin() is None
    w24.twin("tile64")
    w24.tensors["values"] = w24.values.clone()
    assert w24.fresh_twin() is None
    with torch.inference_mode():
        frozen = w24.clone()
    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):
        frozen.twin("tile64")


# ---- bitmask and verify --------------------------------------------------------------------------


def test_bitmask_is_little_endian_packbits():
    w24 = prune_compress(torch.randn(9, 28))
    powers = 2 ** torch.arange(8)
    padded = torch.nn.functional.pad(w24.mask(), (0, 4)).view(9, 4, 8)
    assert torch.equal(w24.bitmask().long(), (padded * powers).sum(2))
    again = Sparse24.from_bitmask(w24.values, w24.bitmask(), torch.tensor([[9], [28]]))
    assert same_weight(again, w24)


@pytest.mark.parametrize("nibble", [n for n in range(16) if bin(n).count("1") != 2])
def test_from_bitmask_wants_two_bits(nibble):
    w24 = prune_compress(torch.randn(4, 12))
    bitmask = w24.bitmask()
    bitmask[2, 0] = (bitmask[2, 0] & 0xF) | nibble << 4
    count = bin(nibble).count("1")
    with pytest.raises(FormatError, match=f"got {count} bits at row 2, columns 4..7"):
        Sparse24.from_bitmask(w24.values, bitmask, w24.shape)


def test_from_bitmask_errors():
    w24 = prune_compress(torch.randn(4, 12))
    bitmask = w24.bitmask()
    padded = bitmask.clone()
    padded[3, 1] |= 0x30
    with pytest.raises(FormatError, match="are 0, got a set bit at row 3, columns 12..15"):
        Sparse24.from_bitmask(w24.values, padded, (4, 12))
    with pytest.raises(FormatError, match=r"bitmask of shape \[4, 2\], got \[4, 1\]"):
        Sparse24.from_bitmask(w24.values, bitmask[:, :1], (4, 12))
    with pytest.raises(FormatError, match="uint8, got torch.int64"):
        Sparse24.from_bitmask(w24.values, bitmask.long(), (4, 12))
    with pytest.raises(FormatError, match=r"values of shape \[4, 6\], got \[4, 4\]"):
        Sparse24.from_bitmask(w24.values[:, :4], bitmask, (4, 12))
    with pytest.raises(FormatError, match="a tensor as bitmask, got str"):
        Sparse24.from_bitmask(w24.values, "bitmask", (4, 12))


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - VALID_NIBBLES))
def test_verify_finds_invalid_nibbles(device, nibble):
    w24 = prune_compress(torch.randn(4, 16, device=device))
    verify(w24)
    w24.metadata[1, 1] = (w24.metadata[1, 1] & 0xF) | nibble << 4
    expected = rf"got {nibble:#x} \(1 of 16 groups\) at row 1, columns 12..15"
    with pytest.raises(FormatError, match=expected):
        verify(w24)


def test_verify_and_decompress_say_what_to_pass():
    w24 = compress(torch.zeros(8, 16))
    with pytest.raises(ValueError, match="verify: expected w24 with data, got one on device meta"):
        verify(w24.to("meta"))
    layer = sk.SparseLinear.from_sparse24(w24)
    for function in (sk.verify, sk.decompress):
        with pytest.raises(TypeError, match="got SparseLinear. Pass its attribute weight"):
            function(layer)


def test_verify_finds_padding_and_values():
    w24 = prune_compress(torch.randn(4, 12))
    w24.metadata[2, 1] &= 0xF
    with pytest.raises(FormatError, match="padding nibble, got 0x0 at row 2, columns 12..15"):
        verify(w24)
    w24 = prune_compress(torch.randn(4, 12))
    w24.values[1, 3] = float("inf")
    with pytest.raises(FormatError, match=r"finite values, got inf .* at row 1, columns 4..7"):
        verify(w24)


# ---- the reference -------------------------------------------------------------------------------


def test_reference_linear_by_hand():
    w = torch.tensor([[1.0, 0.0, -2.0, 0.0]])
    x = torch.tensor([[[3.0, 5.0, 1.0, 7.0]], [[1.0, 1.0, 1.0, 1.0]]])
    bias = torch.tensor([0.5])
    assert reference.linear(x, w).tolist() == [[[1.0]], [[-1.0]]]
    assert reference.linear(x, w, bias).tolist() == [[[1.5]], [[-0.5]]]
    assert reference.linear(x, w, bias, "relu").tolist() == [[[1.5]], [[0.0]]]
    gelu = 0.5 * 1.5 * (1 + torch.erf(torch.tensor(1.5 / 2**0.5, dtype=torch.float64)))
    assert reference.linear(x, w, bias, "gelu")[0].item() == pytest.approx(gelu.item(), rel=1e-12)
    silu = 1.5 / (1 + torch.exp(torch.tensor(-1.5, dtype=torch.float64)))
    assert reference.linear(x, w, bias, "silu")[0].item() == pytest.approx(silu.item(), rel=1e-12)


def test_reference_nm_mask_of_other_patterns():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 5.0, 4.0, 0.0, 0.0]])
    assert reference.nm_mask(scores, 1, 4).int().tolist() == [[0, 0, 1, 0, 1, 0, 0, 0]]
    assert reference.nm_mask(scores, 4, 8).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0]]
