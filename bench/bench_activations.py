"""Quantising activations: alone, behind RMSNorm, behind silu(gate) · up.

    python -m bench activations                     all cases
    python -m bench activations --tokens 1,4096 --features 4096 --budget 60

Each case is timed in turns with a copy of as many bytes (read plus written), and a norm with
RMSNorm alone: torch.nn.functional.rms_norm, and the same compiled by torch.compile. Inputs and
outputs rotate through 3 x L2, or 256 sets where that is less. Before that q and the scales must be
those of the rule in torch (backends/quantize_rows.py) for the y that the kernel gives, bit for bit,
and y must be within two roundings of what torch computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsekern.backends import quantize_rows as rows

from . import timing
from .layers import ROUNDOFF, WrongResult
from .monitor import Monitor
from .options import Run, parser, watchdog

TOKENS = (1, 16, 256, 4096, 16384)
FEATURES = (4096, 8192, 14336, 28672)
QUICK_TOKENS, QUICK_FEATURES = (1, 4096), (4096,)
# {name: elements read and written in 16 bits for each quantised one, beside the 8 bits of q}
SOURCES = {"plain": 1, "norm": 1, "norm+residual": 3, "silu_mul": 2}
EPS = 1e-6
HANG_S, MARGIN_S = 60.0, 2.0
MAX_SETS = 256
Made = tuple[Tensor, Tensor, "Tensor | None"]


def make_parser():
    result = parser("activations", "Time the quantisation of activations.", budget=300)
    result.add_argument("--tokens", help="numbers of tokens, comma-separated")
    result.add_argument("--features", help="lengths of a row, comma-separated")
    result.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    result.add_argument("--storage", default="float8_e4m3fn,int8", help="one or both")
    result.add_argument("--sources", default=",".join(SOURCES), help="comma-separated")
    result.add_argument("--seconds", type=float, default=0.4, help="of timing per case")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    tokens = QUICK_TOKENS if run.quick else TOKENS
    features = QUICK_FEATURES if run.quick else FEATURES
    tokens = tuple(map(int, args.tokens.split(","))) if args.tokens else tokens
    features = tuple(map(int, args.features.split(","))) if args.features else features
    failures: list[str] = []
    with Monitor() as monitor:
        for source in args.sources.split(","):
            for storage in args.storage.split(","):
                for size in ((n, f) for f in features for n in tokens):
                    case = f"{source} {storage}, {size[0]} x {size[1]}"
                    known = dict(op="activations", dtype=args.dtype, tokens=size[0], case=case)
                    known["in_features"] = size[1]
                    if run.has(**known):
                        continue
                    if run.left < MARGIN_S:
                        run.say(f"not measured: {case}")
                        continue
                    try:
                        with watchdog(HANG_S):
                            _case(run, monitor, source, storage, size, args, known)
                    except (WrongResult, RuntimeError) as error:
                        failures.append(f"{case}: {error}")
                        run.say(failures[-1])
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    run.close()
    return 1 if failures else 0


def _case(run: Run, monitor: Monitor, source: str, storage: str, size, args, known) -> None:
    tokens, features = size
    dtype = getattr(torch, args.dtype)
    moved = tokens * features * (2 * SOURCES[source] + 1) + 4 * tokens
    count = min(MAX_SETS, timing.rotations(moved)) if run.device.type == "cuda" else 1
    generator = torch.Generator(run.device).manual_seed(0)

    def normal(*shape) -> Tensor:
        x = torch.empty(*shape, dtype=dtype, device=run.device)
        return x.normal_(generator=generator)

    weight = normal(features)
    made = [_inputs(source, normal, tokens, features) for _ in range(count)]
    ours = [_ours(source, storage, inputs, weight) for inputs in made]
    _check(source, storage, made[0], weight)
    halves = [torch.empty(2, math.ceil(moved / 2), dtype=torch.uint8, device=run.device)]
    halves += [torch.empty_like(halves[0]) for _ in range(count - 1)]
    providers = {
        "ours": [lambda call=call: call(False) for call in ours],
        "copy": [lambda pair=pair: pair[1].copy_(pair[0]) for pair in halves],
    }
    if source.startswith("norm"):
        providers["rms_norm"] = [lambda x=x: _norm(x[0], weight) for x in made]
        if run.device.type == "cuda":
            compiled = torch.compile(_norm, dynamic=False)
            providers["rms_norm compiled"] = [lambda x=x: compiled(x[0], weight) for x in made]
    monitor.clear()
    rule = timing.StopRule(0.005, min_rounds=5, min_s=args.seconds / 2, budget_s=args.seconds)
    times = timing.compare(providers, run.timer, rule, warm_s=0.05)
    us = {name: timed.median for name, timed in times.items()}
    metrics = {"us": round(us["ours"], 3), "tb_s": round(moved / us["ours"] / 1e6, 3)}
    metrics["copy_us"], metrics["of_copy"] = round(us["copy"], 3), us["copy"] / us["ours"]
    norms = [us[name] for name in us if name.startswith("rms_norm")]
    if norms:
        metrics["rms_norm_us"] = round(min(norms), 3)
        metrics["of_rms_norm"] = us["ours"] / min(norms)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    run.add(
        **known,
        backend="cuda" if rows.native(weight) else "torch",
        check="exact+bounded",
        timer=run.timer,
        metrics=metrics,
        bytes=moved,
        copies=count,
        during=monitor.medians(),
    )
    run.say(f"{known['case']}: " + "  ".join(f"{k} {v:g}" for k, v in metrics.items()))


def _inputs(source: str, normal: Callable[..., Tensor], tokens: int, features: int) -> list[Tensor]:
    if source == "silu_mul":
        return [normal(tokens, 2 * features)]
    return [normal(tokens, features) for _ in range(2 if source == "norm+residual" else 1)]


def _ours(source: str, storage: str, inputs: list[Tensor], weight: Tensor):
    """call(with_y) -> (q, scale, y or None)."""

    def call(with_y: bool) -> Made:
        if source == "plain":
            return (*rows.quantize(inputs[0], storage), inputs[0] if with_y else None)
        if source == "silu_mul":
            return rows.silu_mul(*inputs[0].chunk(2, 1), storage, with_y)
        residual = inputs[1] if len(inputs) > 1 else None
        return rows.rms_norm(inputs[0], weight, EPS, storage, residual, with_y)

    return call


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, EPS)


def _check(source: str, storage: str, inputs: list[Tensor], weight: Tensor) -> None:
    """WrongResult unless q, scale and y are right."""
    inputs = [x.clone() for x in inputs]  # a residual changes
    h = inputs[0].double()
    if source == "norm+residual":
        h = (inputs[0].float() + inputs[1].float()).to(weight.dtype).double()
    q, scale, y = _ours(source, storage, inputs, weight)(True)
    assert y is not None
    wanted_q, wanted_scale = rows.quantize_torch(y, storage)
    same = torch.equal(q.view(torch.uint8), wanted_q.view(torch.uint8))
    if not (same and torch.equal(scale, wanted_scale)):
        raise WrongResult(f"bench: {source} {storage} does not quantise as the rule says.")
    if source == "norm+residual" and not torch.equal(inputs[1].double(), h):
        raise WrongResult(f"bench: {source} {storage} leaves a wrong residual.")
    if source.startswith("norm"):
        y64 = h * weight.double() * (h.square().mean(1, keepdim=True) + EPS).rsqrt()
    elif source == "silu_mul":
        gate, up = h.chunk(2, 1)
        y64 = torch.nn.functional.silu(gate) * up
    else:
        y64 = h
    bound = 2 * ROUNDOFF[y.dtype] * y64.abs() + 2.0**-24
    if bool(((y.double() - y64).abs() > bound).any()):
        raise WrongResult(f"bench: {source} {storage} gives a wrong y.")
