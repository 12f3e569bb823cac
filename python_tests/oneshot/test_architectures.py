"""prune_model on tiny models of many architectures: the share that is pruned, 2:4, outputs as of
the dense model with the same zeros, saved and loaded again; and the table in docs/."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.oneshot import architectures
from sparsekern.nn.sparse_experts import find_experts
from sparsekern.nn.sparse_linear import SparseLinear

transformers = pytest.importorskip("transformers")
# What may keep more than a tenth of a model dense; docs/architectures.md says what they mean.
KNOWN = re.compile(r"weight tied to |convolution$|\w+ reads the weight itself$")


@pytest.fixture(scope="module", params=list(architectures.ALL))
def case(request):
    """One architecture: the untouched model, the pruned one, and the report."""
    name = request.param
    cls, config, _ = architectures.ALL[name]
    for needed in (cls, config):
        if not hasattr(transformers, needed):
            pytest.skip(f"Transformers {transformers.__version__} has no {needed}")
    dense = architectures.build(transformers, name)
    model = copy.deepcopy(dense)
    report = architectures.prune(model, name)
    return SimpleNamespace(name=name, dense=dense, model=model, report=report)


def test_the_share_and_every_group_of_four(case):
    """Each pruned layer holds at most two of four; the report accounts for every linear layer; not
    more than a tenth is dense for a reason that is no known one."""
    modules = dict(case.model.named_modules())
    found = {name for name, module in modules.items() if isinstance(module, SparseLinear)}
    assert {row.name for row in case.report.pruned} == found != set()
    for row in case.report.pruned:
        weight = modules[row.name].weight.to_dense()
        assert tuple(weight.shape) == row.shape
        assert int((weight != 0).reshape(-1, 4).sum(1).max()) == 2
        assert 0 <= row.relative_error < 1
    rows = {row.name for row in case.report.layers}
    linear = {n for n, m in case.dense.named_modules() if isinstance(m, nn.Linear)}
    experts = {name: recipe for name, (_, recipe) in find_experts(case.dense).items()}
    matrices = {
        f"{name}.{i}.{key}"
        for name, recipe in experts.items()
        for i in range(recipe.experts)
        for key, _ in recipe.matrices
    }
    assert linear - rows == set() == matrices - rows
    stacked = {
        n for n, p in case.dense.named_parameters() if p.dim() == 3 and "experts" in n.split(".")
    }
    apart = {f"{name}.{key}" for name, recipe in experts.items() for key, _ in recipe.matrices}
    assert {n for n in stacked if not n.endswith("bias")} - apart - rows == set()
    if case.name in architectures.KINDS["mixture of experts"]:
        assert matrices <= found and case.report.share > 0.9
    total = sum(row.elements for row in case.report.layers)
    kept = sum(row.elements for row in case.report.pruned)
    assert case.report.share == pytest.approx(kept / total)
    other = [row for row in case.report.skipped if not KNOWN.match(row.reason)]
    assert sum(row.elements for row in other) <= 0.1 * total, [(r.name, r.reason) for r in other]


def test_outputs_as_of_the_dense_model_with_zeros(case):
    """The same run with compress=False gives the same numbers, and not the untouched model's."""
    untouched = architectures.outputs(case.dense, case.name)
    # What is only left dense because it cannot be compressed would be pruned with compress=False.
    skip = [row.name for row in case.report.skipped]
    zeros = copy.deepcopy(case.dense)
    again = architectures.prune(zeros, case.name, compress=False, skip=skip)
    assert [row.name for row in again.pruned] == [row.name for row in case.report.pruned]
    assert not any(isinstance(module, SparseLinear) for module in zeros.modules())
    got = architectures.outputs(case.model, case.name)
    expected = architectures.outputs(zeros, case.name)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert any(not torch.equal(a, b) for a, b in zip(got, untouched))


def test_saved_and_loaded(case, tmp_path):
    """from_pretrained gives the same outputs, with the same layers compressed."""
    expected = architectures.outputs(case.model, case.name)
    sk.save_pretrained(case.model, tmp_path)
    loaded = sk.from_pretrained(tmp_path)
    assert type(loaded) is type(case.model)
    found = {name for name, m in loaded.named_modules() if isinstance(m, SparseLinear)}
    assert found == {row.name for row in case.report.pruned}
    got = architectures.outputs(loaded, case.name)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_the_row_of_the_page(case):
    """docs/architectures.md says what this run shows."""
    committed = architectures.row_in_page(case.name)
    version = architectures.version_line(transformers)
    if version not in architectures.PAGE.read_text(encoding="utf-8"):
        pytest.skip(f"the page is not of Transformers {transformers.__version__}")
    assert committed == architectures.row(case.name, case.report)


def test_the_page_has_every_architecture():
    """One row for each, and no other."""
    text = architectures.PAGE.read_text(encoding="utf-8")
    made = text.partition(architectures.BEGIN)[2].partition(architectures.END)[0]
    names = re.findall(r"^\| ([\w-]+) \| \w+ \|", made, re.MULTILINE)
    assert [name for name in names if name != "architecture"] == list(architectures.ALL)
    assert len(architectures.ALL) >= 40
