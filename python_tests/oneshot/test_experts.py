"""Experts in 3-D parameters under prune_model: one layer for each matrix, on the tokens that reach
it."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.nn.expert_models import FAMILIES, Mixture, build, ids, logits
from python_tests.oneshot.test_resume import assert_same_state
from sparsekern.nn.sparse_experts import SparseExperts
from sparsekern.oneshot import experts as rules
from sparsekern.oneshot.layerwise import prune_group


def prune(model, method="sparsegpt", data=None, **more):
    data = ids() if data is None and "hessians" not in more else data
    return sk.prune_model(model, method, data, device="cpu", progress=False, **more)


def experts_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseExperts)}


def fused(model):
    """Names of the parameters that hold experts in an untouched model."""
    return [n for n, p in model.named_parameters() if p.dim() == 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_matrix_is_24_and_equal_to_dense_with_zeros(family):
    """SparseGPT as it is by default; the report has each matrix; the share counts them."""
    model, zeros = build(family), build(family)
    names = fused(model)
    count = {name: model.get_parameter(name).shape[0] for name in names}
    report = prune(model)
    again = prune(zeros, compress=False)
    expected = {
        f"{name.rpartition('.')[0]}.{i}.{name.rpartition('.')[2]}"
        for name in names
        for i in range(count[name])
    }
    assert expected <= {row.name for row in report.pruned}
    assert [row.name for row in report.pruned] == [row.name for row in again.pruned]
    assert fused(zeros) == names and not experts_of(zeros)
    for name in expected:
        weight = model.get_submodule(name).weight.to_dense()
        assert int((weight != 0).reshape(-1, 4).sum(1).max()) == 2
        assert 0 < report[name].relative_error < 1 and report[name].tokens is not None
        owner, index, key = name.rsplit(".", 2)
        stored = getattr(zeros.get_submodule(owner), key)[int(index)]
        turned = dict(model.get_submodule(owner).recipe.matrices)[key]
        assert torch.equal(weight, stored.t() if turned else stored)
    assert report.share > 0.85 and not report.partial  # the output embedding is large here
    torch.testing.assert_close(logits(model), logits(zeros), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), logits(build(family)), rtol=1e-2)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_of_the_registry(method):
    model = build("gpt-oss")
    report = prune(model, method)
    assert sum(".experts." in row.name for row in report.pruned) == 16
    assert {row.method for row in report.pruned} == {method}


def routed(model, tokens, key):
    """What each expert of the first layer got of these tokens, from the dense model."""
    module, seen = model.model.layers[0].mlp.experts, []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    x, index, _ = seen[0]
    parts = [x[(index == i).any(-1)] for i in range(module.num_experts)]
    if key == "gate_up_proj":
        return x, parts
    f = [lambda t, i=i: features(module, i, t) for i in range(module.num_experts)]
    return [g(x) for g in f], [g(part) for g, part in zip(f, parts)]


@torch.no_grad()
def features(module, index, x):
    gate, up = (x @ module.gate_up_proj[index].t()).chunk(2, -1)
    return module.act_fn(gate) * up


@pytest.mark.parametrize("key", ["gate_up_proj", "down_proj"])
def test_hessians_are_of_the_tokens_of_the_expert_and_of_the_pool(key):
    """H' = (Σ xxᵀ + k H_pool) / (n + k): both products from the dense model, by hand. One batch of
    fewer than CALL_TOKENS tokens, so that the pool is all of them."""
    model, tokens = build("mixtral"), ids(4, 24)
    everything, parts = routed(model, tokens, key)
    groups = {g.layers[0].name: g for g in sk.calibrate(model, tokens, device="cpu")}
    for i, part in enumerate(parts):
        group = groups[f"model.layers.0.mlp.experts.{i}.{key}"]
        pool = everything if key == "gate_up_proj" else everything[i]
        k, n = rules.PRIOR * part.shape[1], len(part)
        expected = (part.T @ part + k / len(pool) * pool.T @ pool) / (n + k)
        torch.testing.assert_close(group.hessian.matrix / 2, expected, rtol=1e-4, atol=1e-5)
        assert group.layers[0].tokens == n
    assert sum(len(part) for part in parts) == 2 * tokens.numel()


def test_many_tokens_are_enough():
    """An expert with ENOUGH * in_features tokens is pruned on them alone."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Mixture(2, 16, 2)), torch.randn(rules.ENOUGH * 16, 16)
    groups = {g.layers[0].name: g for g in sk.calibrate(model, x[None].unbind(0), device="cpu")}
    matrix = groups["0.bank.1.first"].hessian.matrix
    expected = x.T @ x
    ratio = matrix.trace() / expected.trace()
    torch.testing.assert_close(matrix, expected * ratio, rtol=1e-4, atol=1e-4 * float(ratio))


def test_experts_with_few_tokens_are_named_and_pruned():
    """Three tokens, two experts of eight each: some see none, and all are pruned and named."""
    model = build("mixtral", num_local_experts=8)
    report = prune(model, data=ids(1, 3))
    rows = [row for row in report.pruned if ".experts." in row.name]
    assert len(rows) == 32 and report.few_tokens == rows
    assert min(row.tokens for row in rows) == 0
    for row in rows:
        assert f"saw {row.tokens} tokens, fewer than in_features" in row.note
        assert row.name in report.table()
    assert "32 matrices of experts saw few tokens" in report.summary()
    back = sk.PruneReport.from_json(report.to_json())
    assert [row.name for row in back.few_tokens] == [row.name for row in rows]


def test_the_pool_helps_experts_with_few_tokens(monkeypatch):
    """Error of the pruned layer on other tokens, with the rule and without its pool."""

    def error(prior):
        monkeypatch.setattr(rules, "PRIOR", prior)
        torch.manual_seed(0)
        mix = torch.randn(32, 32) * torch.arange(1, 33)[:, None] ** -0.7
        model = nn.Sequential(Mixture(8, 32))
        dense = copy.deepcopy(model)
        x, other = torch.randn(64, 32) @ mix, torch.randn(2000, 32) @ mix
        prune(model, data=[x])
        with torch.no_grad():
            return float((model(other) - dense(other)).norm() / dense(other).norm())

    with_pool, without = error(0.25), error(1e-9)
    assert with_pool < 0.9 * without


@pytest.mark.parametrize(
    "rule, left",
    [
        ("model.layers.0.mlp.experts.3.down_proj", {"0.3.down_proj"}),
        ("model.layers.0.mlp.experts.3", {"0.3.down_proj", "0.3.gate_up_proj"}),
        ("model.layers.0.mlp.experts.down_proj", {f"0.{i}.down_proj" for i in range(4)}),
        ("*.experts.down_proj", {f"{b}.{i}.down_proj" for b in range(2) for i in range(4)}),
        ("re:.*1.*experts\\.[01]\\.gate", {f"1.{i}.gate_up_proj" for i in range(2)}),
        ("MixtralExperts", None),
        ("block:0", None),
    ],
)
def test_rules_name_experts(rule, left):
    model = build("mixtral")
    report = prune(model, "magnitude", data=None, skip=(rule,))
    dense = {
        row.name.removeprefix("model.layers.").replace(".mlp.experts", "")
        for row in report.skipped
        if ".experts." in row.name
    }
    if left is None:
        every = {
            f"{b}.{i}.{k}_proj" for b in range(2) for i in range(4) for k in ("gate_up", "down")
        }
        left = every if rule == "MixtralExperts" else {n for n in every if n.startswith("0.")}
    assert dense == left
    with pytest.raises(ValueError, match="Near matches: .*experts"):
        prune(build("mixtral"), "magnitude", skip=("model.layers.0.mlp.experts.9.down_proj",))


def test_targets_and_masks():
    model = build("qwen3-moe")
    name = "model.layers.1.mlp.experts.2.down_proj"
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, ::4] = mask[:, 3::4] = True
    report = prune(model, targets=(name,), masks={name: mask}, skip=())
    assert [row.name for row in report.pruned] == [name]
    assert torch.equal(model.get_submodule(name).weight.mask(), mask)
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts"]


@pytest.mark.parametrize("compress", [True, False])
def test_an_exception_leaves_the_model_as_it_was(compress):
    model, untouched = build("gpt-oss"), build("gpt-oss")
    parameters = dict(model.named_parameters())
    calls = []

    def scores(weight, hessian):
        calls.append(1)
        if len(calls) > 14:
            raise RuntimeError("in the second block")
        return weight.abs()

    with pytest.raises(RuntimeError, match="in the second block"):
        prune(model, scores, undo=True, compress=compress)
    assert not experts_of(model) and type(model.model.layers[0].mlp.experts).__name__ == (
        "GptOssExperts"
    )
    assert_same_state(model, untouched)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(untouched))


@pytest.mark.parametrize("compress", [True, False])
def test_interrupted_and_resumed(compress, tmp_path, monkeypatch):
    """The folder holds the experts of the finished block."""
    whole, model = build("mixtral"), build("mixtral")
    expected = prune(whole, "wanda", compress=compress)
    again = {"resume": tmp_path / "run", "compress": compress}

    def second_block_fails(layers, hessian, options):
        if layers[0].block == 1 and layers[0].expert is not None:
            raise KeyboardInterrupt
        return prune_group(layers, hessian, options)

    monkeypatch.setattr("sparsekern.oneshot.run.prune_group", second_block_fails)
    with pytest.raises(KeyboardInterrupt):
        prune(model, "wanda", **again)
    monkeypatch.undo()
    assert len(experts_of(model)) == int(compress)  # the first block is final, the second is dense
    fresh = build("mixtral")
    report = prune(fresh, "wanda", **again)
    assert report.resumed == 1
    assert_same_state(fresh, whole)
    assert [(r.name, r.tokens, r.note) for r in report.layers] == [
        (r.name, r.tokens, r.note) for r in expected.layers
    ]


def test_padding_reaches_no_expert():
    """Masks with holes: the Hessian of an expert is of the tokens that count."""
    model, tokens = build("mixtral"), ids(3, 10)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 3], mask[1, 7:], mask[2, :2] = 0, 0, 0
    seen = []
    module = model.model.layers[0].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        model(tokens, attention_mask=mask)
    handle.remove()
    keep = mask.bool().reshape(-1)
    x, index = seen[0][0][keep], seen[0][1][keep]
    batch = {"input_ids": tokens, "attention_mask": mask}
    groups = {g.layers[0].name: g for g in sk.calibrate(model, batch, device="cpu")}
    for i in range(4):
        part = x[(index == i).any(-1)]
        group = groups[f"model.layers.0.mlp.experts.{i}.gate_up_proj"]
        k = rules.PRIOR * 32
        expected = (part.T @ part + k / len(x) * x.T @ x) / (len(part) + k)
        torch.testing.assert_close(group.hessian.matrix / 2, expected, rtol=1e-4, atol=1e-5)
        assert group.layers[0].tokens == len(part)


def test_true_sequential_takes_all_experts_in_one_pass():
    model, calls = build("mixtral"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: calls.append(1))
    report = prune(model, true_sequential=True)
    assert sum(".experts." in row.name for row in report.pruned) == 16
    # Probe and walk of it, first batch for the order; qkv, o, gate_up, down; the next inputs.
    assert len(calls) < 14
    zeros = build("mixtral")
    prune(zeros, true_sequential=True, compress=False)
    torch.testing.assert_close(logits(model), logits(zeros), rtol=1e-4, atol=1e-5)


def test_more_experts_than_one_pass_holds(monkeypatch):
    """Passes of at most PASS_BYTES of Hessians, with and without the dense model beside."""
    sizes = []
    before = rules.split_passes

    def split(layers):
        made = before(layers)
        sizes.extend(len(part) for part in made)
        return made

    monkeypatch.setattr(rules, "PASS_BYTES", 60_000)
    monkeypatch.setattr("sparsekern.oneshot.stages.split_passes", split)
    model, zeros = build("mixtral"), build("mixtral")
    report = prune(model)
    assert sizes == [8, 4, 8, 4] and sum(sizes) == len(report.pruned)
    assert sum(".experts." in row.name for row in report.pruned) == 16
    prune(zeros, compress=False)
    torch.testing.assert_close(logits(model), logits(zeros), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_no_chain():
    """Calibrated as a whole; a mixture of our own."""
    torch.manual_seed(0)
    model = nn.Sequential(Mixture(), nn.Linear(16, 16))
    zeros, data = copy.deepcopy(model), [torch.randn(40, 16)]
    report = prune(model, data=data)
    assert len(report.pruned) == 13
    prune(zeros, data=data, compress=False)
    x = torch.randn(30, 16)
    torch.testing.assert_close(model(x), zeros(x), rtol=1e-4, atol=1e-5)
    assert list(experts_of(model)) == ["0.bank"]


def test_calibrate_puts_together_what_nobody_replaced():
    model = build("mixtral")
    names = fused(model)
    parameters = dict(model.named_parameters())
    for group in sk.calibrate(model, ids(), device="cpu"):
        if group.layers[0].name == "model.layers.1.mlp.experts.0.down_proj":
            weight = group.layers[0].weight
            group.replace(
                group.layers[0].name, sk.compress(weight, sk.prune.magnitude_mask(weight))
            )
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts"]
    assert fused(model) == names[:2]
    assert model.get_parameter(names[0]) is parameters[names[0]]
    with pytest.raises(ValueError, match="skip rule"):
        sk.calibrate(model, ids(), skip=("nothing",))
    assert fused(model) == names[:2]


def test_compress_model_takes_experts_that_are_24():
    model = build("llama4")
    prune(model, "magnitude", compress=False)
    expected = logits(model)
    report = sk.compress_model(model, skip=("lm_head",))
    assert report.share > 0.85 and len(experts_of(model)) == 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_hessians_handed_out_and_in():
    model, other = build("qwen3-moe"), build("qwen3-moe")
    hessians = prune(model, "wanda", keep_hessians=True).hessians
    assert hessians.keys() >= {"model.layers.0.mlp.experts.2.down_proj"}
    report = prune(other, "sparsegpt", hessians=hessians, match_dense=0.0)
    assert len(report.pruned) == len(hessians)


def test_match_dense_says_that_experts_are_not_matched():
    model = build("mixtral")
    report = prune(model)
    notes = [row.note for row in report.pruned if ".experts." in row.name]
    assert notes and all("not matched to the dense model" in note for note in notes)
    others = [row for row in report.pruned if ".experts." not in row.name]
    assert not any("not matched" in (row.note or "") for row in others)
