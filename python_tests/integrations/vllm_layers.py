"""A program for test_vllm.py: layers of a real vLLM with the plugin's method, on the CPU.

Usage: vllm_layers.py RANK WORLD_SIZE PORT [TYPE]: builds q/k/v, gate/up, o and down of one block,
loads them as vLLM's models do, and prints, as JSON, the largest difference of each output from the
same layer dense. TYPE: "fp8" or "int8", of quantised weights.
"""

import json
import os
import sys

import torch

HIDDEN, HEADS, KV_HEADS, INNER = 64, 4, 2, 96


def block(seed):
    """{name: dense 2:4 weight [out, in]} of one block."""
    from sparsekern.prune import magnitude_mask

    generator = torch.Generator().manual_seed(seed)
    size = HIDDEN // HEADS
    shapes = {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (KV_HEADS * size, HIDDEN),
        "v_proj": (KV_HEADS * size, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN),
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    weights = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=generator)
        weights[name] = (w * magnitude_mask(w)).bfloat16()
    return weights


def stored(w, kind):
    """The tensors of a folder for a weight."""
    from sparsekern import compress

    w24 = compress(w, quantize=kind)
    scales = {k: v for k, v in w24.tensors.items() if k == "weight_scale"}
    shape = torch.tensor([[w.shape[0]], [w.shape[1]]])
    w24 = w24.rowmajor()
    return {"compressed": w24.values, "bitmask": w24.bitmask(), "shape": shape, **scales}


def load(layer, w, kind, shard=None):
    """As the models of vLLM do it, with each tensor's own loader."""
    for part, tensor in stored(w, kind).items():
        parameter = getattr(layer, part)
        arguments = () if shard is None else (shard,)
        parameter.weight_loader(parameter, tensor, *arguments)


def main(rank, world, port, kind=None):
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.plugins import load_general_plugins

    from sparsekern import compress, decompress
    from sparsekern.integrations import vllm as plugin

    load_general_plugins()
    plugin.register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    entry = {"format": "sparse-24-bitmask", "ignore": ["model.layers.0.mlp.router"]}
    config = get_quantization_config("sparsekern").from_config({"sparsity_config": entry})
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    weights, differences = block(0), {}
    if kind:
        storage = {"fp8": "float8_e4m3fn", "int8": "int8"}[kind]
        where = {"o_proj": "self_attn", "q_proj": "self_attn"}
        where |= {"k_proj": "self_attn", "v_proj": "self_attn"}
        config.layers.coded = {
            f"model.layers.0.{where.get(name, 'mlp')}.{name}": storage for name in weights
        }
    dense = {n: decompress(compress(w, quantize=kind)) for n, w in weights.items()}
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(world)
        size = HIDDEN // HEADS
        prefix = "model.layers.0.self_attn"
        common = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
        qkv = QKVParallelLinear(
            HIDDEN, size, HEADS, KV_HEADS, prefix=f"{prefix}.qkv_proj", **common
        )
        gate_up = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], prefix="model.layers.0.mlp.gate_up_proj", **common
        )
        o = RowParallelLinear(HIDDEN, HIDDEN, prefix=f"{prefix}.o_proj", **common)
        down = RowParallelLinear(INNER, HIDDEN, prefix="model.layers.0.mlp.down_proj", **common)
        for letter in "qkv":
            load(qkv, weights[f"{letter}_proj"], kind, letter)
        load(gate_up, weights["gate_proj"], kind, 0)
        load(gate_up, weights["up_proj"], kind, 1)
        load(o, weights["o_proj"], kind)
        load(down, weights["down_proj"], kind)
        for layer in (qkv, gate_up, o, down):
            layer.quant_method.process_weights_after_loading(layer)
            assert not hasattr(layer, "compressed") and layer.weight_packed is not None
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
        inner = torch.randn(5, INNER, generator=torch.Generator().manual_seed(2)).bfloat16()

        # vLLM compiles whole models: no layer may break the graph.
        compiled = torch.compile(lambda x: qkv(x)[0], backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), qkv(x)[0])

        def rows(name):  # those of this rank
            return dense[name].chunk(world)[rank]

        def columns(tensor):
            return tensor.chunk(world, 1)[rank].contiguous()

        expected = {
            "qkv": (qkv(x)[0], x @ torch.cat([rows(f"{c}_proj") for c in "qkv"]).t()),
            "gate_up": (gate_up(x)[0], x @ torch.cat([rows("gate_proj"), rows("up_proj")]).t()),
            "o": (o(columns(x))[0], x @ dense["o_proj"].t()),
            "down": (down(columns(inner))[0], inner @ dense["down_proj"].t()),
        }
        for name, (got, wanted) in expected.items():
            scale = wanted.float().abs().max()
            differences[name] = float((got.float() - wanted.float()).abs().max() / scale)
    print(json.dumps(differences))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
