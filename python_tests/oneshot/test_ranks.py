"""prune_model over ranks of torch.distributed: the weights of one process, bit for bit; an error on
one rank ends all of them."""

import gc
import math
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch

from sparsekern.oneshot.ranks import _packed, _unpacked, assigned, divided

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)
TWO = (
    "sparsegpt published padding permuted together together-masked magnitude levels whole rotated "
    "experts failure resumed other-data other-weights reconstruct trained trained-levels "
    "trained-padding absent"
).split()
EQUAL = TWO[:11]


def run(folder, groups, **environment):
    """{case: what each rank wrote}; groups of (ranks, cases)."""
    command = [sys.executable, "-m", "python_tests.oneshot.ranks_child", str(folder)]
    command += [f"{world}:{','.join(cases)}" for world, cases in groups]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        case: [torch.load(folder / f"{case}-{r}.pt", weights_only=False) for r in range(world)]
        for world, cases in groups
        for case in cases
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    return run(folder, [(2, TWO), (2, ["killed"]), (2, ["command"]), (4, ["many"])])


def assert_equal(results):
    for result in results:
        got, expected = result["got"], result.get("expected", results[0]["expected"])
        assert got.keys() == expected.keys() and got
        for name, tensor in got.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), (
                name
            )


@pytest.mark.parametrize("case", EQUAL)
def test_two_ranks_give_the_weights_of_one_process(case, two):
    """All methods, with padding, experts, levels, a rotation, a permutation, a model that is no
    chain."""
    assert_equal(two[case])
    alone = two[case][0]["expected_rows"]
    assert any(row[2] for row in alone)
    for result in two[case]:
        assert result["rows"] == alone


@pytest.mark.parametrize("case", ["trained", "trained-levels", "trained-padding"])
def test_a_fit_over_ranks_is_that_of_one_process_up_to_rounding(case, two):
    """The same bits on both ranks, and the same errors."""
    first, second = two[case]
    assert_equal([{**second, "expected": first["got"]}])
    for name, tensor in first["got"].items():
        expected = first["expected"][name]
        assert float((tensor - expected).norm()) <= 0.02 * float(expected.norm()), name
    assert first["rows"] == second["rows"]
    for got, expected in zip(first["rows"], first["expected_rows"]):
        assert got[0] == expected[0] and got[2:] == expected[2:]
        assert (got[1] or 0) == pytest.approx(expected[1] or 0, rel=1e-2)
    assert first["fits"] and first["fits"] == second["fits"]
    for got, expected in zip(first["fits"], first["expected_fits"], strict=True):
        assert got == pytest.approx(expected, rel=1e-2)
    assert any(after < before for before, after in first["fits"])


@pytest.mark.parametrize("case", ["together", "together-masked", "trained-padding"])
def test_ranks_solve_every_group_of_a_block_together(case, two):
    """The three cases in which they do: four groups in each of two blocks, and a head."""
    for result in two[case]:
        assert result["shared"][:2] == [4, 4] and all(result["shared"])


def test_more_ranks_than_batches(two):
    """Four ranks, three batches."""
    assert_equal(two["many"])


def test_an_error_on_one_rank_ends_all_and_changes_nothing(two):
    first, second = two["failure"]
    assert "RankError" in first["error"]
    assert "rank 1 failed: RuntimeError: no luck" in first["error"]
    assert "RuntimeError: no luck" in second["error"] and "rank 1 of 2" in second["error"]
    assert_equal(two["failure"])


def test_a_run_of_two_ranks_goes_on(two):
    """Block 0 was stored, in rank 0's folder; the rest comes on the same data only."""
    assert_equal(two["resumed"])
    first, second = two["resumed"]
    assert first["resumed"] == second["resumed"] == 1
    assert (
        "block-00000.safetensors" in first["files"] and "block-00001.safetensors" in first["files"]
    )
    assert "calibration" in first["refused"] and "rank 0 failed" in second["refused"]


@pytest.mark.parametrize(
    "case, text",
    [
        ("other-data", "the same call on every rank, got other on rank 1"),
        ("other-weights", "the same weights in block-00000 on every rank, got other on rank 1"),
        ("reconstruct", "reconstruct on several ranks, which takes one step"),
    ],
)
def test_what_ranks_cannot_do_together_is_refused_on_each(case, text, two):
    for result in two[case]:
        assert re.search(text, result["error"])


def test_a_rank_that_is_not_there_is_not_waited_for_for_ever(two):
    """After SPARSEKERN_RANK_TIMEOUT seconds, with the remedy."""
    text = two["absent"][0]["error"]
    assert "expected all 2 ranks at step 0" in text and "SPARSEKERN_RANK_TIMEOUT=SECONDS" in text


def test_a_rank_that_is_killed_ends_the_other(two):
    assert "expected all 2 ranks at step" in two["killed"][0]["error"]


def test_the_command_line_under_torchrun(two, folder):
    """Two ranks with --stream write what one process does without, byte for byte."""
    assert [result["error"] for result in two["command"]] == [[0, 0], [0]]
    assert not any(result["initialised"] for result in two["command"])
    names = {path.name for path in (folder / "one").iterdir()}
    assert names == {path.name for path in (folder / "two").iterdir()} and "SHA256SUMS" in names
    for name in names - {"prune_report.json"}:
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name


def test_parts_of_a_work():
    assert assigned([1, 5, 1, 2, 1], 2) == [1, 0, 1, 1, 1]
    assert assigned([3.0, 3.0, 3.0], 4) == [0, 1, 2]
    assert assigned([], 2) == []


def test_large_parts_are_divided_until_no_rank_has_much_more_than_the_others():
    assert divided([1, 1, 4, 14], 2, 0) == [0, 1, None, None]
    assert divided([1, 1, 4, 14], 2, 5) == [1, 1, 0, None]
    assert divided([1, 1, 4, 14], 2, math.inf) == [1, 1, 1, 0]
    assert divided([2, 2, 2, 2], 4, 0) == [0, 1, 2, 3]
    assert divided([1], 4, 0) == [None] and divided([], 2, 0) == []


def test_what_was_packed_is_held_by_nobody():
    """Without a garbage collector, which comes late."""
    tensors, gathered = [torch.ones(3), torch.zeros(2)], []
    seen = [weakref.ref(tensor) for tensor in tensors]
    gc.collect()
    gc.disable()
    try:
        (text,) = _packed({"a": tensors, "b": tensors[0]}, gathered)
        found = _unpacked(text, gathered)
        assert len(gathered) == 2 and found["b"] is tensors[0] and found["a"][1] is tensors[1]
        del tensors, gathered, found
        assert [reference() for reference in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.gpu
def test_two_gpus_give_the_weights_of_one(tmp_path):
    """NCCL; both kinds of groups on their GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cases = ["sparsegpt", "padding", "magnitude", "levels", "rotated", "permuted", "experts"]
    cases += ["together", "together-masked"]
    found = run(tmp_path, [(2, [*cases, "trained"])], RANKS_ON_GPU="1")
    first, second = found.pop("trained")
    assert_equal([{**second, "expected": first["got"]}])
    for got, expected in zip(first["fits"], first["expected_fits"], strict=True):
        assert got == pytest.approx(expected, rel=0.05)
    for results in found.values():
        assert_equal(results)
