"""What others build on: registering a backend, a layout and an element type from outside the
package, and using them through the public functions; and what 0.1 left behind: paths, pickles.
"""

import ast
import base64
import copy
import io
import pickle
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from python_tests.linear_cases import random_input, random_weight
from sparsekern import _native
from sparsekern.backends import registry
from sparsekern.backends.cusparselt import library as cusparselt_library
from sparsekern.backends.protocol import Explained, folded
from sparsekern.errors import FormatError
from sparsekern.formats import dtypes, layouts

PACKAGE = Path(sk.__file__).parent
BF16 = torch.bfloat16


# ---- a backend -----------------------------------------------------------------------------------


class Doubled:
    """Computes twice the layer, of 16-bit weights alone, and notes what it is asked."""

    name = "doubled"

    def __init__(self):
        self.problems = []

    def supports(self, problem):
        return None if problem.dtype.itemsize == 2 else f"{problem.dtype} is not 16 bits wide"

    def bind(self, problem):
        self.problems.append(problem)

        def compute(x, w24, bias):
            y = 2 * (x.float() @ w24.to_dense().float().t())
            return (y if bias is None else y + bias.float()).to(x.dtype)

        return folded(compute)

    def explain(self, problem):
        return Explained(f"{problem.tokens} tokens", "it is asked first", 1.5)


@pytest.fixture
def doubled():
    backend = sk.register_backend(Doubled(), device="cpu", before="cpu")
    yield backend
    registry.unregister_backend("doubled")


def test_a_backend_from_outside(doubled):
    w24 = sk.compress(random_weight(8, 16, BF16, integers=True))
    x, bias = random_input((2, 3, 16), BF16, integers=True), torch.ones(8, dtype=BF16)
    single = sk.linear(x, w24, backend="cpu")
    assert torch.equal(sk.linear(x, w24), 2 * single)
    assert torch.equal(sk.linear(x, w24, backend="doubled"), 2 * single)
    told = sk.explain(x, w24)
    assert (told.backend, told.config, told.expected_us) == ("doubled", "6 tokens", 1.5)
    module = sk.SparseLinear.from_sparse24(w24, bias)
    with torch.no_grad():
        assert torch.equal(module(x), 2 * single + 1)
        asked = len(doubled.problems)
        for _ in range(3):
            module(x)
        assert len(doubled.problems) == asked, "bound once"
    compiled = torch.compile(lambda x: sk.linear(x, w24), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 2 * single)
    wide = sk.explain(x.float(), w24.to(torch.float32))
    assert wide.backend == "cpu" and "not doubled: torch.float32 is not 16 bits" in wide.reason
    gated = sk.gated_linear(x, w24, w24)
    doubled_half = torch.nn.functional.silu(0 * single)
    assert gated.shape == doubled_half.shape


# ---- a layout ------------------------------------------------------------------------------------


def transposed():
    """Both tensors of the row-major layout transposed."""

    def check(op, spec, tensors):
        out_features, in_features = spec.shape
        shape = [in_features // 2, out_features]
        layouts.check_tensor_shape(op, "values", tensors["values"], shape)

    def turned(spec, tensors):
        pair = {name: tensors[name].t().contiguous() for name in ("values", "metadata")}
        return {**tensors, **pair}

    return sk.Layout("transposed", check, turned, turned)


@pytest.fixture
def layout():
    yield sk.register_layout(transposed())
    layouts.unregister_layout("transposed")


def test_a_layout_from_outside(layout):
    w = random_weight(8, 16, BF16)
    x = random_input((3, 16), BF16)
    plain, w24 = sk.compress(w), sk.compress(w, layout="transposed")
    assert w24.layout == "transposed" and w24.values.shape == (8, 8)
    assert torch.equal(w24.values, plain.values.t())
    assert torch.equal(sk.linear(x, w24), sk.linear(x, plain))
    assert torch.equal(sk.decompress(w24), w) and torch.equal(w24.mask(), plain.mask())
    sk.verify(w24)
    assert sk.prune_compress(w, layout="transposed").to_layout("tile64").layout == "tile64"
    for other in (copy.deepcopy(w24), pickle.loads(pickle.dumps(w24)), w24.to(torch.float16)):
        assert other.layout == "transposed"
    module = sk.SparseLinear.from_sparse24(plain, layout="transposed")
    assert module.layout == module.weight.layout == "transposed" == module.packed
    assert torch.equal(module(x), sk.linear(x, plain))
    other = sk.SparseLinear(16, 8, bias=False, dtype=BF16, layout="transposed")
    other.load_state_dict(module.state_dict())
    assert other.weight.layout == "transposed" and torch.equal(other(x), module(x))
    module.layout = None
    assert module.weight.layout == "rowmajor"
    compiled = torch.compile(lambda x: sk.linear(x, w24), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sk.linear(x, plain))
    with pytest.raises(ValueError, match="a new name, got 'transposed'"):
        sk.register_layout(transposed())


@pytest.mark.parametrize(
    "change, text",
    [(dict(name=3), "name: text, got 3"), (dict(check=None), "check: a function, got None")],
)
def test_what_is_no_layout(change, text):
    with pytest.raises(TypeError, match=f"sparsekern.Layout: expected {text}"):
        replace(transposed(), **change)


def test_a_layout_that_is_gone_is_named():
    sk.register_layout(transposed())
    w24 = sk.compress(random_weight(8, 16, BF16), layout="transposed")
    layouts.unregister_layout("transposed")
    with pytest.raises(FormatError, match="layout in .*, got 'transposed'"):
        w24.rowmajor()
    with pytest.raises(ValueError, match="layout in .*, got 'transposed'"):
        sk.SparseLinear(16, 8, layout="transposed")
    with pytest.raises(ValueError, match="one of layout and packed"):
        sk.SparseLinear(16, 8, layout="tile64", packed=True)


# ---- an element type -----------------------------------------------------------------------------


class RowScales:
    """8-bit integers with one float32 scale for each row."""

    tensors = ("weight_scale",)

    def encode(self, values, group):
        scale = values.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        stored = (values.float() / scale).round().to(torch.int8)
        return {"values": stored, "weight_scale": scale}

    def decode(self, tensors, dtype, group):
        return (tensors["values"].float() * tensors["weight_scale"]).to(dtype)


@pytest.fixture
def rows8():
    """A type "rows8" that is declared, and then gets a codec."""
    declared = sk.ElementType("rows8", torch.int8, 8, scale="row")
    dtypes._TABLE["rows8"] = declared
    assert not declared.storable and (declared.bits, declared.values_per_byte) == (8, 1)
    yield sk.register_dtype(replace(declared, codec=RowScales()))
    dtypes.unregister_dtype("rows8")


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(name=3), TypeError, "ElementType: expected name: text, got 3"),
        (dict(storage="int8"), TypeError, "storage: a torch.dtype, got 'int8'"),
        (dict(bits=0), ValueError, "bits from 1 to 64, got 0"),
        (dict(backends="cpu"), TypeError, "backends: a tuple, got 'cpu'"),
        (dict(codec=object()), TypeError, "codec: a Codec or None"),
        (dict(codec=RowScales), TypeError, "a codec that is an object, .*codec=YourCodec()"),
        (dict(scale="column"), ValueError, r"scale in \('row', 'group'\) or None, got 'column'"),
        (dict(infinity_bits=3), ValueError, "infinity_bits=None, got 3"),
        (dict(name="fp8"), ValueError, "no element type that can be stored already, got 'fp8'"),
    ],
)
def test_element_types_that_cannot_be_registered(change, error, text):
    fields = dict(name="mine", storage=torch.int8, bits=8, codec=RowScales())
    before = dtypes.elements()
    with pytest.raises(error, match=text):
        sk.register_dtype(sk.ElementType(**{**fields, **change}))
    assert dtypes.elements() == before


@pytest.mark.parametrize(
    "method, returned, text",
    [
        ("encode", torch.ones(2), "compress: expected a dict from the encode of 'rows8', got Ten"),
        ("decode", torch.ones(2), r"numbers \[8, 8\] from the decode of 'rows8', got a tensor"),
        ("decode", None, r"numbers \[8, 8\] from the decode of 'rows8', got None"),
    ],
)
def test_what_a_codec_returns_is_checked(rows8, monkeypatch, method, returned, text):
    monkeypatch.setattr(RowScales, method, lambda *_: returned)
    with pytest.raises(FormatError, match=text):
        sk.decompress(sk.compress(random_weight(8, 16, BF16), dtype="rows8"))


def test_a_type_may_come_again_with_another_codec(rows8):
    """As in a notebook whose cell is run twice."""

    class Quarters:
        tensors = ()

        def encode(self, values, group):
            return {"values": (values * 4).round().to(torch.int8)}

        def decode(self, tensors, dtype, group):
            return tensors["values"].to(dtype) / 4

    w, x = torch.tensor([[1.0, 0, 0, 2.5]]), torch.ones(1, 4)
    old = sk.compress(w, dtype="rows8")
    sk.linear(x, old), pickle.loads(pickle.dumps(old))
    dtypes.unregister_dtype("rows8")
    assert "float32 as rows8" in repr(old)
    sk.register_dtype(replace(rows8, codec=Quarters(), scale=None))
    new = sk.compress(w, dtype="rows8")
    assert list(pickle.loads(pickle.dumps(new)).tensors) == ["values", "metadata"]
    grad = x.clone().requires_grad_()
    assert sk.linear(x, new).item() == sk.linear(grad, new).item() == 3.5


def test_a_codec_may_decode_to_float32(rows8, monkeypatch):
    decode = RowScales.decode
    monkeypatch.setattr(RowScales, "decode", lambda s, t, dtype, g: decode(s, t, torch.float32, g))
    w24 = sk.compress(random_weight(8, 16, BF16), dtype="rows8")
    assert sk.decompress(w24).dtype == sk.dequantize(w24).values.dtype == BF16


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_an_element_type_from_outside(rows8, dtype):
    w, x = random_weight(8, 20, dtype), random_input((2, 3, 20), dtype)
    w24 = sk.compress(w, dtype="rows8")
    assert list(w24.tensors) == ["values", "metadata", "weight_scale"]
    assert (w24.dtype, w24.values.dtype) == (dtype, torch.int8)
    assert w24.nbytes == 8 * 10 + 8 * 3 + 8 * 4 and "stored as rows8" not in repr(w)
    dense = sk.decompress(w24)
    step = w.float().abs().amax(dim=1, keepdim=True) / 127
    assert dense.dtype == dtype and ((dense == 0) >= (w == 0)).all()
    assert ((dense - w).float().abs() <= 0.51 * step + 2.0**-8 * w.float().abs()).all()
    exact = sk.compress(dense)
    assert torch.equal(sk.linear(x, w24), sk.linear(x, exact))
    assert torch.equal(w24.mask() & (dense != 0), dense != 0)
    sk.verify(w24)
    y = x.clone().requires_grad_()
    sk.linear(y, w24).sum().backward()
    z = x.clone().requires_grad_()
    sk.linear(z, exact).sum().backward()
    assert torch.equal(y.grad, z.grad)
    compiled = torch.compile(lambda x: sk.linear(x, w24), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sk.linear(x, w24))
    for other in (copy.deepcopy(w24), pickle.loads(pickle.dumps(w24))):
        assert torch.equal(other.to_dense(), dense)
    half = w24.to(torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half.values, w24.values)
    assert sk.explain(x, w24).backend == "cpu"
    assert torch.equal(w24.to_layout("tile64").to_dense(), dense)


def test_modules_of_an_element_type_from_outside(rows8, tmp_path):
    linear = torch.nn.Linear(20, 8)
    linear.weight.data = random_weight(8, 20, torch.float32)
    module = sk.SparseLinear.from_linear(linear, dtype="rows8")
    x = random_input((3, 20), torch.float32)
    assert dict(module.named_buffers()).keys() == {"values", "metadata", "weight_scale"}
    assert "stored as rows8" in repr(module)
    state = module.state_dict()
    assert set(state) == {"compressed", "bitmask", "shape", "weight_scale", "storage", "bias"}
    other = sk.SparseLinear(20, 8)
    assert not any(other.load_state_dict(state))
    assert torch.equal(other(x), module(x)) and other.weight.spec is module.weight.spec
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    scale = module.weight_scale.clone()
    module.to(BF16)
    assert module.weight.dtype == BF16 and module.bias.dtype == BF16
    assert torch.equal(module.weight_scale, scale), "the codec's tensors stay as they are"
    assert module(x.to(BF16)).dtype == BF16
    with pytest.raises(ValueError, match=r"save_pretrained: 0: .* got rows8. Save its state_dict"):
        sk.save_pretrained(torch.nn.Sequential(module), tmp_path / "folder")
    other.weight = sk.compress(random_weight(8, 20, torch.float32))
    assert "weight_scale" not in dict(other.named_buffers()), "back to a plain type"
    assert "storage" not in other.state_dict()
    state["storage"] = torch.tensor(list(b"int7 0"), dtype=torch.uint8)
    with pytest.raises(FormatError, match="an element type with a codec, got 'int7'"):
        other.load_state_dict(state)


def test_what_is_declared_and_has_no_codec():
    w = random_weight(8, 16, BF16)
    dtypes._TABLE["int7"] = sk.ElementType("int7", torch.int8, 7)
    try:
        with pytest.raises(TypeError, match=r"not only declared \('int7'\).*register_dtype"):
            sk.compress(w, dtype="int7")
    finally:
        dtypes.unregister_dtype("int7")
    with pytest.raises(TypeError, match="an element type in float32, .*, got 'int3'"):
        sk.compress(w, dtype="int3")
    assert sk.compress(w, dtype=torch.float16).dtype == torch.float16
    codec = RowScales()
    for changes, text in (
        (dict(name="bfloat16", codec=codec), "stored already, got 'bfloat16'"),
        (dict(name="a b", codec=codec), "one word"),
        (dict(name="int9"), "a codec, got None"),
    ):
        with pytest.raises(ValueError, match=text):
            sk.register_dtype(replace(sk.ElementType("int9", torch.int8, 8), **changes))


# ---- one table of dtypes -------------------------------------------------------------------------

LITERALS = {"float16", "half", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
# Files that may name a 16- or 8-bit dtype, and why.
EXCEPTIONS = {
    "formats/dtypes.py": "the table",
    "utils/safetensors_io.py": "the names of the file format, weights or not",
    "cli/prune.py": "the dtype that a CPU may have a unit for",
    "cli/main.py": "the dtype that a command takes by default",
    "cli/demo.py": "the dtype that the demo shows",
    "cli/doctor.py": "the dtype that its smoke test runs",
    "integrations/gguf/model.py": "the dtype that a model is loaded in by default",
    "oneshot/discovery.py": "what a dense weight to prune may have",
    "checkpoint/reader.py": "how a file's 16-bit numbers are compared",
    "cli/finetune.py": "the dtypes that a command computes and writes in",
    "finetune/data.py": "the dtype of autocast",
    "finetune/teacher.py": "the dtype of autocast, and of stored log-probabilities",
    "finetune/recipe.py": "the dtypes of autocast",
    "prune/products.py": "what float32 numbers are split into",
}


def test_no_dtype_is_named_outside_the_table():
    """`torch.bfloat16` and its like; in strings and comments they do no harm."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if named and node.value.id == "torch" and node.attr in LITERALS:
                place = path.relative_to(PACKAGE).as_posix()
                found.setdefault(place, []).append(node.lineno)
    assert found.keys() <= EXCEPTIONS.keys(), found
    owned = {"formats", "backends", "ops", "nn", "profiling"}
    assert {place for place in found if place.split("/")[0] in owned} == {"formats/dtypes.py"}


def test_the_table_is_right():
    for dtype, kind in dtypes.PLAIN.items():
        assert kind.storage is dtype and kind.bits == 8 * dtype.itemsize and kind.plain
        bits = torch.tensor([float("inf")], dtype=dtype)
        bits = bits.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
        assert int(bits) == kind.infinity_bits and dtypes.element(kind.name) is kind
        assert kind.columns(64) == 32
    assert dtypes.element("int4").columns(64) == 16
    assert dtypes.element("fp8") is dtypes.element("float8_e4m3fn")
    assert all(kind.storable for kind in dtypes.elements())
    assert all({"cpu", "triton"} <= set(kind.backends) for kind in dtypes.elements())
    assert {name for kind in dtypes.elements() for name in kind.backends} == set(
        registry.backends()
    )
    assert {kind.name for kind in dtypes.elements() if kind.scaled} == {
        dtypes.element(name).name for name in dtypes.QUANTIZED
    }


# ---- what 0.1 left behind ------------------------------------------------------------------------

# Made with 0.1.0: prune_compress(torch.arange(1, 33).reshape(2, 16).to(torch.bfloat16)), the bias
# [1, 2]; pickle.dumps of the weight, of a module with packed=None and of one with packed=True
# without bias, torch.save of the weight and of the module's state_dict, each through zlib.
WEIGHT_PICKLE = (
    "eNrNkj9v00AYxm3HSaOUglUmGBCjWazEhLTdfAF1sfjXLF6QdbGP2sXx+c7noCBFMgMRIG89JAYGRj4CIx+DsSsLM0"
    "gI8TomQkhl5wb7/N5zj9/7PVfqb1BLWY/qcp5hnpMnhKdWM7WHsupONtNTeeO5XEqzaucRzois2oLyIJKVPomfEVh2"
    "NddYyRfySFadOU4Kksvqwlpj+YWIE/jc9TmZFnES+oKkOeX+3IaNZrXTyHJ44WOwNvyE4tB/zOnMny4EOJ3K8TVVUU"
    "rtdS/58e7w+/WTDw+uWKV290sLnkummJ4Bp8g4FTSgiT8nPI9pylQQeDuwksRCJMQnaRjjlGkvvR4UxSIjfg7t56y1"
    "ZLrptaGYR5QL1nY1r0YTp4J1XN3Taw+aHrMtVy8K+KfpbdXipmWmBOsj9MaH0LkYjCZNvcdU7yLIDoZ79v5gOLL7N/"
    "cGNmusg6xgLde4J5j+EAwfMeU8rYoto4lIcZzSOXMU1EcOylCJ3qL36CP6hD6jM/QNKeM1fFeBILor6XZddSVfVduA"
    "IyGBABqQwPZ9HhJOwjtxIOpIj6SoA+vOiMAhFlhGl8xo9/bP/x80XIvzId8ajg76w/5fkPV/QN5oAbL+G/JXGH9Aaq"
    "v6Xtcgo6sbWJ0EL2ghgBqnT2f4hHJZTK1f754J6Q=="
)
WEIGHT_SAVED = (
    "eNqlVTtv00Acv7xdl7ZJKS0tUDowpBKkfuQJgsYGZfFASIUUsUSuczSmTpyzL6laCakINVJXJibUj8AGA6r4Ckx0YE"
    "BiYoGVkbu4TW2XpkBPss62/r/H/R92WQmFAWAYcGLFwSRQLa2hd+FSXcVqqr1ulORx8MSztoOa3VYtG65Dq5VyboU0"
    "u3J0g8DiCxR4joLJaoSQ2g21DVFIwyZhZlf0LciisBJU4j0U2UHRCopVoySsqxodaCPGiUvVOlg3bLZmwdWObtRrGL"
    "Zs06p1BRaNJJPVGCUmkeoaROwhtVwyTBXz2RXnPYtGqwESxqEL1RDZtXYHjSlxjMYfKYDoMz00oTBKoIfiu5pmGgbU"
    "sG62bPahVYcWrD/QNcyixGIFTWJ0sYKmqjRjTYhVmhp0qUF8NAbamxgOdKf7ujyaaYwpYYwuO3rBHpolG9Gb221Q2i"
    "sYXa2ga/3TG+qm2cFovq9hmRtN9Zlpoeud1VRZiTEf7P1qi3DSq3xq9WbA2KB6qaem1VRxrQstmxyqJI8cF5GnlO9+"
    "fnlJXdLrdMo5kDumPMx3TTX0tVYTtnBJFn2t8Vcrm6YGljfQ9yCRCA41kADLAwOrJMcmrU1JvvM/ukfL0DE2IPWwc/"
    "fbLM1+dKiHcXDPMxVLXEm+fQ4DxeJ28WsRSJxUlNrStvRa2pPeSx+lA+mr9EsCMnWWaMaTC0R74QxnN7zO+JK8cKaz"
    "H2RRjb3IZ5EQg/BQjQlXBQbddK78iyxV//Rm7fHZ9Z8HwnED9o9oQ0snHbil0mGt6fWSnPpHM1wmy/NcPiOIWb6QzX"
    "EZoZDm8kK6IIhpURRz+UI2n8sIeerSOOBgkvhI9l0GqNmBT/dUxk84939H/Wj3AM54kPsBcNoc+0ncQzTnHZwgGDK5"
    "fh73ICQ8PK9cPIMB9MPd3TrugU+HgG92/Fh3F3qxb/1Y3o9199CEBzsVBv6u9YPdpZ33ntkF/nPTlZVo9OZRi4ZuDZ"
    "CMbx8NOns+4uwER/9c4H7MeXa+vpGog2H68U7sb5lDtLY="
)
MODULE_PICKLE = (
    "eNrVlb9v00AUxx3HbUN/kRaBoEUVbIEhSkOathNxQV0MBdolC5wu9iV26/jiu3OjIFUKQ0uLTgKJQ2JgYORPYOTPYO"
    "zKwgwSQrzE/ZH0BzN4SHzvfd+7e597d24b754Nat1HTvAGZpxsEBZkfS8gmCk5uta1PYiHb9WtF2pLZWRKMOwFXlBT"
    "u3IEgQTXiSCMg1MaFQ9ziBSU2W4WRcLzYTiJGKlEnu8cqyGde6HHIUjAKUObeXBk5Fgcz+EP14iSaeRT7KAqo3VUaQ"
    "nCQbWkJzStrb8a9n99WP55Y/3T42vZtv7wWxJ+t0ItU05DXQ1GBbWpjzZhgR4NwgQIymPg8T0hfIJI4Hg4CPXd8jAY"
    "RatBEPeeEx4mt0IjUx4AI3cpE+GApZeTMPICEQ5aRtno5KBBLRyyjCiCOTPloY44XnKo2d0ShpeWYeVitrgW24fDRH"
    "kcZIuF+fzCbGEuX1gozhXDOLXdiMKkpa+I0HgCCZ+G2lnaBM7q8aZp7btaSW2rVWVplr6trMS22pMjUK5PbAHVAvqR"
    "R8whjDj3PVt0tnBVCdDvulfh7SW8cZlClahajfcvIwc3sR8BX3cs46aXZv5/xMV87s78bL4PcfocxIdaQJw+QFwqtU"
    "v7Jc3MmSWzYbbN9+ZH87P5xfxq7ps/TG3pCL+V2lFWykrsqL0u3A5mmYJexw4WOOZ57/e/DxNO1zm9Wigu5gq5PpDG"
    "eb16oAWQxgHI7/Acw9IBlt4PK5LTKKABanQq53AfiMPGRJwI9Vpl3NvuzTfyEqpge6OJGdwmjCCX0g1o104WefHY1W"
    "u+gjyOqpHv97vVihxHVcpO6af6rajpCRd14mqHiusnFNhv4hZHNoaT5xxoJo80J5c5c9pzxhwTiAssCHLg5PaFX+51"
    "nMw9Fd+Uf1FMn1ZQ3j9DCtWpE/mke6WPeAGqEiwiBmMrLUdpJHoMuhxCPm6BEeIYbdbxOoVvxxBc9fYGwFiJKtk/Ad"
    "IjiA=="
)
PACKED_PICKLE = (
    "eNrtmE9PE0EYxrfbAk0LWDASBWI81ktjsfzx1m0IlwoqXPZiJtPdaXdkutOdmYXUhKQeJGgm0YQx8eDBox/Box/DI1"
    "cvnCWa6LQL2hbwjtnfYbvv+z7zzux0Zw9PJ/XuZMboIad4CzKOthHzCwT7CDIlx7d6uYdReKjuvlB7Ki/TgkHsY7+h"
    "DmQWaAlsIoEY10WZBrWwXo+CvBzdgSREXHcSlDleAYQCEx1OA4ZqISYuEMjnlIGdBd0+LyciGdc/sIGUzAFCoQvqjD"
    "ZBrS10p0NV+ZUzjI75OkN+flg7ufPs0+NbhY65/i2pr3uBkbd12WgxKqhDCdjRS8HUDxJaYE/oCsFCEASQ72LoB+aB"
    "ndFJ0W4hwPFzxIPkXpDK2yM6yT3KRDBSNe2kjrAvgtFqyk51e1C/EYxVU2Go58zbY11xtOTAcHqPkKms6ZWL4tJWlM"
    "8ECXtSyx6UlhdWiqXFYmmluLwURK2dVhgk1430hghST3THp4FxkTgBC0Y6+rfK5U75qGxY96yy1bI61nvro/XZ+mJ9"
    "tY6s75ZRMWJiYmJiYmJiYmJiYmJiYq486qXaVFWjmlg30vtKX6qJffVKZh1KCHIEpj5XMvuIuYghdxU7omvebCqhR8"
    "l0EwnoQgGVN5H3cpUf5lWwU9oCXWKllO4v6rtBK8W8zEo5FXetFDPayuPj1QGG45j/m76jZHaPktk7St7N0+MSyjng"
    "Ux+0ui8+F8gXZwYn4EioNyrvzXuZt/I6qEFnexcyF7QYAh6l21z1ushrf0v96RmAOaiHhAyW1YacBHXKzulnB7NgFw"
    "sPdMc1zhTzQwpIdmGbAwfqj4J7qpn+oxle5u3zlQvmmAJcQIGAqz8qA8Nv9BeGe89GPu4/FHPnFZQPzpAGTeqGBPV8"
    "5iz2QR1BETIdV3NynIaiL2HKMUBgWyeVHBWYoKWS0qmW3mm9FQcyVcOQq42wVvgNNDxM0Q=="
)
STATE_SAVED = (
    "eNqlVb1v00AUvzipmxpo0/JRKFAKFAhfaew0SctXYwt5MRIlCCnqYjmJaSycOM++FoEEqoRaCTYGEANC/RPYYOQPYE"
    "EsCDFUYmJiA0bu7CbYDiFAn2Sd4tzv4/neezevRGMIxeOoIxJoBGl2pWYs61NVDWup5i1TlgbRQiBWmErFMk29gg2r"
    "4XBX7apu69XLRgVzgE4WIZIsEX5UNjQHmAq2CGFKXcKG6XCqrZeXDLOqYr3hWLa6LHAQTSZL/WS/Q3ZqizrEPAgnya"
    "alYT533XvPQV8pQralgS1FyVppLkG/wmCIX1OQwqzCgBJZBe5hjVrYhmF7EXaUOLrRqjdt3XH0KgzWiFgtVvOYeBiq"
    "9SsJDAmXQYmvwbASVyJrMOKx7MSwqwi7XXdlA9c15xbs8ShaHu9gve1v1GUVYC9hjWHY57EyazBGFsK632M9gOFgEc"
    "ZLfTTnmtbU4VCA84rVWGxzTricGThcc3M94nESsqNKhC6THucxDMeLcGLpHiRLAwSg1nWs0ROEk+7/p0r0eOH0PTjj"
    "ZrOs2w45PDirRBzHKafmlf74wecfF94TNfrMdy2RUZRsl0jqpmXXNaxussnSZKhSfh88VXv19dMDmhp9uquNofwvtc"
    "0CUTXTWGzU9QaWpcxfCYYiN00NzN2GLwyRYP5oYBjNtQ2UyWFbtNhl6fz/6LbCNDA2deph9eLnfSxRYf/oYRBdCnTl"
    "VFqWzm3BwMocKlD1sUffntBGjfVQLwTVeVm6sJX0FwqFlcJGAYlpsSA2xRXxmbguvhbfiB/EDfGHiCTqbbieSE4Q9Y"
    "ke3iaD3gRZmujp7S0JqqF+/978j/wzW82faU9bL9zmU9dHE5vvunsZQpm2l3bTTf2rmQxHFd+9WLzRu/7HkfCrAd30"
    "Hd02SAfe1ej0V42qLKX+0QCfzudnckJemM3Pzs5kp/mckE3P8sJ0ejqdFrK5HJ/NZ2fyOeryyf0Xz5LER9J1GXE/Xc"
    "unf2AlOpyH77Ew2j+ARgPIowzqNuLCJP4hMhYgeewn6ZhcYR7/IBgO8IxEUecACsP9nTwYgD+NotDsCGP9nRbE7oqF"
    "sHwY6++gIPZlGCt0nJ6v4kO6fSFsJoz11+5QALvuw3Y5M39JjQe/NYt6FPu8wrJnWq0RPdtGcqH1wWaPv2ZbLc7Sax"
    "edH/B+e7deH+thOHe/t/cniMsh5A=="
)


def stored(text):
    return zlib.decompress(base64.b64decode(text))


def the_weight():
    return sk.prune_compress(torch.arange(1, 33).reshape(2, 16).to(BF16), layout="rowmajor")


def same_weight(a, b):
    return a.spec is b.spec and all(
        torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors
    )


def test_old_pickles_load():
    expected = the_weight()
    assert same_weight(pickle.loads(stored(WEIGHT_PICKLE)), expected)
    saved = io.BytesIO(stored(WEIGHT_SAVED))
    assert same_weight(torch.load(saved, weights_only=True), expected)
    module = pickle.loads(stored(MODULE_PICKLE))
    assert module.layout is None and same_weight(module.weight.rowmajor(), expected)
    assert module.bias.tolist() == [1, 2]
    x = torch.ones(1, 16, dtype=BF16)
    assert torch.equal(module(x), sk.linear(x, expected, module.bias))
    packed = pickle.loads(stored(PACKED_PICKLE))
    assert packed.packed is True and packed.layout == packed.weight.layout == "tile64"
    assert same_weight(packed.weight.rowmajor(), expected) and packed.bias is None
    state = torch.load(io.BytesIO(stored(STATE_SAVED)), weights_only=True)
    fresh = sk.SparseLinear(16, 2, dtype=BF16)
    assert not any(fresh.load_state_dict(state)) and same_weight(fresh.weight, expected)
    assert state._metadata[""]["version"] == 1 and fresh.state_dict()._metadata[""]["version"] == 2
    state._metadata[""]["version"] = 3
    with pytest.raises(FormatError, match="version 2 or older, got 3"):
        fresh.load_state_dict(state)


def test_old_import_paths():
    from sparsekern import compression, gated, linear, ops, pack, sparse24
    from sparsekern.formats import tile64
    from sparsekern.linear import SparseLinear
    from sparsekern.ops import explain, gated_linear
    from sparsekern.ops import linear as linear_of_ops
    from sparsekern.sparse24 import Sparse24, compress, decompress, prune_compress, verify

    assert linear is sk.linear is linear_of_ops and explain is sk.explain
    assert gated_linear is sk.gated_linear is gated.gated_linear
    assert SparseLinear is sk.SparseLinear and Sparse24 is sk.Sparse24 is sparse24.Sparse24
    assert compress is sk.compress and decompress is sk.decompress
    assert prune_compress is sk.prune_compress and verify is sk.verify
    assert pack.pack is tile64.pack and callable(compression.compress_dense)
    assert callable(ops.linear)


# ---- the fast path on a GPU ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_the_readme_example_runs_on_the_fast_kernels(dtype):
    w = random_weight(256, 512, dtype, integers=True).cuda()
    x = random_input((4, 512), dtype, integers=True).cuda()
    best = registry.best_layout(sk.compress(w, layout="rowmajor").spec, w.device)
    if best == "rowmajor":
        pytest.skip("no CUDA kernels for this GPU")
    expected = (x.double() @ w.double().t()).to(dtype)
    for w24 in (sk.compress(w), sk.prune_compress(w)):
        assert w24.layout == best == sk.explain(x, w24).layout
        assert sk.explain(x, w24).backend == "cuda"
        assert torch.equal(sk.linear(x, w24), expected)
        assert torch.equal(sk.decompress(w24), w) and torch.equal(w24.to_dense(), w)
        assert torch.equal(w24.mask(), w24.rowmajor().mask())
        sk.verify(w24)
        assert w24.cpu().rowmajor().device.type == "cpu"
    rows = sk.compress(w, layout="rowmajor")
    told = sk.explain(x, rows)
    assert (told.backend, told.layout) == ("cuda", best) and rows.fresh_twin() is None
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(sk.linear(x, rows), expected)
        twin = rows.fresh_twin()
        assert twin.layout == best and sk.linear(x, rows, backend="triton").equal(expected)
        rows.values.mul_(2)
        assert torch.equal(sk.linear(x, rows), 2 * expected) and rows.fresh_twin() is not twin
    wanted = x.clone().requires_grad_()
    sk.linear(wanted, rows).sum().backward()
    assert torch.equal(wanted.grad, (2 * w).sum(0).expand_as(x))
    gate = sk.compress(w, layout="rowmajor")
    assert torch.equal(
        sk.gated_linear(x, gate, gate), sk.gated_linear(x, gate.twin(best), gate.twin(best))
    )


@pytest.mark.gpu
def test_a_row_major_weight_is_as_quick_as_a_module():
    """The same launch after the first call, in a captured graph, too."""
    w = random_weight(512, 512, BF16).cuda()
    x = random_input((4, 512), BF16).cuda()
    rows, module = sk.compress(w, layout="rowmajor"), sk.SparseLinear.from_sparse24(sk.compress(w))
    if module.weight.layout == "rowmajor":
        pytest.skip("no CUDA kernels for this GPU")
    with torch.no_grad():
        assert torch.equal(sk.linear(x, rows), module(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sk.linear(x, rows)
        graph.replay()
        assert torch.equal(y, module(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [kind.name for kind in dtypes.elements()])
def test_the_table_names_the_backends_of_a_type(name):
    if not _native.available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs the native module and a GPU of compute capability 9.0")
    kind, found = dtypes.element(name), set()
    dtype = kind.storage if kind.plain else BF16
    w24 = sk.compress(random_weight(256, 512, dtype), layout="rowmajor")
    w24 = w24 if kind.plain else sk.quantize(w24, name, layout="rowmajor")
    for backend in registry.backends():
        device = "cpu" if backend == "cpu" else "cuda"
        x, there = random_input((4, 512), dtype).to(device), w24.to(device)
        try:
            own = registry._own_layout(backend) or "rowmajor"
            layout = "tile64" if backend.startswith("cuda") else own
            sk.linear(x, there.to_layout(layout), backend=backend)
            found.add(backend)
        except (NotImplementedError, TypeError, ValueError):
            continue
    absent = {"cusparselt"} if cusparselt_library.refusal(0, kind.storage) else set()
    assert found == set(kind.backends) - absent


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    w, x = random_weight(256, 256, BF16).cuda(), random_input((4, 256), BF16).cuda()
    for layout in (None, "rowmajor"):
        w24 = sk.compress(w, layout=layout)
        compiled = torch.compile(lambda x, w24=w24: sk.linear(x, w24, None, "silu"), fullgraph=True)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(
                    compiled(x), sk.linear(x, w24, None, "silu"), rtol=2e-2, atol=2e-2
                )
