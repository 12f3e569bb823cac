"""The benchmark of recovery, whole, on a tiny GGUF on the CPU."""

import json

import pytest

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")
from bench import bench_finetune
from python_tests.integrations import gguf_cases as cases

WORDS = "the and then an hand 12 than these 34 a band stand other that is all there is to say "


@pytest.mark.parametrize("start", ["magnitude", "sparsegpt"])
def test_one_record_with_everything(start, tmp_path):
    model = tmp_path / "tiny.gguf"
    cases.write_gguf(model, cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    train, other, test = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "test.txt"
    train.write_text("\n".join(WORDS[i:] for i in range(60)))
    other.write_text("\n".join(WORDS[::-1][i:] for i in range(60)))
    test.write_text("\n".join(WORDS[::2] for _ in range(12)))
    out = tmp_path / "records.jsonl"
    options = ["--gguf", model, "--train", f"{train},{other}", "--held-out", other, "--tail", 400]
    options += ["--test", test, "--start", start, "--samples", 4, "--steps", 3, "--window", 32]
    options += ["--batch", 4, "--teacher-rows", 8, "--teacher-seconds", 1, "--eval-window", 64]
    options += ["--device", "cpu", "--out", out, "--baseline", "--work", tmp_path / "work"]
    options += ["--save", tmp_path / "saved"]
    assert bench_finetune.main(out, [str(option) for option in options]) == 0
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["check"].startswith("0 violations, 14 layers")
    metrics, details = record["metrics"], record["details"]
    for name in ("test.txt", "b.txt tail"):
        assert metrics[f"perplexity {name}"] > 1 and metrics[f"start {name}"] > 1
        assert details["overlap"][name]["found"] == 0
    assert record["settings"]["sampled_tokens"] >= 8 * 32
    assert metrics["dense_training_tokens_per_s"] > 0 and metrics["tokens"] == 3 * 4 * 32
    assert (tmp_path / "saved" / "config.json").exists()
