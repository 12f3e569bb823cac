"""The benchmarks of whole models as dry runs on the CPU: pruning a tiny GGUF, decoding a tiny
Llama."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")

from bench import bench_decode_model, bench_generate, bench_prune, decode_model  # noqa: E402
from sparsekern import SparseLinear  # noqa: E402


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    pytest.importorskip("gguf")
    from python_tests.integrations import gguf_cases

    model = gguf_cases.tiny_llama()
    gguf_cases.write_gguf(
        tmp_path / "tiny.gguf", gguf_cases.gguf_tensors(model), gguf_cases.metadata()
    )
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the and {i} an the 12" for i in range(60)))
    return [
        "--gguf",
        str(tmp_path / "tiny.gguf"),
        "--calibration",
        str(text),
        "--eval",
        str(text),
        "--samples",
        "4",
        "--window",
        "32",
        "--device",
        "cpu",
    ]


def test_dry_run_of_prune(tmp_path, files, monkeypatch):
    path = tmp_path / "r.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert bench_prune.main(path, files) == 0
    *pruned, saved = lines_of(path)
    assert [e["backend"] for e in pruned] == list(bench_prune.METHODS)
    assert all(e["metrics"]["perplexity"] > 1 for e in pruned)
    assert "seconds" not in pruned[0]["metrics"]
    errors = [e["metrics"]["mean_error"] for e in pruned[2:]]
    assert 0 < errors[1] < errors[0] < 1  # SparseGPT repairs what Wanda leaves
    assert pruned[3]["settings"]["samples"] == 4 and pruned[3]["details"]["phases"]
    assert saved["op"] == "checkpoint" and saved["check"] == "exact"
    assert saved["metrics"]["of_dense_bf16"] == pytest.approx(0.5625, abs=0.005)


def test_prune_through_dense_weights_gives_the_same_perplexity(tmp_path, files, monkeypatch):
    path = tmp_path / "r.jsonl"
    monkeypatch.setattr(bench_prune.Problem, "check_reload", lambda self, method: 0)
    for weights in ("sparse", "dense"):
        arguments = [*files, "--methods", "wanda", "--eval-weights", weights]
        assert bench_prune.main(path, arguments) == 0
    first, second = (entry["metrics"]["perplexity"] for entry in lines_of(path))
    assert first == pytest.approx(second, rel=1e-4)


def test_prune_fails_when_the_loaded_model_differs(tmp_path, files, monkeypatch):
    monkeypatch.setattr(
        bench_prune, "logits_in_new_process", lambda _, file, __: torch.save(torch.zeros(1), file)
    )
    path = tmp_path / "r.jsonl"
    assert bench_prune.main(path, [*files, "--methods", "magnitude"]) == 1
    assert [entry["op"] for entry in lines_of(path)] == ["prune_model"]


def test_prune_needs_a_model(tmp_path, capsys):
    assert bench_prune.main(tmp_path / "r.jsonl", ["--device", "cpu"]) == 0
    assert "give --gguf FILE or --model DIR" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"got \['thin'\]"):
        bench_prune.main(tmp_path / "r.jsonl", ["--model", "x", "--methods", "dense,thin"])


def tiny(sparse):
    return decode_model.build("tiny", 2, torch.bfloat16, torch.device("cpu"), sparse)


def test_dry_run_of_decode_model(tmp_path):
    path = tmp_path / "r.jsonl"
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--preset",
        "tiny",
        "--layers",
        "2",
        "--batch",
        "1",
        "--context",
        "8",
    ]
    assert bench_decode_model.main(path, arguments) == 0
    found = {entry["backend"]: entry for entry in lines_of(path)}
    assert {"dense", "sparse"} <= set(found) <= {"dense", "sparse", "sparse gated"}
    assert found["dense"]["metrics"]["speedup"] == 1.0
    assert found["sparse"]["metrics"]["tokens_s"] > 0
    assert found["sparse"]["case"] == "tiny, 2 layers, batch 1, context 8"


def test_dry_run_of_generate(tmp_path):
    path = tmp_path / "r.jsonl"
    arguments = "--device cpu --quick --preset tiny --layers 2 --batch 1,2 --context 8"
    arguments = [*arguments.split(), "--no-compile", "--dtype", "float32"]
    assert bench_generate.main(path, arguments) == 0
    found = {(entry["backend"], entry["case"]): entry for entry in lines_of(path)}
    assert len(found) == 6
    entry = found["optimized", "tiny, 2 layers, batch 2, context 8"]
    assert entry["metrics"]["tokens_s"] > 0 and entry["details"]["logits_distance"] < 1e-5
    assert entry["details"]["pdl"] is False


def test_decode_model_refuses_wrong_logits(tmp_path, monkeypatch):
    forward = SparseLinear.forward

    def wrong(self, x):
        return forward(self, x) * (1.5 if self.in_features == 128 else 1)  # down_proj alone

    monkeypatch.setattr(SparseLinear, "forward", wrong)
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--preset",
        "tiny",
        "--layers",
        "2",
        "--batch",
        "1",
        "--context",
        "8",
    ]
    with pytest.raises(RuntimeError, match="logits of sparse within 0.08 of the reference"):
        bench_decode_model.main(tmp_path / "r.jsonl", arguments)


def test_the_decode_step_is_that_of_transformers():
    """Against LlamaForCausalLM as it comes, fed the same sequence without a cache."""
    import transformers

    model = tiny(sparse=False).float()
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "attn_implementation": "eager"})
    config._attn_implementation = "eager"
    plain = transformers.LlamaForCausalLM(config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(6).unsqueeze(0) * 7
    with torch.inference_mode():
        step = decode_model.Step(model, batch=1, context=6)
        prefix = transformers.DynamicCache(config=config)
        plain(ids[:, :-1], past_key_values=prefix, use_cache=True)
        for layer in range(2):
            step.cache.keys[layer][:, :, :-1] = prefix.layers[layer].keys
            step.cache.values[layer][:, :, :-1] = prefix.layers[layer].values
        step.ids = ids[:, -1:]
        wanted = plain(ids).logits[:, -1]
        with decode_model.fused_pointwise(False) as product:
            decode_model.set_mlp(model, product, None)
            torch.testing.assert_close(step(), wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(step(), wanted, rtol=1e-4, atol=1e-4)  # it can be repeated


def test_a_sparse_model_keeps_no_dense_linear():
    model = tiny(sparse=True)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "proj" in name}
    assert len(kinds) == 14 and set(kinds.values()) == {"SparseLinear"}
    assert type(model.lm_head) is torch.nn.Linear


def test_fused_pointwise_puts_back_what_it_changed():
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    with decode_model.fused_pointwise(True):
        assert modeling_llama.apply_rotary_pos_emb is not original
    assert modeling_llama.apply_rotary_pos_emb is original
