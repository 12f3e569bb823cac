"""Skip rules: every form, and rules that match nothing."""

import pytest
from torch import nn

from python_tests.oneshot.driver_models import build, plain, tokens
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.skip import resolve


def skipped_names(skip, layers=4):
    model = build("llama", layers=layers)
    report = prune_model(model, "magnitude", skip=skip, progress=False, device="cpu")
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert dense == {row.name for row in report.skipped}
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == len(report.pruned)
    return dense


def in_blocks(*blocks):
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return {f"model.layers.{b}.{name}" for b in blocks for name in attention + mlp}


@pytest.mark.parametrize(
    "skip, expected",
    [
        ((), set()),
        (None, set()),
        ("lm_head", {"lm_head"}),
        (("lm_head", "model.layers.0.mlp.up_proj"), {"lm_head", "model.layers.0.mlp.up_proj"}),
        ("model.layers.2", in_blocks(2)),
        ("*.down_proj", {f"model.layers.{i}.mlp.down_proj" for i in range(4)}),
        ("model.layers.[12].*_attn.q_proj", {f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)}),
        ("LlamaMLP", {n for n in in_blocks(0, 1, 2, 3) if ".mlp." in n}),
        ("Linear", in_blocks(0, 1, 2, 3) | {"lm_head"}),
        (
            r"re:.*\.(q|k)_proj",
            {f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qk"},
        ),
        (1, in_blocks(1)),
        (-1, in_blocks(3)),
        (range(1, 3), in_blocks(1, 2)),
        ([0, "block:2-3"], in_blocks(0, 2, 3)),
        ("block:-2", in_blocks(2)),
        ("block:-2--1", in_blocks(2, 3)),
    ],
)
def test_every_form_of_rule(skip, expected):
    assert skipped_names(skip) == expected


@pytest.mark.parametrize(
    "skip, error, text",
    [
        (
            "model.layers.0.mlp.up_prj",
            ValueError,
            "'model.layers.0.mlp.up_prj'.*Near matches: .*mlp.up_proj",
        ),
        ("q_proj", ValueError, r'write "\*\.q_proj"'),
        ("LlamaMlp", ValueError, "Near matches: .*LlamaMLP"),
        ("*.fc1", ValueError, r"'\*\.fc1' to match a Linear layer, got no match"),
        ("model.norm", ValueError, "got no match"),
        ("re:layers", ValueError, "got no match"),
        ("re:(", ValueError, "regular expression"),
        (4, ValueError, r"within blocks 0\.\.3, got block 4"),
        (-5, ValueError, "got block -1"),
        ("block:2-9", ValueError, "got block 4"),
        ("block:3-2", ValueError, "upwards, got 3 to 2"),
        ("block:first", ValueError, "'block:first'"),
        (range(0), ValueError, "no Linear layer in those blocks"),
        ([3.5], TypeError, "got 3.5"),
    ],
)
def test_rules_that_match_nothing_or_make_no_sense(skip, error, text):
    with pytest.raises(error, match=text):
        skipped_names(skip)


def test_the_default_rule_is_the_output_embedding_under_any_name():
    report = prune_model(plain(), "magnitude", progress=False, device="cpu")  # no head: no error
    assert not [row for row in report.skipped if "skip rule" in row.reason]
    model = build("llama")
    model.output = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.output
    report = prune_model(model, "magnitude", progress=False, device="cpu")
    assert report["output"].reason == "skip rule 'lm_head'"


def test_files_of_rules_among_others(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"skip": ["lm_head", "*.up_proj"]}')
    expected = skipped_names(["lm_head", "*.up_proj", "*.q_proj"])
    assert skipped_names([str(file), "*.q_proj"]) == expected == skipped_names(["*.q_proj", file])
    with pytest.raises(FileNotFoundError, match=r"expected a file of skip rules at no\.json"):
        skipped_names(["no.json", "*.q_proj"])


@pytest.mark.parametrize("more", [{"skip": ""}, {"targets": ["up", " "]}])
def test_an_empty_rule_does_not_mean_everything(more):
    with pytest.raises(ValueError, match="rule '.?' to name something, got empty text"):
        prune_model(plain(), "magnitude", progress=False, **more)


def test_block_rules_need_blocks():
    with pytest.raises(ValueError, match="a model without blocks"):
        prune_model(plain(), "magnitude", skip=0, progress=False)


def test_skipped_blocks_still_pass_their_outputs_on():
    model = build("llama", layers=3)
    report = prune_model(
        model, "sparsegpt", tokens(), skip=("lm_head", 1), progress=False, device="cpu"
    )
    assert {row.block for row in report.pruned} == {0, 2}
    whole = build("llama", layers=3)
    other = prune_model(whole, "sparsegpt", tokens(), progress=False, device="cpu")
    name = "model.layers.2.mlp.up_proj"
    assert (
        report["model.layers.0.mlp.up_proj"].relative_error
        == other["model.layers.0.mlp.up_proj"].relative_error
    )
    assert report[name].relative_error != other[name].relative_error


def test_a_module_that_is_registered_twice_goes_by_each_name():
    block = nn.ModuleDict({"up": nn.Linear(8, 8)})
    model = nn.ModuleDict({"first": block, "second": block, "other": nn.Linear(8, 8)})
    for rule in ("second.up", "second", "sec*", "re:second"):
        assert list(resolve(rule, ["first.up", "other"], model, {}, 0)) == ["first.up"]
