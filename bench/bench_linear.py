"""Linear layers of Llama-3 against cuBLAS and cuSPARSELt, few tokens (decode) and many (prefill).

    python -m bench linear                          everything, both dtypes
    python -m bench linear --kind decode --dtype bfloat16 --budget 240
    python -m bench linear --kind prefill --sweep   every config of the kernels, and the one picked
    python -m bench linear --sweep mma              the same of the mma.sp kernel, also on Hopper

Every cell (shape, tokens, dtype) is checked, then all providers are timed against each other in one
process; its records are written at once, so a run that is cut off loses one cell. A wrong result is
reported, not recorded, and the exit code is 1.
"""

from __future__ import annotations

import torch

from . import cusparselt, results, sweep, timing, verdict
from .ceilings import bandwidths
from .layers import Layer, WrongResult
from .monitor import Monitor
from .options import Run, parser, watchdog
from .shapes import select, token_counts

HANG_S = 120.0  # a cell that takes longer does not return
MARGIN_S = 3.0  # a cell is begun only with so much time left


def make_parser():
    result = parser("linear", "Time linear layers against cuBLAS and cuSPARSELt.", budget=540)
    result.add_argument("--kind", default="both", choices=("decode", "prefill", "both"))
    result.add_argument("--dtype", default="bfloat16,float16", help="one or both, comma-separated")
    result.add_argument("--shapes", help="8b, 70b, 1b or OUTxIN, comma-separated")
    result.add_argument("--tokens", help="numbers of tokens, comma-separated")
    result.add_argument(
        "--providers",
        default="cuda,dense,cusparselt",
        help="also: cuda-mma, triton (and cpu for dry runs)",
    )
    result.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="of timing per cell, for large grids (default: until the medians are "
        "known to 0.5 %%, 0.1 to 2.4 s)",
    )
    result.add_argument(
        "--sweep",
        nargs="?",
        const="picked",
        choices=("picked", "mma"),
        help="time every config of the kernels and judge the one that is picked; "
        "mma: those of the mma.sp kernel, whatever the GPU",
    )
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    kinds = ("decode", "prefill") if args.kind == "both" else (args.kind,)
    dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
    jobs = [
        (dtype, shape, kind, token_counts(args.tokens, kind, args.quick))
        for dtype in dtypes
        for kind in kinds
        for shape in select(args.shapes, kind, args.quick)
    ]
    failures: list[str] = []
    if args.sweep:
        lines = sweep.summary(sweep.run_jobs(run, jobs, failures, args.sweep == "mma"))
    else:
        with Monitor() as monitor:
            read = bandwidths(run)["read_tb_s"]
            names = {dtype: _providers(run, dtype, args.providers.split(",")) for dtype in dtypes}
            skipped = _grid(run, monitor, jobs, names, failures, args.seconds)
        cells = results.cells(run.records)
        lines = results.summary(cells, read)
        for promise in verdict.against_cusparselt(cells):
            lines.append(f"{verdict.word(promise.met)}: {promise.text}: {promise.found}")
        if skipped:
            lines.append(f"not measured: {', '.join(skipped)}")
    print("\n".join(lines), flush=True)
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    run.close()
    return 1 if failures else 0


def _providers(run: Run, dtype, names) -> tuple[str, ...]:
    """The providers that can run this dtype; records why cuSPARSELt cannot."""
    if "cusparselt" in names:
        reason = cusparselt.available()
        if not reason and dtype != torch.bfloat16:
            run.say(f"trying cuSPARSELt with {_name(dtype)} in a child process")
            reason = cusparselt.probe(dtype)
            if reason:
                run.add(
                    op="linear_peer",
                    backend="cusparselt",
                    check="child process",
                    case=_name(dtype),
                    metrics={"outcome": reason},
                )
        if reason:
            run.say(f"cuSPARSELt is not compared in {_name(dtype)}: {reason}")
            names = [name for name in names if name != "cusparselt"]
    return tuple(names)


def _grid(
    run: Run, monitor: Monitor, jobs, names, failures: list[str], seconds: float | None
) -> list[str]:
    """Measures all cells for which there is time; returns the names of the others."""
    skipped: list[str] = []
    dead = False
    for dtype, shape, kind, tokens_list in jobs:
        case = dict(
            op="linear",
            out_features=shape.out_features,
            in_features=shape.in_features,
            dtype=_name(dtype),
        )
        wanted = [n for n in tokens_list if not run.has(**case, tokens=n)]
        layer, rule = None, stop_rule(kind, run.quick, seconds)
        for tokens in wanted:
            what = f"{shape} {kind} {_name(dtype)} {tokens} tokens"
            if dead or run.left < MARGIN_S:
                skipped.append(what)
                continue
            try:
                with watchdog(HANG_S):
                    layer = layer or Layer(shape, dtype, run.device, names[dtype])
                    measure(run, monitor, layer, {**case, "tokens": tokens}, rule, failures)
            except (RuntimeError, NotImplementedError) as error:
                failures.append(f"{what}: {error}")
                run.say(failures[-1])
                dead = "CUDA error" in str(error)  # the context is gone, and with it all others
    return skipped


def measure(
    run: Run, monitor: Monitor, layer: Layer, case: dict, rule: timing.StopRule, failures: list[str]
) -> None:
    """Checks one cell, times its providers in turns, and adds a record of each.

    Args:
        case: op, out_features, in_features, dtype and tokens of the records.
        failures: gets a line for each provider whose result is wrong; it is not timed.
    """
    tokens = case["tokens"]
    x = layer.inputs(tokens)
    checks = {}
    for name in layer.names:
        try:
            checks[name] = layer.check(name, x)
        except WrongResult as error:
            failures.append(f"{layer.shape} {tokens} tokens {case['dtype']}: {error}")
            run.say(failures[-1])
    if not set(checks) - {"dense"}:
        return
    monitor.clear()
    times = timing.compare(
        {name: layer.calls(name, x) for name in checks},
        run.timer,
        rule,
        warm_s=rule.min_s / 8 if tokens > 64 else min(0.05, rule.min_s / 2),
    )
    during = monitor.medians()
    traffic = x.nbytes + tokens * layer.shape.out_features * x.element_size()
    for name, timed in times.items():
        provider = layer.providers[name]
        run.add(
            **case,
            backend=name,
            check=checks[name],
            config=provider.config(x),
            copies=layer.copies,
            bytes=provider.bytes + traffic,
            during=during,
            **timed.row(),
        )
    cell = results.cells(run.records[-len(times) :], case["op"])[0]
    text = "  ".join(f"{name} {timed.median:.1f}" for name, timed in times.items())
    state = ", ".join(f"{value:g} {name}" for name, value in during.items())
    run.say(f"{cell}: {text} us, ratios {results.ratio_cell(cell, True)}; {state}")


def stop_rule(kind: str, quick: bool, seconds: float | None = None) -> timing.StopRule:
    """Decode needs precision; prefill also time, until the power limit holds the clocks."""
    if seconds is not None:
        return timing.StopRule(0.005, min_rounds=3, min_s=seconds, budget_s=seconds)
    if kind == "decode":
        return timing.StopRule(0.005, min_rounds=10 if quick else 30, min_s=0.1, budget_s=1.0)
    seconds = 0.3 if quick else 0.8
    return timing.StopRule(0.005, min_rounds=5, min_s=seconds, budget_s=3 * seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
