"""Decode steps of Transformers' own Llama, compiled, with a static cache: sparse against dense.

    python -m bench generate --layers 32 --batch 1,32

What `generate(cache_implementation="static")` runs for each token: LlamaForCausalLM's forward as
Transformers has it (scaled_dot_product_attention, a mask over the whole cache), compiled by
torch.compile(mode="reduce-overhead", fullgraph=True), so that a step is one CUDA graph. Random bf16
weights of the 8B shape; lm_head and embeddings dense. Three models take turns in one process:

    dense
    sparse       every linear layer of the blocks 2:4
    optimized    the same after sparsekern.optimize: q, k, v in one launch, gate and up in one

Timed by CUDA events around a step, which includes what the host adds. Before timing, the optimized
model's logits are compared with those of the same weights decompressed and multiplied by torch.
"""

from __future__ import annotations

import torch
from torch import nn

import sparsekern

from . import decode_model, timing
from .monitor import Monitor
from .options import Run, parser, watchdog

LOGITS_DISTANCE = 0.08  # as in bench_decode_model
HANG_S = 300.0  # one model is compiled, or one batch measured


def make_parser():
    result = parser("generate", "Decode steps in Transformers.", budget=400)
    result.add_argument("--preset", default="8b", choices=sorted(decode_model.PRESETS))
    result.add_argument("--layers", type=int, default=32)
    result.add_argument("--batch", default="1,32", help="comma-separated")
    result.add_argument("--context", type=int, default=1024, help="positions of the cache")
    result.add_argument("--dtype", default="bfloat16")
    result.add_argument("--no-compile", action="store_true", help="eager, as a dry run")
    return result


class Step:
    """One decode step; the cache begins anew when it is full."""

    def __init__(self, forward, model: nn.Module, batch: int, context: int):
        import transformers

        self.forward = forward
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        config = model.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=context)
        heads = config.num_key_value_heads
        self.cache.early_initialization(batch, heads, config.head_dim, dtype, device)
        self.ids = torch.arange(batch, device=device).unsqueeze(1) * 7919 % config.vocab_size
        self.positions = torch.tensor([context // 2], device=device)
        self.context, self.left = context, context

    def __call__(self):
        if self.left == 0:
            for layer in self.cache.layers:
                if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                    layer.cumulative_length.zero_()  # how far the cache is filled
            self.left = self.context
        self.left -= 1
        output = self.forward(
            input_ids=self.ids,
            position_ids=self.positions.unsqueeze(0),
            cache_position=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    dtype = getattr(torch, args.dtype)
    batches = [int(text) for text in args.batch.split(",")]
    models, forwards = {}, {}
    with torch.inference_mode():
        for name in ("dense", "sparse", "optimized"):
            with run.phase(f"{name}: build"), watchdog(HANG_S):
                models[name] = decode_model.build(
                    args.preset,
                    args.layers,
                    dtype,
                    run.device,
                    sparse=name != "dense",
                    attention=None,
                )
                if name == "optimized":
                    run.say(str(sparsekern.optimize(models[name])))
            forwards[name] = models[name].forward
            if not args.no_compile:
                forwards[name] = torch.compile(
                    forwards[name], mode="reduce-overhead", fullgraph=True
                )
        needed = 0.0  # seconds of the longest batch so far
        for batch in batches:
            if run.left < needed:
                run.say(f"no time for batch {batch}: {run.left:.0f} s left, {needed:.0f} s needed")
                continue
            begin = run.elapsed
            steps = {}
            for name, forward in forwards.items():
                steps[name] = Step(forward, models[name], batch, args.context)
                with run.phase(f"batch {batch}, {name}: compile"), watchdog(HANG_S):
                    for _ in range(3):
                        logits = steps[name]()
                    _check_finite(name, logits)
            with run.phase(f"batch {batch}: check"), watchdog(HANG_S):
                distance = _distance(models["optimized"], steps["optimized"], batch, args.context)
            with run.phase(f"batch {batch}: measure"), watchdog(HANG_S):
                _measure(run, args, batch, steps, distance)
            needed = max(needed, run.elapsed - begin)
    run.close()
    return 0


def _check_finite(name: str, logits: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"bench.generate: expected finite logits from {name}.")


def _distance(model, step, batch: int, context: int) -> float:
    """Of the compiled step's logits from those of the decompressed weights, eager."""
    got = step().double().clone()
    plain = Step(model.forward, model, batch, context)
    with decode_model.reference_linears():
        wanted = plain().double()
    result = round(float((got - wanted).norm() / wanted.norm()), 5)
    if not result <= LOGITS_DISTANCE:
        raise RuntimeError(
            f"bench.generate: expected logits within {LOGITS_DISTANCE} of the reference, got a "
            f"distance of {result}."
        )
    return result


def _measure(run: Run, args, batch: int, steps: dict[str, Step], distance: float) -> None:
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
            case=f"{args.preset}, {args.layers} layers, batch {batch}, context {args.context}",
            dtype=args.dtype,
            converged=converged[name],
            during=during,
            details={"logits_distance": distance if name == "optimized" else None},
            metrics=metrics,
        )
        run.say(
            f"batch {batch}, {name}: {metrics['tokens_s']} tokens/s, "
            f"{metrics['ms_per_step']} ms, {metrics['speedup']}x"
        )
