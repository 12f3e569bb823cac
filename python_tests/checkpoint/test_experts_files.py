"""Folders of models with 2:4 experts: the names that Transformers writes, loaded by us and by it,
exported, verified; damage is named."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekern as sk
from python_tests.nn.expert_models import FAMILIES, Mixture, build, logits
from sparsekern.checkpoint import experts as experts_files
from sparsekern.checkpoint import export_dense, verify_checkpoint
from sparsekern.checkpoint.experts import read_entries
from sparsekern.errors import FormatError
from sparsekern.integrations import vllm_rules
from sparsekern.nn.sparse_experts import SparseExperts

FUSED = ("gpt-oss", "llama4", "granite-moe")  # on disk, too
PARTLY = ("lm_head", "*.1.down_proj", "model.layers.1.*.experts.gate_up_proj")


def pruned(family, skip=("lm_head",), **more):
    model = build(family)
    sk.prune_model(model, "magnitude", skip=skip, device="cpu", progress=False, **more)
    return model


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def kinds(model):
    """{name: whether it is compressed} of the linear layers of experts."""
    return {
        f"{name}.{i}.{key}": isinstance(layer, sk.SparseLinear)
        for name, m in model.named_modules()
        if isinstance(m, SparseExperts)
        for i in range(m.recipe.experts)
        for key, layer in m.expert(i).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_are_those_that_transformers_writes(family, tmp_path):
    """Of every tensor, a compressed one under its name without `.weight`."""
    build(family).save_pretrained(tmp_path / "dense")
    sk.save_pretrained(pruned(family), tmp_path / "sparse")
    dense, sparse = tensors(tmp_path / "dense"), tensors(tmp_path / "sparse")
    layers = {n.removesuffix(".compressed") for n in sparse if n.endswith(".compressed")}
    mapped = {
        n.removesuffix(".weight") if n.removesuffix(".weight") in layers else n for n in dense
    }
    parts = (".compressed", ".bitmask", ".shape")
    assert mapped == {n for n in sparse if not n.endswith(parts)} | layers
    assert any(".3." in n for n in layers) != (family in FUSED)
    for name in layers:
        weight = dense.get(f"{name}.weight", dense.get(name))
        assert sparse[f"{name}.compressed"].numel() * 2 == weight.numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [("lm_head",), PARTLY], ids=["all", "partly"])
def test_loaded_and_exported(family, skip, tmp_path):
    """The same logits bit for bit by our loader, load_into and Transformers' own; verify finds
    nothing; exported, a plain Transformers model gives them up to the order of its sums."""
    model = pruned(family, skip)
    expected = logits(model)
    sk.save_pretrained(model, tmp_path / "sparse", max_shard_size=100_000)
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 1
    loaded = sk.from_pretrained(tmp_path / "sparse")
    assert kinds(loaded) == kinds(model) and any(kinds(model).values())
    assert all(kinds(model).values()) == (skip is not PARTLY)
    assert torch.equal(logits(loaded), expected)
    into = sk.load_into(build(family, seed=9), tmp_path / "sparse")
    assert torch.equal(logits(into), expected)
    plain = type(model).from_pretrained(tmp_path / "sparse").eval()
    assert kinds(plain) == kinds(model) and torch.equal(logits(plain), expected)
    report = verify_checkpoint(tmp_path / "sparse")
    assert report.ok, report.table()
    export_dense(tmp_path / "sparse", tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    assert not kinds(dense)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)
    build(family).save_pretrained(tmp_path / "names")
    assert tensors(tmp_path / "dense").keys() == tensors(tmp_path / "names").keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_blocks_on_request(family, tmp_path):
    """By our loader and by Transformers' own, which say what they leave out."""
    model = pruned(family)
    sk.save_pretrained(model, tmp_path)
    few = len(model.model.layers) - 1
    for load in (sk.from_pretrained, type(model).from_pretrained):
        with pytest.warns(UserWarning, match=rf"left out: .*layers\.{few}\."):
            loaded = load(tmp_path, num_hidden_layers=few)
        assert kinds(loaded).items() <= kinds(model).items()
        for name, module in loaded.named_modules():
            if isinstance(module, sk.SparseLinear):
                weight = model.get_submodule(name).weight.to_dense()
                assert torch.equal(module.weight.to_dense(), weight)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_saved_again_and_by_transformers(family, tmp_path):
    """What was loaded is written as before, by model.save_pretrained too; into a model that is
    apart already; in bf16."""
    model = pruned(family)
    sk.save_pretrained(model, tmp_path / "a")
    loaded = sk.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = sk.load_into(pruned(family), tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    half = sk.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for name in kinds(model):
        weight = model.get_submodule(name).weight.to_dense().bfloat16()
        assert torch.equal(half.get_submodule(name).weight.to_dense(), weight)
    assert logits(half).dtype == torch.bfloat16


def test_the_config_says_what_export_needs(tmp_path):
    sk.save_pretrained(pruned("gpt-oss"), tmp_path / "gpt-oss")
    sk.save_pretrained(pruned("mixtral"), tmp_path / "mixtral")
    entries = json.loads((tmp_path / "gpt-oss/config.json").read_text())["sparsekern"]["experts"]
    assert {
        "tensor": "model.layers.1.mlp.experts.down_proj",
        "experts": 4,
        "transposed": True,
        "layers": ["model.layers.1.mlp.experts.down_proj"],
    } in entries
    assert "sparsekern" not in json.loads((tmp_path / "mixtral/config.json").read_text())


def test_a_mixture_of_our_own(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Mixture())
    sk.prune_model(model, "magnitude", progress=False, skip=("*.2.last",))
    sk.save_pretrained(model, tmp_path)
    names = tensors(tmp_path).keys()
    assert {"0.bank.first.compressed", "0.bank.0.last.compressed", "0.bank.2.last.weight"} <= names
    torch.manual_seed(1)
    other = sk.load_into(torch.nn.Sequential(Mixture()), tmp_path)
    x = torch.randn(20, 16)
    assert torch.equal(other(x), model(x))


def damaged(folder, change):
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_what_is_missing_or_misshapen_is_named(family, tmp_path):
    sk.save_pretrained(pruned(family), tmp_path)
    layer = "model.layers.0.mlp.experts.2.up_proj"
    if family == "gpt-oss":
        layer = "model.layers.0.mlp.experts.down_proj"

    def drop(found):
        for part in ("compressed", "bitmask", "shape"):
            found.pop(f"{layer}.{part}", None)

    def shorten(found):
        if f"{layer}.shape" in found:
            rows = int(found[f"{layer}.shape"][0]) - 8
            found[f"{layer}.shape"][0] = rows
            for part in ("compressed", "bitmask"):
                found[f"{layer}.{part}"] = found[f"{layer}.{part}"][:rows].contiguous()

    good = tensors(tmp_path)
    for change, text in ((shorten, "rows|shape"), (drop, "experts")):
        save_file(good, tmp_path / "model.safetensors", metadata={"format": "pt"})
        damaged(tmp_path, change)
        model = build(family)
        parameters, before = dict(model.named_parameters()), logits(model)
        for load in (sk.from_pretrained, lambda folder, m=model: sk.load_into(m, folder)):
            with pytest.raises(FormatError, match=text):
                load(tmp_path)
        assert torch.equal(logits(model), before)
        assert all(parameters[name] is p for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "entry",
    [
        {"experts": 3},
        {"experts": 0},
        {"experts": True},
        {"layers": ["nothing"]},
        {"layers": "model.layers.0.mlp.experts.down_proj"},
        {"layers": ["model.layers.0.mlp.experts.down_proj"] * 4},
        {"transposed": "yes"},
        {"tensor": None},
    ],
)
def test_entries_of_a_config_are_checked(entry):
    name = "model.layers.0.mlp.experts.down_proj"
    good = {"tensor": name, "experts": 4, "transposed": True, "layers": [name]}
    layers = {name: (128, 64)}
    assert read_entries({"sparsekern": {"experts": [good]}}, layers, {}) == [good]
    for bad in ([{**good, **entry}], [good, good], good, ["x"]):
        with pytest.raises(FormatError, match="sparsekern.experts"):
            read_entries({"sparsekern": {"experts": bad}}, layers, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vllm_plugin_refuses_them(family, tmp_path):
    sk.save_pretrained(pruned(family), tmp_path)
    with pytest.raises(NotImplementedError, match="fused experts cannot read.*export"):
        vllm_rules.sparse_layers(str(tmp_path))


def test_the_vllm_plugin_takes_dense_experts(tmp_path):
    sk.save_pretrained(pruned("mixtral", ("lm_head", "MixtralExperts")), tmp_path)
    layers = vllm_rules.Layers(vllm_rules.sparse_layers(str(tmp_path)))
    assert not vllm_rules.has_sparse_experts(layers, "model.layers.0.block_sparse_moe.experts")
    some = vllm_rules.Layers(dense=["lm_head"])
    assert vllm_rules.has_sparse_experts(some, "model.layers.0.mlp.experts")
    none = vllm_rules.Layers(dense=["re:.*experts"])
    assert not vllm_rules.has_sparse_experts(none, "model.layers.0.mlp.experts")


@pytest.mark.parametrize("storage", ["fp8", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_quantised_experts(family, storage, tmp_path):
    """Levels and scales go by rows as the values do: split, stacked, loaded, exported."""
    model = pruned(family, PARTLY, quantize=storage)
    expected = logits(model)
    sk.save_pretrained(model, tmp_path / "sparse")
    loaded = sk.from_pretrained(tmp_path / "sparse")
    assert kinds(loaded) == kinds(model)
    assert torch.equal(logits(loaded), expected)
    plain = type(model).from_pretrained(tmp_path / "sparse").eval()
    assert torch.equal(logits(plain), expected)
    report = verify_checkpoint(tmp_path / "sparse")
    assert report.ok, report.table()
    export_dense(tmp_path / "sparse", tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-4)


def test_decompressed_by_the_public_name():
    model = pruned("gpt-oss")
    expected = logits(model)
    names = {name for name, _ in build("gpt-oss").named_parameters()}
    count = sk.num_parameters(model)
    assert sk.decompress_model(model) is model
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert count.dense == sk.num_parameters(model).dense > count.stored


def test_a_conversion_that_needs_the_numbers_is_said(caplog):
    place = experts_files.Place("mlp.experts", "down_proj", (2, 3, 4), False)

    def split(name, ids):
        raise RuntimeError("needs floating point")

    assert experts_files._pieces(place, split) == {}
    assert f"{place.name} is stored under its name in memory" in caplog.text
    assert "needs floating point" in caplog.text


@pytest.mark.parametrize("more", [{}, {"quantize": "int8"}, {"targets": ["*.0.down_proj"]}])
def test_a_conversion_that_turns_the_tensor_of_all_experts(more, tmp_path):
    """Qwen3-VL-MoE: files of before hold it [experts, in, out] under the name that it has in
    memory; a compressed layer's rows are those of the experts in turn."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3VLMoeForConditionalGeneration"):
        pytest.skip("needs Qwen3-VL-MoE")
    text = dict(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
        pad_token_id=0,
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    model = kind(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # less than half, where only some are targets
        sk.prune_model(model, "magnitude", progress=False, **more)
    model.save_pretrained(tmp_path)
    expected = sk.decompress_model(model).state_dict()
    for load in (sk.from_pretrained, kind.from_pretrained):
        found = sk.decompress_model(load(tmp_path)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
