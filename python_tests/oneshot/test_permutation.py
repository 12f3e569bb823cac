"""permute: the same function in another order, less lost at 2:4; folding, refusals, resume."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
import transformers as T
from torch import nn

import sparsekern as sk
from python_tests.oneshot.test_rotation import build, ids
from sparsekern.errors import FormatError
from sparsekern.oneshot import permutation, presets
from sparsekern.oneshot.permutation import find_sites, lost, permute, search

WIDE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
QUIET = dict(compress=False, progress=False)


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def close(a, b):
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_stay_and_less_is_lost(family, kv, tied):
    """GQA and MHA, tied and untied, with biases in qwen2."""
    model = build(family, num_key_value_heads=kv, tie_word_embeddings=tied, **WIDE)
    before = logits(model, ids(2, 16))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    report = permute(model, ids(), rounds=20)
    assert close(logits(model, ids(2, 16)), before) and report.logits_distance < 1e-5
    assert report.sites == 4 and report.lost_after < 0.97 * report.lost_before
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_moves_is_rows_of_the_makers_and_columns_of_the_readers():
    model = build(num_key_value_heads=2, **WIDE)
    dense = copy.deepcopy(model)
    batches = permutation.make_batches(ids(), model, None, torch.device("cpu"))
    made = permutation.permute_on(model, batches, torch.device("cpu"), rounds=20)
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")]
    assert list(made.orders) == names
    mlp, old = model.model.layers[1].mlp, dense.model.layers[1].mlp
    order = made.orders["model.layers.1.mlp.down_proj"][0]
    assert torch.equal(mlp.gate_proj.weight, old.gate_proj.weight[order])
    assert torch.equal(mlp.up_proj.weight, old.up_proj.weight[order])
    assert torch.equal(mlp.down_proj.weight, old.down_proj.weight[:, order])
    attention, was = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    order = made.orders["model.layers.0.self_attn.o_proj"]  # [2 key-value heads, 16]
    assert not torch.equal(order[0], order[1])
    rows = torch.cat([order[0], 16 + order[1]])
    assert torch.equal(attention.v_proj.weight, was.v_proj.weight[rows])
    columns = torch.cat([16 * head + order[head // 2] for head in range(4)])
    assert torch.equal(attention.o_proj.weight, was.o_proj.weight[:, columns])
    assert torch.equal(attention.q_proj.weight, was.q_proj.weight)
    made.undo()
    new, old = model.state_dict(), dense.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())


def test_the_report_is_the_importance_that_2_4_drops():
    model = build(num_key_value_heads=2, **WIDE)
    report = permute(model, ids(), rounds=10)
    batches = permutation.make_batches(ids(), model, None, torch.device("cpu"))
    sites = find_sites(model)
    energies = permutation.input_energies(model, batches, torch.device("cpu")).sums
    shares = []
    for site in sites:
        scores = site.reader.weight.detach().square() * energies[site.name]
        mask = sk.prune.nm_mask(scores)
        shares.append(float(scores[~mask].sum() / scores.sum()))
    assert abs(sum(shares) / len(shares) - report.lost_after) < 1e-5


def test_search_never_raises_the_sum_and_finds_the_best_of_two_groups():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 32, generator=generator) * torch.rand(32, generator=generator) ** 4
    sums = [float(lost(scores))]
    for rounds in (1, 3, 10, 40):
        order = search(scores[None], rounds, torch.Generator().manual_seed(1))[0]
        assert sorted(order.tolist()) == list(range(32))
        sums.append(float(lost(scores[:, order])))
    assert sums == sorted(sums, reverse=True) and sums[-1] < 0.95 * sums[0]
    eight = scores[:, :8].contiguous()
    order = search(eight[None], 20, torch.Generator().manual_seed(1))[0]
    best = min(
        float(lost(eight[:, [*half, *(i for i in range(8) if i not in half)]]))
        for half in itertools.combinations(range(8), 4)
    )
    assert float(lost(eight[:, order])) <= 1.02 * best
    same = torch.ones(3, 40, 32)  # no exchange gains anything
    order = search(same, 5, torch.Generator().manual_seed(1))
    assert torch.equal(order, torch.arange(32).expand(3, -1))
    four = torch.tensor([[3.0, 1.0, 2.0, 5.0], [0.0, 0.0, 7.0, 1.0]])
    assert float(lost(four)) == 1 + 2 + 0 + 0


def test_places_of_one_shape_are_searched_together(monkeypatch):
    model = build(num_key_value_heads=2, **WIDE)
    stacks = permutation._stacks(find_sites(model))
    assert [[s.name.split(".")[-1] for s in stack] for stack in stacks] == [
        ["o_proj", "o_proj"],
        ["down_proj", "down_proj"],
    ]
    monkeypatch.setattr(permutation, "_STACKED", 1)
    assert [len(stack) for stack in permutation._stacks(find_sites(model))] == [1] * 4
    scores = torch.rand(4, 24, 16, generator=torch.Generator().manual_seed(3)) ** 3
    order = search(scores, 8, torch.Generator().manual_seed(4))
    for (before, after), half in zip(
        permutation._shares(scores, order, 2), (slice(2), slice(2, 4))
    ):
        pairs = list(zip(scores[half], order[half]))
        whole = float(scores[half].sum())
        assert abs(before - sum(float(lost(part)) for part, _ in pairs) / whole) < 1e-6
        assert abs(after - sum(float(lost(part[:, o])) for part, o in pairs) / whole) < 1e-6
        assert after < before


def pairs_of_groups(pairs=30, rows=24):
    generator = torch.Generator().manual_seed(2)
    columns = torch.rand(8 * pairs, rows, generator=generator) ** 3
    return columns, torch.randperm(8 * pairs, generator=generator).view(pairs, 8)


def compare_the_kernel(device):
    from sparsekern.backends.triton import exchange

    for pairs, rows in ((5, 24), (2, 1300), (1, 512)):
        columns, eight = (t.to(device) for t in pairs_of_groups(pairs, rows))
        wanted = permutation._costs(columns, eight)
        for got, expected in zip(exchange.costs(columns, eight), wanted):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_through_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton")
    code = "from python_tests.oneshot import test_permutation as t; t.compare_the_kernel('cpu')"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_kernel_gets_columns_one_after_the_other(monkeypatch):
    """Of one head, too, whose columns a view would have."""
    seen = []

    def costs(columns, eight):
        seen.append(columns.is_contiguous() and eight.is_contiguous())
        return permutation._costs(columns, eight)

    monkeypatch.setattr(permutation, "_costs_function", lambda scores: costs)
    for heads in (1, 2):
        scores = torch.rand(heads, 24, 16, generator=torch.Generator().manual_seed(heads))
        search(scores, 2, torch.Generator().manual_seed(4))
    assert len(seen) == 4 and all(seen)


@pytest.mark.gpu
def test_the_kernel_searches_large_places_on_a_gpu():
    pytest.importorskip("triton")
    compare_the_kernel("cuda")
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(1, 2048, 1024, generator=generator) ** 3
    # Columns of one kind lose the same in any order.
    scores = (scores * (1.5 * torch.randn(1, 1, 1024, generator=generator)).exp()).cuda()
    assert permutation._costs_function(scores) is not permutation._costs
    order = search(scores, 20, torch.Generator().manual_seed(4))
    plain = search(scores.cpu(), 20, torch.Generator().manual_seed(4))
    found, expected = (float(lost(scores[0][:, o[0].cuda()])) for o in (order, plain))
    assert found < 0.8 * float(lost(scores[0])) and abs(found / expected - 1) < 1e-2


def test_an_exchange_is_the_best_of_the_sixteen_and_heads_are_apart():
    columns, eight = pairs_of_groups()
    values = columns[eight]
    order = permutation._exchange(*permutation._costs(columns, eight))
    for pair, chosen in zip(values, order.tolist()):
        found = {tuple(range(8)): float(lost(pair.t()))}
        for i, j in itertools.product(range(4), range(4, 8)):
            other = list(range(8))
            other[i], other[j] = j, i
            found[tuple(other)] = float(lost(pair[other].t()))
        assert tuple(chosen) == min(found, key=found.get)
    scores = torch.rand(3, 24, 16, generator=torch.Generator().manual_seed(3)) ** 3
    orders = search(scores, 8, torch.Generator().manual_seed(4))
    assert orders.shape == (3, 16)
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(3, -1))
    whole = sum(float(lost(part[:, o])) for part, o in zip(scores, orders))
    assert whole < 0.95 * sum(float(lost(part)) for part in scores)


def test_prune_model_permutes_first_and_resumes(tmp_path):
    model = build(num_key_value_heads=2, **WIDE)
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    before = sk.prune_model(plain, "sparsegpt", ids(8), **QUIET)
    knobs = dict(QUIET, permute={"rounds": 30, "seed": 3}, resume=tmp_path / "run")
    report = sk.prune_model(model, "sparsegpt", ids(8), **knobs)
    assert report.options["permute"] == {"rounds": 30, "seed": 3}
    assert report.permutation["sites"] == 4 and report.phases["permute"] > 0
    assert type(report).from_json(report.to_json()) == report

    def error(of):
        return sum(r.relative_error for r in of.pruned if r.name.endswith(("o_proj", "down_proj")))

    assert error(report) < error(before)
    again = copy.deepcopy(start)
    resumed = sk.prune_model(again, "sparsegpt", ids(8), **knobs)
    assert resumed.resumed == 2
    new, old = again.state_dict(), model.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    with pytest.raises(ValueError, match="the permutation that .* was started with"):
        other = dict(knobs, permute={"rounds": 31})
        sk.prune_model(copy.deepcopy(start), "sparsegpt", ids(8), **other)
    with pytest.raises(FormatError, match="the permutation that .* was started with"):
        other = dict(knobs, permute=None, preset="default", reconstruct=())
        sk.prune_model(copy.deepcopy(start), "sparsegpt", ids(9), **other)
    file = tmp_path / "run" / "permutation.safetensors"
    good = file.read_bytes()
    for damage in (good[:-1] + bytes([good[-1] ^ 1]), good[:40], b"{"):
        file.write_bytes(damage)
        with pytest.raises(FormatError, match="Delete the directory"):
            sk.prune_model(copy.deepcopy(start), "sparsegpt", ids(8), **knobs)


@pytest.mark.parametrize("name", ["permutation", "rotation"])
def test_a_pipe_in_the_folder_is_refused_without_waiting(name, tmp_path):
    os.mkfifo(tmp_path / f"{name}.safetensors")
    step = {"permute": True} if name == "permutation" else {"rotate": {"steps": 1}}
    with pytest.raises(FormatError, match="no regular file.*Delete the directory"):
        sk.prune_model(build(), "sparsegpt", ids(2), **dict(QUIET, **step, resume=tmp_path))


def test_an_error_after_it_puts_the_order_back(monkeypatch):
    from sparsekern.oneshot import run

    model = build(num_key_value_heads=2, **WIDE)
    before = copy.deepcopy(model.state_dict())

    def fails(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(run, "prune_group", fails)
    with pytest.raises(RuntimeError, match="no"):
        sk.prune_model(model, "wanda", ids(), permute=True, undo=True, **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_after_a_rotation_the_dense_model_is_the_same():
    model = build(num_key_value_heads=2, **WIDE)
    before = logits(model, ids(2, 16))
    sk.rotate(model, ids(), steps=5)
    report = permute(model, ids(), rounds=20)
    assert report.sites >= 3  # a place that the rotation has served may have nothing to gain
    after = logits(model, ids(2, 16))
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4


class Normed(nn.Module):
    """An MLP with a gain between, which the order does not pass."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gain = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)) * self.gain)


def test_what_cannot_be_permuted_is_refused_and_stays():
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    model = nn.Sequential(Normed())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="cannot be permuted"):
        permute(model, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="without permutation"):
        permute(nn.Sequential(nn.Linear(16, 16)), [x])
    gpt2 = T.GPT2LMHeadModel(T.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96)).eval()
    with pytest.raises(ValueError, match="without permutation"):
        permute(gpt2, ids())
    pruned = build(**WIDE)
    sk.prune_model(pruned, "magnitude", progress=False)
    with pytest.raises(ValueError, match="compressed: the permutation comes before prune_model"):
        permute(pruned, ids())
    with pytest.raises(ValueError, match="compressed: the rotation comes before prune_model"):
        sk.rotate(pruned, ids())
    with pytest.raises(ValueError, match="rounds from 0 to .*, got -1"):
        permute(build(**WIDE), ids(), rounds=-1)


def test_a_gate_between_v_and_o_keeps_the_order_of_heads(tmp_path):
    """The attention of Qwen3-Next multiplies what o reads by a gate: its MLPs alone move."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=96)
    attention = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    kinds = dict(layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1], num_experts=2)
    config = T.Qwen3NextConfig(**sizes, **attention, **kinds)
    model = T.Qwen3NextForCausalLM(config).eval()
    dense, before = copy.deepcopy(model), logits(model, ids(2, 16))
    alone = permute(copy.deepcopy(model), ids(), rounds=10, heads=False)
    with pytest.warns(UserWarning, match="Qwen3NextForCausalLM does more between v and o"):
        report = permute(model, ids(), rounds=10)
    assert close(logits(model, ids(2, 16)), before) and report.logits_distance < 1e-5
    assert report.sites == alone.sites == 2 and report.lost_after < report.lost_before
    for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(layer.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
        assert not torch.equal(layer.mlp.down_proj.weight, old.mlp.down_proj.weight)
    knobs = dict(permute={"rounds": 10}, resume=tmp_path, progress=False)
    runs = [copy.deepcopy(dense) for _ in range(2)]
    with pytest.warns(UserWarning, match="keep their order"):
        for run in runs:
            sk.prune_model(run, "wanda", ids(), **knobs)
    assert torch.equal(*(logits(run, ids(2, 16)) for run in runs))


def test_mistakes_of_prune_model():
    model = build(**WIDE)
    before = copy.deepcopy(model.state_dict())
    name = "model.layers.0.mlp.down_proj"
    mask = torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool)
    for options, text in (
        (dict(permute={"round": 3}), r"keywords of sparsekern.permute: .* got \['round'\]"),
        (dict(permute=True, calibration=None), "calibration data for permute"),
        (dict(permute=True, pattern="4:8 in pairs"), r"pattern \(2, 4\) with permute"),
        (dict(permute=True, masks={name: mask}), "masks or permute"),
    ):
        with pytest.raises(ValueError, match=text):
            sk.prune_model(model, "magnitude", **{"calibration": ids(), **QUIET, **options})
    for options, text in (
        (dict(permute=3), "permute: True or False or a dict or None, got 3"),
        (dict(permute={"heads": 3}), "sparsekern.permute: expected heads: True or False, got 3"),
        (dict(rotate={"steps": "x"}), "sparsekern.rotate: expected steps: a whole number, got 'x'"),
    ):
        with pytest.raises(TypeError, match=text):
            sk.prune_model(model, "magnitude", ids(), **QUIET, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_opt_permutes_its_mlp_and_zero_rounds_change_nothing():
    torch.manual_seed(0)
    config = T.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64)
    config.vocab_size, config.word_embed_proj_dim, config.max_position_embeddings = 96, 32, 64
    model = T.OPTForCausalLM(config).eval()
    before, state = logits(model, ids(2, 16)), copy.deepcopy(model.state_dict())
    report = permute(model, ids(), rounds=0)
    assert report.sites == 0 and report.lost_after == report.lost_before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    report = permute(model, ids(), rounds=10)
    assert report.sites == 4 and close(logits(model, ids(2, 16)), before)
    assert permute(model, ids(), rounds=10, heads=False).sites <= 2


@pytest.mark.gpu
def test_on_a_gpu_the_logits_stay_and_less_is_lost():
    model = build(num_key_value_heads=2, **WIDE)
    before = logits(model, ids(2, 16))
    report = permute(model, ids(), rounds=20)  # the search on CUDA, the model where it was
    assert next(model.parameters()).device.type == "cpu"
    assert close(logits(model, ids(2, 16)), before)
    assert report.sites == 4 and report.lost_after < 0.97 * report.lost_before


def test_a_preset_leaves_out_a_permutation_that_cannot_be(monkeypatch):
    row = presets.Preset("", "admm", permute={"rounds": 2})
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "fast": row})
    knobs = QUIET
    with pytest.warns(UserWarning, match="preset fast without permutation with pattern"):
        report = sk.prune_model(build(), None, ids(), preset="fast", pattern=(4, 8), **knobs)
    assert report.permutation is None and report.method == "admm"
    small = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    data = [torch.randn(8, 16) for _ in range(2)]
    with pytest.warns(UserWarning, match="without permutation. .*expected Sequential with an MLP"):
        report = sk.prune_model(small, None, data, preset="fast", **knobs)
    assert "skipped" in report.permutation and len(report.pruned) == 2
    with pytest.raises(ValueError, match="expected Sequential with an MLP"):
        sk.prune_model(small, None, data, preset="fast", permute=True, **knobs)
