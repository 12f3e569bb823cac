"""SparseLinear among other modules: back to nn.Linear, dtypes that it cannot have, state_dicts that
are damaged, and counts of parameters."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import FormatError

transformers = pytest.importorskip("transformers", reason="needs transformers")
from python_tests.nn.expert_models import build as build_mixture  # noqa: E402
from python_tests.nn.expert_models import logits  # noqa: E402
from python_tests.oneshot.driver_models import build, tokens  # noqa: E402


def mixture(**options):
    """A small mixture of experts, pruned, and its report."""
    pruned = build_mixture("mixtral")
    return pruned, sk.prune_model(pruned, "magnitude", device="cpu", progress=False, **options)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32))
    layers[2].bias.requires_grad_(False)
    sk.prune_model(layers.to(dtype), "magnitude", progress=False)
    return layers


# ---- dense again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_linear(dtype):
    for layer in model(dtype).train():
        dense = layer.to_linear()
        assert type(dense) is nn.Linear and dense.training
        assert (dense.in_features, dense.out_features) == (32, 32)
        assert torch.equal(dense.weight, layer.weight.to_dense())
        assert dense.weight.requires_grad and dense.weight.dtype == dtype
        if layer.bias is None:
            assert dense.bias is None
        else:
            assert torch.equal(dense.bias, layer.bias) and dense.bias is not layer.bias
            assert dense.bias.requires_grad == layer.bias.requires_grad
    again = sk.SparseLinear.from_linear(dense)
    assert torch.equal(again.weight.to_dense(), layer.weight.to_dense())


def test_to_linear_under_another_default_dtype_and_device():
    layer = model()[0]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        dense = layer.to_linear()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert dense.weight.dtype == torch.float32 and not dense.weight.is_meta


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decompress_model(family, tmp_path):
    pruned = build(family)
    report = sk.prune_model(pruned, "magnitude", skip=(), progress=False)
    with torch.no_grad():
        expected = pruned(tokens()).logits
    dense = sk.decompress_model(copy.deepcopy(pruned))
    kinds = {type(m).__name__ for m in dense.modules()}
    assert "SparseLinear" not in kinds
    assert ("Conv1D" in kinds) == (family == "gpt2")
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, dense(tokens()).logits)
    found = sk.compress_model(dense)
    assert len(found.pruned) == len(report.pruned)
    with torch.no_grad():
        assert torch.equal(dense(tokens()).logits, expected)


def test_inference_mode_around_it_leaves_what_trains():
    model = build()
    sk.prune_model(model, "magnitude", progress=False)
    with torch.inference_mode():
        sk.decompress_model(model)
    model(tokens()).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    sk.prune_model(model, "magnitude", compress=False, progress=False)
    with torch.inference_mode():
        sk.compress_model(model, quantize="int8")
        sk.optimize(model)
    x = torch.randn(2, 4, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad.abs().sum() > 0


def test_transformers_own_word_for_it(tmp_path):
    pruned = build()
    sk.prune_model(pruned, "magnitude", progress=False)
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert any(isinstance(m, sk.SparseLinear) for m in loaded.modules())
    dense = loaded.dequantize()
    assert not any(isinstance(m, sk.SparseLinear) for m in dense.modules())
    dense.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, dense(tokens()).logits)


def test_what_decompress_model_refuses():
    with pytest.raises(TypeError, match="decompress_model: expected a model, got int"):
        sk.decompress_model(3)
    with pytest.raises(TypeError, match="to_linear"):
        sk.decompress_model(model()[0])
    experts = mixture()[0].model.layers[0].mlp.experts
    with pytest.raises(TypeError, match="got SparseExperts. Pass the model that holds it"):
        sk.decompress_model(experts)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_models_with_experts(quantize):
    pruned, report = mixture(quantize=quantize)
    dense, gone = build_mixture("mixtral"), sum(row.elements for row in report.pruned)
    before, after = sk.num_parameters(dense), sk.num_parameters(pruned)
    assert before.dense == after.dense == dense.num_parameters()
    assert after.stored == before.dense - gone // 2 and after.nbytes < before.nbytes
    assert sk.optimize(pruned).groups and sk.num_parameters(pruned) == after
    expected = logits(pruned)
    again = sk.decompress_model(copy.deepcopy(pruned))
    assert not any(isinstance(m, (sk.SparseExperts, sk.SparseLinear)) for m in again.modules())
    assert sk.num_parameters(again) == before
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


# ---- parameters ----------------------------------------------------------------------------------


def test_num_parameters():
    before = sk.num_parameters(build())
    assert before.dense == before.stored == build().num_parameters()
    pruned = build()
    report = sk.prune_model(pruned, "magnitude", progress=False)
    after = sk.num_parameters(pruned)
    gone = sum(row.elements for row in report.pruned)
    assert after.dense == before.dense and after.stored == before.dense - gone // 2
    assert after.nbytes < before.nbytes
    assert report.parameters == {"dense": after.dense, "stored": after.stored}
    assert f"{after.stored:,} of {after.dense:,} parameters kept" in report.summary()
    assert str(after).startswith(f"{after.dense:,} parameters")
    with pytest.raises(TypeError, match="num_parameters: expected model: an nn.Module"):
        sk.num_parameters({})


def test_a_weight_that_two_layers_share_counts_once():
    w24 = sk.compress(torch.zeros(8, 16))
    layers = [sk.SparseLinear.from_sparse24(w24, layout="rowmajor") for _ in range(2)]
    count = sk.num_parameters(nn.ModuleList(layers))
    assert (count.dense, count.stored, count.nbytes) == (8 * 16, 8 * 8, w24.nbytes)


# ---- dtypes --------------------------------------------------------------------------------------

REFUSED = {
    "double": lambda m: m.double(),
    "complex": lambda m: m.to(torch.complex64),
    "float8": lambda m: m.to(torch.float8_e4m3fn),
    "type": lambda m: m.type(torch.float64),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_dtypes_that_a_weight_cannot_have(name):
    layers = model()
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(TypeError, match="SparseLinear.to: expected a dtype .*decompress_model"):
        REFUSED[name](layers)
    after = layers.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    layers(torch.randn(2, 32))


def test_overflow_is_counted():
    layers = model()
    layers[0].values.data[3, :5] = 1e6
    layers[2].bias.data[1] = -1e9
    with pytest.warns(UserWarning) as seen:
        layers.half()
    texts = [str(w.message) for w in seen]
    assert any("5 of 512 numbers of a weight are beyond torch.float16" in t for t in texts)
    assert any("1 of 32 numbers of a bias are beyond torch.float16" in t for t in texts)
    assert layers[0].values.dtype == torch.float16


@pytest.mark.parametrize(
    "change", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.float()]
)
def test_without_overflow_nothing_is_said(change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(model())


# ---- state_dicts ---------------------------------------------------------------------------------

DAMAGE = {
    "bits": ("1.bitmask", lambda t: torch.full_like(t, 255)),
    "rows": ("1.compressed", lambda t: t[:-1]),
    "shape": ("2.shape", lambda t: t + 1),
    "bias": ("2.bias", lambda t: t[:-1]),
    "dtype": ("2.bitmask", lambda t: t.float()),
    "NaN": ("1.compressed", lambda t: t * float("nan")),
    "missing": ("2.compressed", None),
    "no tensor": ("2.bitmask", lambda t: 3),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_layer_leaves_the_whole_model_as_it_was(name, assign):
    layers, other = model(), model(torch.float32)
    for parameter in other.parameters():
        parameter.data.add_(1)
    for layer in other:
        layer.values.mul_(2)
    key, damage = DAMAGE[name]
    state = other.state_dict()
    state[key] = damage(state[key]) if damage else None
    if damage is None:
        del state[key]
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(FormatError, match=f"load_state_dict\\('{key[0]}'\\)"):
        layers.load_state_dict(state, assign=assign)
    after = layers.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    layers.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layers[0].values, other[0].values)


def test_a_layer_alone_is_all_or_nothing():
    layer, other = model()[0], model()[2]
    state = other.state_dict()
    state["bias"] = state["bias"][:-1]
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        layer.load_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_models_that_were_loaded_check_too(tmp_path):
    pruned = build()
    sk.prune_model(pruned, "magnitude", progress=False)
    sk.save_pretrained(pruned, tmp_path)
    for loaded in (
        sk.from_pretrained(tmp_path),
        sk.load_into(build(), tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        copy.deepcopy(pruned),
        pickle.loads(pickle.dumps(pruned)),
    ):
        state = {k: v * 2 if v.is_floating_point() else v for k, v in loaded.state_dict().items()}
        state["model.layers.1.mlp.down_proj.bitmask"].fill_(0)
        before = copy.deepcopy(loaded.state_dict())
        before = {k: v for k, v in before.items() if not k.endswith("bitmask")}
        with pytest.raises(FormatError, match="down_proj"):
            loaded.load_state_dict(state)
        after = loaded.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
