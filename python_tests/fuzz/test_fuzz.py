"""A fixed number of damaged checkpoints in every run; more by python -m python_tests.fuzz."""

import pytest

from python_tests.fuzz.targets import TARGETS, Outcome, run

CASES = {"header": 60, "index": 60, "shard": 40, "config": 15, "model": 15, "generation": 10}


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_refused_or_found_by_the_checksum(tmp_path, target):
    if target in ("config", "model", "generation"):
        pytest.importorskip("transformers")
    outcome = Outcome()
    run(target, CASES.get(target, 20), 1, tmp_path, outcome)
    assert outcome.faults == []
    assert sum(outcome.counts.values()) == CASES.get(target, 20)
    if target in ("header", "index", "config"):
        assert outcome.counts[f"{target}: refused"] > 5
