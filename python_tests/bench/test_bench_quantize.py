"""The benchmark of quantisers, whole, on a tiny GGUF on the CPU."""

import json

import pytest

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")
from bench import bench_quantize, table
from python_tests.integrations import gguf_cases as cases

WORDS = "the and then an hand 12 than these 34 a band stand other that is all there is to say "


def test_a_record_for_every_row(tmp_path):
    model = tmp_path / "tiny.gguf"
    cases.write_gguf(model, cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    train, test = tmp_path / "a.txt", tmp_path / "test.txt"
    train.write_text("\n".join(WORDS[i:] for i in range(60)))
    test.write_text("\n".join(WORDS[::2] for _ in range(12)))
    out = tmp_path / "records.jsonl"
    options = ["--gguf", model, "--calibration", train, "--eval", test, "--samples", 4]
    options += ["--window", 32, "--device", "cpu", "--out", out, "--budget", 3600]
    assert bench_quantize.main(out, [str(option) for option in options]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["backend"] for record in records] == list(bench_quantize.CASES)
    found = {record["backend"]: record["metrics"] for record in records}
    assert all(metrics["perplexity"] > 1 for metrics in found.values())
    assert found["2:4"]["of_16_bit_2:4"] == 1
    for kind in ("fp8", "int8", "int4 g128"):
        rtn, gptq = (found[f"2:4, {kind} {method}"] for method in ("rtn", "gptq"))
        assert gptq["added_error"] < rtn["added_error"]
        assert rtn["bits_per_weight"] == gptq["bits_per_weight"]
    for kind in ("fp8", "int8"):  # the same weights, other inputs
        alone, both = (found[f"2:4, {kind} gptq{x}"] for x in ("", f", x of {kind}"))
        assert alone["added_error"] == both["added_error"]
        assert alone["perplexity"] != both["perplexity"]
    assert found["2:4, int8 rtn"]["added_error"] < found["2:4, int4 g128 rtn"]["added_error"]
    for preset in ("blocks", "best"):
        assert found[preset]["of_16_bit_2:4"] == 1
        for kind in ("int4 g128", "fp8"):
            assert found[f"{preset}, {kind} trained"]["fit_seconds"] > 0
            assert "of_16_bit_2:4" in found[f"{preset}, {kind} trained"]
    lines = table.metrics_table(records).splitlines()
    assert len(lines) == 2 + len(records)
    with pytest.raises(ValueError, match="expected rows in"):
        bench_quantize.main(out, ["--gguf", "x", "--cases", "fp3"])
