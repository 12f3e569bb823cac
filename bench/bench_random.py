"""Linear layers of random shapes, which no table has: what the dispatcher picks, against cuBLAS.

    python -m bench random                      120 shapes, 480 cells, in 60 of them all variants
    python -m bench random --budget 200 --log picks.jsonl
    python -m bench random --shard 1/2 --campaign NAME      half of them, on one of two GPUs

Cells, and their order, which makes a run that is cut short a fair sample: unseen.py. Checks and
timing are those of `bench linear`. In every 8th cell of a class all variants are timed as
`sparsekern tune` does; how much slower than the fastest the cost model's pick is becomes a record,
and with --log a line for `python -m bench.fit --check` or `--test`. The verdict (verdict.py) is
printed at the end, and made anew from the records by `python -m bench table`.

A cell takes about 0.12 s of timing and 0.25 s around it, 0.3 s more where launches reach the power
limit; a cell with all variants 0.7 s more, there 3.5 s: 200 s are 350 to 400 cells.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from sparsekern.profiling import rounds

from . import cells, timing, unseen, verdict
from .bench_linear import HANG_S, MARGIN_S, measure
from .layers import Layer
from .monitor import Monitor
from .options import Run, parser, watchdog
from .shapes import Shape

SETTLE_S, SUSTAINED_S = 0.1, 0.3  # of a cell at the power limit: before, and of timing at least
SWEEP_S = 3.0  # of the last rounds of a cell with all variants, at the power limit


def make_parser():
    result = parser("random", "Time random shapes against cuBLAS, and judge the picks.", budget=200)
    result.add_argument("--shapes", type=int, default=unseen.SHAPES_WANTED, metavar="COUNT")
    result.add_argument("--shape-seed", type=int, default=unseen.SEED, metavar="N")
    result.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    result.add_argument("--providers", default="cuda,dense", help="also cusparselt, triton, cpu")
    result.add_argument("--seconds", type=float, default=0.12, help="of timing per cell")
    result.add_argument(
        "--every", type=int, default=unseen.EVERY, help="all variants in one cell of so many; 0: no"
    )
    result.add_argument("--log", type=Path, metavar="FILE", help="for python -m bench.fit")
    result.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts")
    for name, most in zip(("out", "in"), cells.MOST, strict=True):
        text = f"most {name}_features of a shape (default {most})"
        result.add_argument(f"--most-{name}", type=int, default=most, metavar="N", help=text)
    result.add_argument(
        "--most",
        type=float,
        default=float("inf"),
        metavar="N",
        help="leave out cells with more tokens * out * in: for dry runs",
    )
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    names = tuple(args.providers.split(","))
    ours = next((name for name in names if name != "dense"), "cuda")
    shard = tuple(map(int, args.shard.split("/")))
    failures: list[str] = []
    skipped = 0
    dead = ""
    with Monitor() as monitor:
        sizes = args.most_out, args.most_in
        for shape, points in unseen.jobs(args.shapes, args.shape_seed, args.every, shard, sizes):
            layer = None
            for point in points:
                case = _case(shape, point.tokens, args.dtype)
                small = point.tokens * shape.out_features * shape.in_features <= args.most
                if not small or run.has(op=verdict.OP, **case):
                    continue
                if dead or run.left < MARGIN_S:
                    skipped += 1
                    continue
                try:
                    with watchdog(HANG_S):
                        if layer is None:
                            layer = Layer(shape, getattr(torch, args.dtype), run.device, names)
                        rule = stop_rule(case, args.seconds)
                        measure(run, monitor, layer, {"op": verdict.OP, **case}, rule, failures)
                        if point.swept and run.device.type == "cuda" and ours == "cuda":
                            _sweep(run, case, args.log, failures)
                except (RuntimeError, NotImplementedError) as error:
                    failures.append(f"{shape}, {point.tokens} tokens: {error}")
                    run.say(failures[-1])
                    dead = "CUDA error" if "CUDA error" in str(error) else ""
    found = verdict.judge(run.records, ours)
    print("\n".join(found.lines() if found else ["nothing was measured"]), flush=True)
    if skipped:
        print(f"{skipped} cells were not reached in the budget", flush=True)
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    run.close()
    return 1 if failures else 0


def stop_rule(case: dict, seconds: float) -> timing.StopRule:
    """Of one cell; longer, and after a while under load, where the power limit is reached."""
    rule = timing.StopRule(0.005, min_rounds=3, min_s=seconds, budget_s=seconds)
    sizes = case["tokens"], case["out_features"], case["in_features"]
    if rounds.rule(*sizes) is rounds.SHORT:
        return rule
    longer = max(seconds, SUSTAINED_S)
    return dataclasses.replace(rule, min_s=longer, budget_s=longer, settle_s=SETTLE_S)


def _case(shape: Shape, tokens: int, dtype: str) -> dict:
    sizes = dict(out_features=shape.out_features, in_features=shape.in_features)
    return dict(**sizes, tokens=tokens, dtype=dtype)


def _sweep(run: Run, case: dict, log: Path | None, failures: list[str]) -> None:
    """All variants of one cell: a record of the regret of the cost model's pick."""
    from sparsekern.backends.cuda import tuned_tables
    from sparsekern.profiling import tune, tune_plan
    from sparsekern.profiling.tune_cell import tune_cell

    size, tokens = (case["out_features"], case["in_features"]), case["tokens"]
    index = torch.cuda.current_device()
    layer = tune.Layer(*size, getattr(torch, case["dtype"]), torch.device("cuda", index))
    layer.warm_up()
    at, names = layer.cell(tokens), layer.names(tokens)
    rule = tune_plan.rule(tokens, *size, SWEEP_S)
    cell = tune_cell(tokens, names, at.sampler, at.wrong, rule=rule, dense=at.dense)
    what = f"{size[0]}x{size[1]}"
    if cell is None:
        failures.append(f"{what}, {tokens} tokens: no variant is right")
        return
    failures += [f"{what}, {tokens} tokens, {n}: {why}" for n, why in cell.refused.items()]
    run.say(f"{what}, {cell}")
    run.add(
        op=verdict.PICK,
        backend="cuda",
        check="exact",
        **case,
        config=cell.heuristic,
        metrics={
            "regret": round(cell.gap, 5),
            "us": round(cell.heuristic_us, 4),
            "best_us": round(cell.us, 4),
            "best": cell.best,
            "variants": len(cell.times),
        },
    )
    if log is not None:
        line = tune.logged(cell, size, case["dtype"], tuned_tables.gpu_name(index))
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
