"""bench.blocks on the CPU: a line of numbers, a record, and the same weights each time."""

import json

import pytest

from bench import blocks, record

pytest.importorskip("transformers")


def test_a_dry_run(tmp_path, capsys):
    given = "--preset tiny --layers 2 --samples 4 --window 16 --device cpu --refine 2".split()
    out = tmp_path / "records.jsonl"
    found = []
    for _ in range(2):
        assert blocks.main([*given, "--out", str(out)]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["checksum"] == found[1]["checksum"] > 0
    first = found[0]["blocks"]["block-00000"]
    assert {"hessian", "prune", "forward", "prune: solve", "prune: refine"} <= set(first)
    assert 0 < first["prune: solve"] <= first["prune"] + 0.001
    assert {"stem", "block-00000", "block-00001"} <= set(found[0]["stages"])
    entries = record.read(out)
    assert [e["op"] for e in entries] == ["prune_blocks"] * 2
    assert entries[0]["metrics"]["rest"] == entries[0]["details"]["stages"]["block-00001"]
