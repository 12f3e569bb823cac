"""The registry of pruning methods: one registered from outside goes through all of prune_model."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.oneshot.driver_models import build, run_prune, tokens
from sparsekern import prune
from sparsekern.prune import Details, Method, Option


def thinned(weight, hessian, *, pattern, mask, shrink):
    """Magnitude, and every kept weight times `shrink`."""
    mask = prune.magnitude_mask(weight, *pattern) if mask is None else mask
    return weight * mask * shrink, mask, Details(notes=(f"times {shrink:g}",))


THINNED = Method(
    "thinned",
    "magnitude, kept weights shrunk",
    thinned,
    options=(Option("shrink", 0.5, "factor", "a number from 0 to 1", lambda v: 0 <= v <= 1),),
    updates=True,
    refine=0,
)


def masked_descent(block, masks, weights, *, steps, rate):
    """Kept weights of the whole block by gradient descent on the dense block's outputs."""
    now = {module: module.weight.detach().clone() for module in masks}
    with torch.no_grad():
        for module, weight in weights.items():
            module.weight.copy_(weight)
        wanted = list(block.outputs())
        for module, weight in now.items():
            module.weight.copy_(weight)
    inputs = list(block.inputs())
    with torch.enable_grad():
        optimizer = torch.optim.Adam([module.weight for module in masks], lr=rate)
        for _ in range(steps):
            for i, (x, y) in enumerate(zip(inputs, wanted)):
                optimizer.zero_grad()
                (block.forward(i, x.detach()) - y).square().mean().backward()
                for module, mask in masks.items():
                    module.weight.grad.mul_(mask)
                optimizer.step()
    for module in masks:
        module.weight.grad = None


@pytest.fixture
def registered():
    names = []

    def register(method):
        prune.register_method(method)
        names.append(method.name)

    yield register
    for name in names:
        prune.unregister_method(name)


def test_a_registered_method_is_used_and_reported(registered, tmp_path):
    registered(THINNED)
    names = list(prune.methods())  # pages of docs/ may have registered theirs in this process
    assert names[:3] == ["sparsegpt", "wanda", "magnitude"] and names[-1] == "thinned"
    model, dense = build(), build()
    report = run_prune(model, "thinned", shrink=0.25, resume=tmp_path)
    assert report.method == "thinned" and report.options["shrink"] == 0.25
    assert "refine" not in report.options and "match_dense" not in report.options
    row = report["model.layers.1.mlp.up_proj"]
    assert row.method == "thinned" and row.note == "times 0.25" and row.relative_error > 0.5
    w = dense.model.layers[1].mlp.up_proj.weight.detach()
    expected = w * prune.magnitude_mask(w) * 0.25
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight.to_dense(), expected)
    again = build()
    assert run_prune(again, "thinned", shrink=0.25, resume=tmp_path).resumed == 2
    with pytest.raises(ValueError, match="shrink: 0.5 here, 0.25 there"):
        run_prune(build(), "thinned", resume=tmp_path)


def test_its_options_are_checked_by_name(registered):
    registered(THINNED)
    with pytest.raises(ValueError, match="shrink, a number from 0 to 1, got 2"):
        run_prune(build(), "thinned", shrink=2)
    with pytest.raises(ValueError, match="options of wanda: none, got 'shrink'"):
        run_prune(build(), "wanda", shrink=0.5)
    with pytest.raises(ValueError, match="sparsegpt or admm with match_dense, got thinned"):
        run_prune(build(), "thinned", match_dense=0.5)
    with pytest.raises(ValueError, match="method in .*'thinned'.* got 'thin'"):
        run_prune(build(), "thin")


def test_given_masks_reach_a_method_that_updates(registered):
    registered(THINNED)
    mask = torch.zeros(64, 8, 4, dtype=torch.bool)
    mask[..., :2] = True
    name, mask = "model.layers.0.mlp.up_proj", mask.view(64, 32)
    model, dense = build(), build()
    report = run_prune(model, "thinned", masks={name: mask})
    w = dense.get_submodule(name).weight.detach()
    assert torch.equal(model.get_submodule(name).weight.to_dense(), w * mask * 0.5)
    assert report[name].note == "mask given; times 0.5"


def test_a_method_of_block_outputs_lowers_the_error_of_the_block(registered):
    """needs="outputs": the block's own error falls below that of the masks it starts from."""
    registered(
        Method(
            "descent",
            "wanda, then gradient descent on the block's output",
            prune.methods()["wanda"].function,
            needs="outputs",
            options=(Option("steps", 6, "passes"), Option("rate", 3e-3, "of Adam")),
            finish=masked_descent,
        )
    )
    dense, ids = build(layers=1), tokens(8, 16)
    plain, better = copy.deepcopy(dense), copy.deepcopy(dense)
    run_prune(plain, "wanda", ids)
    report = run_prune(better, "descent", ids)
    with torch.no_grad():
        y = dense.model(ids).last_hidden_state
        errors = [(m.model(ids).last_hidden_state - y).square().mean() for m in (plain, better)]
    assert errors[1] < 0.8 * errors[0]
    assert len(report.pruned) == 7 and report.method == "descent" and report.share > 0.5
    with pytest.raises(ValueError, match="a chain of blocks, with calibration, for descent"):
        run_prune(nn.Sequential(nn.Linear(8, 8)), "descent", torch.randn(4, 3, 8))


def test_an_option_that_prune_model_would_take_for_its_own_is_refused():
    option = Option("targets", 1.0, "")
    with pytest.raises(ValueError, match=r"options of mine with names of their own, .*'targets'"):
        run_prune(build(), Method("mine", "", thinned, options=(option,)))


def test_what_a_method_returns_is_checked(registered):
    def wrong(weight, hessian, *, pattern, mask):
        return weight, torch.ones_like(weight, dtype=torch.bool), None

    registered(Method("wrong", "keeps all", wrong))
    with pytest.raises(ValueError, match="at most 2 of 4 kept in .* by method wrong, got 4"):
        run_prune(build(), "wrong")


def test_a_method_that_changes_its_weight_in_place_is_refused(registered):
    """The errors would be those of a weight that is pruned already."""

    def in_place(weight, hessian, *, pattern, mask):
        mask = prune.magnitude_mask(weight)
        return weight.mul_(mask), mask, None

    registered(Method("in-place", "", in_place))
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="in-place to leave its weight as it is, .*Work on a clone"
    ):
        run_prune(model, "in-place")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_details_of_another_type_are_refused(registered):
    def told(weight, hessian, *, pattern, mask):
        mask = prune.magnitude_mask(weight)
        return weight * mask, mask, "all well"

    registered(Method("told", "", told))
    with pytest.raises(TypeError, match="from method told: prune.Details or None, got str"):
        run_prune(build(), "told")


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(name=3), "Method: expected name: text, got 3"),
        (dict(function=None), "function: a function, got None"),
        (dict(options={"a": 1}), "options: a tuple, got {'a': 1}"),
        (dict(options=("a",)), r"options: a tuple of Option, got \['str'\]"),
    ],
)
def test_what_is_no_method(change, text):
    with pytest.raises(TypeError, match=text):
        Method(**{**dict(name="mine", help="", function=thinned), **change})


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(name="wanda"), "a name that is free, got 'wanda'"),
        (dict(name="a b"), "a name of letters"),
        (dict(needs="nothing"), "needs in"),
        (dict(needs="outputs"), "finish with needs"),
        (dict(match_dense=0.5, updates=False), "match_dense=None"),
        (dict(options=(Option("refine", 1, ""),)), r"names of their own, got \['refine'\]"),
    ],
)
def test_methods_that_cannot_be_registered(change, text):
    fields = {**dict(name="mine", help="", function=thinned), **change}
    with pytest.raises(ValueError, match=text):
        prune.register_method(Method(**fields))
    assert "mine" not in sk.prune.methods()
