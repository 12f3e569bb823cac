"""sparsekern.optimize: siblings in one launch, with the same results, names and state_dict."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.optimize import JoinedLinear, optimize
from sparsekern.ops import linear_op

transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=128,
)


def llama(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more)
    model = transformers.LlamaForCausalLM(config).eval()
    sk.prune_model(model, "magnitude", progress=False)
    return model


IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention_bias", [False, True])
def test_equal_results_fewer_launches(attention_bias):
    model = llama(attention_bias=attention_bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(False).normal_()
    with torch.no_grad():
        before = model(IDS).logits
    calls = []
    handles = [
        m.register_forward_hook(lambda *_: calls.append(1))
        for m in model.modules()
        if isinstance(m, sk.SparseLinear)
    ]
    for handle in handles:
        handle.remove()
    report = optimize(model)
    assert len(report.groups) == 4 and not report.skipped
    assert report.groups[0] == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    seen = []
    original = linear_op.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_op, "linear", lambda *a, **k: (seen.append(1), original(*a, **k))[1])
        with torch.no_grad():
            after = model(IDS).logits
    assert len(seen) == 2 * (1 + 1 + 1 + 1)  # qkv, o, gate-up, down
    assert torch.equal(before, after)
    group = model.model.layers[0].self_attn.q_proj._group
    assert group.kept is None


def test_no_memory_is_added_and_undo():
    model = llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = optimize(model)
    attention = model.model.layers[0].self_attn
    one = attention.q_proj.weight.values.untyped_storage().data_ptr()
    assert attention.k_proj.weight.values.untyped_storage().data_ptr() == one
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    report.undo()
    assert type(attention.q_proj) is sk.SparseLinear and not report.groups
    with torch.no_grad():
        model(IDS)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert len(optimize(model).groups) == 4
    assert set(optimize(model).skipped.values()) == {"joined already"}


def test_copies_saves_and_moves(tmp_path):
    model = llama()
    with torch.no_grad():
        wanted = model(IDS).logits
    optimize(model)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].mlp.up_proj._group is None
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    sk.save_pretrained(model, tmp_path / "d")
    loaded = sk.from_pretrained(tmp_path / "d", dtype=torch.float32)
    with torch.no_grad():
        for other in (twin, loaded):
            assert torch.equal(other(IDS).logits, wanted)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj._group is None
    report = optimize(half)
    assert len(report.groups) == 4
    other = llama()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, sk.SparseLinear):
                module.weight = sk.prune_compress(torch.randn(module.weight.shape))
        expected = other(IDS).logits
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_gradients_and_trained_bias():
    model = llama(attention_bias=True)
    optimize(model)
    attention = model.model.layers[0].self_attn
    model(IDS).logits.sum().backward()
    assert attention.k_proj.bias.grad is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    joined = x.grad.clone()
    plain = llama(attention_bias=True)
    x.grad = None
    plain(inputs_embeds=x).logits.sum().backward()
    torch.testing.assert_close(joined, x.grad, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        attention.q_proj.bias.fill_(3.0)  # in place: the group's bias is the same memory
        group = attention.q_proj._group
        assert (group.bias[: attention.q_proj.out_features] == 3.0).all()


def test_compiled_without_breaks():
    model = llama()
    with torch.no_grad():
        wanted = model(IDS).logits
        optimize(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS).logits, wanted)
        torch.testing.assert_close(compiled((IDS + 1) % 128).logits, model((IDS + 1) % 128).logits)


class Cross(nn.Module):
    """q reads one tensor, k and v another."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            w24 = sk.prune_compress(torch.randn(16, 32))
            setattr(self, name, sk.SparseLinear.from_sparse24(w24))

    def forward(self, x, memory):
        return self.q_proj(x), self.k_proj(memory), self.v_proj(memory)


def test_other_inputs_part_a_group():
    module = Cross()
    x, memory = torch.randn(3, 32), torch.randn(5, 32)
    wanted = module(x, memory)
    optimize(module)
    for _ in range(5):
        for got, right in zip(module(x, memory), wanted):
            torch.testing.assert_close(got, right)
    assert module.q_proj._group.given_up and module.q_proj._group.kept is None


def test_threads():
    model = llama()
    optimize(model)
    inputs = [(IDS + i) % 128 for i in range(4)]
    with torch.no_grad():
        wanted = [model(ids).logits for ids in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.allclose(model(inputs[i]).logits, wanted[i], atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_not_joined():
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda *_: None)
    model.to(torch.bfloat16)
    first = model.model.layers[1].self_attn
    first.q_proj.layout = "tile64"
    report = optimize(model)
    assert "a layer has hooks" in report.skipped.values()
    assert any("differ" in reason for reason in report.skipped.values())
    for name in ("k_proj", "v_proj"):
        getattr(first, name).layout = "tile64"
    assert any("256" in reason for reason in optimize(model).skipped.values())
    assert "launches" in str(report) and "hooks" in str(report)
    with pytest.raises(TypeError, match="nn.Module"):
        optimize("model")
    with pytest.raises(ValueError, match="SparseLinear"):
        optimize(nn.Linear(4, 4))


def test_tile64_parts_at_row_groups():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            for name, rows in (("gate_proj", 512), ("up_proj", 100)):
                w24 = sk.prune_compress(torch.randn(rows, 192).bfloat16())
                layer = sk.SparseLinear.from_sparse24(w24, layout="tile64")
                setattr(self, name, layer)

    pair = Pair()
    weights = [layer.weight.to_dense() for layer in (pair.gate_proj, pair.up_proj)]
    optimize(pair)
    assert isinstance(pair.up_proj, JoinedLinear)
    for layer, weight in zip((pair.gate_proj, pair.up_proj), weights):
        assert torch.equal(layer.weight.to_dense(), weight)
    assert torch.equal(pair.gate_proj._group.weight.to_dense(), torch.cat(weights))


def test_another_bias_is_used():
    """An assigned Parameter and assigned .data are no part of the group's memory."""
    model = llama(attention_bias=True)
    optimize(model)
    key = model.model.layers[0].self_attn.k_proj
    x = torch.randn(3, 64)
    for change in (
        lambda: setattr(key, "bias", nn.Parameter(torch.full((32,), 2.0))),
        lambda: setattr(key.bias, "data", torch.full((32,), 3.0)),
        lambda: setattr(key, "bias", None),
    ):
        change()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj(x)
            assert torch.equal(key(x), sk.linear(x, key.weight, key.bias))


def test_what_is_written_into_x_between_two_calls_is_seen():
    model = llama()
    optimize(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(3, 64)
    with torch.no_grad():
        attention.q_proj(x)
        x.mul_(2)
        assert torch.equal(attention.k_proj(x), sk.linear(x, attention.k_proj.weight))
    with torch.inference_mode():  # where tensors have no version: a round begins with its member
        x = torch.randn(3, 64)
        for _ in range(2):
            x.add_(1)
            y = attention.q_proj(x)
            assert torch.equal(y, sk.linear(x, attention.q_proj.weight))


def test_outputs_can_be_changed_in_place():
    model = llama()
    optimize(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 3, 64, requires_grad=True)
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    (q.add_(1).sum() + k.mul_(2).sum() + v.relu_().sum()).backward()
    wide = torch.cat([m.weight.to_dense() for m in (attention.q_proj, attention.k_proj)])
    wide[64:] *= 2
    positive = (x @ attention.v_proj.weight.to_dense().t() > 0).float()
    wanted = wide.sum(0) + positive @ attention.v_proj.weight.to_dense()
    torch.testing.assert_close(x.grad, wanted.detach())
