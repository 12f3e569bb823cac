"""The vLLM plugin: which layers are 2:4, refusals, and layers of the real vLLM on the CPU."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern.formats.config_json import sparsity_entry
from sparsekern.integrations import inductor_pdl
from sparsekern.integrations import vllm_rules as plugin

HERE = Path(__file__).resolve().parent
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed (pip install --no-deps vllm==0.24.0, and what it imports)",
)
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_the_parts_of_fused_layers():
    layers = plugin.Layers(dense=["lm_head", "model.layers.0.mlp.gate_proj"])
    assert layers.sparse_parts("model.layers.0.self_attn.qkv_proj", FUSED) == [True] * 3
    assert layers.sparse_parts("model.layers.0.mlp.down_proj", FUSED) == [True]
    assert layers.sparse_parts("lm_head", FUSED) == [False]
    assert layers.sparse_parts("model.layers.0.mlp.gate_up_proj", FUSED) == [False, True]


@pytest.mark.parametrize(
    "sparse, rows, expected",
    [
        ([True], [8, 4, 4], [(True, 0, 16)]),
        ([True, True, True], [8, 4, 4], [(True, 0, 16)]),
        ([False, True, True], [8, 4, 4], [(False, 0, 8), (True, 8, 16)]),
        ([True, False, True], [8, 4, 2], [(True, 0, 8), (False, 8, 12), (True, 12, 14)]),
        ([False, False, True], [8, 4, 4], [(False, 0, 12), (True, 12, 16)]),
    ],
)
def test_products_of_a_fused_layer(sparse, rows, expected):
    found = plugin.runs(sparse, rows)
    assert [(run.sparse, run.begin, run.end) for run in found] == expected
    with pytest.raises(ValueError):
        plugin.runs([True, False], [1, 2, 3])


def test_patterns_of_older_folders():
    layers = plugin.Layers(dense=["re:.*lm_head", r"re:.*\.0\.self_attn"])
    assert not layers.is_sparse("lm_head") and not layers.is_sparse("model.layers.0.self_attn.q")
    assert layers.is_sparse("model.layers.1.self_attn.q")


def test_the_files_of_a_folder_decide(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": torch.nn.Linear(16, 16)})
    sk.prune_model(model, "magnitude", skip=("b",), progress=False)
    sk.save_pretrained(model, tmp_path)
    assert plugin.sparse_layers(str(tmp_path)) == ["a"]
    assert plugin.sparse_layers(str(tmp_path / "nothing")) is None
    layers = plugin.Layers(sparse=["a"], dense=["a"])
    assert layers.is_sparse("a") and not layers.is_sparse("b")


@pytest.mark.parametrize("per_rank, good", [(64, True), (24, True), (36, True), (12, False)])
def test_columns_are_split_where_bytes_of_the_bitmask_end(per_rank, good):
    if good:
        columns = 36 if per_rank == 36 else 2 * per_rank
        return plugin.check_columns("o_proj", columns, per_rank, None)
    with pytest.raises(ValueError, match="multiple of 8, got 12 of 24.*tensor_parallel_size"):
        plugin.check_columns("o_proj", 24, per_rank, plugin.Coding("int8"))


def test_columns_of_int4_are_split_where_words_and_groups_end():
    plugin.check_columns("o_proj", 256, 128, plugin.Coding("int4", 128))
    plugin.check_columns("o_proj", 96, 48, plugin.Coding("int4"))
    with pytest.raises(ValueError, match="multiple of 128, got 64 of 128"):
        plugin.check_columns("o_proj", 128, 64, plugin.Coding("int4", 128))
    with pytest.raises(ValueError, match="multiple of 16, got 24 of 48"):
        plugin.check_columns("o_proj", 48, 24, plugin.Coding("int4"))


def test_a_shape_of_another_model():
    plugin.check_shape("p", torch.tensor([[7], [64]]), 64)
    with pytest.raises(sk.FormatError, match=r"'shape' of p to end in 64, got \[64, 128\]"):
        plugin.check_shape("p", torch.tensor([[64], [128]]), 64)


def test_types_of_quantised_layers(tmp_path):
    int8, int4 = plugin.Coding("int8"), plugin.Coding("int4", 64)
    layers = plugin.Layers(sparse=["a.q_proj", "a.k_proj"], coded={"a.q_proj": int8})
    fused = {"qk": ["q_proj", "k_proj"], "qv": ["q_proj", "v_proj"]}
    assert layers.coding("a.q_proj", {}) == int8 and layers.coding("a.k_proj", {}) is None
    with pytest.raises(ValueError, match="values of one type.*a.k_proj not quantised"):
        layers.coding("a.qk", fused)
    layers.coded["a.k_proj"] = int4
    with pytest.raises(ValueError, match="a.q_proj int8, a.k_proj int4 in groups of 64"):
        layers.coding("a.qk", fused)
    layers.coded["a.k_proj"] = int8
    assert layers.coding("a.qk", fused) == int8
    assert layers.coding("a.qv", fused) == int8  # v is dense


@pytest.mark.parametrize("group, stored", [(64, 64), (128, 0)])  # 128 columns: one scale a row
def test_the_coding_of_a_folder(tmp_path, group, stored):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(128, 16), "b": torch.nn.Linear(128, 16)})
    sk.prune_model(model, "magnitude", quantize="int4", quantize_group=group, progress=False)
    sk.save_pretrained(model, tmp_path)
    coding = plugin.Coding("int4", stored)
    assert plugin.coded_layers(str(tmp_path)) == {"a": coding, "b": coding}


@pytest.mark.parametrize(
    "weights, activations, readable",
    [
        ({"num_bits": 8, "strategy": "channel", "type": "float"}, None, True),
        ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "dynamic": True}, True),
        ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "dynamic": False}, False),
        ({"num_bits": 8, "strategy": "channel", "symmetric": False}, None, False),
        ({"num_bits": 8, "strategy": "tensor"}, None, False),
        ({"num_bits": 4, "strategy": "group"}, None, False),
    ],
)
def test_which_quantised_folders_are_read(weights, activations, readable):
    group = {"weights": weights, "input_activations": activations}
    config = {"config_groups": {"group_0": group}}
    assert (plugin.unreadable(config) is None) == readable
    ours = plugin.unreadable({**config, "quant_method": "sparsekern"}) is None
    assert ours == (readable or weights["num_bits"] == 4)  # int4 has a form in our folders alone
    assert plugin.unreadable({}) is None
    for place, readable in (("weight_output", True), ("q_attn", False)):
        use = {"targets": ["Linear"], "location": place}
        config = {"transform_config": {"config_groups": {"R3": {"apply": [use]}}}}
        assert (plugin.unreadable(config) is None) == readable


@pytest.mark.parametrize(
    "config, known",
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, True),
        ({"sparsity_config": {"format": "dense"}}, False),
        ({"sparsity_config": None}, False),
        ({}, False),
        (None, False),
    ],
)
def test_which_configs_are_ours(config, known):
    assert (sparsity_entry(config) is not None) == known


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@needs_vllm
@pytest.mark.parametrize(
    "world, kind",
    [(1, None), (2, None), (1, "int8"), (2, "fp8"), (2, "int4"), (1, "mixed"), (2, "mixed")],
)
def test_layers_of_vllm_compute_the_dense_product(world, kind):
    """q/k/v, gate/up, o, down and a head as vLLM builds, loads, splits and runs them, on 1 and 2
    ranks; in "mixed" k and gate are dense."""
    more = [kind] if kind else []
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, str(HERE / "vllm_layers.py"), str(rank), str(world), str(port)] + more,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for child in children:
        output, errors = child.communicate(timeout=900)
        assert child.returncode == 0, errors[-3000:]
        differences = json.loads(output.splitlines()[-1])
        assert set(differences) == {"qkv", "gate_up", "o", "down", "head"}
        assert max(differences.values()) < 2**-7  # a sum over ranks is rounded once more


@needs_vllm
def test_the_registered_method_answers_for_older_folders():
    code = (
        "from sparsekern.integrations import vllm as plugin; plugin.register(); plugin.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config as get\n"
        "config = {'quant_method': 'compressed-tensors', 'sparsity_config':"
        " {'format': 'sparse-24-bitmask', 'ignore': ['lm_head']}}\n"
        "ours = get('sparsekern')\n"
        "assert ours.override_quantization_method(config, None) == 'sparsekern'\n"
        "four = {'g': {'weights': {'num_bits': 4, 'strategy': 'group'}}}\n"
        "assert ours.override_quantization_method({**config, 'config_groups': four}, None)"
        " is None\n"
        "assert ours.from_config(config).layers.dense == ['lm_head']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "options, variable, device, known, expected",
    [
        ({}, None, (9, 0), True, True),
        ({}, None, (10, 0), True, True),
        ({}, "1", (9, 0), True, True),
        ({}, "0", (9, 0), True, False),
        ({inductor_pdl.PDL: False}, "1", (9, 0), True, False),
        ({inductor_pdl.PDL: True}, "0", (8, 0), True, True),
        ({}, "1", (8, 9), True, None),
        ({}, None, None, True, None),
        ({}, None, (9, 0), False, None),
    ],
)
def test_when_the_kernels_between_ours_start_early(
    monkeypatch, options, variable, device, known, expected
):
    monkeypatch.setattr(inductor_pdl, "known", lambda: known)
    monkeypatch.setattr(inductor_pdl, "at_once", lambda: True)
    monkeypatch.delenv(inductor_pdl.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(inductor_pdl.VARIABLE, variable)
    plugin.start_early(options, device)
    assert options.get(inductor_pdl.PDL) == expected


@needs_vllm
def test_a_model_with_our_layers_is_compiled_with_early_starts():
    """Only such a model: the option is in the key of vLLM's cache, and others' engines keep it."""
    code = (
        "import torch\n"
        "from vllm.config import CompilationConfig, DeviceConfig, VllmConfig\n"
        "from vllm.config import set_current_vllm_config\n"
        "from vllm.model_executor.layers.linear import LinearBase\n"
        "from sparsekern.integrations import vllm_rules as rules\n"
        "from sparsekern.integrations._vllm_method import SparseKernConfig\n"
        "from sparsekern.integrations import inductor_pdl\n"
        "inductor_pdl.known = lambda: True\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = lambda *_: (9, 0)\n"
        "ours = SparseKernConfig(rules.Layers(sparse=['m.up']))\n"
        "layer = LinearBase.__new__(LinearBase)\n"
        "assert ours.get_quant_method(layer, 'm.up') is not None, 'no engine: nothing to set'\n"
        "def built(name, **options):\n"
        "    engine = VllmConfig(device_config=DeviceConfig(device='cpu'),"
        " compilation_config=CompilationConfig(inductor_compile_config=options))\n"
        "    before = engine.compute_hash()\n"
        "    with set_current_vllm_config(engine):\n"
        "        ours.get_quant_method(layer, name)\n"
        "    same = engine.compute_hash() == before\n"
        "    return engine.compilation_config.inductor_compile_config.get(inductor_pdl.PDL), same\n"
        "assert built('m.up') == (True, False)\n"
        "assert built('m.dense') == (None, True)\n"
        "assert built('m.up', **{inductor_pdl.PDL: False}) == (False, True)\n"
    )
    variables = {k: v for k, v in os.environ.items() if k != inductor_pdl.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**variables, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
