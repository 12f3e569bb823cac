"""prune_model: model families, propagation through pruned blocks, what is skipped and why, and the
state it leaves."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from python_tests.oneshot.driver_models import (
    FAMILIES,
    build,
    hessian64,
    hook_inputs,
    is_24,
    record_hessians,
    run_prune,
    tokens,
)
from sparsekern import prune
from sparsekern.nn import replace
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.calibration import make_batches
from sparsekern.oneshot.layerwise import prune_group
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.sequential import Walk, probe

CPU = torch.device("cpu")


def linears(model):
    return {name: module for name, module in model.named_modules() if replace.is_linear(module)}


# ----------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_alone_as_inside_the_model(family):
    """The recorded calls reproduce the model: same hidden states after the last block, bit for
    bit."""
    model = build(family, layers=3)
    _, blocks = models.find_blocks(model)
    assert len(blocks) == 3
    batches = make_batches(tokens(5), model, 2, CPU)
    assert [b.samples for b in batches] == [2, 2, 1]
    expected = []
    handle = blocks[-1].register_forward_hook(lambda m, a, out: expected.append(out))
    with torch.no_grad():
        for batch in batches:
            batch.run(model, CPU)
        handle.remove()
        shown = probe(model, blocks, [], batches[0].probe(), CPU)
        assert shown.chained
        walk = Walk(model, blocks, batches, shown, CPU, CPU, None)
        for _ in walk.capture():
            pass
        for i in range(3):
            for _ in walk.block(i, keep=True):
                pass
    assert len(expected) == 3
    for hidden, out in zip(walk.hidden, expected):
        assert torch.equal(hidden, out[0] if isinstance(out, tuple) else out)
    assert all("forward" not in block.__dict__ for block in blocks)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_block_becomes_sparse(family, method):
    model = build(family)
    dense = copy.deepcopy(model)
    masked = copy.deepcopy(model)
    per_block = FAMILIES[family][2]
    report = run_prune(model, method)
    assert len(report.pruned) == 2 * per_block
    assert [row.block for row in report.pruned] == [0] * per_block + [1] * per_block
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(sparse) == 2 * per_block
    run_prune(masked, method, compress=False)
    for name, module in linears(masked).items():
        weight = replace.dense_weight(module)
        other = model.get_submodule(name)
        if not isinstance(other, SparseLinear):
            assert torch.equal(weight, replace.dense_weight(dense.get_submodule(name)))
            continue
        assert is_24(weight) and torch.equal(other.weight.to_dense(), weight)
        kept = weight != 0
        unchanged = torch.equal(weight[kept], replace.dense_weight(dense.get_submodule(name))[kept])
        assert unchanged == (method != "sparsegpt")
        assert (module.bias is None) == (other.bias is None)
    ids = tokens(2, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, masked(ids).logits, rtol=1e-5, atol=1e-5)


def test_sparsegpt_has_the_least_error_and_magnitude_the_most():
    mean = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        report = run_prune(build("llama"), method, tokens(16, 32))
        errors = [row.relative_error for row in report.pruned if row.block == 0]
        mean[method] = sum(errors) / len(errors)
    assert 0 < mean["sparsegpt"] < mean["wanda"] < mean["magnitude"] < 1


def test_conv1d_is_pruned_along_its_inputs():
    """GPT-2 stores [in_features, out_features]; the pruned weight is that of sparsegpt on the
    transpose."""
    model = build("gpt2")
    layer = model.transformer.h[0].mlp.c_proj
    weight = layer.weight.detach().t().clone()
    seen = {}

    def score(w, hessian):
        if torch.equal(w, weight):
            seen["scores"] = w.abs() * hessian.act_norm
        return w.abs() * hessian.act_norm

    run_prune(model, score)
    new = model.transformer.h[0].mlp.c_proj.weight.to_dense()
    assert new.shape == (32, 64)
    assert torch.equal(new, weight * prune.nm_mask(seen["scores"]))


# -------------------------------------------------------------------------------------- propagation


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_hessians_of_block_1_come_from_pruned_block_0(family, compress):
    model = build(family)
    dense = copy.deepcopy(model)
    ids = tokens()
    seen = record_hessians(model, calibration=ids, compress=compress, batch_size=2)
    weights = {name: replace.dense_weight(m).clone() for name, m in linears(dense).items()}
    half = copy.deepcopy(dense)  # block 0 pruned, block 1 dense
    _, blocks = models.find_blocks(half)
    for module in (m for m in blocks[0].modules() if replace.is_linear(m)):
        w = replace.dense_weight(module)
        replace.write_weight(module, w * prune.magnitude_mask(w))
    checked = 0
    for source, block, agree in ((half, 1, True), (dense, 1, False), (dense, 0, True)):
        _, found = models.find_blocks(source)
        modules = {n: m for n, m in source.named_modules() if replace.is_linear(m)}
        names = [n for n, m in modules.items() if m in set(found[block].modules())]
        inputs = hook_inputs(
            source, [modules[n] for n in names], lambda s=source: s(ids, use_cache=False)
        )
        for name, x in zip(names, inputs):
            matrix = next(h for w, h in seen if torch.equal(w, weights[name]))
            expected = hessian64(x)
            error = (matrix.double() - expected).norm() / expected.norm()
            assert (error < 1e-5) == agree, (name, float(error))
            checked += 1
    assert checked == 3 * FAMILIES[family][2]


def test_true_sequential_prunes_each_group_on_the_groups_before():
    """With true_sequential o_proj sees the attention of pruned q, k, v; without, that of the dense
    ones."""
    ids = tokens()
    dense = build("llama", layers=1)
    attention = dense.model.layers[0].self_attn
    o_weight = attention.o_proj.weight.detach().clone()
    partly = copy.deepcopy(dense)
    for part in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(partly.model.layers[0].self_attn, part)
        replace.write_weight(
            layer, layer.weight.detach() * prune.magnitude_mask(layer.weight.detach())
        )
    for true_sequential, source in ((True, partly), (False, dense)):
        seen = record_hessians(
            copy.deepcopy(dense), calibration=ids, true_sequential=true_sequential
        )
        assert len(seen) == 7
        matrix = next(h for w, h in seen if torch.equal(w, o_weight))
        layer = source.model.layers[0].self_attn.o_proj
        (x,) = hook_inputs(source, [layer], lambda s=source: s(ids, use_cache=False))
        torch.testing.assert_close(matrix.double(), hessian64(x), rtol=1e-4, atol=1e-5)


def test_layers_with_one_input_share_one_hessian_and_one_sweep():
    """q, k, v get the Hessian of their common input; the sweep over their stacked rows equals three
    sweeps."""
    model = build("llama", layers=1)
    attention = model.model.layers[0].self_attn
    weights = {
        p: getattr(attention, p).weight.detach().clone() for p in ("q_proj", "k_proj", "v_proj")
    }
    ids = tokens()
    (inputs,) = hook_inputs(model, [attention.q_proj], lambda: model(ids, use_cache=False))
    hessian = prune.Hessian(32)
    hessian.add(inputs[0])
    hessians = []

    def score(w, hessian):
        hessians.append(hessian)
        return w.abs()

    run_prune(copy.deepcopy(model), score)
    assert len(hessians) == 7 and len({id(h) for h in hessians}) == 4
    report = run_prune(model, "sparsegpt", ids, refine=0)
    for part, weight in weights.items():
        expected, mask, alone = prune.sparsegpt(weight, hessian)
        got = getattr(attention, part).weight.to_dense()
        assert torch.equal(got != 0, mask)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        row = report[f"model.layers.0.self_attn.{part}"]
        assert row.relative_error == pytest.approx(alone.relative_error, rel=1e-3)
        assert row.damp == 0.01


class Switching(nn.Module):
    """Two layers that share their input in the first call only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(8, 8), nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.a(x) + self.b(x if self.calls % 4 == 1 else x * 2)


def test_layers_that_stop_sharing_get_their_own_hessians():
    torch.manual_seed(0)
    model = Switching()
    batches = [torch.randn(3, 8) for _ in range(3)]
    weight = model.b.weight.detach().clone()
    seen = record_hessians(model, calibration=batches)
    matrix = next(h for w, h in seen if torch.equal(w, weight))
    # The first pass ends in its second batch; the second pass therefore starts with call 3.
    factors = [1.0 if call % 4 == 1 else 2.0 for call in (3, 4, 5)]
    inputs = torch.cat([x * f for x, f in zip(batches, factors)]).double()
    torch.testing.assert_close(matrix.double(), 2 / 3 * inputs.T @ inputs, rtol=1e-5, atol=1e-6)


def test_host_offload_and_batch_size_do_not_change_the_masks():
    results = []
    for options in (
        {"batch_size": 6},
        {"batch_size": 6, "offload_activations": True},
        {"batch_size": 2},
    ):
        model = build("gemma2")
        run_prune(model, "wanda", **options)
        results.append([m.weight.bitmask() for m in model.modules() if isinstance(m, SparseLinear)])
    for other in results[1:]:
        assert len(other) == 14 and all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_calibration_of_several_lengths():
    ids = [torch.arange(3, 19), torch.arange(20, 36), torch.arange(5, 13)[None]]
    report = run_prune(build("llama"), "wanda", ids)
    assert (report.calibration["samples"], report.calibration["tokens"]) == (3, 40)
    assert len(report.calibration["sha256"]) == 64
    other = run_prune(build("llama"), "wanda", [t.flatten() for t in ids], batch_size=1)
    assert other.calibration["sha256"] == report.calibration["sha256"]


# ---------------------------------------------------------------------------- outside of the blocks


def test_lm_head_is_pruned_on_the_outputs_of_the_pruned_blocks():
    model = build("llama")
    dense_head = model.lm_head
    weight = dense_head.weight.detach().clone()
    ids = tokens()
    report = run_prune(model, "sparsegpt", ids, skip=())
    assert isinstance(model.lm_head, SparseLinear) and not report.skipped
    (inputs,) = hook_inputs(model, [model.lm_head], lambda: model(ids, use_cache=False))
    hessian = prune.Hessian(32)
    hessian.add(inputs[0])
    expected, mask, _ = prune.sparsegpt(weight, hessian)
    expected = prune.refine(
        weight, expected, mask, hessian, steps=prune.methods()["sparsegpt"].refine
    )
    assert torch.equal(model.lm_head.weight.to_dense() != 0, mask)
    torch.testing.assert_close(model.lm_head.weight.to_dense(), expected, rtol=1e-3, atol=1e-5)


def test_layers_before_the_blocks_are_pruned_first():
    """OPT's project_in: block 0 is calibrated on what the pruned project_in returns."""
    model = build("opt", word_embed_proj_dim=16)
    dense = copy.deepcopy(model)
    ids = tokens()
    seen = record_hessians(model, calibration=ids)
    assert isinstance(model.model.decoder.project_in, SparseLinear)
    assert isinstance(model.model.decoder.project_out, SparseLinear)
    w = dense.model.decoder.project_in.weight.detach()
    replace.write_weight(dense.model.decoder.project_in, w * prune.magnitude_mask(w))
    layer = dense.model.decoder.layers[0].self_attn.q_proj
    (inputs,) = hook_inputs(dense, [layer], lambda: dense(ids, use_cache=False))
    matrix = next(h for w, h in seen if torch.equal(w, layer.weight))
    torch.testing.assert_close(matrix.double(), hessian64(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_tied_weights_stay_tied(method):
    model = build("llama", tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    report = run_prune(model, method, skip=())
    assert "tied to model.embed_tokens.weight" in report["lm_head"].reason
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)


# --------------------------------------------------------------------------------- masks and scores


def test_given_masks_are_used():
    model = build("llama")
    dense = copy.deepcopy(model)
    name = "model.layers.1.mlp.down_proj"
    mask = torch.zeros(32, 64, dtype=torch.bool).view(32, 16, 4)
    mask[..., 2:] = True
    mask = mask.view(32, 64)
    report = run_prune(model, "sparsegpt", masks={name: mask})
    got = model.get_submodule(name).weight
    assert torch.equal(got.mask(), mask) and report[name].note == "mask given"
    assert not torch.equal(got.to_dense(), dense.get_submodule(name).weight * mask)
    model = copy.deepcopy(dense)
    report = prune_model(model, "magnitude", masks={name: mask}, device="cpu", progress=False)
    assert torch.equal(
        model.get_submodule(name).weight.to_dense(), dense.get_submodule(name).weight * mask
    )
    assert (
        report[name].method == "mask"
        and report["model.layers.0.mlp.down_proj"].method == "magnitude"
    )


def test_a_mask_for_one_layer_of_a_group_leaves_the_others_to_the_method():
    model, other = build("llama"), build("llama")
    name = "model.layers.0.self_attn.k_proj"
    mask = prune.magnitude_mask(model.get_submodule(name).weight.detach())
    run_prune(model, masks={name: mask})
    run_prune(other)
    assert torch.equal(model.get_submodule(name).weight.mask(), mask)
    for part in ("q_proj", "v_proj"):
        a, b = (getattr(m.model.layers[0].self_attn, part).weight.mask() for m in (model, other))
        assert torch.equal(a, b)


def test_score_functions():
    model, wanda = build("llama"), build("llama")

    def by_norm(w, hessian):
        return w.abs() * hessian.act_norm

    def in_place(w, hessian):
        return w.abs_().mul_(hessian.act_norm)

    report, other = run_prune(model, by_norm), build("llama")
    run_prune(wanda, "wanda")
    run_prune(other, in_place)
    assert report.method.endswith("by_norm")
    for name, module in wanda.named_modules():
        if isinstance(module, SparseLinear):
            for scored in (model, other):
                weight = scored.get_submodule(name).weight
                assert torch.equal(weight.to_dense(), module.weight.to_dense())


def test_other_patterns_without_compression():
    model = build("llama")
    run_prune(model, "sparsegpt", pattern=(4, 8), compress=False)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal((weight != 0).view(-1, 8).sum(1), torch.full((weight.numel() // 8,), 4))
    assert not is_24(weight)


# ----------------------------------------------------------------------------------- the state left


def state_of(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    own_forward = sum("forward" in m.__dict__ for m in model.modules())
    return hooks, own_forward, model.config.use_cache, torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_flags_hooks_and_config_are_restored(fails):
    model = build("llama").train()
    model.model.layers[1].eval()
    before = state_of(model)
    assert before == (0, 0, True, True)

    def score(w, hessian):
        if fails and w.shape == (32, 64):
            raise KeyError("stop here")
        return w.abs()

    if fails:
        with pytest.raises(KeyError, match="stop here"):
            run_prune(model, score)
    else:
        run_prune(model, score)
        assert (
            model.model.layers[0].mlp.up_proj.training
            and not model.model.layers[1].mlp.up_proj.training
        )
    assert state_of(model) == before
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training


def test_pruned_model_is_trainable_where_it_was():
    """Nothing of inference mode stays behind: biases train and gradients reach the input."""
    model = build("qwen2")
    run_prune(model)
    model(tokens(1)).logits.sum().backward()
    bias = model.model.layers[0].self_attn.q_proj.bias
    assert bias.requires_grad and bias.grad.abs().sum() > 0


def test_runs_inside_inference_mode():
    model, other = build("llama"), build("llama")
    with torch.inference_mode():
        run_prune(model)
    run_prune(other)
    a, b = (m.model.layers[1].mlp.down_proj.weight.to_dense() for m in (model, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("training", [{}, {"reconstruct": {"epochs": 1}}])
def test_a_forward_in_inference_mode_gives_the_same(training):
    """Its tensors have no versions, and what blocks are trained on is copied."""
    model, other = build("llama"), build("llama")
    model.forward = torch.inference_mode()(model.forward)
    for one in (model, other):
        run_prune(one, **training)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            expected = other.get_submodule(name).weight.to_dense()
            assert torch.equal(module.weight.to_dense(), expected)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_no_dense_copy_outlives_its_block(method, monkeypatch):
    """When block 1 is pruned, the dense layers of block 0 are freed, not merely replaced."""
    model = build("llama")
    block = model.model.layers[0]
    dense = [weakref.ref(m.weight) for m in block.modules() if isinstance(m, nn.Linear)]
    alive = []

    def watch(layers, hessian, options):
        if layers[0].block == 1:
            gc.collect()
            alive.append(sum(ref() is not None for ref in dense))
        return prune_group(layers, hessian, options)

    monkeypatch.setattr("sparsekern.oneshot.run.prune_group", watch)
    assert len(dense) == 7
    run_prune(model, method, undo=False)
    assert alive and not any(alive)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_block_at_a_time_on_the_gpu(family):
    """The model stays on the CPU; masks agree with a CPU run up to near-ties of the scores."""
    model, reference = build(family), build(family)
    run_prune(model, device="cuda", skip=())
    run_prune(reference, skip=())
    same = total = 0
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            assert module.weight.device.type == "cpu"
            mask = module.weight.mask()
            same += int((mask == reference.get_submodule(name).weight.mask()).sum())
            total += mask.numel()
    assert total and same / total > 0.98
    assert all(p.device.type == "cpu" for p in model.parameters())
