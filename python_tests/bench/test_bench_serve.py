"""bench serve and vllm, as far as they run without a server."""

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from bench import bench_serve, bench_vllm, pdl
from sparsekern.integrations import inductor_pdl


def answer(tokens, logprobs, second=None):
    best = [{t: p} for t, p in zip(tokens, logprobs, strict=True)]
    if second:
        best[second[0]][second[1]] = second[2]
    return {"logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": best}}


def test_distance_of_answers():
    same = [answer(["a", "b"], [-1.0, -2.0])]
    assert bench_serve.distance(same, [answer(["a", "b"], [-1.1, -2.0])]) == (pytest.approx(0.1), 2)
    # They part where the dense server's two best were close: only that gap counts.
    other = answer(["a", "c", "d"], [-1.0, -2.0, -9.0], (1, "b", -2.05))
    mine = answer(["a", "b", "x"], [-1.0, -2.0, -1.0])
    assert bench_serve.distance([mine], [other]) == (pytest.approx(0.05), 1)
    lost = answer(["a", "c"], [-1.0, -2.0])
    worst, same = bench_serve.distance([answer(["a", "b"], [-1.0, -1.0])], [lost])
    assert math.isinf(worst) and same == 1


def test_each_server_has_its_own_gpu_where_there_are_two(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert bench_serve.visible_gpus() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bench_serve.visible_gpus() == ["0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert bench_serve.visible_gpus() == [""]


def test_phases_of_a_log():
    log = """INFO Loading weights took 3.21 seconds
    INFO Model loading took 9.4 GiB memory and 5.5 seconds
    INFO torch.compile takes 20.10 s in total
    INFO Graph capturing finished in 7 secs, took 0.4 GiB
    INFO init engine (profile, create kv cache, warmup model) took 31.9 seconds"""
    found = bench_vllm.phases(log)
    assert found == {"weights": 3.21, "load": 5.5, "compile": 20.1, "capture": 7.0, "engine": 31.9}
    assert bench_vllm.phases("") == {}


# ---- bench vllm, with processes that only say what an engine would -------------------------------


class Children:
    """In place of subprocess.run: notes what each was started with, and answers like one."""

    def __init__(self, fails=(), distance=0.0):
        self.started, self.fails, self.distance = [], fails, distance
        self.gpus = []

    def __call__(self, command, env, **_):
        job = json.loads(command[-1])
        name = job["folder"] if job["quantization"] is None else "fp8"
        self.started.append((name, env.get(inductor_pdl.VARIABLE)))
        self.gpus.append(job["tensor_parallel"])
        if name in self.fails:
            return subprocess.CompletedProcess(command, 1, "", "it fell over")
        rate = 50.0 * len(self.started)
        answer = {"tokens": [1, 2], "logprobs": [-1.0, -2.0 + self.distance * (name == "zeros")]}
        result = {
            "start_s": 1.0,
            "weights_gb": 2.0,
            "peak_gb": 3.0,
            "pdl": env.get(inductor_pdl.VARIABLE) == "1",
            "decode": {str(batch): rate for batch in job["batches"]},
            "prefill_tokens_s": rate,
            "answers": [answer],
        }
        return subprocess.CompletedProcess(command, 0, "RESULT " + json.dumps(result) + "\n", "")


@pytest.fixture
def vllm_bench(tmp_path, monkeypatch):
    """(a call of the benchmark with options, its children, the lines that it has written)"""
    monkeypatch.setenv(inductor_pdl.VARIABLE, "1")
    monkeypatch.setattr(
        bench_vllm, "write_models", lambda preset, layers, folder, kinds, run: {k: k for k in kinds}
    )
    path, children = tmp_path / "r.jsonl", Children()
    monkeypatch.setattr(bench_vllm, "subprocess", SimpleNamespace(run=children))

    def call(*options):
        arguments = ["--device", "cpu", "--folder", str(tmp_path), "--batch", "1", *options]
        return bench_vllm.main(path, arguments)

    def lines():
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return call, children, lines


def test_the_rows_of_engines_that_ended_stay_when_one_fails(vllm_bench):
    call, children, lines = vllm_bench
    children.fails = ("sparse-fp8",)
    with pytest.raises(RuntimeError, match="it fell over"):
        call("--engines", "fp8,sparse-fp8,dense")
    assert [name for name, _ in children.started] == ["dense", "fp8", "sparse-fp8"]
    assert [entry["backend"] for entry in lines()] == ["dense"] * 2 + ["fp8"] * 2
    assert lines()[2]["metrics"] == {"tokens_s": 100.0, "speedup": 2.0}


def test_the_answers_are_compared_before_the_rows_are_written(vllm_bench):
    call, children, lines = vllm_bench
    assert call("--engines", "sparse,dense", "--same-answers") == 0
    assert [name for name, _ in children.started] == ["dense", "zeros", "sparse"]
    checks = {entry["backend"]: entry["check"] for entry in lines()}
    assert checks == {"dense": "ran", "sparse": "logprobs within 0.000 of dense with zeros"}
    children.distance = 1.0
    with pytest.raises(RuntimeError, match="distance of 1.000"):
        call("--engines", "sparse", "--same-answers")
    assert len(lines()) == 4


def test_on_several_gpus_an_engine_answers_like_one(vllm_bench):
    call, children, lines = vllm_bench
    options = ("--engines", "sparse,dense", "--tensor-parallel", "2")
    assert call(*options, "--engine-args", '{"seed": 3}') == 0
    assert [name for name, _ in children.started] == ["dense", "sparse", "sparse"]
    assert children.gpus == [2, 1, 2]
    entry = lines()[-1]
    assert entry["check"] == "logprobs within 0.000 of the same on one GPU"
    assert entry["case"].endswith(" layers, 2 GPUs, prefill 8 x 2048")
    assert entry["details"]["engine_args"] == {"seed": 3}


@pytest.mark.parametrize("option, ours", [((), "1"), (("--no-pdl",), "0"), (("--pdl",), "1")])
def test_early_starts_are_chosen_for_our_engines_alone(vllm_bench, option, ours):
    call, children, lines = vllm_bench
    assert call("--engines", "dense,sparse-fp8,fp8", *option) == 0
    assert dict(children.started) == {"dense": None, "sparse-fp8": ours, "fp8": None}
    recorded = {entry["backend"]: entry["details"]["pdl"] for entry in lines()}
    assert recorded == {"dense": False, "sparse-fp8": ours == "1", "fp8": False}


def test_an_engine_is_not_started_without_time_for_it(vllm_bench, capsys):
    call, children, lines = vllm_bench
    assert call("--engines", "dense,sparse", "--budget", "-1") == 0
    assert not children.started and not lines()
    assert "no time for sparse" in capsys.readouterr().out


def test_inductors_option_in_this_process(monkeypatch):
    cpu = torch.device("cpu")
    assert not pdl.is_on(cpu, {inductor_pdl.PDL: True})
    if not inductor_pdl.known():
        pdl.choose(False)
        with pytest.raises(RuntimeError, match="enable_pdl"):
            pdl.choose(True)
        return
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(TritonKernel, "_filter_pdl", TritonKernel._filter_pdl)
    config = torch._inductor.config
    with config.patch({inductor_pdl.PDL: False}):
        pdl.choose(None)
        assert not config.triton.enable_pdl
        pdl.choose(True)
        assert config.triton.enable_pdl and TritonKernel._filter_pdl.at_once
        pdl.choose(False)
        assert not config.triton.enable_pdl


@pytest.mark.parametrize("capability, on", [((9, 0), True), ((8, 0), False)])
def test_what_a_record_says_of_early_starts(monkeypatch, capability, on):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    cuda = torch.device("cuda")
    assert pdl.is_on(cuda, {inductor_pdl.PDL: True}) == on
    assert not pdl.is_on(cuda, {inductor_pdl.PDL: False})
