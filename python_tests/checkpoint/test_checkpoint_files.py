"""Files from elsewhere: compressed-tensors' own bytes, and damaged or hostile folders."""

import json
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.checkpoint import (
    export_dense,
    from_pretrained,
    load_into,
    save_pretrained,
    verify_checkpoint,
)
from sparsekern.errors import FormatError
from sparsekern.formats.sparse24 import Sparse24, compress, prune_compress
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.safetensors_io import TensorFiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Every way to have fewer than two non-zeros, every pair of columns, a last group of its own byte.
DENSE = [
    [1, 2, 0, 0, 0, 3, 0, 4, 0, 0, 0, 0],
    [0, 0, 5, 6, 7, 0, 0, 8, 0, -9, 10, 0],
    [-11, 0, 12, 0, 0.5, 0, 0, 0, 0, -0.25, 0, 0],
    [0, 0, 13, 0, 0, 0, 0, -14, 1.5, -2.5, 0, 0],
]
# What compressed-tensors 0.14.0 (Sparse24BitMaskTensor.from_dense, torch 2.13) makes of DENSE.
GOLDEN_BITMASK = "a30c9c06550acc03"
GOLDEN_SHAPE = "04000000000000000c00000000000000"
GOLDEN_VALUES = {
    torch.float32: (
        "0000803f00000040000040400000804000000000000000000000a0400000c0400000e04000000041"
        "000010c100002041000030c1000040410000003f00000000000080be000000000000504100000000"
        "00000000000060c10000c03f000020c0"
    ),
    torch.float16: (
        "003c00400042004400000000004500460047004880c8004980c9004a0038000000b40000804a0000"
        "000000cb003e00c1"
    ),
    torch.bfloat16: (
        "803f00404040804000000000a040c040e040004110c1204130c14041003f000080be000050410000"
        "000060c1c03f20c0"
    ),
}


def raw(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()).hex()


def from_hex(text, dtype, shape):
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).reshape(shape)


class OneLayer(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data = weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_write_the_golden_bytes(tmp_path, dtype):
    model = OneLayer(torch.tensor(DENSE, dtype=dtype))
    model.layer = SparseLinear.from_linear(model.layer)
    save_pretrained(model, tmp_path)
    files = TensorFiles(tmp_path)
    values, bitmask, shape = files.read("layer.compressed", "layer.bitmask", "layer.shape")
    assert sorted(files.info) == ["layer.bitmask", "layer.compressed", "layer.shape"]
    assert (values.dtype, list(values.shape), raw(values)) == (dtype, [4, 6], GOLDEN_VALUES[dtype])
    assert (bitmask.dtype, list(bitmask.shape)) == (torch.uint8, [4, 2])
    assert raw(bitmask) == GOLDEN_BITMASK
    assert (shape.dtype, list(shape.shape), raw(shape)) == (torch.int64, [2, 1], GOLDEN_SHAPE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_the_golden_bytes(tmp_path, dtype):
    tensors = {
        "layer.compressed": from_hex(GOLDEN_VALUES[dtype], dtype, (4, 6)),
        "layer.bitmask": from_hex(GOLDEN_BITMASK, torch.uint8, (4, 2)),
        "layer.shape": from_hex(GOLDEN_SHAPE, torch.int64, (2, 1)),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_into(OneLayer(torch.zeros(4, 12)), tmp_path)
    assert torch.equal(model.layer.weight.to_dense(), torch.tensor(DENSE, dtype=dtype))


def test_negative_zeros_of_other_writers_become_positive(tmp_path):
    model = OneLayer(torch.tensor(DENSE))
    model.layer = SparseLinear.from_linear(model.layer)
    model.layer.values[model.layer.values == 0] = -0.0
    save_pretrained(model, tmp_path)
    assert verify_checkpoint(tmp_path).layers[0].negative_zeros == 6
    loaded = load_into(OneLayer(torch.zeros(4, 12)), tmp_path).layer
    assert raw(loaded.values) == GOLDEN_VALUES[torch.float32]


# ---- compressed-tensors itself, where it is installed -------------------------------------------


@pytest.fixture
def peer():
    """compressed-tensors' module; releases after 0.14.0 have no sparse compressors."""
    return pytest.importorskip(
        "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask",
        reason="needs compressed-tensors 0.14.0 (the golden bytes above come from it)",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (16, 64), (33, 1020)])
def test_same_bytes_as_compressed_tensors(peer, dtype, shape):
    dense = torch.randn(shape).to(dtype)
    dense[torch.rand(shape) < 0.3] = 0
    dense = prune_compress(dense).to_dense()
    theirs = peer.Sparse24BitMaskTensor.from_dense(dense)
    ours = compress(dense)
    assert raw(ours.values) == raw(theirs.compressed)
    assert raw(ours.bitmask()) == raw(theirs.bitmask)
    back = Sparse24.from_bitmask(theirs.compressed, theirs.bitmask, theirs.shape)
    assert torch.equal(back.to_dense(), dense)
    assert torch.equal(theirs.decompress(), dense)


def test_compressed_tensors_reads_our_folder(peer, tmp_path):
    from compressed_tensors.compressors import ModelCompressor

    model = cases.sparsify(cases.llama(torch.bfloat16))
    save_pretrained(model, tmp_path, max_shard_size=9000)
    compressor = ModelCompressor.from_pretrained(str(tmp_path))
    assert compressor.sparsity_config.format == "sparse-24-bitmask"
    found = dict(compressor.sparsity_compressor.decompress(str(tmp_path)))
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            assert torch.equal(found.pop(name + ".weight"), module.weight.to_dense())
    assert "model.embed_tokens.weight" in found


def test_transformers_loads_our_folder_through_compressed_tensors(peer, tmp_path):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) > 4:
        pytest.skip("transformers 5 asks for a compressed-tensors that cannot read the format")
    model = cases.sparsify(cases.llama(torch.bfloat16))
    save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_we_read_a_folder_written_by_compressed_tensors(peer, tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import Sparse24BitMaskConfig

    model = cases.sparsify(cases.llama(torch.bfloat16))
    save_pretrained(model, tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "dense")
    dense = from_pretrained(tmp_path / "dense")
    config = Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"])
    compressor = ModelCompressor.from_pretrained_model(dense, sparsity_config_or_format=config)
    dense.save_pretrained(tmp_path / "theirs", state_dict=compressor.compress(dense))
    compressor.update_config(str(tmp_path / "theirs"))

    ours, theirs = TensorFiles(tmp_path / "ours"), TensorFiles(tmp_path / "theirs")
    assert set(ours.info) == set(theirs.info)
    for name in ours.info:
        assert raw(ours.read(name)[0]) == raw(theirs.read(name)[0])
    loaded = from_pretrained(tmp_path / "theirs")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert verify_checkpoint(tmp_path / "theirs").ok
    keys = ("version", "transform_config")
    entries = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "theirs")]
    ours, theirs = (entry["quantization_config"] for entry in entries)
    assert ours.keys() == theirs.keys()
    assert [ours[key] for key in keys] == [theirs[key] for key in keys]
    assert ours["sparsity_config"].keys() == theirs["sparsity_config"].keys()


# ---- damaged and hostile folders ---------------------------------------------------------------


def edit(change):
    """Mutation of a folder that changes header and data of its only safetensors file."""

    def mutate(folder):
        header, data = cases.split_file(folder / "model.safetensors")
        result = change(header, data)
        cases.join_file(folder / "model.safetensors", header if result is None else result, data)

    return mutate


def put(name, **fields):
    return edit(lambda header, data: header[name].update(fields))


def bytes_at(name, position, value):
    def change(header, data):
        data[header[name]["data_offsets"][0] + position] = value

    return edit(change)


def numbers_at(name, *values):
    def change(header, data):
        start = header[name]["data_offsets"][0]
        data[start : start + 8 * len(values)] = b"".join(v.to_bytes(8, "little") for v in values)

    return edit(change)


def file_bytes(change):
    def mutate(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return mutate


def overlap(header, data):
    first, second = header["first.bias"], header["table.weight"]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    start = first["data_offsets"][0]
    second["data_offsets"] = [start, start + size]


def rename(old, new):
    def change(header, data):
        header[new] = header.pop(old)

    return edit(change)


def duplicate_key(header, data):
    text = json.dumps(header)
    return (text[:-1] + ', "first.bias": ' + json.dumps(header["first.bias"]) + "}").encode()


def index(weight_map):
    def mutate(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        header, _ = cases.split_file(folder / "model-00001-of-00001.safetensors")
        names = {n: "model-00001-of-00001.safetensors" for n in header if n != "__metadata__"}
        text = json.dumps({"weight_map": weight_map(names)})
        (folder / "model.safetensors.index.json").write_text(text)

    return mutate


def moved(target):
    return index(lambda names: {**names, "first.bias": target})


def pickled(folder):
    class Bomb:
        def __reduce__(self):
            return (open, (str(folder / "unpickled"), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


HUGE = 2**62
DAMAGE = {
    "empty file": (file_bytes(lambda b: b""), "model.safetensors.*8 bytes"),
    "header longer than the file": (
        file_bytes(lambda b: (HUGE).to_bytes(8, "little") + b[8:]),
        "model.safetensors.*header of at most",
    ),
    "header length halved": (
        file_bytes(lambda b: (int.from_bytes(b[:8], "little") // 2).to_bytes(8, "little") + b[8:]),
        "model.safetensors.*JSON",
    ),
    "truncated": (file_bytes(lambda b: b[:-1]), "model.safetensors.*truncated"),
    "trailing bytes": (file_bytes(lambda b: b + b"x"), "model.safetensors.*trailing"),
    "not JSON": (edit(lambda h, d: b"{nonsense"), "model.safetensors.*JSON"),
    "not UTF-8": (edit(lambda h, d: b'{"\xff": 1}'), "model.safetensors.*UTF-8"),
    "nested JSON": (edit(lambda h, d: b"[" * 200_000), "model.safetensors.*JSON"),
    "JSON array": (edit(lambda h, d: b"[]"), "model.safetensors.*JSON object"),
    "duplicate key": (edit(duplicate_key), "'first.bias' twice"),
    "offset outside the file": (
        put("first.bias", data_offsets=[10**9, 10**9 + 32]),
        "first.bias.*inside",
    ),
    "negative offset": (put("first.bias", data_offsets=[-32, 0]), "first.bias.*data_offsets"),
    "reversed offsets": (put("first.bias", data_offsets=[64, 32]), "first.bias.*begin <= end"),
    "overlap": (edit(overlap), "(first.bias|table.weight).*overlap"),
    "huge shape": (put("first.bias", shape=[HUGE, HUGE]), "first.bias.*contradict"),
    "overflowing shape": (put("first.bias", shape=[2**63]), "first.bias.*non-negative"),
    "boolean shape": (put("first.bias", shape=[True, 16]), "first.bias.*non-negative"),
    "unknown dtype": (put("first.bias", dtype="F128"), "first.bias.*dtype among"),
    "extra field": (put("first.bias", path="/etc/passwd"), "first.bias.*fields"),
    "bias of wrong dtype": (put("first.bias", dtype="F16"), "first.bias.*torch.bfloat16"),
    "integer bias": (put("first.bias", dtype="I16"), "first.bias.*dtype"),
    "embedding of wrong shape": (put("table.weight", shape=[16, 10]), "table.weight.*shape"),
    "values of wrong dtype": (
        put("first.compressed", dtype="F8_E4M3", shape=[16, 12]),
        "first.weight_scale.*8-bit",
    ),
    "values flattened": (put("first.compressed", shape=[96]), "first.compressed.*unstructured"),
    "odd values": (put("first.compressed", shape=[32, 3]), "first.compressed.*multiple of 4"),
    "layer of other shape": (put("first.compressed", shape=[8, 12]), "first.bitmask.*to match"),
    "bitmask of wrong dtype": (put("first.bitmask", dtype="I8"), "first.bitmask.*uint8"),
    "bitmask of wrong shape": (put("first.bitmask", shape=[2, 16]), "first.bitmask.*to match"),
    "three bits in a nibble": (bytes_at("first.bitmask", 2, 0x37), "first.bitmask.*row 1.*0..3"),
    "one bit in a nibble": (bytes_at("first.bitmask", 2, 0x13), "first.bitmask.*row 1.*4..7"),
    "bits in the padding": (bytes_at("first.bitmask", 3, 0x33), "first.bitmask.*padding"),
    "shape of wrong dtype": (put("first.shape", dtype="F64"), "first.shape.*int64"),
    "shape of wrong shape": (put("first.shape", shape=[2]), r"first.shape.*\[2, 1\]"),
    "huge number in shape": (numbers_at("first.shape", HUGE, HUGE), "first.shape.*match"),
    "missing part": (rename("first.bitmask", "other"), "first.bitmask.*none in the folder"),
    "dense weight beside": (rename("steps", "first.weight"), "first.weight.*both"),
    "missing tensor": (rename("table.weight", "tables.weight"), "1 missing.*1 unexpected"),
    "dots in a name": (rename("table.weight", "..x"), "1 missing.*1 unexpected"),
    "layer that the model lacks": (
        edit(lambda h, d: json.dumps({k.replace("first", "x"): v for k, v in h.items()}).encode()),
        "x.compressed.*linear layer named 'x'",
    ),
    "index to the parent": (moved("../model.safetensors"), "index.json.*first.bias.*same folder"),
    "index to an absolute path": (moved("/etc/model.safetensors"), "index.json.*same folder"),
    "index to a Windows path": (moved("..\\model.safetensors"), "index.json.*same folder"),
    "index to a pickle": (moved("pytorch_model.bin"), "index.json.*first.bias.*safetensors"),
    "index to a number": (moved(7), "index.json.*first.bias"),
    "index to a missing file": (moved("model-2.safetensors"), "model-2.safetensors.*regular file"),
    "index without a tensor": (
        index(lambda names: {k: v for k, v in names.items() if k != "first.bias"}),
        "first.bias.*mixed",
    ),
    "index with a tensor too many": (
        index(lambda names: {**names, "ghost": "model-00001-of-00001.safetensors"}),
        "missing ghost",
    ),
    "index without a map": (index(lambda names: []), "index.json.*weight_map"),
    "pickle instead of safetensors": (pickled, "pytorch_model.bin.*never read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
    "config of another method": (
        lambda folder: (folder / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        "config.json.*gptq",
    ),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json.*JSON"),
}
# Damage that only shows against a module; to verify and export the folder is consistent in itself.
NEEDS_MODULE = {
    "bias of wrong dtype",
    "integer bias",
    "embedding of wrong shape",
    "missing tensor",
    "dots in a name",
    "layer that the model lacks",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_format_error(tmp_path, kind):
    mutate, pattern = DAMAGE[kind]
    cases.plain_folder(tmp_path / "folder")
    assert verify_checkpoint(tmp_path / "folder").ok
    mutate(tmp_path / "folder")
    with pytest.raises(FormatError, match=f"(?s){pattern}"):
        load_into(cases.Plain(), tmp_path / "folder")
    if kind not in NEEDS_MODULE:
        report = verify_checkpoint(tmp_path / "folder")
        assert not report.ok and "FAILED" in report.table()
        with pytest.raises(FormatError, match=f"(?s){pattern}"):
            export_dense(tmp_path / "folder", tmp_path / "dense")
        assert not list((tmp_path / "dense").glob("*"))
    assert not (tmp_path / "folder" / "unpickled").exists()


def test_a_pointer_of_git_lfs(tmp_path):
    cases.plain_folder(tmp_path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(FormatError, match="a pointer of Git LFS.*Run 'git lfs pull'"):
        load_into(cases.Plain(), tmp_path)


def test_the_report_names_layer_and_rule(tmp_path):
    cases.plain_folder(tmp_path)
    bytes_at("second.bitmask", 1, 0xF3)(tmp_path)
    bytes_at("first.compressed", 1, 0x7F)(tmp_path)
    bytes_at("first.compressed", 0, 0x80)(tmp_path)
    report = verify_checkpoint(tmp_path)
    problems = {layer.name: set(layer.problems) for layer in report.layers}
    assert problems == {"first": {"finite"}, "second": {"bitmask"}}
    assert "first.compressed" in report.layers[0].problems["finite"]
    table = report.table()
    assert "16x12" in table and "row 0, columns 12..15" in table and not report.ok


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_never_raises_anything_else(tmp_path, seed):
    """Flipped, dropped and doubled bytes load, or raise FormatError; both occur."""
    cases.plain_folder(tmp_path / "good")
    good = (tmp_path / "good" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    rng, outcomes = random.Random(seed), []
    for _ in range(100):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(rng.choice([8, length, len(damaged)]))
            action = rng.randrange(4)
            if action == 0:
                del damaged[position]
            elif action == 1:
                damaged.insert(position, rng.randrange(256))
            else:
                damaged[position] ^= 1 << rng.randrange(8)
        (tmp_path / "bad" / "model.safetensors").write_bytes(damaged)
        try:
            load_into(cases.Plain(), tmp_path / "bad")
            outcomes.append("loaded")
        except FormatError:
            outcomes.append("refused")
        verify_checkpoint(tmp_path / "bad").table()
    assert set(outcomes) == {"loaded", "refused"}


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers to fit"),
        ({"hidden_size": 10**12}, "hidden_size to fit"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "model named|none"),
        ({"hidden_size": 64}, "shape"),
        ({"model_type": "no-such-model"}, "config.json"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"num_attention_heads": "many"}, "config.json"),
        ({"quantization_config": {"config_groups": {"group_0": {}}}}, "config_groups"),
        (
            {"quantization_config": {"sparsity_config": {"format": "sparse-bitmask"}}},
            "sparse-bitmask",
        ),
        ({"quantization_config": [1]}, "quantization_config"),
        (
            {"quantization_config": {"transform_config": {"apply": [{"location": "input"}]}}},
            "transform_config of weights alone, got some of input. Make",
        ),
    ],
)
def test_config_that_does_not_fit_is_a_format_error(tmp_path, change, pattern):
    pytest.importorskip("transformers")
    save_pretrained(cases.sparsify(cases.llama()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError, match=pattern):
        from_pretrained(tmp_path)
    assert not verify_checkpoint(tmp_path).ok


def test_verify_finds_a_config_that_hides_layers(tmp_path):
    pytest.importorskip("transformers")
    save_pretrained(cases.sparsify(cases.llama(tied=False), keep=("lm_head", "q_proj")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]["sparsity_config"]
    for ignore, named in (
        (["lm_head"], "model.layers.0.self_attn.q_proj"),
        (entry["ignore"] + ["model.layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj"),
    ):
        entry["ignore"] = ignore
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert named in verify_checkpoint(tmp_path).problems["ignore"]
    (tmp_path / "SHA256SUMS").unlink()
    # As llm-compressor writes where few are compressed: each layer by its name, nothing of others.
    entry["ignore"] = []
    entry["targets"] = [layer.name for layer in verify_checkpoint(tmp_path).layers]
    config["quantization_config"]["transform_config"] = {
        "config_groups": {"R1": {"type": "hadamard", "apply": [{"location": "weight_output"}]}}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert verify_checkpoint(tmp_path).ok
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config" in verify_checkpoint(tmp_path).problems
