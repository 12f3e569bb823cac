"""A pruned model behind vLLM's HTTP server, against the same weights dense with zeros.

    python -m bench serve --gguf SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4.utf8 \\
        --folder /tmp/served

Prunes the model, saves it, exports the same weights dense, and serves one folder after the other
with `vllm serve`, as a user would: nothing is said about the format, the plugin is found by its
entry point. Each server gets the same requests at /v1/completions, greedy with log-probabilities.

Check: as far as the tokens agree, their log-probabilities lie within LOGPROB_DISTANCE of the dense
server's; where they part, the dense server's two best were that close. Served in --dtype float16:
vLLM rounds logits to the model's dtype, and bfloat16 has steps of 0.25 from 32 to 64, where those
of SmolLM2 are.

Where there are two GPUs each server has its own and they start together.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import sparsekern
from sparsekern.checkpoint.export import export_dense
from sparsekern.eval import texts
from sparsekern.integrations.loading import load_model

from . import record
from .options import Run, Watch, parser, told
from .vllm_child import SETTINGS

LOGPROB_DISTANCE = 0.15  # as in bench_vllm
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The three primary colours are",
)
NEW_TOKENS = 24
SERVERS: list[subprocess.Popen] = []  # that run


def make_parser():
    result = parser("serve", "A pruned model behind vLLM's server.", budget=300)
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--calibration", default="builtin", metavar="FILE|builtin")
    result.add_argument("--method", default="sparsegpt")
    result.add_argument("--samples", type=int, default=64)
    result.add_argument("--window", type=int, default=1024)
    result.add_argument("--folder", type=Path, required=True, help="where the models are written")
    result.add_argument("--memory", type=float, default=0.2, help="gpu-memory-utilization")
    result.add_argument("--dtype", default="float16", help="of vllm serve (default float16)")
    result.add_argument("--start-seconds", type=float, default=180.0)
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    if not (args.gguf or args.model):
        print("bench serve: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    run = Run(path, args)
    folders = {name: args.folder / name for name in ("sparse", "zeros")}
    answers, seconds = {}, {}
    case = f"{Path(args.gguf or args.model).name}, {args.method}, vllm serve"

    def rescue(why: str) -> None:
        for server in SERVERS:
            server.kill()
        known = {name: [a["text"] for a in given] for name, given in answers.items()}
        run.add(
            op="serve_stopped",
            backend="sparse",
            check=f"not compared: {why}",
            case=f"{case}, stopped",
            metrics={"seconds": round(run.elapsed, 1), "servers": len(known)},
            details={"why": why, "phases": dict(run.phases), "start_s": seconds, "answers": known},
        )
        for name in folders:
            log = args.folder / f"{name}.log"
            if name not in known and log.exists():
                run.say(f"{log}:\n{tail(log)}")

    with Watch(run, args.budget, rescue):
        with run.phase("prune and save"):
            prepare(args, run, folders)
        gpus = visible_gpus()
        with run.phase("serve"), ThreadPoolExecutor(min(2, len(gpus))) as pool:

            def ask(place: int, name: str) -> None:
                gpu = gpus[place % len(gpus)]
                answers[name], seconds[name] = serve(folders[name], args, run, gpu)
                run.say(f"{name}: {answers[name][0]['text']!r}")

            for done in [pool.submit(ask, *item) for item in enumerate(folders)]:
                done.result()
    worst, same = distance(answers["sparse"], answers["zeros"])
    if not worst <= LOGPROB_DISTANCE:
        raise RuntimeError(
            f"bench.serve: expected log-probabilities within {LOGPROB_DISTANCE} of the same "
            f"weights dense with zeros, got a distance of {worst:.3f}."
        )
    tokens = len(PROMPTS) * NEW_TOKENS
    run.add(
        op="serve",
        backend="sparse",
        check=f"logprobs within {worst:.3f} of dense with zeros",
        case=case,
        dtype=args.dtype,
        metrics={"same_tokens": same, "of_tokens": tokens, "logprob_distance": round(worst, 4)},
        details={
            "vllm": record._version("vllm"),
            "start_s": seconds,
            "phases": run.phases,
            "answers": {name: [a["text"] for a in given] for name, given in answers.items()},
        },
    )
    run.say(f"{same} of {tokens} tokens the same, log-probabilities within {worst:.4f}")
    run.close()
    return 0


def prepare(args, run: Run, folders: dict[str, Path]) -> None:
    """Writes the pruned folder and the dense one."""
    with run.phase("load"):
        model, tokenizer = load_model(args.gguf or args.model)
        model = model.to(run.device)
    windows = None
    if args.method != "magnitude":
        with run.phase("tokenize"):
            tokens = texts.tokenize(
                tokenizer, texts.join_rows(texts.read_rows(args.calibration, "train"))
            )
            windows = texts.calibration_windows(tokens, args.samples, args.window)
    with run.phase("prune"), told(run):
        report = sparsekern.prune_model(model, args.method, calibration=windows, progress=False)
    run.say(str(report).splitlines()[-1])
    with run.phase("save"):
        sparsekern.save_pretrained(model, folders["sparse"], tokenizer=tokenizer)
    with run.phase("export dense"):
        export_dense(folders["sparse"], folders["zeros"])


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one by one; "" alone without a GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())] or [""]


def serve(folder: Path, args, run: Run, gpu: str) -> tuple[list[dict], float]:
    """Starts a server over the folder on a GPU, asks it, and ends it: (answers, seconds until it
    was up)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    command += ["--gpu-memory-utilization", str(args.memory), "--served-model-name", "m"]
    command += ["--dtype", args.dtype]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = gpu
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [root, os.environ.get("PYTHONPATH", "")])
    )
    log = folder.parent / f"{folder.name}.log"
    begin = time.monotonic()
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=root)
    SERVERS.append(server)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if server.poll() is not None or time.monotonic() - begin > args.start_seconds:
                raise RuntimeError(f"bench.serve: expected a server, got:\n{tail(log)}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        up = round(time.monotonic() - begin, 1)
        run.say(f"{folder.name}: serves after {up} s")
        question = {
            "model": "m",
            "prompt": list(PROMPTS),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logprobs": 2,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["choices"], up
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        SERVERS.remove(server)


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def distance(ours: list[dict], theirs: list[dict]) -> tuple[float, int]:
    """(largest distance of log-probabilities, number of tokens that are the same) up to where the
    answers part; a parting counts with the distance of the dense server's two best."""
    worst, same = 0.0, 0
    for mine, other in zip(ours, theirs, strict=True):
        a, b = mine["logprobs"], other["logprobs"]
        for i, (token, wanted) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            if token != wanted:
                best = b["top_logprobs"][i]
                gap = b["token_logprobs"][i] - best.get(token, -float("inf"))
                worst = max(worst, gap)
                break
            worst = max(worst, abs(a["token_logprobs"][i] - b["token_logprobs"][i]))
            same += 1
    return worst, same
