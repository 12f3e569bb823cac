"""bench serve and vllm, as far as they run without a server."""

import math

import pytest

pytest.importorskip("transformers")
from bench import bench_serve, bench_vllm


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


def test_phases_of_a_log():
    log = """INFO Loading weights took 3.21 seconds
    INFO Model loading took 9.4 GiB memory and 5.5 seconds
    INFO torch.compile takes 20.10 s in total
    INFO Graph capturing finished in 7 secs, took 0.4 GiB
    INFO init engine (profile, create kv cache, warmup model) took 31.9 seconds"""
    found = bench_vllm.phases(log)
    assert found == {"weights": 3.21, "load": 5.5, "compile": 20.1, "capture": 7.0, "engine": 31.9}
    assert bench_vllm.phases("") == {}
