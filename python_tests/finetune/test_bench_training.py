"""The benchmark of a training step, whole, on the CPU: its checks run, its numbers mean nothing."""

import json

from bench import bench_training


def test_a_record_for_each_way(tmp_path):
    out = tmp_path / "records.jsonl"
    options = ["--device", "cpu", "--hidden", 16, "--inner", 32, "--tokens", 8, "--rounds", 2]
    assert bench_training.main(out, [str(option) for option in (*options, "--out", out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    ways = [(record["op"], record["backend"]) for record in records]
    assert ways == [
        *(("training_step", name) for name in ("dense", "masked", "sparse")),
        *(("lora_step", name) for name in ("dense", "sparse")),
    ]
    for record in records[:3]:
        metrics = record["metrics"]
        assert all(metrics[f"{part}_ms"] >= 0 for part in bench_training.PARTS)
        assert metrics["step_ms"] > 0 and metrics["speedup"] > 0
    assert records[0]["metrics"]["speedup"] == 1
    assert "forward" in str(records[2]["details"]["choices"]["gate"])
    assert records[4]["metrics"]["weight_ratio"] < 1
