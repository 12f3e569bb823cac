"""Folders with quantised layers: round trips, compressed-tensors' own, damage, exports."""

import json
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekern as sk
from python_tests.checkpoint import checkpoint_cases as cases
from python_tests.checkpoint import foreign_quantized as foreign
from sparsekern.checkpoint import export_dense, verify_checkpoint
from sparsekern.errors import FormatError
from sparsekern.formats import dtypes
from sparsekern.formats.disk import read_sparse24, stored_bytes, stored_tensors
from sparsekern.formats.forms import FORMS, form_of
from sparsekern.utils.safetensors_io import TensorFiles

BF16 = torch.bfloat16
KINDS = ["fp8", "int8", "int4"]


def sparse(name, dtype=BF16):
    """Plain's layers first (shared, with bias) and second, quantised."""
    model = cases.sparsify(cases.with_dtype(cases.Plain(), dtype), keep=("head",))
    for module in model.modules():
        if isinstance(module, sk.SparseLinear):
            module.weight = sk.quantize(module.weight, name)
    return model


def folder(tmp_path, name, dtype=BF16):
    model = sparse(name, dtype)
    sk.save_pretrained(model, tmp_path / name)
    return tmp_path / name, model


def logits(model, dtype=BF16):
    return model(torch.linspace(-1, 1, 24).view(2, 12).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", KINDS)
def test_round_trip_of_a_module(tmp_path, name, dtype):
    path, model = folder(tmp_path, name, dtype)
    report = verify_checkpoint(path)
    assert report.ok, report.table()
    assert {layer.dtype for layer in report.layers} == {model.first.weight.spec.storage}
    files = TensorFiles(path)
    nbytes = sum(files.info[f"first.{part}"].nbytes for part in form_of(files, "first").parts)
    assert nbytes == stored_bytes(model.first.weight.spec)
    with torch.no_grad():
        for other in (
            sk.load_into(cases.with_dtype(cases.Plain(), dtype), path, verify=True),
            sk.load_into(cases.with_dtype(cases.Plain(), torch.float16), path),
        ):
            assert other.first.weight.spec is model.first.weight.spec
            assert torch.equal(logits(other, dtype), logits(model, dtype))
        narrow = sk.load_into(cases.Plain(), path, dtype=torch.float16)
    assert narrow.first.weight.dtype == torch.float16
    assert torch.equal(narrow.first.weight.values.view(torch.uint8),
                       model.first.weight.values.view(torch.uint8))  # fmt: skip


def test_what_stands_in_the_files(tmp_path):
    path, model = folder(tmp_path, "fp8")
    tensors = load_file(path / "model.safetensors")
    assert tensors["first.compressed"].dtype == dtypes.element("fp8").storage
    assert tensors["first.weight_scale"].dtype == torch.float32
    assert tensors["first.weight_scale"].shape == (16, 1)
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    group = entry["config_groups"]["group_0"]
    assert entry["format"] == group["format"] == "float-quantized"
    assert entry["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    assert group["input_activations"]["strategy"] == "token" and group["targets"] == ["Linear"]
    path, model = folder(tmp_path, "int4")
    tensors = load_file(path / "model.safetensors")
    assert tensors["second.weight_packed"].shape == (12, 1), "8 kept levels in one word"
    levels = dtypes.scaled_codec("int4").unpack(model.second.weight.values)[0].int().tolist()
    word = sum(level + 8 << 4 * place for place, level in enumerate(levels))
    assert int(tensors["second.weight_packed"][0, 0]) & 0xFFFFFFFF == word
    assert tensors["second.weight_shape"].tolist() == [12, 16]


def test_layers_of_several_types(tmp_path):
    model = sparse("int8")
    model.second.weight = sk.quantize(sk.dequantize(model.second.weight), "int4")
    sk.save_pretrained(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "mixed-precision"
    targets = [group["targets"] for group in entry["config_groups"].values()]
    assert sorted(targets) == [["first"], ["second"]]
    other = sk.load_into(cases.with_dtype(cases.Plain(), BF16), tmp_path)
    assert torch.equal(logits(other), logits(model)) and verify_checkpoint(tmp_path).ok
    model.first.weight = model.first.weight.to(torch.float16)
    model.first.bias.data = model.first.bias.data.half()
    with pytest.raises(ValueError, match="layers of one dtype, got bfloat16, float16"):
        sk.save_pretrained(model, tmp_path / "other")


@pytest.mark.parametrize("name", KINDS)
def test_transformers_models(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = cases.llama(BF16, tied=False)
    sk.prune_model(model, "magnitude", quantize=name, progress=False)
    model.save_pretrained(tmp_path / "a")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
        assert torch.equal(loaded(ids).logits, wanted)
        ours = sk.from_pretrained(tmp_path / "a", verify=True)
        assert torch.equal(ours(ids).logits, wanted)
    spec = model.model.layers[0].mlp.up_proj.weight.spec
    assert loaded.model.layers[0].mlp.up_proj.weight.spec is spec
    assert ours.model.layers[0].mlp.up_proj.weight.spec is spec
    assert verify_checkpoint(tmp_path / "a").ok


# ---- compressed-tensors' own files ---------------------------------------------------------------


@pytest.mark.parametrize("name", foreign.FOLDERS)
def test_folders_of_compressed_tensors(tmp_path, name):
    storage, dense, scale = foreign.write(name, tmp_path)
    assert verify_checkpoint(tmp_path).ok
    model = sk.load_into(foreign.module(name), tmp_path, verify=True)
    w24 = model.a.weight
    # Without a dtype in config.json that of the scales, which marlin-24 always has in float16.
    assert w24.dtype == (torch.float16 if name.startswith("marlin") else BF16)
    w24 = w24.to(BF16)
    assert w24.spec.storage == storage
    assert torch.equal(w24.to_dense(), dense)
    assert torch.equal(w24.tensors["weight_scale"], scale)
    tensors = load_file(tmp_path / "model.safetensors")
    if storage != "int4":  # the same bytes, but for the scale's dtype
        for part, tensor in stored_tensors(w24).items():
            theirs = tensors[f"a.{part}"]
            same = theirs.to(tensor.dtype) if part == "weight_scale" else theirs
            assert same.dtype == tensor.dtype and torch.equal(
                same.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
            )
    export_dense(tmp_path, tmp_path / "dense")
    exported = load_file(tmp_path / "dense" / "model.safetensors")["a.weight"]
    assert torch.equal(exported.to(BF16), dense)


def one(in_features):
    return nn.Sequential(OrderedDict(a=nn.Linear(in_features, 8, bias=False))).bfloat16()


GROUPS = [(96, 192), (96, 288), (48, 96), (160, 320), (40, 160), (12, 96), (4, 64), (32, 256)]
GROUPS += [(96, 256), (128, 192), (64, 256), (128, 256), (512, 1024), (4096, 8192)]


@pytest.mark.parametrize("size, in_features", GROUPS)
def test_groups_are_as_the_config_says(tmp_path, size, in_features):
    """The number of scales does not say it: rows of 192 have two of 96 columns, or two of 128 with
    a shorter last one."""
    dense = foreign.write_packed(tmp_path / "a", size, in_features, size)
    assert verify_checkpoint(tmp_path / "a").ok
    model = sk.load_into(one(in_features), tmp_path / "a")
    assert model.a.weight.spec.levels == f"int4 g{size}"
    assert torch.equal(model.a.weight.to_dense(), dense)
    x = torch.randn(3, in_features).bfloat16()
    torch.testing.assert_close(model(x), nn.functional.linear(x, dense), rtol=2e-2, atol=2e-2)
    sk.save_pretrained(model, tmp_path / "b")
    export_dense(tmp_path / "b", tmp_path / "c", keep_quantized=True)
    for folder in "bc":
        again = sk.load_into(one(in_features), tmp_path / folder)
        assert again.a.weight.spec.group == size
        assert torch.equal(again.a.weight.to_dense(), dense)


@pytest.mark.parametrize("group_size, more", [(-1, {}), (None, {"strategy": "channel"}), (512, {})])
def test_one_scale_a_row(tmp_path, group_size, more):
    dense = foreign.write_packed(tmp_path, 192, 192, group_size, **more)
    assert torch.equal(sk.load_into(one(192), tmp_path).a.weight.to_dense(), dense)


WRONG = [
    ((64, 256, 128), r"rows of 256 columns as config.json says \(group_size 128\), got 4 a row"),
    ((6, 96, 6), "groups of a multiple of 4 columns, got 6. Quantise"),
    ((64, 256, "64"), "config.json: expected group_size > 0, a whole number, got '64'"),
    ((64, 256, 0), "group_size > 0, a whole number, got 0"),
]


@pytest.mark.parametrize("sizes, text", WRONG)
def test_groups_that_do_not_fit(tmp_path, sizes, text):
    foreign.write_packed(tmp_path, *sizes)
    with pytest.raises(FormatError, match=text):
        sk.load_into(one(sizes[1]), tmp_path)
    assert not verify_checkpoint(tmp_path).ok


def test_a_folder_that_does_not_say_its_groups(tmp_path):
    dense = foreign.write_packed(tmp_path, 128, 256, 128)
    (tmp_path / "config.json").unlink()
    assert torch.equal(sk.load_into(one(256), tmp_path).a.weight.to_dense(), dense)
    foreign.write_packed(tmp_path, 96, 192, 96)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match="only one size of groups has, got 2. config.json says"):
        sk.load_into(one(192), tmp_path)


def test_layers_in_groups_of_two_sizes(tmp_path):
    """Where both sizes have as many scales, the config_groups that name the layer decide."""
    dense = foreign.write_packed(tmp_path, 96, 192, 96)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    other = {"targets": ["b"], "weights": groups["group_0"]["weights"] | {"group_size": 128}}
    for targets in (["a"], ["re:^a"]):
        groups["group_0"]["targets"], groups["group_1"] = targets, other
        path.write_text(json.dumps(config))
        assert torch.equal(sk.load_into(one(192), tmp_path).a.weight.to_dense(), dense)
    groups["group_0"]["targets"] = ["Linear"]
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="group_size 96 or group_size 128.*got 2 a row"):
        sk.load_into(one(192), tmp_path)


def test_the_config_is_the_one_that_compressed_tensors_writes(tmp_path):
    foreign.write("int-quantized", tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    model = sk.load_into(foreign.module("int-quantized"), tmp_path)
    sk.save_pretrained(model, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert ours.pop("quant_method") == "sparsekern" and theirs.pop("quant_method")
    for entry in (ours, theirs):
        entry["sparsity_config"].pop("global_sparsity")
    assert ours == theirs


def test_exported_levels_are_the_files_of_compressed_tensors(tmp_path):
    """Without the sparsity: dense levels and scales, which engines read."""
    _, dense, _ = foreign.write("pack-quantized", tmp_path / "a")
    model = sk.load_into(foreign.module("pack-quantized"), tmp_path / "a")
    sk.save_pretrained(model, tmp_path / "b")
    assert form_of(TensorFiles(tmp_path / "b"), "a").name == "words"
    export_dense(tmp_path / "b", tmp_path / "c", keep_quantized=True)
    theirs = load_file(tmp_path / "a" / "model.safetensors")
    ours = load_file(tmp_path / "c" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].to(tensor.dtype), tensor), key
    entry = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "compressed-tensors" and "sparsity_config" not in entry
    assert entry["ignore"] == ["b"] and entry["format"] == "pack-quantized"
    again = sk.load_into(foreign.module("pack-quantized"), tmp_path / "c")
    assert torch.equal(again.a.weight.to_dense(), dense)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_exports_of_8_bits(tmp_path, name):
    path, model = folder(tmp_path, name)
    export_dense(path, tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(dense["first.weight"], model.first.weight.to_dense())
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    export_dense(path, tmp_path / "levels", keep_quantized=True)
    levels = load_file(tmp_path / "levels" / "model.safetensors")
    assert levels["first.weight"].dtype == model.first.weight.values.dtype
    numbers = levels["first.weight"].float() * levels["first.weight_scale"]
    assert torch.equal(numbers.to(BF16), model.first.weight.to_dense())
    assert "first.bitmask" not in levels
    with pytest.raises(FormatError, match=r"got dense levels with scales \(first.weight, second"):
        export_dense(tmp_path / "levels", tmp_path / "again")
    with pytest.raises(FormatError, match="Quantised dense weights are not read"):
        sk.load_into(cases.Plain(), tmp_path / "levels")


# ---- damage --------------------------------------------------------------------------------------


def edited(name, change):
    """Changes the dict of tensors of a folder."""

    def apply(path):
        file = path / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        (path / "SHA256SUMS").unlink(missing_ok=True)

    return name, apply


def config(name, change):
    def apply(path):
        file = path / "config.json"
        content = json.loads(file.read_text())
        change(content["quantization_config"]["config_groups"]["group_0"])
        file.write_text(json.dumps(content))
        (path / "SHA256SUMS").unlink(missing_ok=True)

    return name, apply


def put(key, row, value):
    return lambda tensors: tensors[key].__setitem__(row, value)


DAMAGE = {
    "scale of zero": (*edited("fp8", put("first.weight_scale", 3, 0)), "scale.*got 0.0 at row 3"),
    "scale of NaN": (
        *edited("int4", put("first.weight_scale", 3, float("nan"))),
        "first.weight_scale.*got nan at row 3",
    ),
    "negative scale": (*edited("int8", put("first.weight_scale", 3, -1)), "got -1.0 at row 3"),
    "no scale": (*edited("fp8", lambda t: t.pop("first.weight_scale")), "need their scales"),
    "scales of another shape": (
        *edited("fp8", lambda t: t.update({"first.weight_scale": torch.ones(15, 1)})),
        r"first.weight_scale.*\[16, 1\]",
    ),
    "scales of too many groups": (
        *edited("int4", lambda t: t.update({"first.weight_scale": torch.ones(16, 9)})),
        "first.weight_scale.*groups of columns",
    ),
    "zero point": (
        *edited("int4", lambda t: t.update({"first.weight_zero_point": torch.ones(16, 1)})),
        "weight_zero_point.*symmetric",
    ),
    "bits": (*edited("int4", put("first.bitmask", 2, 0x77)), "first.bitmask.*2 bits set"),
    "sizes": (*edited("int4", put("first.weight_shape", 1, 20)), "first.*weight_packed|bitmask"),
    "a fp8 that is NaN": (
        *edited("fp8", lambda t: t["first.compressed"].view(torch.uint8).fill_(0x7F)),
        "finite",
    ),
    "asymmetric": (
        *config("int8", lambda group: group["weights"].update(symmetric=False)),
        "symmetric False",
    ),
    "of 2 bits": (*config("int4", lambda group: group["weights"].update(num_bits=2)), "2-bit"),
    "nvfp4": (
        *config("int4", lambda group: group.update(format="nvfp4-pack-quantized")),
        "nvfp4-pack-quantized",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(tmp_path, kind):
    name, apply, text = DAMAGE[kind]
    path, _ = folder(tmp_path, name)
    apply(path)
    with pytest.raises(FormatError, match=f"(?s){text}"):
        sk.load_into(cases.with_dtype(cases.Plain(), BF16), path, verify="fp8 that" in kind)
    report = verify_checkpoint(path)
    assert not report.ok and report.table()


def test_dense_int4_that_is_not_24(tmp_path):
    foreign.write("pack-quantized", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["a.weight_packed"] = torch.full_like(tensors["a.weight_packed"], 0x11111111)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="a.weight_packed.*4 at row 0.*prune the model before"):
        sk.load_into(foreign.module("pack-quantized"), tmp_path)


def test_marlin_of_other_shapes(tmp_path):
    foreign.write("marlin-24", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for part, tensor in (
        ("meta", torch.zeros(2, 100, dtype=torch.int16)),
        ("weight_packed", torch.zeros(3, 3, dtype=torch.int32)),
        ("scale_packed", torch.ones(5, 64, dtype=torch.float16)),
    ):
        shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{part}")
        path = tmp_path.parent / f"{tmp_path.name}-{part}"
        save_file({**tensors, f"a.{part}": tensor}, path / "model.safetensors")
        with pytest.raises(FormatError, match=f"a.{part}"):
            sk.load_into(foreign.module("marlin-24"), path)


def test_forms_name_their_tensors():
    assert len({form.name for form in FORMS}) == len(FORMS)
    for form in FORMS:
        assert {form.values, form.shape, form.scale} - {""} <= {*form.parts}


def test_one_scale_of_a_whole_weight(tmp_path):
    path, model = folder(tmp_path, "fp8")
    edited("fp8", lambda t: t.update({"first.weight_scale": torch.tensor([0.5], dtype=BF16)}))[1](
        path
    )
    w24 = read_sparse24(TensorFiles(path), "first")
    assert w24.dtype == BF16 and torch.equal(w24.tensors["weight_scale"], torch.full((16, 1), 0.5))
