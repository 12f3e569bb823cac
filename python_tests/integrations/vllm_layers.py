"""A program for test_vllm.py: layers of a real vLLM with the plugin's method, on the CPU.

Usage: vllm_layers.py RANK WORLD_SIZE PORT [TYPE]: builds q/k/v, gate/up, o and down of one block
and a head, loads them as vLLM's models do, and prints, as JSON, the largest difference of each
output from the same layer dense. TYPE: "fp8", "int8" or "int4", of quantised weights; "mixed": of
fused layers of which some are dense.
"""

import json
import os
import sys

import torch

HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY = 256, 4, 2, 512, 100
DENSE = ("k_proj", "gate_proj")  # of "mixed"


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
        "lm_head": (VOCABULARY, HIDDEN),
    }
    weights = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=generator)
        weights[name] = (w * magnitude_mask(w)).bfloat16()
    return weights


def load(layer, w, kind, shard=None):
    """As the models of vLLM do it, with each tensor's own loader. kind: "dense" for w as it is."""
    from sparsekern import compress
    from sparsekern.formats.disk import stored_tensors

    parts = {"weight": w} if kind == "dense" else stored_tensors(compress(w, quantize=kind))
    for part, tensor in parts.items():
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
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.plugins import load_general_plugins

    from sparsekern import compress, decompress
    from sparsekern.integrations import vllm as plugin
    from sparsekern.integrations.vllm_rules import Coding

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
    names = {name: f"model.layers.0.mlp.{name}" for name in weights}
    names |= {n: f"model.layers.0.self_attn.{n}" for n in weights if n[0] in "qkvo"}
    names["lm_head"] = "lm_head"
    mixed, kind = kind == "mixed", None if kind == "mixed" else kind
    config.layers.sparse = [names[name] for name in weights if not (mixed and name in DENSE)]
    if kind:
        coding = {
            "fp8": Coding("float8_e4m3fn"),
            "int8": Coding("int8"),
            "int4": Coding("int4", 128),
        }[kind]
        config.layers.coded = dict.fromkeys(config.layers.sparse, coding)
    of = dict.fromkeys(weights, kind) | (dict.fromkeys(DENSE, "dense") if mixed else {})
    dense = {n: decompress(compress(w, quantize=kind)) for n, w in weights.items()}
    dense |= {name: weights[name] for name, form in of.items() if form == "dense"}
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
        head = ParallelLMHead(
            VOCABULARY,
            HIDDEN,
            params_dtype=torch.bfloat16,
            quant_config=config,
            prefix="lm_head",
        )
        for letter in "qkv":
            load(qkv, weights[f"{letter}_proj"], of[f"{letter}_proj"], letter)
        load(gate_up, weights["gate_proj"], of["gate_proj"], 0)
        load(gate_up, weights["up_proj"], of["up_proj"], 1)
        load(o, weights["o_proj"], kind)
        load(down, weights["down_proj"], kind)
        load(head, weights["lm_head"], kind)
        for layer in (qkv, gate_up, o, down, head):
            layer.quant_method.process_weights_after_loading(layer)
            assert not hasattr(layer, "bitmask") and layer.weight_packed is not None
            assert not hasattr(layer, "weight") and len(layer.sparse_products) == 1 + (
                mixed and layer in (gate_up,)
            ) + 2 * (mixed and layer is qkv)
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
        logits = head.quant_method.apply(head, x)
        own = head.shard_indices
        mine = dense["lm_head"][own.org_vocab_start_index : own.org_vocab_end_index]
        assert logits[:, mine.shape[0] :].count_nonzero() == 0  # padding
        expected["head"] = (logits[:, : mine.shape[0]], x @ mine.t())
        for name, (got, wanted) in expected.items():
            scale = wanted.float().abs().max()
            differences[name] = float((got.float() - wanted.float()).abs().max() / scale)
    print(json.dumps(differences))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
