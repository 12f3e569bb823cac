"""sk.calibrate: the loops that it is made for, each a few lines."""

import copy
import itertools
import json

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, run_prune, tokens
from python_tests.oneshot.test_resume import assert_same_state
from sparsekern import prune


def test_sensitivity_of_each_layer_without_changing_the_model():
    """The error of pruning one layer at a time, on top of the dense model."""
    model, untouched, ids = build(), build(), tokens()
    errors = {}
    for group in sk.calibrate(model, ids, targets="*.down_proj"):
        for layer in group.layers:
            weight, _, _ = prune.sparsegpt(layer.weight, group.hessian)
            errors[layer.name] = prune.relative_error(layer.weight, weight, group.hessian)
    assert set(errors) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert all(0 < error < 1 for error in errors.values())
    assert_same_state(model, untouched)
    first = run_prune(copy.deepcopy(model), targets="*.0.mlp.down_proj", refine=0, match_dense=0)
    assert errors["model.layers.0.mlp.down_proj"] == first.pruned[0].relative_error


def test_pruning_with_an_own_solver_is_prune_model():
    """prune_model(refine=0, match_dense=0) as a loop: same weights, SparseLinear included."""
    model, expected = build(layers=3), build(layers=3)
    for group in sk.calibrate(model, tokens(), batch_size=2):
        rows = [layer.weight for layer in group.layers]
        weight, mask, _ = prune.sparsegpt(torch.cat(rows), group.hessian)
        sizes = [len(w) for w in rows]
        for layer, w, m in zip(group.layers, weight.split(sizes), mask.split(sizes)):
            group.replace(layer.name, sk.compress(w, m))
    run_prune(expected, batch_size=2, refine=0, match_dense=0)
    assert_same_state(model, expected)
    assert not model.training and model.config.use_cache


def test_two_processes_with_half_of_the_data_each():
    """Hessians added up before each solve: both end with the same weights, those of one process up
    to rounding."""
    ids, halves = tokens(8), [build(), build()]
    loops = [sk.calibrate(m, part) for m, part in zip(halves, (ids[:4], ids[4:]))]
    for groups in itertools.zip_longest(*loops):  # both to their ends
        total = groups[0].hessian.merge(groups[1].hessian)
        for layer in groups[0].layers:
            mask = prune.wanda_mask(layer.weight, total.act_norm)
            for group in groups:
                group.replace(layer.name, sk.compress(layer.weight, mask))
    assert_same_state(*halves)
    one = build()
    run_prune(one, "wanda", ids)
    name = "model.layers.1.mlp.down_proj"
    masks = [m.get_submodule(name).weight.mask() for m in (one, halves[0])]
    assert (masks[0] == masks[1]).float().mean() > 0.99


def test_stages_give_a_block_its_inputs_and_outputs():
    model, ids = build(), tokens()
    seen = []
    for stage in sk.calibrate(model, ids, batch_size=3).stages():
        if stage.index == 1:
            x, y = list(stage.inputs()), list(stage.outputs())
            assert [t.shape for t in x] == [(3, 20, 32)] * 2
            leaf = x[0].clone().requires_grad_()
            out = stage.forward(0, leaf)
            assert torch.equal(out, y[0]) and out.requires_grad
        else:
            with (
                pytest.raises(ValueError, match="a block of a chain")
                if stage.key == "head"
                else (pytest.raises(ValueError) if stage.index is None else memory())
            ):
                list(stage.inputs())
        for group in stage.groups():
            (shape,) = {tuple(x.shape) for x in group.inputs()}
            seen.append((stage.key, len(group.layers), shape[-1]))
    assert [row for row in seen if row[0] == "block-00001"] == [
        ("block-00001", 3, 32),
        ("block-00001", 1, 32),
        ("block-00001", 2, 32),
        ("block-00001", 1, 64),
    ]


def memory():
    import contextlib

    return contextlib.nullcontext()


def test_an_iteration_that_is_left_leaves_the_model_usable():
    model = build().train()
    for group in sk.calibrate(model, tokens()):
        assert not model.training and group.block == 0
        break
    import gc

    gc.collect()
    assert model.training and model.config.use_cache
    assert all("forward" not in m.__dict__ and not m._forward_pre_hooks for m in model.modules())


def test_a_group_whose_block_is_done_is_refused():
    """A Sparse24 put there would stay a dense weight."""
    model, untouched = build(), build()
    groups = list(sk.calibrate(model, tokens()))
    layer = groups[0].layers[0]
    with pytest.raises(
        ValueError, match="the loop is at, got one of block-00000, which is done. C"
    ):
        groups[0].replace(layer.name, sk.prune_compress(layer.weight))
    assert_same_state(model, untouched)


def test_hessians_out_and_in():
    first, second, third = build(), build(), build()
    report = run_prune(first, refine=0, match_dense=0, keep_hessians=True)
    assert len(report.hessians) == 14 and "hessians" not in json.loads(report.to_json())
    again = sk.prune_model(second, "sparsegpt", hessians=report.hessians, refine=0, progress=False)
    assert_same_state(first, second)
    assert again.calibration is None
    matrices = {name: h.matrix for name, h in report.hessians.items()}
    sk.prune_model(third, "sparsegpt", hessians=matrices, refine=0, progress=False)
    assert_same_state(first, third)
    del matrices["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="a Hessian for model.layers.0.mlp.up_proj"):
        sk.prune_model(build(), "sparsegpt", hessians=matrices, progress=False)


def test_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match="sparsekern.calibrate: expected token ids within"):
        sk.calibrate(build(), torch.full((2, 8), 64))
    with pytest.raises(ValueError, match="target rule 'nothing'"):
        sk.calibrate(build(), tokens(), targets="nothing")
    group = next(iter(sk.calibrate(build(), tokens())))
    with pytest.raises(ValueError, match="one of .*q_proj"):
        group.replace("lm_head", torch.zeros(64, 32))
    for wrong in (torch.zeros(4, 4), None, torch.zeros(32, 32, device="meta")):
        with pytest.raises(ValueError, match=r"a weight \[32, 32\] for .* got .*Pass a tensor"):
            group.replace(group.layers[0].name, wrong)
    groups = sk.calibrate(build(), tokens())
    assert list(groups)
    with pytest.raises(ValueError, match="a calibration that is new, got one that was used. Call"):
        next(iter(groups))
