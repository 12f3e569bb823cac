"""Tokens per second of a Llama-3-8B-shaped model that decodes: sparse against dense, end to end.

    python -m bench decode_model --layers 32 --batch 1,8,32

Random bf16 weights, one decode step at a full static cache, captured in a CUDA graph
(decode_model.py says what runs). Dense and sparse steps take turns in one process. Before timing,
the sparse model's logits are compared with those of the same weights decompressed and multiplied
by torch, and a replay of each graph with its eager step (cuBLAS may take another algorithm inside a
capture, so the same bits are not asked for; the records say whether they were the same).

Peak memory is that of building the model and running the largest batch, each model alone.
"""

from __future__ import annotations

import torch

from . import decode_model, timing
from .monitor import Monitor
from .options import Run, parser, watchdog

# Relative distance of the logits, ‖a − b‖ / ‖b‖, that rounding alone stays below: adding up in
# another order gives 0.013 after 32 layers, the gated layer, which rounds less often, 0.042. One
# wrong sublayer of 64 gives more than 0.12. (The kernels' exactness is checked by bench_linear.)
LOGITS_DISTANCE = 0.08
HANG_S = 240.0  # one model is built, or one batch measured


def make_parser():
    result = parser("decode_model", "Tokens per second of a decoding model.", budget=300)
    result.add_argument("--preset", default="8b", choices=sorted(decode_model.PRESETS))
    result.add_argument("--layers", type=int, default=32)
    result.add_argument("--batch", default="1,8,32", help="comma-separated")
    result.add_argument("--context", type=int, default=1024, help="positions of the cache")
    result.add_argument("--dtype", default="bfloat16")
    result.add_argument("--no-compile", action="store_true", help="pointwise parts eager")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    args.layers = min(args.layers, 4) if run.quick else args.layers
    compiled = run.device.type == "cuda" and not args.no_compile
    with torch.inference_mode(), decode_model.fused_pointwise(compiled) as product:
        bench = Bench(run, args, product)
        for batch in (int(text) for text in args.batch.split(",")):
            if run.left < 15.0 and run.device.type == "cuda":
                run.say(f"no time for batch {batch}")
                continue
            with watchdog(HANG_S):
                bench.measure(batch)
    run.close()
    return 0


class Bench:
    """The dense and the sparse model, both on the device."""

    def __init__(self, run: Run, args, product):
        self.run, self.args, self.product = run, args, product
        self.dtype = getattr(torch, args.dtype)
        self.base, self.models, self.same_bits = {}, {}, {}
        self.gated = decode_model.gated_layer()
        for name in ("dense", "sparse"):
            with watchdog(HANG_S):
                self._build(name)

    def _build(self, name: str) -> None:
        run, args = self.run, self.args
        on_gpu = run.device.type == "cuda"
        before = self._reset_peak()
        model = decode_model.build(
            args.preset, args.layers, self.dtype, run.device, sparse=name == "sparse"
        )
        decode_model.set_mlp(model, self.product, None)
        self.base[name] = {}
        if on_gpu:
            self.base[name]["build_peak_gb"] = self._peak(before)
            self.base[name]["weights_gb"] = round((torch.cuda.memory_allocated() - before) / 1e9, 3)
        self.models[name] = model
        run.say(f"{name} model with {args.layers} layers: {self.base[name]}")

    def _reset_peak(self) -> int:
        if self.run.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self, before: int) -> float:
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)

    def steps(self, batch: int) -> dict:
        """{name: step}: dense, sparse and, where there is one, sparse with the gated layer."""
        steps = {
            name: decode_model.Step(model, batch, self.args.context)
            for name, model in self.models.items()
        }
        found = {"dense": steps["dense"], "sparse": self._with_mlp(steps["sparse"], None)}
        if self.gated is not None:
            found["sparse gated"] = self._with_mlp(steps["sparse"], self.gated)
        return found

    def _with_mlp(self, step, gated):
        def call():
            decode_model.set_mlp(step.model, self.product, gated)
            return step()

        return call

    def measure(self, batch: int) -> None:
        """Checks, times and records one batch size."""
        run, args = self.run, self.args
        steps, distances = self.steps(batch), {}
        reference = None
        memory = {}
        for name, step in steps.items():
            before = self._reset_peak()
            logits = step()
            if run.device.type == "cuda":
                memory[name] = {"step_peak_gb": self._peak(before)}
            if not bool(torch.isfinite(logits).all()):
                raise RuntimeError(f"bench.decode_model: expected finite logits from {name}.")
            if name == "sparse":
                with decode_model.reference_linears():
                    reference = step().double()
            if name != "dense":
                distance = (logits.double() - reference).norm() / reference.norm()
                distances[name] = round(float(distance), 5)
                if not distance <= LOGITS_DISTANCE:
                    raise RuntimeError(
                        f"bench.decode_model: expected logits of {name} within {LOGITS_DISTANCE} "
                        f"of the reference, got a distance of {distances[name]}."
                    )
        run.say(f"batch {batch}: checked, distance of the logits {distances}")
        with Monitor() as monitor:
            samplers = {name: self._sampler(name, step) for name, step in steps.items()}
            monitor.clear()
            rule = timing.StopRule(
                0.003,
                min_rounds=3 if run.quick else 50,
                min_s=1.0,
                budget_s=3.0 if run.quick else 8.0,
            )
            samples, converged = timing.sample_rounds(samplers, rule)
            during = monitor.medians()
        medians = {name: timing.quantile(taken, 0.5) for name, taken in samples.items()}
        for name, us in medians.items():
            metrics = {
                "tokens_s": round(batch * 1e6 / us, 1),
                "ms_per_step": round(us / 1e3, 4),
                "speedup": round(medians["dense"] / us, 3),
                **self.base[name.partition(" ")[0]],
                **memory.get(name, {}),
            }
            run.add(
                op="decode_model",
                backend=name,
                check="finite" if name == "dense" else "bounded",
                case=f"{args.preset}, {args.layers} layers, batch {batch}, context {args.context}",
                dtype=args.dtype,
                converged=converged[name],
                during=during,
                details={
                    "logits_distance": distances.get(name),
                    "samples": len(samples[name]),
                    "graph_repeats_bits": self.same_bits.get(name),
                },
                metrics=metrics,
            )
            run.say(
                f"batch {batch}, {name}: {metrics['tokens_s']} tokens/s, "
                f"{metrics['ms_per_step']} ms, {metrics['speedup']}x"
            )

    def _sampler(self, name: str, step):
        """Samples of the captured step; RuntimeError when a replay is far from the eager step."""
        if self.run.device.type != "cuda":
            return timing.wall_sampler([step])
        wanted, kept = step().clone(), {}

        def keep():
            kept["logits"] = step()

        sample = timing.graph_sampler([keep])
        sample()
        got = kept["logits"]
        self.same_bits[name] = torch.equal(got, wanted)
        distance = float((got.double() - wanted.double()).norm() / wanted.double().norm())
        if not distance <= LOGITS_DISTANCE:
            raise RuntimeError(
                f"bench.decode_model: expected the graph of {name} to repeat the eager step within "
                f"{LOGITS_DISTANCE}, got a distance of {distance:.3g}."
            )
        return sample
