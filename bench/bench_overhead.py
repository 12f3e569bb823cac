"""What one eager call costs the host: SparseLinear against nn.Linear, module by module; and the
cuSPARSELt backend against the library's bare C function and against torch's own use of it. Then
what the public functions take on the GPU: `sk.linear(x, sk.compress(w))` as the README writes it,
against SparseLinear and dense, by CUDA graphs (`public_call`).

A sample is the host's time for a batch of calls, divided by their number; the GPU's queue is
drained before each batch and the batch fits in it, so nothing in the sample waits for the GPU.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from sparsekern import SparseLinear, _native, compress, decompress, linear, prune_compress
from sparsekern.backends.cusparselt import library as cusparselt_library
from sparsekern.backends.cusparselt import linear as cusparselt_backend
from sparsekern.ops import linear_op as ops

from . import cusparselt, timing
from .layers import check_bounded
from .options import Run, parser, watchdog

CALLS = 64  # of one batch: far below the length of a stream's queue
CASES = ((4096, 4096, 1), (4096, 4096, 256))  # out_features, in_features, tokens
HANG_S = 120.0


def make_parser():
    result = parser("overhead", "Host time of one eager call of a layer.", budget=30)
    result.add_argument("--dtype", default="bfloat16")
    result.add_argument(
        "--shape",
        action="append",
        metavar="OUTxINxTOKENS",
        help="default: " + ", ".join("x".join(map(str, case)) for case in CASES),
    )
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    cases = [tuple(int(n) for n in text.split("x")) for text in args.shape or ()] or CASES
    with watchdog(HANG_S + args.budget), torch.inference_mode():
        for case in cases:
            measure(run, *case, getattr(torch, args.dtype))
        for case in cases:
            public(run, *case, getattr(torch, args.dtype))
    run.close()
    return 0


def measure(run: Run, out_features: int, in_features: int, tokens: int, dtype) -> None:
    """Times and records one problem."""
    providers, backend = layers(out_features, in_features, tokens, dtype, run.device)
    samplers = {name: host_sampler(call, run.device) for name, call in providers.items()}
    kernels = dict.fromkeys(samplers, backend)
    for name, (sampler, kernel) in vendor(out_features, in_features, tokens, dtype, run).items():
        samplers[name], kernels[name] = sampler, kernel
    rounds, seconds = (20, 0.5) if run.quick else (200, 5.0)
    rule = timing.StopRule(0.01, min_rounds=rounds, budget_s=seconds)
    samples, _ = timing.sample_rounds(samplers, rule)
    case = f"{out_features}x{in_features}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    for name, taken in samples.items():
        metrics = {
            f"us_p{int(100 * q)}": round(timing.quantile(taken, q), 3) for q in (0.2, 0.5, 0.8)
        }
        run.add(
            op="eager_call",
            backend=name,
            check="bounded",
            case=case,
            kernel=kernels[name],
            metrics=metrics,
        )
        run.say(f"{case}: {name} {metrics['us_p50']} us per call")


def public(run: Run, out_features: int, in_features: int, tokens: int, dtype: torch.dtype) -> None:
    """Times and records one problem through the public functions, nothing packed by hand."""
    generator = torch.Generator(run.device).manual_seed(0)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=run.device)
    weight.normal_(0, in_features**-0.5, generator=generator)
    x = torch.empty(tokens, in_features, dtype=dtype, device=run.device).normal_(
        generator=generator
    )
    pruned = decompress(prune_compress(weight))
    size = out_features * in_features * weight.element_size() // 2
    count = timing.rotations(size) if run.device.type == "cuda" else 2
    weights = [compress(pruned) for _ in range(count)]
    modules = [SparseLinear.from_sparse24(compress(pruned)) for _ in range(count)]
    copies = [weight.clone() for _ in range(count)]
    calls = {
        "dense": [lambda w=w: nn.functional.linear(x, w) for w in copies],
        "SparseLinear": [lambda m=m: m(x) for m in modules],
        "sk.linear(x, sk.compress(w))": [lambda w=w: linear(x, w) for w in weights],
    }
    for name, (call, *_) in calls.items():
        check_bounded(name, call(), x, weight if name == "dense" else pruned, 2.0**-5, ours=False)
    rule = timing.StopRule(0.005, min_rounds=10 if run.quick else 50, budget_s=2.0)
    times = timing.compare(calls, run.timer, rule)
    layouts = {"SparseLinear": modules[0].weight.layout, "dense": "dense"}
    for name, timed in times.items():
        run.add(
            op="public_call",
            backend=name,
            check="bounded",
            out_features=out_features,
            in_features=in_features,
            tokens=tokens,
            dtype=str(dtype).removeprefix("torch."),
            kernel=layouts.get(name, weights[0].layout),
            **timed.row(),
        )
    dense = times["dense"].median
    text = ", ".join(f"{n} {t.median:.2f} us ({dense / t.median:.2f})" for n, t in times.items())
    run.say(f"{out_features}x{in_features}, {tokens} tokens: {text}")


def vendor(out_features, in_features, tokens, dtype, run: Run) -> dict:
    """{name: (sampler, what computes)} of cuSPARSELt, every output checked; the same plan and
    algorithm (the default) for all but torch, which makes its own. Tokens are padded beforehand.

        C function          cusparseLtMatmul alone, many times from C++, plan cached
        binding             the same through the native module
        cusparselt_backend  and the output allocated, the plan looked up
        sparsekern.linear   and the arguments checked
        SparseLinear        and the module
        torch               torch._cslt_sparse_mm
    """
    index = run.device.index or 0 if run.device.type == "cuda" else -1
    if why := cusparselt_library.refusal(index, dtype):
        run.say(f"without cuSPARSELt: {why}")
        return {}
    generator = torch.Generator(run.device).manual_seed(0)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=run.device)
    weight.normal_(0, in_features**-0.5, generator=generator)
    rowmajor = prune_compress(weight, layout="rowmajor")
    x = torch.empty(tokens, in_features, dtype=dtype, device=run.device)
    x = cusparselt.padded(x.normal_(generator=generator))
    w24, pruned = cusparselt_backend.pack(rowmajor), decompress(rowmajor)
    y = x.new_empty(x.shape[0], out_features)
    native, stream = _native.module(), torch.cuda.current_stream().cuda_stream
    plan, workspace_bytes, _ = native.cusparselt_plan(
        device=index,
        dtype=cusparselt_library.DTYPES[dtype],
        y_dtype=cusparselt_library.DTYPES[dtype],
        out_features=out_features,
        tokens=x.shape[0],
        in_features=in_features,
        x_stride=in_features,
        y_stride=out_features,
        bias=0,
        relu=False,
        channel_scale=False,
        **cusparselt_backend.Algorithm()._asdict(),
    )
    workspace = x.new_empty(workspace_bytes, dtype=torch.uint8)
    module = SparseLinear.from_sparse24(w24, packed="cusparselt")
    arguments = (
        plan,
        w24.values.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        workspace.data_ptr(),
        stream,
    )

    def bare() -> float:
        torch.cuda.synchronize()
        names = ("plan", "blob", "x", "y", "workspace", "stream")
        named = dict(zip(names, arguments, strict=True))
        return native.cusparselt_time_matmul(**named, calls=CALLS) * 1e6 / CALLS

    def binding():
        native.cusparselt_matmul(*arguments)
        return y

    calls = {
        "cuSPARSELt binding": binding,
        "cusparselt_backend.linear": lambda: cusparselt_backend.linear(x, w24, None, None),
        "sparsekern.linear, cuSPARSELt": lambda: ops.linear(x, w24, backend="cusparselt"),
        "SparseLinear, cuSPARSELt": lambda: module(x),
    }
    config = cusparselt_backend.config(x, w24)
    kernels = dict.fromkeys(["cuSPARSELt C function", *calls], config)
    if not cusparselt.available():
        blob = cusparselt.compress(pruned)
        calls["torch._cslt_sparse_mm"] = lambda: cusparselt.linear(blob, x, cusparselt.Algorithm(0))
        kernels["torch._cslt_sparse_mm"] = f"cuSPARSELt {torch.backends.cusparselt.version()}"
    for name, call in calls.items():
        y.fill_(float("nan"))
        check_bounded(name, call(), x, pruned, 2.0**-5, ours=False)
    samplers = {name: host_sampler(call, run.device) for name, call in calls.items()}
    samplers = {"cuSPARSELt C function": bare, **samplers}
    return {name: (sampler, kernels[name]) for name, sampler in samplers.items()}


def layers(out_features, in_features, tokens, dtype, device):
    """({name: call}, the backend that computes), every output checked."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
    weight.normal_(0, in_features**-0.5, generator=generator)
    x = torch.empty(tokens, in_features, dtype=dtype, device=device).normal_(generator=generator)
    w24 = prune_compress(weight)
    pruned = decompress(w24)
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)
    linear.weight.data = pruned
    sparse = SparseLinear.from_sparse24(w24)
    w24 = sparse.weight  # in the layout that the module prefers
    if device.type == "cuda":
        torch.cuda.synchronize()
    calls = {
        "nn.Linear": lambda: linear(x),
        "SparseLinear": lambda: sparse(x),
        "sparsekern.linear": lambda: ops.linear(x, w24),
    }
    explanation = ops.explain(x, w24)
    if explanation.backend == "cuda":
        from sparsekern.backends.cuda import linear as cuda_backend

        calls["cuda_backend.linear"] = lambda: cuda_backend.linear(x, w24, None, None)
    for name, call in calls.items():
        check_bounded(name, call(), x, pruned, 2.0**-5, ours=False)
    return calls, f"{explanation.backend} {explanation.config}"


def host_sampler(call: timing.Call, device) -> timing.Sampler:
    """Microseconds of the host's time per call, over a batch of CALLS."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(CALLS):
        call()

    def sample() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) * 1e6 / CALLS

    return sample
