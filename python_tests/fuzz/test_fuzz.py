"""A fixed number of damaged files in every run; more by python -m python_tests.fuzz."""

import pytest

from python_tests.fuzz.targets import TARGETS, Outcome, run

CASES = {
    "header": 60,
    "index": 60,
    "shard": 40,
    "config": 15,
    "model": 15,
    "generation": 10,
    "gguf": 30,
    "stage": 8,
    "manifest": 12,
    "tuning": 40,
}


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_refused_or_found_by_the_checksum(tmp_path, target):
    if TARGETS[target].source not in ("plain", "sharded", "tuning", ""):
        pytest.importorskip("transformers")
    if target == "gguf":
        pytest.importorskip("gguf")
    outcome = Outcome()
    run(target, CASES.get(target, 20), 1, tmp_path, outcome)
    assert outcome.faults == []
    assert sum(outcome.counts.values()) == CASES.get(target, 20)
    if target in ("header", "index", "config", "gguf", "stage", "manifest"):
        assert outcome.counts[f"{target}: refused"] > 5


def test_a_child_that_dies_is_a_fault_and_the_next_case_goes_on(tmp_path, monkeypatch):
    """The harness itself, with a command that dies in case 1 and hangs in case 3."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for name, first, end in json.loads(sys.argv[1]):\n"
        "    for case in range(first, end):\n"
        "        print('case', name, case, flush=True)\n"
        "        if case == 1: os.abort()\n"
        "        if case == 3: time.sleep(60)\n"
        "        counts = {'counts': {name + ': same': 1}, 'faults': []}\n"
        "        print(json.dumps({**counts, 'slowest': 0, 'peak_kib': 0}), flush=True)\n"
    )
    import python_tests.fuzz.__main__ as harness

    real = harness.subprocess.Popen
    monkeypatch.setattr(
        harness.subprocess,
        "Popen",
        lambda command, **kw: real([command[0], str(script), command[-1]], **kw),
    )
    monkeypatch.setattr(harness, "STUCK", 3.0)
    outcome, work = Outcome(), [("header", 0, 6), ("index", 5, 6)]
    while work:
        work = harness._guarded(work, 0, outcome)
    assert [fault.split(":")[0] for fault in outcome.faults] == ["header 0 1", "header 0 3"]
    assert "nothing for 3 s" in outcome.faults[1] and "ended with -6" in outcome.faults[0]
    assert outcome.counts["header: same"] == 4 and outcome.counts["index: same"] == 1
