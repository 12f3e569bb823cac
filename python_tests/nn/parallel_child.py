"""A program for test_parallel.py: one rank. Usage: parallel_child.py RANK WORLD PORT BACKEND."""

import copy
import sys

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sparsekern as sk
from sparsekern.nn.parallel import SplitLinear

SIZES = dict(num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
WIDTHS = {"cpu": (64, 256), "cuda": (1024, 1024)}  # hidden, intermediate; tiles of a GPU are 256


def distance(got, wanted):
    """‖got − wanted‖ / ‖wanted‖: a shard left out, or added twice, gives more than 0.3."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def refuses(part, call, kind=ValueError):
    try:
        call()
    except kind as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"not refused: {part}")


def same_after(model, plan, ids, layers):
    wanted = model.to(ids.device)(ids).last_hidden_state
    sk.tensor_parallel(model, plan=plan)
    assert sum(isinstance(m, SplitLinear) for m in model.modules()) == layers
    assert distance(model(ids).last_hidden_state, wanted) < 1e-5


def main(rank, world, port, backend):
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for quantize, bias in ((None, True), ("fp8", False)):
        torch.manual_seed(0)
        hidden, inner = WIDTHS[device.type]
        sizes = SIZES | {"hidden_size": hidden, "intermediate_size": inner}
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, attention_bias=bias)
        model = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        sk.prune_model(
            model,
            "magnitude",
            progress=False,
            quantize=quantize,
            skip=("lm_head", "*.1.mlp.up_proj"),
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = model.to(device, dtype)
        ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        wanted = model(inputs_embeds=x).logits
        wanted.float().square().sum().backward()
        gradient, x.grad = x.grad, None
        split = sk.tensor_parallel(copy.deepcopy(model), mesh if quantize is None else None)
        mlp = split.model.layers[0].mlp
        assert mlp.up_proj.layer.out_features == inner // world
        assert mlp.down_proj.layer.in_features == inner // world
        assert isinstance(mlp.down_proj.layer, sk.SparseLinear)
        got = split(inputs_embeds=x).logits
        got.float().square().sum().backward()
        # a GPU quantises x, too, beside an fp8 weight: half a row has another scale than the row
        near = 1e-5 if dtype == torch.float32 else 0.03 if quantize is None else 0.12
        assert distance(got, wanted) < near, distance(got, wanted)
        assert distance(x.grad, gradient) < 2 * near, distance(x.grad, gradient)
        with torch.no_grad():
            report = sk.optimize(split)
            assert distance(split(inputs_embeds=x).logits, wanted) < near
            if device.type == "cpu":
                compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
                assert distance(compiled(inputs_embeds=x).logits, wanted) < near
        assert len(report.groups) == 3, report  # one up_proj is dense
    model = nn.Sequential(nn.Linear(24, 7), nn.Linear(7, 8))
    refuses("a multiple of 2", lambda: sk.tensor_parallel(model, plan={"0": "colwise"}))
    refuses("names linear layers", lambda: sk.tensor_parallel(model, plan={"x": "colwise"}))
    refuses("'diagonal'", lambda: sk.tensor_parallel(model, plan={"0": "diagonal"}))
    sparse = nn.Sequential(sk.SparseLinear(24, 8))
    refuses("a multiple of 16", lambda: sk.tensor_parallel(sparse, plan={"0": "rowwise"}))
    assert type(sparse[0]) is sk.SparseLinear
    # OPT's o_proj is called out_proj: its own plan would split q, k and v alone.
    small = dict(hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=1)
    opt = transformers.OPTModel(transformers.OPTConfig(**small, num_attention_heads=4)).eval()
    refuses("a 'rowwise' layer beside decoder.layers.0.self_attn.", lambda: sk.tensor_parallel(opt))
    # OPT's attention reshapes by a number of heads of its own.
    plan = {"*.[qkv]_proj": "colwise", "*.out_proj": "rowwise", "*.fc1": "colwise"}
    plan["*.fc2"] = "rowwise"
    wrapped = copy.deepcopy(opt)
    for name, module in list(wrapped.named_modules()):
        if isinstance(module, nn.Linear):  # names are those inside
            wrapped.set_submodule(name, checkpoint_wrapper(module))
    same_after(opt, plan, ids, 6)
    same_after(wrapped, plan, ids, 6)
    few = dict(num_attention_heads=4, vocab_size=64, num_hidden_layers=1, hidden_size=32)
    one = transformers.LlamaConfig(**few, num_key_value_heads=1, intermediate_size=64)
    mlp = {"*.gate_proj": "colwise", "*.up_proj": "colwise", "*.down_proj": "rowwise"}
    one = transformers.LlamaModel(one).eval()
    refuses("Use fewer ranks, or a plan without attention.", lambda: sk.tensor_parallel(one))
    same_after(one, mlp, ids, 3)
    t5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    wi_wo = {"*.wi": "colwise", "*.wo": "rowwise"}
    t5 = transformers.T5EncoderModel(t5).eval()
    same_after(t5, wi_wo, ids, 2)  # reads wo.weight.dtype
    phi3 = transformers.Phi3Model(
        transformers.Phi3Config(**few, intermediate_size=64, pad_token_id=0)
    )
    fused = {"*.gate_up_proj": "colwise", "*.down_proj": "rowwise"}
    refuses("at most the 64 out_features", lambda: sk.tensor_parallel(phi3, plan=fused))
    refuses("got 3: 'colwise'", lambda: sk.tensor_parallel(phi3, plan={3: "colwise"}))
    shared = nn.Linear(32, 32)
    shared = nn.Sequential(shared, nn.ReLU(), shared)
    both = {"0": "colwise", "2": "rowwise"}
    refuses("one word for 0 and 2", lambda: sk.tensor_parallel(shared, plan=both))
    refuses("a whole model", lambda: sk.save_pretrained(split, "never"))
    flat = dist.device_mesh.init_device_mesh(device.type, (world, 1))
    refuses("got one of 2 dimensions", lambda: sk.tensor_parallel(sparse, flat))
    refuses("a process group, got 'cpu'", lambda: sk.tensor_parallel(sparse, "cpu"), TypeError)
    dist.destroy_process_group()
    print("all equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
