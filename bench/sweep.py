"""Every config of the native kernels on every shape, and how far the one picked is from the best.

Up to 64 tokens: the row blocks and splits of the decode kernel; from 32 tokens all prefill tiles
too, so that where the two cross is a measurement. Above, all prefill tiles. Where the heuristics
pick the mma.sp kernel, its tiles as well; on other GPUs than Hopper, and when asked for, these
alone.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from . import timing
from .layers import Layer, WrongResult
from .options import Run, watchdog

DECODE_LIMIT = 64  # tokens that the decode kernel takes
PREFILL_FROM = 32  # tokens from which prefill tiles are timed beside it
HANG_S = 180.0
MARGIN_S = 6.0


def configs(tokens: int, mma: bool = False) -> dict[str, tuple[str, int]]:
    """{name: (native function, index of its config)}, named as cuda_backend.config does."""
    from sparsekern.backends.cuda import linear as cuda_backend

    wanted = {"mma"} if mma else {"decode"} if tokens <= DECODE_LIMIT else set()
    if not mma and tokens >= PREFILL_FROM:
        wanted |= {"prefill", "split"}
    return {name: of for name, of in cuda_backend.variants().items() if of[0] in wanted}


def workspace(device) -> Tensor:
    """What the prefill kernel wants: zeros, for launches that follow each other on one stream."""
    from sparsekern import _native

    size = _native.module().prefill_workspace_bytes()
    return torch.zeros(size, dtype=torch.uint8, device=device)


def launch(space: Tensor, kind: str, index: int, x: Tensor, w24) -> Tensor:
    """y = x · Wᵀ by one native kernel with one config; x contiguous."""
    from sparsekern import _native

    tokens, (out_features, in_features) = x.shape[0], w24.shape
    y = x.new_empty(tokens, out_features)
    linear = _native.module().Linear(
        kernel=kind,
        config=index,
        tokens=tokens,
        out_features=out_features,
        in_features=in_features,
        x_stride=in_features,
        y_stride=out_features,
        dtype=str(x.dtype).removeprefix("torch."),
    )
    linear(
        x=x.data_ptr(),
        values=w24.values.data_ptr(),
        metadata=w24.metadata.data_ptr(),
        y=y.data_ptr(),
        workspace=space.data_ptr(),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    return y


def run_jobs(run: Run, jobs, failures: list[str], mma: bool = False) -> list[dict]:
    """Measures what the time allows; returns one dict per cell, see `judge`.

    Args:
        mma: the configs of the mma.sp kernel also where the GPU has faster kernels.
    """
    judged = []
    for dtype, shape, _, tokens_list in jobs:
        layer = None
        for tokens in tokens_list:
            if run.left < MARGIN_S:
                run.say(f"no time for {shape}, {tokens} tokens")
                continue
            try:
                with watchdog(HANG_S):
                    layer = layer or Layer(shape, dtype, run.device, ("cuda",))
                    cell = _cell(run, layer, tokens, failures, mma)
            except RuntimeError as error:
                failures.append(f"{shape} {tokens} tokens: {error}")
                run.say(failures[-1])
                if "CUDA error" in str(error):  # the context is gone
                    return judged
                continue
            if cell:
                judged.append(cell)
    return judged


def checked(
    run: Run, layer: Layer, x: Tensor, wanted: dict[str, tuple[str, int]], failures: list[str]
) -> dict[str, list[timing.Call]]:
    """{name: one call per copy of the weight} of the configs whose output is exact.

    Args:
        layer: with a provider of the native kernels.      wanted: as from `configs`.
        failures: gets a line for each of the others.
    """
    tokens = x.shape[0]
    integers = layer.inputs(tokens, integers=True)
    weights = [layer.packed, *(layer.packed.clone() for _ in range(layer.copies - 1))]
    torch.cuda.synchronize()
    providers, known, space = {}, None, workspace(x.device)
    for name, (kind, index) in wanted.items():
        call = partial(launch, space, kind, index)
        try:
            known = layer.check_variant(call, name, integers, known)
        except (WrongResult, ValueError, NotImplementedError) as error:
            failures.append(f"{layer.shape} {tokens} tokens {name}: {error}")
            run.say(failures[-1])
            continue
        providers[name] = [partial(call, x, w) for w in weights]
    return providers


def _cell(run: Run, layer: Layer, tokens: int, failures: list[str], mma: bool) -> dict | None:
    from sparsekern.backends.cuda import linear as cuda_backend

    x = layer.inputs(tokens)
    picked = (cuda_backend.mma_config if mma else cuda_backend.config)(x, layer.packed)
    wanted = configs(tokens, mma)
    if picked.startswith("mma ") and not mma:
        hopper = not cuda_backend.hopper_refusal(x.get_device())
        wanted = (wanted if hopper else {}) | configs(tokens, mma=True)
    providers = checked(run, layer, x, wanted, failures)
    if not providers:
        return None
    rule = timing.StopRule(0.01, min_rounds=3 if run.quick else 5, min_s=0.2, budget_s=2.5)
    times = timing.compare(providers, run.timer, rule, warm_s=0.02)
    for name, timed in times.items():
        run.add(
            op="linear_config",
            backend=name,
            check="exact",
            picked=name == picked,
            tokens=tokens,
            out_features=layer.shape.out_features,
            in_features=layer.shape.in_features,
            dtype=str(layer.dtype).removeprefix("torch."),
            **timed.row(),
        )
    cell = judge(str(layer.shape), tokens, picked, {n: t.median for n, t in times.items()})
    run.say(describe(cell))
    return cell


def judge(shape: str, tokens: int, picked: str, us: dict[str, float]) -> dict:
    """{"shape", "tokens", "picked", "us", "best", "gap"}: gap = time of the pick / best - 1."""
    best = min(us, key=us.get)
    gap = us[picked] / us[best] - 1 if picked in us else None
    return dict(shape=shape, tokens=tokens, picked=picked, us=us, best=best, gap=gap)


def describe(cell: dict) -> str:
    order = sorted(cell["us"], key=cell["us"].get)[:3]
    fastest = ", ".join(f"{name} {cell['us'][name]:.1f}" for name in order)
    gap = "was not timed" if cell["gap"] is None else f"+{cell['gap']:.1%}"
    return f"{cell['shape']}, {cell['tokens']} tokens: {fastest} us; picked {cell['picked']}: {gap}"


def summary(judged: list[dict]) -> list[str]:
    """Mean and worst gap, the five largest, and how often each config was the best."""
    known = sorted((c for c in judged if c["gap"] is not None), key=lambda c: -c["gap"])
    if not known:
        return ["no cell where the picked config was timed"]
    mean = statistics.fmean(cell["gap"] for cell in known)
    lines = [f"picked config: {mean:.2%} from the best on average, {known[0]['gap']:.2%} at worst"]
    lines += [f"  {describe(cell)}" for cell in known[:5] if cell["gap"] > 0]
    wins: dict[str, int] = {}
    for cell in judged:
        wins[cell["best"]] = wins.get(cell["best"], 0) + 1
    ranking = sorted(wins.items(), key=lambda item: -item[1])
    lines.append("best most often: " + ", ".join(f"{name} ({n})" for name, n in ranking))
    return lines
