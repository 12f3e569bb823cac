"""Quantised weights: levels and scales against reference.py, what is refused, copies."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import sparsekern as sk
from python_tests.linear_cases import random_weight
from sparsekern import reference
from sparsekern.errors import FormatError
from sparsekern.formats import codec, dtypes, scaled
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24, metadata_of_bitmask, of_levels

BF16 = torch.bfloat16
TOP = {"fp8": 448, "int8": 127, "int4": 7}
LOW = {"fp8": -448, "int8": -127, "int4": -8}
KINDS = [("fp8", None), ("int8", None), ("int4", 64), ("int4", 128), ("int4", 200)]


def weight(shape=(24, 200), dtype=torch.float32):
    """Rows of very different size, a row of zeros, -0.0, groups with one kept number or none."""
    w = random_weight(*shape, dtype)
    w *= torch.logspace(-6, 4, shape[0])[:, None].to(dtype)
    w[3] = 0
    w[4, ::3] = -0.0
    w[5, : shape[1] // 2] = 0
    return w


def test_reference_has_the_numbers_of_e4m3():
    numbers = reference.fp8_numbers()
    every = torch.arange(256, dtype=torch.uint8).view(dtypes.element("fp8").storage).double()
    assert torch.equal(numbers, every[every.isfinite()].unique())


def test_reference_rounds_as_torch_does():
    numbers = reference.fp8_numbers().float()
    between = (numbers[1:] + numbers[:-1]) / 2
    w = torch.cat((numbers, between, between * 1.0001, torch.tensor([1e4, -1e4, 1e-9])))[None]
    expected = w.clamp(-448, 448).to(dtypes.element("fp8").storage).double()
    assert torch.equal(reference.quantize(w, torch.ones(1, 1), "fp8"), expected)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name, group", KINDS)
def test_levels_are_the_nearest_ones(name, group, dtype, scale):
    w = weight(dtype=dtype)
    w24 = sk.compress(w)
    quantized = sk.quantize(w24, name, group=group, scale=scale)
    spec, scales = quantized.spec, quantized.tensors["weight_scale"]
    assert quantized.dtype == dtype and scales.dtype == torch.float32
    assert scales.shape == (24, -(-200 // group) if group else 1)
    assert bool((scales > 0).all()) and bool((scales[3] == 1).all())
    levels = reference.quantize(w, scales, name, spec.group)
    expected = reference.dequantize(levels, scales, spec.group)
    stored = dtypes.scaled_codec(spec.storage).unpack(quantized.values)
    assert float(stored.min()) >= LOW[name] and float(stored.max()) <= TOP[name]
    dense = codec.decompress_dense(stored, quantized.metadata, 200)
    assert torch.equal(dense.double(), levels)
    assert torch.equal(quantized.to_dense(), expected.float().to(dtype))
    assert bool((quantized.to_dense() == 0)[w == 0].all()), "pruned stays pruned, zero stays zero"
    bits = quantized.to_dense().view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    assert not bool((bits == torch.iinfo(bits.dtype).min).any()), "no -0.0"
    sk.verify(quantized)
    # The same tensors as of the dense weight that it stands for: zeros free their slots.
    again = codec.compress_dense(levels.float())
    assert torch.equal(again[1], quantized.metadata) and torch.equal(again[0], stored)
    if scale == "absmax":
        most = w.float().abs()
        size = spec.group or 200
        most = torch.stack([part.amax(1) for part in most.split(size, dim=1)], dim=1)
        wanted = torch.where(most == 0, 1.0, (most / TOP[name]).clamp(min=2.0**-126))
        assert torch.equal(scales, wanted)


@pytest.mark.parametrize("name, group", KINDS)
def test_least_squares_scales_lower_the_weighted_error(name, group):
    w = random_weight(32, 200, torch.float32)
    importance = torch.rand(200).square() * torch.rand(200).square()
    w24 = sk.compress(w)

    def error(quantized, weights):
        return float(((quantized.to_dense() - w).square() * weights).sum())

    largest = sk.quantize(w24, name, group=group)
    plain = sk.quantize(w24, name, group=group, scale="mse")
    weighted = sk.quantize(w24, name, group=group, scale="mse", importance=importance)
    one = torch.ones(200)
    assert error(plain, one) <= error(largest, one)
    assert error(weighted, importance) <= min(error(plain, importance), error(largest, importance))
    if name == "int4":
        assert error(plain, one) < 0.9 * error(largest, one)
        assert error(weighted, importance) < error(plain, importance)


def test_int4_bytes_and_scales_of_groups():
    w = torch.zeros(1, 136)
    w[0, [0, 1, 6, 7, 64, 130]] = torch.tensor([7.0, -7.0, 1.0, 3.0, -14.0, 0.5])
    quantized = sk.quantize(sk.compress(w), "int4", group=64)
    expected = torch.tensor([[7.0, 14.0, 0.5]]) / 7
    assert torch.equal(quantized.tensors["weight_scale"], expected)
    assert quantized.values.shape == (1, 34) and quantized.values.dtype == torch.uint8
    assert quantized.values[0, :2].tolist() == [0x97, 0x31], "the lower column in the low nibble"
    assert quantized.spec.text == "1x136 int4 float32 rowmajor group 64"
    assert torch.equal(quantized.to_dense(), w)
    assert sk.quantize(sk.compress(w), "int4").spec.group == 128
    row = sk.quantize(sk.compress(w), "int4", group=136)
    assert row.spec.group == 136 and row.tensors["weight_scale"].tolist() == [[2.0]]
    assert WeightSpec.of((4, 32), "int4").group == 32, "at most in_features"
    assert quantized.nbytes == 34 + 17 + 12


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_compress_and_quantize_agree(name):
    w = weight()
    quantized = sk.compress(w, quantize=name)
    same = sk.quantize(sk.compress(w), name)
    assert quantized.spec is same.spec is sk.compress(w, dtype=name).spec
    for key in quantized.tensors:
        a, b = quantized.tensors[key], same.tensors[key]
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    mask = torch.rand(24, 200) < 0.3
    mask &= codec.mask24(torch.rand(24, 200))
    masked = sk.compress(torch.randn(24, 200), mask, quantize=name)
    assert not masked.to_dense()[~mask].any()


def test_given_scales():
    w24 = sk.compress(random_weight(8, 32, torch.float32))
    scale = torch.rand(8, 1) + 0.5
    quantized = sk.quantize(w24, "int8", scale=scale)
    assert torch.equal(quantized.tensors["weight_scale"], scale)
    levels = (w24.to_dense() / scale).round().clamp(-127, 127)
    assert torch.equal(quantized.to_dense(), levels * scale)
    for bad, text in (
        (float("nan"), "nan at row 5"),
        (float("inf"), "inf at row 5"),
        (0.0, "0.0 at row 5"),
        (-1.0, "-1.0 at row 5"),
    ):
        scale = torch.ones(8, 1)
        scale[5] = bad
        with pytest.raises(FormatError, match=f"scale finite and above 0, got {text}"):
            sk.quantize(w24, "int8", scale=scale)
        broken = sk.quantize(w24, "int8")
        broken.tensors["weight_scale"][5] = bad
        with pytest.raises(FormatError, match=f"weight_scale finite and above 0, got {text}"):
            sk.verify(broken)


def quantized_weight(name="int4"):
    return sk.quantize(sk.compress(weight()), name)


REFUSALS = [
    (
        lambda: sk.quantize(torch.randn(8, 16), "fp8"),
        TypeError,
        r"w24 of type.*Tensor \[8, 16\]. Prune first",
    ),
    (lambda: sk.quantize(quantized_weight(), "fp8"), TypeError, "got int4.*dequantize"),
    (lambda: sk.compress(torch.randn(8, 16), quantize="fp8"), ValueError, "non-zeros.*Prune first"),
    (lambda: sk.quantize(sk.compress(weight()), "fp4"), ValueError, "'fp8', 'int8', 'int4', got"),
    (lambda: sk.quantize(sk.compress(weight()), "bfloat16"), ValueError, "one of 'fp8'"),
    (lambda: sk.quantize(sk.compress(weight()), "fp8", group=64), ValueError, "one scale for each"),
    (
        lambda: sk.quantize(sk.compress(weight()), "int4", group=32),
        ValueError,
        r"\(64, 128\).*got 32",
    ),
    (
        lambda: sk.quantize(sk.compress(weight()), "int8", scale="max"),
        ValueError,
        "'absmax', 'mse'",
    ),
    (
        lambda: sk.quantize(sk.compress(weight()), "int8", scale=torch.ones(24)),
        ValueError,
        r"scale of shape \[24, 1\]",
    ),
    (
        lambda: sk.quantize(sk.compress(weight()), "int8", importance=torch.ones(200)),
        ValueError,
        "scale='mse' with importance",
    ),
    (
        lambda: sk.quantize(sk.compress(weight()), "int8", scale="mse", importance=torch.ones(3)),
        ValueError,
        r"importance of shape \[in_features\]",
    ),
    (
        lambda: sk.quantize(
            sk.compress(weight()), "int8", scale="mse", importance=-torch.ones(200)
        ),
        ValueError,
        "-1.0 at column 0",
    ),
    (lambda: sk.quantize(sk.compress(weight()), "int8", layout="x"), ValueError, "layout in"),
    (
        lambda: sk.compress(weight(), quantize="int8", dtype="int8"),
        ValueError,
        "one of dtype and quantize",
    ),
    (
        lambda: sk.quantize(
            sk.compress(weight()), "int8", scale="mse", importance=torch.ones(200).cfloat()
        ),
        TypeError,
        "importance of real numbers, got torch.complex64",
    ),
    (
        lambda: sk.compress(weight(), dtype="int5"),
        TypeError,
        "compress: expected dtype: an element type in .*got 'int5'",
    ),
    (
        lambda: sk.compress(weight(), dtype=torch.int8),
        TypeError,
        "got torch.int8. Quantised types go by name: 'fp8', 'int8', 'int4'",
    ),
    (
        lambda: sk.quantize(sk.compress(weight()), "int8", scale=np.ones((4, 1))),
        ValueError,
        r"scale in \('absmax', 'mse'\) or a tensor, got array",
    ),
    (
        lambda: sk.quantize(sk.compress(weight()), "int8", scale=torch.ones(4, 1).to_sparse()),
        NotImplementedError,
        "a dense scale",
    ),
    (
        lambda: sk.quantize(
            sk.compress(weight()), "int8", scale="mse", importance=torch.ones(200).to_sparse()
        ),
        NotImplementedError,
        "a dense importance",
    ),
    (lambda: sk.dequantize(torch.ones(4, 4)), TypeError, "w24 of type Sparse24, got Tensor"),
    (lambda: sk.quantize(sk.SparseLinear(8, 4), "int8"), TypeError, "Pass its attribute weight"),
    (lambda: sk.quantize(torch.nn.Sequential(), "int8"), TypeError, "compress_model takes a model"),
    (lambda: WeightSpec.of((4, 8), "int8", group=64), FormatError, "group 0 for int8"),
    (lambda: WeightSpec.of((4, 8), "int4", group=6), FormatError, "multiple of 4, got 6"),
]


@pytest.mark.parametrize("call, kind, text", REFUSALS, ids=[text for _, _, text in REFUSALS])
def test_refusals(call, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        call()


def test_importance_in_float64_keeps_its_range():
    w24 = sk.compress(weight())
    column = torch.linspace(1, 2, 200)
    for factor in (1e-200, 1e300):
        scales = [
            sk.quantize(w24, "int4", scale="mse", importance=given).tensors["weight_scale"]
            for given in (column, column.double() * factor)
        ]
        assert torch.equal(*scales)


def test_dequantize_on_meta():
    w24 = sk.quantize(sk.compress(weight()), "int4").to("meta")
    plain = sk.dequantize(w24)
    assert plain.is_meta and plain.shape == w24.shape and plain.spec.element.plain


def test_scales_of_another_form_are_refused():
    w24 = quantized_weight("fp8")
    for scale in (torch.ones(24), torch.ones(24, 2), torch.ones(24, 1, dtype=BF16)):
        with pytest.raises(FormatError, match=r"weight_scale float32 of shape \[24, 1\]"):
            Sparse24.from_tensors(w24.spec, {**w24.tensors, "weight_scale": scale})
    with pytest.raises(FormatError, match="weight_scale"):
        Sparse24.from_tensors(w24.spec, {k: w24.tensors[k] for k in ("values", "metadata")})


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_copies_pickles_and_dtypes(name):
    w24 = quantized_weight(name)
    dense = w24.to_dense()
    for other in (w24.clone(), copy.deepcopy(w24), pickle.loads(pickle.dumps(w24)), w24.detach()):
        assert other.spec is w24.spec and torch.equal(other.to_dense(), dense)
    half = w24.to(BF16)
    assert half.dtype == BF16 and half.spec.storage == w24.spec.storage
    for key in w24.tensors:
        assert half.tensors[key].dtype == w24.tensors[key].dtype
    assert torch.equal(half.to_dense(), dense.to(BF16))
    file = io.BytesIO()
    torch.save(w24, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).to_dense(), dense)
    plain = sk.dequantize(w24)
    assert plain.spec.element.plain and torch.equal(plain.to_dense(), dense)
    assert sk.dequantize(plain) is plain
    assert w24.spec.storage in repr(w24)


def test_numbers_that_float16_cannot_hold():
    w = torch.zeros(2, 8)
    w[1, 2] = 1e6
    w24 = sk.quantize(sk.compress(w), "fp8").to(torch.float16)
    with pytest.raises(FormatError, match="finite values, got inf .* at row 1, columns 0..3"):
        sk.dequantize(w24)


def test_numbers_at_the_ends_of_float32():
    w = torch.zeros(6, 8)
    w[:4, 0] = torch.tensor([1e-45, 2.0**-126, 3e38, -1e-40])
    w[4, 0] = torch.finfo(torch.float32).max
    w[5] = -w[4]
    for name in ("fp8", "int8", "int4"):
        w24 = sk.quantize(sk.compress(w), name)
        sk.verify(w24)
        assert torch.allclose(w24.to_dense(), w, rtol=1e-5, atol=2.0**-120)
        w24 = sk.quantize(sk.compress(w), name, scale="mse")
        sk.verify(w24)


def test_a_twin_follows_its_scales():
    """The copy in another layout is made anew when a scale changes."""
    w24 = sk.quantize(sk.compress(weight()), "int8")
    twin = w24.twin("tile64")
    assert w24.twin("tile64") is twin
    w24.tensors["weight_scale"].mul_(2)
    assert w24.twin("tile64") is not twin
    assert torch.equal(w24.twin("tile64").to_dense(), w24.to_dense())


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_tile64_and_back(name):
    for group in (None, 64, 128, 200) if name == "int4" else (None,):
        w24 = sk.quantize(sk.compress(weight(dtype=BF16)), name, group=group)
        packed = w24.to_layout("tile64")
        assert torch.equal(packed.to_dense(), w24.to_dense())
        for key, tensor in packed.rowmajor().tensors.items():
            assert torch.equal(tensor.view(torch.uint8), w24.tensors[key].view(torch.uint8))
        for other in (packed.to(torch.float32), pickle.loads(pickle.dumps(packed)), packed.clone()):
            assert torch.equal(other.to(BF16).to_dense(), w24.to_dense())
        module = sk.SparseLinear.from_sparse24(w24, layout="tile64")
        x = torch.randn(3, 200).to(BF16)
        assert torch.equal(module(x), sk.linear(x, w24))
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 4)])
@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_small_and_empty(shape, name):
    w24 = sk.quantize(sk.compress(torch.zeros(shape)), name, scale="mse")
    assert w24.to_dense().shape == shape and not w24.to_dense().any()
    sk.verify(w24)


def test_levels_of_other_writers():
    """int8 of -128, which our own scales never give."""
    bitmask = torch.tensor([[0b1001]], dtype=torch.uint8)
    spec = WeightSpec.of((1, 4), "int8")
    w24 = of_levels(
        spec, torch.tensor([[-128.0, 5]]), torch.ones(1, 1), metadata_of_bitmask(bitmask, (1, 4))
    )
    assert w24.to_dense().tolist() == [[-128, 0, 0, 5]]


def test_group_of_a_number_of_scales():
    for in_features in (4096, 14336):
        for group in (64, 128, 32):
            count = scaled.groups(in_features, group)
            assert scaled.group_of(in_features, count) == group
        assert scaled.group_of(in_features, 1) == in_features
    assert scaled.group_of(200, 4) == 64  # the last one is shorter: no 4 whole ones fit
    # 192 columns with 2 scales: groups of 128, the last one shorter, or of 96.
    for in_features, count in ((4096, 7), (192, 2), (136, 2), (200, 2), (320, 2), (96, 2), (64, 0)):
        with pytest.raises(FormatError, match="number of scales .* that only one size of groups"):
            scaled.group_of(in_features, count)


@pytest.mark.gpu
@pytest.mark.parametrize("name, group", KINDS)
def test_the_gpu_gives_the_same_bits(name, group):
    w24 = sk.compress(weight(dtype=BF16))
    importance = torch.rand(200)
    for scale in ("absmax", "mse"):
        knobs = {"group": group, "scale": scale, "layout": "rowmajor"}
        more = {"importance": importance} if scale == "mse" else {}
        ours = sk.quantize(w24, name, **knobs, **more)
        more = {key: value.cuda() for key, value in more.items()}
        theirs = sk.quantize(sk.compress(weight(dtype=BF16).cuda()), name, **knobs, **more).cpu()
        if scale == "mse":  # sums in another order may choose the neighbour of a scale
            w = w24.to_dense().float()
            errors = [
                ((q.to_dense().float() - w).square() * importance).sum(1) for q in (ours, theirs)
            ]
            assert torch.allclose(*errors, rtol=1e-3)
            continue
        assert torch.equal(ours.tensors["weight_scale"], theirs.tensors["weight_scale"])
        assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
        assert torch.equal(ours.metadata, theirs.metadata)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
