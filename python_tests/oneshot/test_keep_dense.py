"""prune_model(keep_dense="if-slower"): what is measured, which layers stay dense, and what a
resumed run does."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from python_tests.oneshot.driver_models import build, plain, tokens
from python_tests.oneshot.test_resume import assert_same_state
from sparsekern import SparseLinear
from sparsekern.backends.cuda import configs
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.oneshot import keep_dense
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.report import PruneReport
from sparsekern.profiling import layer_bench

UP, DOWN = (64, 32), (32, 64)  # gate_proj and up_proj, down_proj of driver_models' Llama


class Bench:
    """layer_bench.bench_shape with times by shape: (dense us, sparse us) of one call per token."""

    def __init__(self, monkeypatch, slow=(), ratio=1.07):
        self.slow, self.ratio, self.calls = set(slow), ratio, []
        monkeypatch.setattr(layer_bench, "bench_shape", self)

    def __call__(self, out_features, in_features, count, *, dtype, device):
        self.calls.append((out_features, in_features, count, dtype, device))
        factor = self.ratio if (out_features, in_features) in self.slow else 0.5
        return SimpleNamespace(dense_us=10.0 * count, sparse_us=10.0 * count * factor)


def run(model, **options):
    options = {"device": "cpu", "progress": False, "keep_dense": "if-slower", **options}
    return prune_model(model, "magnitude", **options)


def test_only_the_layers_that_get_slower_stay_dense(monkeypatch):
    bench, model = Bench(monkeypatch, [DOWN]), build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(model, keep_dense_tokens=(1, 4))
    kept = {layer.name for layer in report.skipped}
    assert kept == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))}
    row = report["model.layers.1.mlp.down_proj"]
    assert row.reason == ("kept dense: 2:4 is 1.07x slower at tokens 1, 4 (53.5 us, dense 50.0 us)")
    assert row.bytes_sparse == row.bytes_dense
    assert not isinstance(model.model.layers[0].mlp.down_proj, SparseLinear)
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert report.options["keep_dense"] == "if-slower"
    assert report.options["keep_dense_tokens"] == [1, 4]
    assert PruneReport.from_json(report.to_json())[row.name].reason == row.reason
    shapes = {call[:2] for call in bench.calls}
    assert DOWN in shapes and UP in shapes and len(bench.calls) == 2 * len(shapes), "each once"
    assert {call[2:] for call in bench.calls} == {(count, torch.float32, "cpu") for count in (1, 4)}


def test_calibrated_runs_prune_the_rest_as_a_skip_rule_would(monkeypatch):
    Bench(monkeypatch, [DOWN])
    ours, skipped = build("llama"), build("llama")
    options = {"device": "cpu", "progress": False, "batch_size": 2}
    prune_model(ours, "sparsegpt", tokens(), keep_dense="if-slower", **options)
    prune_model(skipped, "sparsegpt", tokens(), skip=("lm_head", "*.down_proj"), **options)
    assert_same_state(ours, skipped)


def test_when_everything_is_slower_nothing_is_pruned_and_that_is_said(monkeypatch):
    model, before = plain(), plain()
    Bench(monkeypatch, [(32, 16), (16, 32), (16, 16)])
    with pytest.warns(
        UserWarning,
        match="nothing is pruned: on cpu 2:4 is slower for every layer "
        r"\(on a CPU every call of a sparse layer decompresses",
    ):
        report = run(model, skip=())
    assert report.pruned == [] and "0 layers pruned" in report.summary()
    assert "kept dense: 2:4 is 1.07x slower" in report.table()
    assert_same_state(model, before)


def test_the_real_measurement_on_the_cpu():
    """The CPU backend decompresses the weight in every call: dense is faster."""
    model = build("llama", layers=1)
    with pytest.warns(UserWarning, match="nothing is pruned"):
        report = run(model, keep_dense_tokens=(1,))
    reasons = {layer.reason for layer in report.layers if layer.name != "lm_head"}
    assert all(reason.startswith("kept dense: 2:4 is ") for reason in reasons)


def test_without_it_nothing_is_measured(monkeypatch):
    bench = Bench(monkeypatch, [DOWN])
    report = run(build("llama"), keep_dense=None)
    assert bench.calls == [] and "keep_dense" not in report.options
    assert [layer.name for layer in report.skipped] == ["lm_head"]


def test_skipped_layers_are_not_measured(monkeypatch):
    bench = Bench(monkeypatch)
    run(build("llama"), skip=("lm_head", "*.down_proj"))
    assert DOWN not in {call[:2] for call in bench.calls}


def test_times_of_a_tuned_table_are_not_measured_again(monkeypatch):
    """Both times of a cell must be there; the others are measured."""
    asked, bench = [], Bench(monkeypatch)

    def tuned_times(out_features, in_features, count, *, dtype, device):
        asked.append((out_features, in_features, count, dtype, device))
        return (1.0, 1000.0) if ((out_features, in_features), count) == (DOWN, 4) else None

    monkeypatch.setattr(layer_bench, "tuned_times", tuned_times)
    report = run(build("llama"), keep_dense_tokens=(1, 4))
    assert (*DOWN, 1, torch.float32, "cpu") in asked and (*DOWN, 4) not in {
        call[:3] for call in bench.calls
    }
    row = report["model.layers.0.mlp.down_proj"]
    assert row.reason.endswith("slower at tokens 1, 4 (1005.0 us, dense 11.0 us)")


def test_a_tuned_table_tells_both_times_or_nothing(monkeypatch):
    chosen = configs.Choice("decode a", "", 3.5, 3.25)
    where = dict(dtype=torch.bfloat16, device="cuda:0")
    assert layer_bench.tuned_times(64, 32, 8, **(where | {"device": "cpu"})) is None
    monkeypatch.setattr(cuda_backend, "packs", lambda device, dtype: True)
    monkeypatch.setattr(cuda_backend, "choose", lambda *problem: chosen)
    assert layer_bench.tuned_times(64, 32, 8, **where) == (3.25, 3.5)
    chosen = configs.Choice("decode a", "", None, None)
    assert layer_bench.tuned_times(64, 32, 8, **where) is None


# ---- resume --------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_stored_times(monkeypatch, tmp_path):
    first, again, straight = build("llama"), build("llama"), build("llama")
    Bench(monkeypatch, [DOWN])
    done = run(first, resume=tmp_path)
    times = json.loads((tmp_path / "layer_times.json").read_text())
    assert times["32x64 float32"] == [2730.0, pytest.approx(2730.0 * 1.07)]
    other = Bench(monkeypatch, [UP])  # now the other layers would be the slow ones
    report = run(again, resume=tmp_path)
    assert other.calls == [] and report.resumed == 2
    assert_same_state(first, again)
    assert [row.reason for row in report.layers] == [row.reason for row in done.layers]
    run(straight)
    assert other.calls and straight.state_dict().keys() != first.state_dict().keys()


def test_interrupted_before_the_first_block_too(monkeypatch, tmp_path):
    Bench(monkeypatch, [DOWN])

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.oneshot.run.prune_group", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(build("llama"), resume=tmp_path)
    other = Bench(monkeypatch, [UP])
    report = run(build("llama"), resume=tmp_path)
    assert other.calls == [] and report["model.layers.0.mlp.down_proj"].skipped


def test_a_run_with_other_arguments_may_not_continue(monkeypatch, tmp_path):
    Bench(monkeypatch)
    run(build("llama"), resume=tmp_path)
    for options in ({"keep_dense": None}, {"keep_dense_tokens": (1,)}):
        with pytest.raises(ValueError, match="expected the run that .*keep_dense"):
            run(build("llama"), resume=tmp_path, **options)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(keep_dense="always"), "keep_dense None or \"if-slower\", got 'always'"),
        (dict(compress=False), "compress=True with keep_dense, got False"),
        (dict(keep_dense_tokens=()), r"positive ints, got \(\)"),
        (dict(keep_dense_tokens=(1, 0)), r"positive ints, got \(1, 0\)"),
        (dict(keep_dense_tokens=16), "keep_dense_tokens: a list, got 16"),
        (dict(keep_dense_tokens=(True,)), r"positive ints, got \(True,\)"),
    ],
)
def test_errors_come_before_anything_is_changed(options, text):
    model = plain()
    with pytest.raises((ValueError, TypeError), match=text):
        run(model, **options)
    assert_same_state(model, plain())


def test_a_wrong_sparse_result_stops_the_run(monkeypatch):
    right = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda layer, x: right(layer, x) + 0.1)
    model = plain()
    with pytest.raises(RuntimeError, match="a difference of 0.1"):
        run(model, keep_dense_tokens=(1,))
    monkeypatch.undo()
    assert_same_state(model, plain())


def test_equal_times_are_not_slower():
    layer = SimpleNamespace(shape=(8, 8), dtype="float32", reason=None)
    keep_dense.decide([layer], {"8x8 float32": [5.0, 5.0]}, (1,), "cpu")
    assert layer.reason is None


@pytest.mark.gpu
def test_on_a_gpu():
    model = build("llama", layers=1).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers so small may all be slower
        report = run(model, device="cuda", keep_dense_tokens=(1, 100))
    for row in report.layers:
        assert not row.skipped or row.name == "lm_head" or row.reason.startswith("kept dense: 2:4")
