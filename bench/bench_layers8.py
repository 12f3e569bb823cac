"""Linear layers with quantised 2:4 weights against dense 8-bit layers, 16 bits, cuSPARSELt,
and vLLM's dense int4 kernels where vLLM can be imported.

    python -m bench layers8                                     fp8, then int8, Llama-3 8B and 70B
    python -m bench layers8 --dtype float8_e4m3fn --shapes 8b --tokens 1,16,1024 --seconds 0.3
    python -m bench layers8 --dtype int4 --tokens 1,4,16 --budget 140 --campaign NAME

Providers, checks and rotation: layers8.py. Every cell (shape, tokens, type) is checked, then all
providers are timed in turns in one process; its records are written at once. A run with --campaign
goes on where one of that name and --out was cut off.
"""

from __future__ import annotations

import torch

from . import cusparselt, results8, shapes, timing, vllm_int4
from .bench_linear import HANG_S, MARGIN_S, stop_rule
from .ceilings import bandwidths
from .layers import WrongResult
from .layers8 import PROVIDERS, Layer8
from .monitor import Monitor
from .options import Run, parser, watchdog

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_TOKENS = (1, 16, 64, 1024)
LIBRARIES = {"cusparselt": "cuSPARSELt", "marlin": "vLLM's Marlin", "machete": "vLLM's Machete"}
ALIASES = {"fp8": "float8_e4m3fn"}


def make_parser():
    result = parser("layers8", "Time linear layers with quantised 2:4 weights.", budget=540)
    result.add_argument("--dtype", default="fp8,int8", help="of fp8, int8, int4, comma-separated")
    result.add_argument("--shapes", help="8b, 70b, 1b or OUTxIN, comma-separated")
    result.add_argument("--tokens", help="numbers of tokens, comma-separated")
    result.add_argument("--providers", help="comma-separated (default: all of layers8.py)")
    result.add_argument(
        "--numbers", default="bfloat16", choices=("bfloat16", "float16"), help="of x and y"
    )
    result.add_argument(
        "--seconds", type=float, metavar="S", help="of timing per cell (default as in linear)"
    )
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    storages = [ALIASES.get(name, name) for name in args.dtype.split(",")]
    for name in storages:
        if name not in PROVIDERS:
            raise SystemExit(f"bench: expected --dtype of fp8, int8, int4, got {name!r}.")
    tokens = tuple(map(int, args.tokens.split(","))) if args.tokens else TOKENS
    tokens = QUICK_TOKENS if args.quick and not args.tokens else tokens
    failures: list[str] = []
    with Monitor() as monitor:
        bandwidths(run)
        for storage in storages:
            names = _providers(run, (storage, args.numbers), args.providers)
            for shape in shapes.select(args.shapes, "prefill", args.quick):
                _shape(run, monitor, (storage, args.numbers), shape, names, tokens, args, failures)
    print("\n".join(results8.summary(run.records)), flush=True)
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    run.close()
    return 1 if failures else 0


def _providers(run: Run, types: tuple[str, str], asked: str | None) -> tuple[str, ...]:
    """The providers that can run; records why a library cannot."""
    storage, numbers = types
    names = PROVIDERS[storage] if asked is None else tuple(asked.split(","))
    names = tuple(name for name in names if name in PROVIDERS[storage])
    if run.device.type == "cpu":
        return tuple(n for n in names if n in ("w8a16", "w8a8", "w8a8+quantize", "w4a16", "dense"))
    reasons: dict[str, str] = {}
    if "cusparselt" in names:
        run.say(f"trying cuSPARSELt with {storage} in a child process")
        reasons["cusparselt"] = cusparselt.probe(storage)
    if peers := [name for name in names if name in vllm_int4.NAMES]:
        run.say(f"trying {' and '.join(peers)} of vLLM in child processes")
        reasons |= vllm_int4.probe(peers, numbers, timeout=max(10, min(120, run.left / 2)))
    for name, reason in reasons.items():
        if reason:
            run.add(
                op="linear_peer",
                backend=name,
                check="child process",
                case=storage,
                metrics={"outcome": reason},
            )
            run.say(f"{LIBRARIES.get(name, name)} is not compared in {storage}: {reason}")
    return tuple(name for name in names if not reasons.get(name))


def _shape(run: Run, monitor: Monitor, types, shape, names, tokens_list, args, failures) -> None:
    storage, numbers = types
    case = dict(
        op="linear8",
        out_features=shape.out_features,
        in_features=shape.in_features,
        dtype=storage,
        case=numbers,
    )
    wanted = [n for n in tokens_list if not run.has(**case, tokens=n)]
    layer = None
    for tokens in wanted:
        if run.left < MARGIN_S:
            run.say(f"not measured: {shape} {storage} {tokens} tokens")
            continue
        rule = stop_rule("decode" if tokens <= 64 else "prefill", run.quick, args.seconds)
        try:
            with watchdog(HANG_S):
                if layer is None:
                    dtype = getattr(torch, numbers)
                    layer = Layer8(shape, storage, dtype, run.device, names)
                    run.say(f"{shape} {storage}: {layer.copies} copies of each weight")
                    for name, why in layer.refused.items():
                        run.say(f"{shape}, {LIBRARIES[name]} is left out: {why}")
                _cell(run, monitor, layer, {**case, "tokens": tokens}, rule, failures)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            failures.append(f"{shape} {storage} {tokens} tokens: {error}")
            run.say(failures[-1])
            if "CUDA error" in str(error):  # the context is gone, and with it all others
                raise


def _cell(
    run: Run, monitor: Monitor, layer: Layer8, case: dict, rule: timing.StopRule, failures
) -> None:
    tokens = case["tokens"]
    x, checks = layer.inputs(tokens), {}
    for name in layer.names:
        if not layer.takes(name, tokens):
            continue
        try:
            checks[name] = layer.check(name, x)
        except (WrongResult, NotImplementedError, RuntimeError, ValueError) as error:
            if "CUDA error" in str(error):
                raise
            text = f"{layer.shape} {tokens} tokens {case['dtype']}, {name}: {error}"
            if isinstance(error, vllm_int4.Refused):
                run.say(f"left out: {text}")
                continue
            failures.append(text)
            run.say(text)
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
    state = ", ".join(f"{value:g} {name}" for name, value in during.items())
    text = "  ".join(f"{name} {timed.median:.1f}" for name, timed in times.items())
    run.say(f"{layer.shape}, {tokens} tokens, {case['dtype']}: {text} us; {state}")
