"""Tokens per second of a model in a real vLLM: 2:4 through the plugin, in bfloat16 and in fp8,
against dense bfloat16 and vLLM's own fp8.

    python -m bench vllm --preset 8b --layers 32 --folder /tmp/models

Writes an 8B-shaped Llama of random weights to the folder, dense and 2:4 (magnitude; "sparse-fp8":
its kept weights rounded to e4m3, "sparse-int8"), unless they are there, then starts one engine
after the other, each in a process of its own (vllm_child.py) with vLLM's own compilation and CUDA
graphs. The fp8 engine is vLLM's own dynamic fp8 over the dense folder. lm_head and embeddings are
dense everywhere.

The dense engine runs first. The rows of an engine are written when it ends, so a run that is cut
short keeps those that it has; one that the budget has no time for is not started. --no-pdl turns
off the early starts that the plugin asks for (docs/engines.md); engines without our kernels run as
they come, and each record says what its engine had.

Decode: tokens per second over the difference of two lengths, median of the repeats. Prefill:
prompts of 2048 tokens, one token each. Check, in the rows of "sparse": it answers, greedy, with the
tokens of an engine over the same weights dense with zeros, and with their log-probabilities within
a bound.

--tensor-parallel N runs every engine on N GPUs, and before each 2:4 one the same folder on one GPU,
which it has to answer like, within the same bound. Where peer access is missing:
--engine-args '{"disable_custom_all_reduce": true}'.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from . import pdl, record
from .options import Run, parser

PRESETS = {"8b": (4096, 14336, 32, 8, 128256), "tiny": (64, 128, 4, 2, 256)}
LOGPROB_DISTANCE = 0.15  # of one token's log-probability; bf16 sums in another order give 0.05
NEW_TOKENS, PROMPT = 192, 32


def make_parser():
    result = parser("vllm", "Tokens per second in a real vLLM.", budget=540)
    result.add_argument("--preset", default="8b", choices=sorted(PRESETS))
    result.add_argument("--layers", type=int, default=32)
    result.add_argument("--batch", default="1,8,32,128", help="comma-separated")
    result.add_argument("--folder", type=Path, required=True, help="where the models are written")
    result.add_argument("--engines", default="dense,sparse,sparse-fp8,fp8", help="comma-separated")
    result.add_argument("--repeats", type=int, default=3)
    pdl.add_option(result, "on in 2:4 engines, where the plugin asks for it")
    result.add_argument(
        "--same-answers",
        action="store_true",
        help="one more engine, over the 2:4 weights stored dense with zeros, for the check",
    )
    result.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs")
    result.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="more, for vLLM's LLM"
    )
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    wanted = plan(args.engines.split(","), args.same_answers, args.tensor_parallel)
    kinds = sorted({folder_of(name) for name in wanted})
    folders = write_models(args.preset, args.layers, args.folder, kinds, run)
    results: dict[str, dict] = {}
    needed = 0.0  # seconds of the longest engine so far
    for name in wanted:
        if run.left < needed:
            run.say(f"no time for {name}: {run.left:.0f} s left, {needed:.0f} s needed")
            continue
        begin = run.elapsed
        with run.phase(name):
            results[name] = engine(name, folders, args, run)
        needed = max(needed, run.elapsed - begin)
        if not is_reference(name):
            write_rows(name, results, args, run)
    run.close()
    return 0


ALONE = " alone"  # of an engine on one GPU, that one on several is compared with


def plan(names: list[str], same_answers: bool, gpus: int = 1) -> list[str]:
    """The engines in the order in which they run: dense first, as every ratio is to it, and what
    an engine is compared with just before it."""
    ordered = []
    for name in sorted(dict.fromkeys(names), key=lambda name: name != "dense"):
        if name == "sparse" and same_answers:
            ordered.append("zeros")
        if name.startswith("sparse") and gpus > 1:
            ordered.append(name + ALONE)
        ordered.append(name)
    return ordered


def is_reference(name: str) -> bool:
    """True of an engine that only answers questions."""
    return name == "zeros" or name.endswith(ALONE)


def folder_of(name: str) -> str:
    """The kind of folder that an engine reads."""
    return "dense" if name == "fp8" else name.removesuffix(ALONE)


def write_rows(name: str, results: dict, args, run: Run) -> None:
    """The records of one engine, whose result is the newest."""
    result, base = results[name], results.get("dense", {})
    check = compare(name, results)
    gpus = f"{args.tensor_parallel} GPUs, " if args.tensor_parallel > 1 else ""
    rows = {f"batch {batch}": rate for batch, rate in result["decode"].items()}
    rows["prefill 8 x 2048"] = result["prefill_tokens_s"]
    known = ("start_s", "phases_s", "weights_gb", "peak_gb", "pdl")
    for case, rate in rows.items():
        metrics = {"tokens_s": rate}
        reference = (
            base.get("prefill_tokens_s")
            if case.startswith("prefill")
            else base.get("decode", {}).get(case.partition(" ")[2])
        )
        if reference:
            metrics["speedup"] = round(rate / reference, 3)
        run.add(
            op="vllm",
            backend=name,
            check=check,
            case=f"{args.preset}, {args.layers} layers, {gpus}{case}",
            dtype="bfloat16",
            metrics=metrics,
            details={key: result[key] for key in known}
            | {"vllm": record._version("vllm"), "repeats": args.repeats}
            | ({"engine_args": args.engine_args} if args.engine_args else {}),
        )
        run.say(f"{name:6} {case:18} {rate:10.1f} tokens/s  {metrics.get('speedup', '')}")


def compare(name: str, results: dict) -> str:
    """What the records of an engine say of its answers, beside those of its references;
    RuntimeError when they differ beyond rounding."""
    said = []
    known = {"the same on one GPU": name + ALONE}
    if name == "sparse":
        known["dense with zeros"] = "zeros"
    for what, reference in known.items():
        if reference not in results:
            continue
        worst = distance(results[name]["answers"], results[reference]["answers"])
        if worst > LOGPROB_DISTANCE:
            raise RuntimeError(
                f"bench.vllm: expected log-probabilities of {name} within {LOGPROB_DISTANCE} of "
                f"{what}, got a distance of {worst:.3f}."
            )
        said.append(f"logprobs within {worst:.3f} of {what}")
    return ", ".join(said) or "ran"


def distance(ours: list[dict], theirs: list[dict]) -> float:
    """Largest distance of two engines' log-probabilities, as far as their tokens agree."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b, p, q in zip(
            mine["tokens"], other["tokens"], mine["logprobs"], other["logprobs"], strict=True
        ):
            worst = max(worst, abs(p - q))
            if a != b:
                break  # from here on the two answer different questions
    return worst


def engine(name: str, folders: dict, args, run: Run) -> dict:
    """Runs one engine; RuntimeError with the end of its output when it fails."""
    questions = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(1)).tolist()
    job = {
        "folder": str(folders[folder_of(name)]),
        "quantization": "fp8" if name == "fp8" else None,
        "batches": [int(text) for text in args.batch.split(",")],
        "prompt": PROMPT,
        "new": NEW_TOKENS,
        "prefill": [8, 2048],
        "max_len": 2304,
        "repeats": args.repeats,
        "logprobs": 12 if args.same_answers or args.tensor_parallel > 1 else 0,
        "questions": questions,
        "tensor_parallel": args.tensor_parallel,
        "engine_args": args.engine_args,
    }
    if is_reference(name):
        job |= {"batches": [1], "repeats": 1, "new": 8, "prefill": [1, 64], "tensor_parallel": 1}
    run.say(f"starting {name}")
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.vllm_child", json.dumps(job)],
        capture_output=True,
        text=True,
        env=pdl.environment(environment, name.startswith("sparse"), args.pdl),
        cwd=root,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        tail = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"bench.vllm: expected an engine {name} that runs, got:\n{tail}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    result["phases_s"] = phases(done.stdout + done.stderr)
    run.say(
        f"{name}: started in {result['start_s']} s {result['phases_s']}, "
        f"weights {result['weights_gb']} GB"
    )
    return result


# What vLLM says of starting, and the words for it in the records.
_PHASES = {
    "weights": r"Loading weights took ([\d.]+)",
    "load": r"Model loading took [\d.]+ GiB memory and ([\d.]+)",
    "compile": r"torch\.compile (?:takes|took) ([\d.]+)",
    "capture": r"Graph capturing finished in ([\d.]+)",
    "engine": r"init engine .*? took ([\d.]+)",
}


def phases(log: str) -> dict[str, float]:
    """{phase: seconds} of an engine's start, as far as its log says them; the last of each."""
    found = {name: re.findall(pattern, log) for name, pattern in _PHASES.items()}
    return {name: float(times[-1]) for name, times in found.items() if times}


def write_models(
    preset: str, layers: int, folder: Path, kinds: list[str], run: Run
) -> dict[str, Path]:
    """{kind: folder} of one random model: "dense"; "sparse", "sparse-fp8", "sparse-int8"; "zeros",
    the 2:4 weights dense.

    Tensor by tensor, pruned on the device, so that host memory stays at one shard.
    """
    from safetensors.torch import save_file

    from sparsekern import prune_compress, quantize
    from sparsekern.formats.config_json import compression_config

    folders = {name: folder / f"{preset}-{layers}-{name}" for name in kinds}
    if all((path / "config.json").exists() for path in folders.values()):
        return folders
    hidden, inner, heads, kv_heads, vocabulary = PRESETS[preset]
    head_size = hidden // heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * head_size, hidden),
        "self_attn.v_proj": (kv_heads * head_size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator(run.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        w = torch.randn(shape, generator=generator, device=run.device)
        return (w / shape[-1] ** 0.5).bfloat16()

    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    files = {name: {} for name in folders}

    def flush(shard: str) -> None:
        for name, tensors in files.items():
            save_file(tensors, folders[name] / f"{shard}.safetensors", {"format": "pt"})
            for key in tensors:
                index[name][key] = f"{shard}.safetensors"
            tensors.clear()

    index: dict[str, dict[str, str]] = {name: {} for name in folders}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in linears.items():
            w = random(*shape)
            w24 = prune_compress(w).rowmajor()
            key = f"{prefix}{name}"
            if "dense" in files:
                files["dense"][f"{key}.weight"] = w.cpu()
            if "zeros" in files:
                files["zeros"][f"{key}.weight"] = w24.to_dense().cpu()
            if "sparse" in files:
                files["sparse"][f"{key}.compressed"] = w24.values.cpu()
                files["sparse"][f"{key}.bitmask"] = w24.bitmask().cpu()
                files["sparse"][f"{key}.shape"] = torch.tensor([[shape[0]], [shape[1]]])
            for kind in ("fp8", "int8"):
                if (to := files.get(f"sparse-{kind}")) is not None:
                    coded = quantize(w24, kind).rowmajor()
                    to[f"{key}.compressed"] = coded.values.cpu()
                    to[f"{key}.bitmask"] = coded.bitmask().cpu()
                    to[f"{key}.weight_scale"] = coded.tensors["weight_scale"].cpu()
                    to[f"{key}.shape"] = torch.tensor([[shape[0]], [shape[1]]])
        for name in ("input_layernorm", "post_attention_layernorm"):
            for tensors in files.values():
                tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        flush(f"layer-{layer:03d}")
    embeddings, head = random(vocabulary, hidden).cpu(), random(vocabulary, hidden).cpu()
    for tensors in files.values():
        tensors["model.embed_tokens.weight"] = embeddings
        tensors["lm_head.weight"] = head
        tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    flush("outside")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    names = {f"model.layers.{i}.{name}": "Linear" for i in range(layers) for name in linears}
    for name, path in folders.items():
        entry = dict(config)
        if name.startswith("sparse"):
            kinds = {**names, "lm_head": "Linear"}
            entry["quantization_config"] = compression_config(kinds, set(names), 0.5)
        text = {"metadata": {}, "weight_map": index[name]}
        (path / "model.safetensors.index.json").write_text(json.dumps(text))
        (path / "config.json").write_text(json.dumps(entry, indent=1))
    sizes = {
        name: sum(f.stat().st_size for f in p.glob("*.safetensors")) / 1e9
        for name, p in folders.items()
    }
    run.say("written: " + ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items()))
    return folders
