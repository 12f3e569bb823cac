"""Decode steps of Transformers' own Llama, compiled, with a static cache: sparse against dense.

    python -m bench generate --layers 32 --batch 1,32
    python -m bench generate --layers 8 --batch 1 --profile --attention sdpa,sparsekern

What `generate(cache_implementation="static")` runs for each token: LlamaForCausalLM's forward as
Transformers has it, compiled as one graph, and the choice of the next token. Random bf16 weights of
the 8B shape; lm_head and embeddings dense. The models take turns in one process:

    dense
    sparse       every linear layer of the blocks 2:4
    optimized    the same after sparsekern.optimize: q, k, v in one launch, gate and up in one
    gated        after sparsekern.optimize(gated=True); on demand: --models dense,optimized,gated

--launch says what a step costs the host (generate_step.py): "graph", one CUDA graph captured around
the compiled step, or "trees", torch.compile(mode="reduce-overhead"). --attention is Transformers'
attn_implementation, the same for all models: "sdpa", its default, copies the whole cache once
for every head that shares one, and "sparsekern" (sparsekern.integrations.attention) does not. A
ratio is always between models with the same launch and the same attention.

Timed by CUDA events around a step, with the L2 cache overwritten before; that includes what the
host adds. Before timing, each sparse model's logits are compared with those of the same weights
decompressed and multiplied by torch, in Transformers' own attention. --profile adds the GPU time of
a step by kind of kernel.
"""

from __future__ import annotations

import contextlib
import traceback

import torch
from torch import nn

import sparsekern
from sparsekern import SparseLinear
from sparsekern.nn import gated_mlp
from sparsekern.nn.optimize import JoinedLinear

from . import decode_model, pdl, step_profile, timing
from .generate_step import LAUNCHES, Step, compiled
from .monitor import Monitor
from .options import Run, parser, watchdog

LOGITS_DISTANCE = 0.08  # as in bench_decode_model
HANG_S = 300.0  # one model is compiled, or one batch measured
MODELS = ("dense", "sparse", "optimized", "gated")


def make_parser():
    result = parser("generate", "Decode steps in Transformers.", budget=400)
    result.add_argument("--preset", default="8b", choices=sorted(decode_model.PRESETS))
    result.add_argument("--layers", type=int, default=32)
    result.add_argument("--batch", default="1,32", help="comma-separated")
    result.add_argument("--context", type=int, default=1024, help="positions of the cache")
    result.add_argument("--dtype", default="bfloat16")
    result.add_argument("--models", default=",".join(MODELS[:3]), help="dense first")
    result.add_argument("--launch", default="graph", choices=LAUNCHES)
    result.add_argument("--attention", default="sdpa", help="comma-separated implementations")
    result.add_argument("--profile", action="store_true", help="GPU time by kind of kernel")
    pdl.add_option(result, "as TORCHINDUCTOR_ENABLE_PDL says, else off; the same for all models")
    result.add_argument("--no-compile", action="store_true", help="the same as --launch eager")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    pdl.choose(args.pdl)
    names = args.models.split(",")
    if names[:1] != ["dense"] or not set(names) <= set(MODELS):
        raise ValueError(f"bench.generate: expected models in {MODELS}, dense first, got {names}.")
    launch = "eager" if args.no_compile else args.launch
    if launch == "graph" and run.device.type != "cuda":
        launch = "trees"  # compiled; there is nothing to capture
    with torch.inference_mode():
        if args.profile:
            step_profile.prepare(run.device)
        models = {name: _build(run, args, name) for name in names}
        forwards = {name: compiled(model, launch) for name, model in models.items()}
        failures: list[str] = []
        needed = 0.0  # seconds of the longest batch so far
        for attention in args.attention.split(","):
            for batch in map(int, args.batch.split(",")):
                case = f"batch {batch}, {attention}"
                if run.left < needed:
                    run.say(f"no time for {case}: {run.left:.0f} s left, {needed:.0f} s needed")
                    continue
                begin = run.elapsed
                try:
                    _measure_case(run, args, launch, models, forwards, attention, batch)
                except Exception as error:
                    failures.append(f"{case}: {type(error).__name__}: {error}")
                    run.say(f"failed: {failures[-1]}\n{traceback.format_exc()[-3000:]}")
                    if "CUDA error" in str(error):
                        break
                needed = max(needed, run.elapsed - begin)
    run.close()
    for failure in failures:
        run.say(f"failed: {failure[:300]}")
    return 1 if failures else 0


def _build(run: Run, args, name: str) -> nn.Module:
    dtype = getattr(torch, args.dtype)
    with run.phase(f"{name}: build"), watchdog(HANG_S):
        model = decode_model.build(
            args.preset, args.layers, dtype, run.device, sparse=name != "dense", attention=None
        )
        if name in ("optimized", "gated"):
            run.say(str(sparsekern.optimize(model, gated=name == "gated")))
    return model


def _measure_case(run, args, launch, models, forwards, attention: str, batch: int) -> None:
    """Compiles, checks, times and profiles one batch size with one attention."""
    case = f"batch {batch}, {attention}"
    steps = {}
    for name, model in models.items():
        model.config._attn_implementation = attention
        steps[name] = step = Step(forwards[name], model, batch, args.context)
        with run.phase(f"{case}, {name}: compile"), watchdog(HANG_S):
            if launch == "graph":
                step.capture()
            for _ in range(3):
                logits = step()
            _check_finite(name, logits)
    with run.phase(f"{case}: check"), watchdog(HANG_S):
        distances = {
            name: _distance(models[name], step, batch, args.context)
            for name, step in steps.items()
            if name != "dense"
        }
    with run.phase(f"{case}: measure"), watchdog(HANG_S):
        medians = _measure(run, args, launch, attention, batch, steps, distances)
    if args.profile:
        with run.phase(f"{case}: profile"), watchdog(HANG_S):
            for name, step in steps.items():
                try:
                    found = step_profile.profile(step, run.device)
                except RuntimeError as error:  # the times stand without it
                    run.say(f"{case}, {name}: {error}")
                    continue
                text = "\n".join(found.lines(medians[name]))
                run.say(f"{case}, {name}:\n{text}")


def _check_finite(name: str, logits: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"bench.generate: expected finite logits from {name}.")


def _distance(model, step, batch: int, context: int) -> float:
    """Of the step's logits from those of the decompressed weights, eager, with "sdpa"."""
    step.begin()
    got = step().double().clone()
    attention, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    plain = Step(model.forward, model, batch, context)
    with _single_layers():
        wanted = plain().double()
    model.config._attn_implementation = attention
    result = round(float((got - wanted).norm() / wanted.norm()), 5)
    if not result <= LOGITS_DISTANCE:
        raise RuntimeError(
            f"bench.generate: expected logits within {LOGITS_DISTANCE} of the reference, got a "
            f"distance of {result}."
        )
    return result


@contextlib.contextmanager
def _single_layers():
    """Inside, each layer multiplies its own decompressed weight with torch, joined or not."""
    joined, few = JoinedLinear.forward, gated_mlp.FEW_TOKENS
    with decode_model.reference_linears():
        JoinedLinear.forward, gated_mlp.FEW_TOKENS = SparseLinear.forward, -1
        try:
            yield
        finally:
            JoinedLinear.forward, gated_mlp.FEW_TOKENS = joined, few


def _measure(
    run: Run, args, launch: str, attention: str, batch: int, steps: dict[str, Step], distances
) -> dict[str, float]:
    """Times and records the steps; median microseconds by name."""
    with Monitor() as monitor:
        if run.device.type == "cuda":
            samplers = {name: timing.event_sampler([step]) for name, step in steps.items()}
        else:
            samplers = {name: timing.wall_sampler([step]) for name, step in steps.items()}
        monitor.clear()
        quick = run.quick
        rule = timing.StopRule(
            0.005, min_rounds=3 if quick else 50, min_s=1.0, budget_s=2.0 if quick else 8.0
        )
        samples, converged = timing.sample_rounds(samplers, rule)
        during = monitor.medians()
    medians = {name: timing.quantile(taken, 0.5) for name, taken in samples.items()}
    case = f"{args.preset}, {args.layers} layers, batch {batch}, context {args.context}"
    case += "" if attention == "sdpa" else f", {attention} attention"
    for name, us in medians.items():
        metrics = {
            "tokens_s": round(batch * 1e6 / us, 1),
            "ms_per_step": round(us / 1e3, 4),
            "speedup": round(medians["dense"] / us, 3),
        }
        run.add(
            op="generate",
            backend=name,
            check="finite" if name == "dense" else "bounded",
            case=case,
            dtype=args.dtype,
            converged=converged[name],
            during=during,
            details={
                "logits_distance": distances.get(name),
                "launch": launch,
                "attention": attention,
                "pdl": launch != "eager" and pdl.is_on(run.device),
            },
            metrics=metrics,
        )
        run.say(
            f"batch {batch}, {attention}, {name}: {metrics['tokens_s']} tokens/s, "
            f"{metrics['ms_per_step']} ms, {metrics['speedup']}x"
        )
    return medians
