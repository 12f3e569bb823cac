"""SparseLinear: construction, state_dict and its errors, moving, copying, pickling, compiling."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils import prune

from python_tests.linear_cases import (
    DTYPES,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from sparsekern import reference
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.errors import FormatError
from sparsekern.formats.sparse24 import Sparse24, compress, decompress, verify
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.ops.quantize import quantize

KEYS = ["bias", "compressed", "bitmask", "shape"]


def make(out_features=6, in_features=20, dtype=torch.float32, bias=True, device="cpu"):
    """20 columns: an odd number of groups, so that the last metadata byte holds padding."""
    w24 = compress(random_weight(out_features, in_features, dtype).to(device))
    vector = random_input((out_features,), dtype, seed=5).to(device) if bias else None
    return SparseLinear.from_sparse24(w24, vector)


def same(ours, theirs):
    assert torch.equal(ours.weight.values, theirs.weight.values)
    assert torch.equal(ours.weight.metadata, theirs.weight.metadata)
    assert (ours.bias is None) == (theirs.bias is None)
    assert ours.bias is None or torch.equal(ours.bias, theirs.bias)


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_dense_layer(dtype, device):
    w = random_weight(6, 20, dtype)
    x = random_input((2, 3, 20), dtype)
    for bias in (False, True):
        dense = nn.Linear(20, 6, bias=bias, dtype=dtype)
        dense.weight.data = w
        sparse = SparseLinear.from_linear(dense).to(device)
        y64 = reference.linear(x, w, dense.bias)
        y = sparse(x.to(device)).detach()
        assert_within(y, y64, error_bound(x, w, dense.bias, y64, dtype))


def test_from_linear_with_a_mask():
    dense = nn.Linear(8, 3)
    mask = torch.tensor([[True, False, False, True] * 2] * 3)
    sparse = SparseLinear.from_linear(dense.eval(), mask)
    assert torch.equal(decompress(sparse.weight), dense.weight.detach() * mask)
    assert sparse.bias.data_ptr() != dense.bias.data_ptr() and torch.equal(sparse.bias, dense.bias)
    assert not sparse.training
    with pytest.raises(ValueError, match="at most 2 non-zeros"):
        SparseLinear.from_linear(dense)


def test_from_linear_keeps_a_frozen_bias_frozen():
    dense = nn.Linear(8, 3)
    dense.weight.data = random_weight(3, 8, torch.float32)
    dense.bias.requires_grad_(False)
    assert not SparseLinear.from_linear(dense).bias.requires_grad


def test_from_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 20)
    w = random_weight(6, 20, torch.float32)
    conv1d.weight.data = w.t().contiguous()
    conv1d.bias.data = random_input((6,), torch.float32)
    sparse = SparseLinear.from_linear(conv1d)
    assert (sparse.out_features, sparse.in_features) == (6, 20)
    assert torch.equal(decompress(sparse.weight), w)
    x = random_input((2, 3, 20), torch.float32)
    torch.testing.assert_close(sparse(x), conv1d(x))


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.ReLU()], ids=repr)
def test_from_linear_refuses_other_modules(module):
    got = type(module).__name__
    with pytest.raises(TypeError, match=f"expected nn.Linear or Conv1D, got {got}"):
        SparseLinear.from_linear(module)


def test_from_sparse24_shares_its_tensors_and_checks_the_bias():
    w24 = compress(random_weight(6, 20, torch.float32))
    sparse = SparseLinear.from_sparse24(w24)
    assert sparse.weight.values.data_ptr() == w24.values.data_ptr()
    parameter = nn.Parameter(torch.zeros(6), requires_grad=False)
    assert SparseLinear.from_sparse24(w24, parameter).bias is parameter
    for bias, exception, pattern in (
        (torch.zeros(5), ValueError, r"bias of shape \[6\], got \[5\]"),
        (torch.zeros(6).half(), TypeError, r"bias\.dtype == weight\.dtype .*got torch\.float16"),
        (torch.zeros(6, device="meta"), ValueError, r"device \(cpu\), got meta"),
    ):
        with pytest.raises(exception, match=pattern):
            SparseLinear.from_sparse24(w24, bias)
    with pytest.raises(TypeError, match="Sparse24, got Tensor"):
        SparseLinear.from_sparse24(torch.zeros(6, 20))


@pytest.mark.parametrize("in_features", [0, 4, 8, 20])
def test_a_new_module_is_a_compressed_zero(in_features):
    sparse = SparseLinear(in_features, 3, dtype=torch.bfloat16)
    verify(sparse.weight)
    zero = torch.zeros(3, in_features, dtype=torch.bfloat16)
    same(sparse, SparseLinear.from_sparse24(compress(zero), torch.zeros_like(sparse.bias)))
    x = torch.ones(2, in_features, dtype=torch.bfloat16)
    assert torch.equal(sparse(x), torch.zeros(2, 3, dtype=torch.bfloat16))


def test_constructor_errors():
    with pytest.raises(ValueError, match="a multiple of 4, got in_features 6, out_features 3"):
        SparseLinear(6, 3)
    with pytest.raises(ValueError, match="got in_features 8, out_features -1"):
        SparseLinear(8, -1)
    with pytest.raises(TypeError, match="float32, float16, bfloat16, got torch.float64"):
        SparseLinear(8, 3, dtype=torch.float64)


def test_only_the_bias_is_a_parameter():
    sparse = make()
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]
    assert not any(buffer.requires_grad for buffer in sparse.buffers())
    sparse(torch.ones(2, 20)).sum().backward()
    assert torch.equal(sparse.bias.grad, torch.full((6,), 2.0))
    assert list(make(bias=False).parameters()) == []


def test_assigning_a_weight():
    sparse = make()
    other = compress(random_weight(6, 20, torch.float32, seed=9))
    sparse.weight = other
    assert torch.equal(decompress(sparse.weight), decompress(other))
    assert [name for name, _ in sparse.named_buffers()] == ["values", "metadata"]
    with pytest.raises(ValueError, match=r"shape \[6, 20\], got \[6, 24\]"):
        sparse.weight = compress(random_weight(6, 24, torch.float32))
    with pytest.raises(TypeError, match="Sparse24, got Tensor"):
        sparse.weight = torch.zeros(6, 20)


@pytest.mark.parametrize(
    "other, text",
    [
        (torch.nn.Parameter(torch.zeros(6, 20)), r"Parameter \[6, 20\].*compress\(w\)"),
        (make(), "SparseLinear. Pass its attribute weight"),
        (torch.nn.Linear(20, 6), "Linear. Pass the weight of one layer"),
    ],
)
def test_something_else_as_weight(other, text):
    """Ties and initialisations of models assign a Parameter; nn.Module would take a layer, too."""
    module = make()
    with pytest.raises(TypeError, match=f"expected weight of type Sparse24, got {text}"):
        module.weight = other
    assert isinstance(module.weight, Sparse24) and not list(module.children())


def test_repr():
    text = "SparseLinear(in_features=20, out_features=6, bias=True, dtype=torch.float32)"
    assert repr(make()) == text


# ---- state_dict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_round_trip_through_a_file(dtype, bias, device):
    source = nn.Sequential(make(dtype=dtype, bias=bias, device=device))
    state = source.state_dict()
    assert list(state) == ["0." + key for key in KEYS if bias or key != "bias"]
    assert state["0.compressed"].shape == (6, 10) and state["0.compressed"].dtype == dtype
    assert state["0.bitmask"].shape == (6, 3) and state["0.bitmask"].dtype == torch.uint8
    assert state["0.shape"].tolist() == [[6], [20]] and state["0.shape"].dtype == torch.int64
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    target = nn.Sequential(SparseLinear(20, 6, bias, dtype=dtype, device=device))
    result = target.load_state_dict(loaded)
    assert not result.missing_keys and not result.unexpected_keys
    same(target[0], source[0])
    assert target[0].weight.device.type == device.type


def test_bitmask_bits_are_the_kept_columns():
    sparse = make()
    mask = sparse.weight.mask()
    bits = sparse.state_dict()["bitmask"].unsqueeze(2) >> torch.arange(8) & 1
    assert torch.equal(bits.flatten(1)[:, :20].bool(), mask)
    assert not bits.flatten(1)[:, 20:].any()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_in_inference_mode_leaves_a_layer_that_trains(assign):
    """As an nn.Linear, into whose tensors the loaded ones are copied."""
    state, module = make().state_dict(), SparseLinear(20, 6)
    with torch.inference_mode():
        module.load_state_dict(state, assign=assign)
    x = torch.randn(3, 20, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.to_dense().sum(0).expand(3, 20))


def test_a_layer_made_in_inference_mode_loads_there():
    with torch.inference_mode():
        module, state = SparseLinear(20, 6), make().state_dict()
        module.load_state_dict(state)
    assert torch.equal(module.bias, state["bias"]) and module.bias.is_inference()


def test_loading_copies_and_casts_to_the_module():
    state = make().state_dict()
    target = SparseLinear(20, 6, dtype=torch.bfloat16)
    target.load_state_dict(state)
    assert target.weight.dtype == target.bias.dtype == torch.bfloat16
    assert torch.equal(target.weight.values, state["compressed"].bfloat16())
    same_dtype = SparseLinear(20, 6)
    same_dtype.load_state_dict(state)
    before = same_dtype.weight.values.clone()
    state["compressed"].zero_()
    assert torch.equal(same_dtype.weight.values, before) and before.any()


def test_loading_onto_meta_needs_assign():
    source = make(dtype=torch.bfloat16)
    state = source.state_dict()
    target = SparseLinear(20, 6, device="meta")
    assert target.weight.values.is_meta and target.bias.is_meta
    assert target.state_dict()["bitmask"].is_meta
    with pytest.raises(ValueError, match="assign=True"):
        target.load_state_dict(state)
    target.load_state_dict(state, assign=True)
    same(target, source)
    assert target.weight.values.data_ptr() == state["compressed"].data_ptr()


def damaged(**changes):
    return {key: changes.get(key, value) for key, value in make().state_dict().items()}


def edited(key, index, value):
    tensor = make().state_dict()[key].clone()
    tensor[index] = value
    return {key: tensor}


DAMAGE = {
    "three bits": (
        edited("bitmask", (2, 0), 0x37),
        "2 bits set .*got 3 bits at row 2, columns 0..3",
    ),
    "one bit": (edited("bitmask", (5, 1), 0x13), "got 1 bits at row 5, columns 12..15"),
    "padding bits": (edited("bitmask", (1, 2), 0x13), "padding bits .*row 1"),
    "nan": (
        edited("compressed", (3, 4), float("nan")),
        "finite values, got nan .*at row 3, columns 8..11",
    ),
    "infinity": (edited("compressed", (0, 0), float("inf")), "finite values, got inf .*at row 0"),
    "values shape": (
        dict(compressed=torch.zeros(6, 9)),
        r"'compressed' of shape \[6, 10\], got \[6, 9\]",
    ),
    "values rank": (
        dict(compressed=torch.zeros(60)),
        r"'compressed' of shape \[6, 10\], got \[60\]",
    ),
    "values dtype": (
        dict(compressed=torch.zeros(6, 10).long()),
        "float32, float16, bfloat16, got torch.int64",
    ),
    "bitmask shape": (
        dict(bitmask=torch.zeros(6, 2).byte()),
        r"'bitmask' of shape \[6, 3\], got \[6, 2\]",
    ),
    "bitmask dtype": (
        dict(bitmask=torch.zeros(6, 3)),
        "'bitmask' of dtype uint8, got torch.float32",
    ),
    "other shape": (dict(shape=torch.tensor([[6], [24]])), r"'shape' == \[6, 20\], got \[6, 24\]"),
    "shape numbers": (dict(shape=torch.tensor([6])), r"'shape' with 2 numbers, got \[1\]"),
    "shape dtype": (
        dict(shape=torch.tensor([[6.0], [20.0]])),
        "'shape' of dtype int64, got torch.float32",
    ),
    "not a tensor": (dict(bitmask="x"), "'bitmask' to be a Tensor, got str"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_state_dicts(name):
    changes, pattern = DAMAGE[name]
    target = SparseLinear(20, 6)
    with pytest.raises(FormatError, match=pattern):
        target.load_state_dict(damaged(**changes))
    assert not target.weight.values.any(), "a refused weight must leave the module as it was"


def test_values_that_overflow_the_module_are_refused():
    state = damaged(**edited("compressed", (0, 0), 1e6))
    with pytest.raises(FormatError, match="finite values, got inf .*at row 0"):
        SparseLinear(20, 6, dtype=torch.float16).load_state_dict(state)


def test_missing_and_unexpected_keys():
    state = make().state_dict()
    for key in ("compressed", "bitmask", "shape"):
        with pytest.raises(FormatError, match=f"keys compressed, bitmask, shape, got no '{key}'"):
            SparseLinear(20, 6).load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        SparseLinear(20, 6).load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match='Missing key.*"compressed".*"bitmask".*"shape"'):
        SparseLinear(20, 6).load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight"'):
        SparseLinear(20, 6).load_state_dict({**state, "weight": torch.zeros(6, 20)})
    kept = SparseLinear(20, 6)
    result = kept.load_state_dict({"bias": state["bias"], "weight": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["compressed", "bitmask", "shape"]
    assert result.unexpected_keys == ["weight"]
    assert torch.equal(kept.bias, state["bias"])


def test_errors_name_the_module():
    model = nn.ModuleDict({"proj": SparseLinear(20, 6)})
    state = {f"proj.{k}": v for k, v in damaged(shape=torch.tensor([[1], [4]])).items()}
    with pytest.raises(FormatError, match=r"load_state_dict\('proj'\): expected"):
        model.load_state_dict(state)
    state = {f"proj.{k}": v for k, v in damaged(**edited("bitmask", (2, 0), 0x37)).items()}
    with pytest.raises(FormatError, match=r"load_state_dict\('proj'\): .*got 3 bits at row 2"):
        model.load_state_dict(state)


# ---- moving, copying -----------------------------------------------------------------------------


def test_to_dtype_and_device(device):
    sparse = make().to(device, torch.bfloat16)
    assert sparse.weight.dtype == sparse.bias.dtype == torch.bfloat16
    assert sparse.weight.metadata.dtype == torch.uint8
    assert sparse.weight.device.type == sparse.bias.device.type == device.type
    assert sparse(torch.ones(1, 20, dtype=torch.bfloat16, device=device)).dtype == torch.bfloat16


def test_type_leaves_what_is_no_number():
    """nn.Module.type casts every buffer, of which the metadata is none."""
    module = make()
    same(copy.deepcopy(module).type(torch.bfloat16), copy.deepcopy(module).bfloat16())
    coded = SparseLinear.from_sparse24(quantize(module.weight, "int8"))
    kept = coded.values.clone()
    assert torch.equal(coded.type(torch.bfloat16).values, kept)


@pytest.mark.parametrize("storage", [None, "int8"])
def test_distributed_checkpoints(storage, tmp_path):
    """They ask for each key of a state_dict as an attribute."""
    weight = make().weight if storage is None else quantize(make().weight, storage)
    model = nn.Sequential(SparseLinear.from_sparse24(weight, torch.ones(6)), nn.ReLU())
    distributed.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    other = nn.Sequential(copy.deepcopy(model[0]), nn.ReLU())
    other[0].values.zero_()
    state = get_model_state_dict(other)
    distributed.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    same(other[0], model[0])
    assert torch.equal(model[0].compressed, weight.values)
    assert hasattr(model[0], "storage") == (storage is not None)


def test_torch_nn_utils_prune_of_the_weight_is_refused():
    with pytest.raises(TypeError, match="SparseLinear: expected a Parameter.*before it is compr"):
        prune.l1_unstructured(make(), "weight", 0.5)


def test_underflow_leaves_positive_zeros():
    sparse = make()
    sparse.values.fill_(-1e-30)
    sparse.half()
    assert torch.equal(sparse.values.view(torch.int16), torch.zeros(6, 10, dtype=torch.int16))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copier):
    sparse = make()
    before = make()
    other = copier(sparse)
    same(other, sparse)
    assert other.weight.layout == "rowmajor" and other.layout is None
    other.values.zero_()
    other.bias.data.zero_()
    same(sparse, before)


def test_whole_module_through_torch_save():
    file = io.BytesIO()
    torch.save(make(), file)
    file.seek(0)
    same(torch.load(file, weights_only=False), make())


def packed_pair(packed=True, device="cpu"):
    """The same bfloat16 weight, 70 x 84, in a row-major module and in one with `packed`."""
    w24 = compress(random_weight(70, 84, torch.bfloat16).to(device))
    bias = random_input((70,), torch.bfloat16, seed=5).to(device)
    plain = SparseLinear.from_sparse24(w24, bias, packed=False)
    return plain, SparseLinear.from_sparse24(w24, bias.clone(), packed=packed)


def test_the_state_dict_is_row_major_whatever_the_layout(device):
    plain, sparse = packed_pair(device=device)
    assert "layout=tile64" in repr(sparse) and "layout" not in repr(plain)
    through_pickle = pickle.loads(pickle.dumps(sparse))
    for module in (sparse, copy.deepcopy(sparse), through_pickle, sparse.to(torch.bfloat16)):
        assert module.packed is True and module.weight.layout == "tile64"
        for key, value in plain.state_dict().items():
            assert torch.equal(module.state_dict()[key], value)
    target = SparseLinear(84, 70, dtype=torch.bfloat16, device=device, packed=True)
    target.load_state_dict(plain.state_dict())
    assert target.weight.layout == "tile64"
    assert torch.equal(target.weight.values, sparse.weight.values)
    assert torch.equal(target.weight.metadata, sparse.weight.metadata)


def test_a_packed_module_computes_the_same():
    plain, sparse = packed_pair()
    x = random_input((2, 84), torch.bfloat16)
    assert torch.equal(sparse(x), plain(x))
    assert torch.equal(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), plain(x))


def test_packed_can_be_assigned_and_follows_the_weight():
    plain, sparse = packed_pair(None)
    assert sparse.weight.layout == "rowmajor", "the CPU has no kernels for tile64"
    sparse.packed = True
    assert sparse.weight.layout == "tile64" and sparse.values.shape == (4, 2048)
    sparse.weight = plain.weight
    assert sparse.weight.layout == "tile64"
    sparse.packed = None
    same(sparse, plain)
    sparse.weight = packed_pair()[1].weight
    same(sparse, plain)
    module = make()
    with pytest.raises(TypeError, match="float16 or bfloat16, got torch.float32"):
        module.packed = True
    assert module.packed is None and module.weight.layout == "rowmajor"


def test_a_buffer_replaced_by_hand_is_seen():
    plain, sparse = make(), make()
    sparse.values = sparse.values * 2
    assert sparse.weight.values is sparse.values
    assert torch.equal(decompress(sparse.weight), 2 * decompress(plain.weight))


def test_the_device_decides_the_layout(monkeypatch):
    """With the CPU taken for a GPU that has kernels: every way to arrive there packs."""
    plain, _ = packed_pair()
    monkeypatch.setattr(cuda_backend, "packs", lambda device, dtype: dtype != torch.float32)
    arrived = (
        copy.deepcopy(plain),
        SparseLinear.from_sparse24(plain.weight, plain.bias),
        SparseLinear(84, 70, dtype=torch.bfloat16),
        SparseLinear(84, 70).to(torch.bfloat16),
        SparseLinear(84, 70, dtype=torch.bfloat16, device="meta"),
    )
    for module in arrived[2:]:
        module.load_state_dict(plain.state_dict(), assign=module.values.is_meta)
    assert arrived[0].weight.layout == "rowmajor", "packed=False"
    for module in arrived[1:]:
        assert module.weight.layout == "tile64"
        assert list(module.state_dict()) == KEYS
        same(module.float(), copy.deepcopy(plain).float())
    moved = SparseLinear.from_sparse24(plain.weight)
    monkeypatch.undo()
    assert moved.to("cpu").weight.layout == "rowmajor", "it came to a device without the kernels"
    assert torch.equal(moved.weight.values, plain.weight.values)
    assert SparseLinear(0, 4, dtype=torch.bfloat16).weight.layout == "rowmajor"


@pytest.mark.gpu
def test_layouts_on_a_gpu():
    plain, _ = packed_pair()
    expected = "tile64" if cuda_backend.packs(torch.device("cuda"), torch.bfloat16) else "rowmajor"
    module = SparseLinear.from_sparse24(plain.weight, plain.bias).cuda()
    assert module.weight.layout == expected
    assert SparseLinear(84, 70, dtype=torch.bfloat16, device="cuda").weight.layout == expected
    assert module.float().weight.layout == "rowmajor", "float32 has no such kernels"
    assert module.bfloat16().weight.layout == expected
    module.packed = False
    assert module.weight.layout == "rowmajor"
    module.packed = None
    same(module.cpu(), plain)


# ---- compiling -----------------------------------------------------------------------------------


def test_compile_fullgraph_with_gradients(device):
    model = nn.Sequential(make(8, 20), nn.GELU(), make(4, 8, bias=False)).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        model.zero_grad()
        x = random_input((5, 20), torch.float32).to(device).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, model[0].bias.grad))
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager)


@pytest.mark.gpu
def test_module_in_a_cuda_graph():
    sparse = make(96, 256, torch.bfloat16, device="cuda")
    x = torch.zeros(2, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        sparse(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse(x)
        x.copy_(random_input((2, 256), torch.bfloat16))
        graph.replay()
        assert torch.equal(y, sparse(x))
