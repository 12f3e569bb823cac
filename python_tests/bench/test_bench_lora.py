"""The benchmark of LoRA, whole, on a tiny GGUF on the CPU."""

import json

import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("peft", reason="needs peft, which is no dependency")
from bench import bench_lora, recovery_table, table
from python_tests.integrations import gguf_cases as cases

WORDS = "the and then an hand 12 than these 34 a band stand other that is all there is to say "


@pytest.fixture
def options(tmp_path):
    model = tmp_path / "tiny.gguf"
    cases.write_gguf(model, cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    train, test = tmp_path / "a.txt", tmp_path / "test.txt"
    train.write_text("\n".join(WORDS[i:] for i in range(60)))
    test.write_text("\n".join(WORDS[::-2] for _ in range(12)))
    found = ["--gguf", model, "--train", train, "--held-out", train, "--tail", 400, "--test", test]
    found += ["--samples", 4, "--window", 32, "--batch", 4, "--micro-batch", 2, "--rank", 4]
    found += ["--eval-window", 64, "--eval-windows", 2, "--start", "magnitude"]
    return [*found, "--device", "cpu", "--out", tmp_path / "records.jsonl"]


def measure(options, *more):
    code = bench_lora.main(options[-1], [str(option) for option in (*options, *more)])
    file = options[-1]
    lines = file.read_text().splitlines() if file.exists() else []
    return code, [json.loads(line) for line in lines]


def test_one_record_of_three_arms(options):
    code, (record,) = measure(options, "--steps", 4, "--lr", "1e-2")
    assert code == 0 and record["op"] == "lora" and record["backend"] == "magnitude"
    assert record["check"] == "14 layers, same start in all arms, 2:4 verified after merging"
    metrics, details = record["metrics"], record["details"]
    assert metrics["steps"] == 4 and metrics["tokens"] == 4 * 4 * 32
    for test in ("test.txt", "a.txt tail"):
        # float32 on the CPU: the arms differ by the order of sums alone
        assert metrics[f"ratio {test}"] == pytest.approx(1, abs=1e-3)
        assert metrics[f"lora dense {test}"] != metrics[f"start {test}"]
        assert metrics[f"merged masked {test}"] == pytest.approx(
            metrics[f"lora masked {test}"], rel=1e-3
        )
        assert metrics[f"merged sparse {test}"] != metrics[f"lora sparse {test}"]
        assert metrics[f"dense {test}"] > 1
        assert details["overlap"][test]["found"] == 0
    losses = details["losses"]
    assert all(len(losses[arm]) == 4 for arm in ("sparse", "dense", "masked"))
    assert losses["sparse"][0] == pytest.approx(losses["masked"][0], rel=1e-5)  # B is zero
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-3)
    assert losses["sparse"][1:] != losses["masked"][1:]
    assert metrics["merge_logits exact masked"] < 1e-3 < metrics["merge_logits exact sparse"]
    assert metrics["merge_logits exact dense"] < 1e-3
    assert metrics["merge_lost masked"] == 0 < metrics["merge_lost sparse"] < 1
    assert metrics["weight_bytes sparse"] < metrics["weight_bytes dense"]
    assert all(metrics[f"ms_per_step {arm}"] > 0 for arm in losses)
    ((case, (header, lines)),) = recovery_table.lora_rows([record]).items()
    assert case.endswith("rank 4, the first 2 windows") and len(header) == len(lines[0])
    assert [line[0] for line in lines] == [
        "dense model", "magnitude", "LoRA on the 2:4 model", "the same, merged",
        "LoRA on the same weights, dense with zeros", "LoRA under the mask", "the same, merged",
    ]  # fmt: skip
    assert lines[2][1] == f"{metrics['lora sparse test.txt']:.2f}"
    shown = table.render([{**record, "dirty": False}])
    assert "LoRA on a compressed model" in shown and "| the same, merged |" in shown


def test_arms_are_two_or_three_and_time_leaves_the_third_out(options):
    for bad in ("sparse", "dense,sparse", "sparse,dense,other"):
        with pytest.raises(SystemExit):
            measure(options, "--arms", bad)
    code, (record,) = measure(
        options, "--steps", 50, "--seconds", 1e-9, "--budget", 0, "--alpha", 1
    )
    assert code == 0 and record["check"].endswith("not run: masked")
    assert record["metrics"]["steps"] == bench_lora.WARM  # then the clock is read
    losses = record["details"]["losses"]
    assert len(losses["dense"]) == bench_lora.WARM and record["settings"]["alpha"] == 1
    assert losses["dense"][0] > 2  # cross-entropy of a random model, without a teacher


def test_a_base_of_bfloat16_under_autocast(options, monkeypatch):
    """The dtypes of a run on a GPU."""
    init = bench_lora.Adaptation.__init__

    def as_on_a_gpu(self, run, args):
        init(self, run, args)
        self.bf16 = torch.bfloat16

    monkeypatch.setattr(bench_lora.Adaptation, "__init__", as_on_a_gpu)
    code, (record,) = measure(options, "--steps", 2, "--lr", "1e-2")
    metrics = record["metrics"]
    assert code == 0 and record["dtype"] == "bfloat16"
    assert metrics["ratio test.txt"] == pytest.approx(1, abs=0.05)
    for arm in ("dense", "masked"):  # what rounding the sum to bfloat16 costs, and that alone
        exact, stored = (metrics[f"merge_logits {what} {arm}"] for what in ("exact", "stored"))
        assert exact < 1e-4 < stored < 0.1


def test_a_merge_that_changes_logits_is_a_failure(options, monkeypatch):
    monkeypatch.setattr(bench_lora, "EXACT", -1.0)
    assert measure(options, "--steps", 1) == (1, [])


def test_adapters_that_begin_apart_are_refused(options, monkeypatch):
    real, seeds = bench_lora.torch.manual_seed, iter(range(100))
    monkeypatch.setattr(bench_lora.torch, "manual_seed", lambda seed: real(next(seeds)))
    with pytest.raises(RuntimeError, match="adapters begin with other numbers"):
        measure(options, "--steps", 1)


def test_a_run_that_is_ended_in_the_third_arm_has_the_first_two(options, monkeypatch):
    right = bench_lora.Adaptation.one

    def one(self, name, student):
        if name == "dense":
            self.rescue("too early")  # nothing to compare yet
        if name == "masked":
            self.rescue("SIGTERM")
            self.rescue("the limit is reached")
            raise KeyboardInterrupt
        return right(self, name, student)

    monkeypatch.setattr(bench_lora.Adaptation, "one", one)
    with pytest.raises(KeyboardInterrupt):
        measure(options, "--steps", 2)
    (record,) = map(json.loads, options[-1].read_text().splitlines())
    assert record["check"].endswith("verified after merging; not run: masked")
    assert record["metrics"]["ratio test.txt"] == pytest.approx(1, abs=1e-2)
