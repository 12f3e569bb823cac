"""Kernels side by side: what `sparsekern bench kernels` prints, a row as soon as it is measured.

    sparsekern bench kernels --shapes llama3-8b --tokens 1,16,1024 --out rows.jsonl --plot speed.svg

    sparsekern  the fastest variant of the native kernels that is exact (profiling/tune.py); on the
                CPU, and where there is no native module, the backend that sparsekern.linear takes
    dense       torch, that is cuBLAS on a GPU, on the weight before it was pruned
    triton      the Triton kernel
    cusparselt  the vendor's library, its algorithm searched, in a child process of its own: a
                kernel of it that dies takes the CUDA context with it. Timed there, not in turns
    NAME        a kernel of your own, from a file (`--kernel FILE`, see `load_kernel`)

Every output is checked before it is timed: sparsekern's kernels and yours on whole numbers, bit for
bit, and all of them against the float64 product within a bound, element by element. A kernel that
fails is a row that says so, without a time. Those of one cell are timed in turns (rounds.contest),
by replays of a CUDA graph over weights that rotate beyond the cache; x dense is the median of the
ratios of each round.

`roof` is the share of what this machine gave in the same run: the time in which the bytes of a call
can be read, or its products computed (the dense ceiling of cuBLAS; twice that for 2:4, which is the
ratio of the hardware), whichever is longer, over the time of the call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern import _native
from sparsekern.backends.compress import compress, decompress, prune_compress
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.errors import check, message
from sparsekern.formats import dtypes
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.formats.tile64 import pack
from sparsekern.ops import linear_op as ops
from sparsekern.profiling import provenance, rounds, timer
from sparsekern.profiling.layer_bench import copies_beyond_cache
from sparsekern.prune import magnitude_mask

OP = "sparsekern bench kernels"
SCHEMA = "sparsekern.kernel_bench/1"
# (out_features, in_features): q+k+v, o, gate+up, down.
MODELS = {
    "llama3-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    "llama3-3b": ((5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)),
    "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in dtypes.PLAIN}
EXACT_SLACK, PEER_SLACK = 2.0**-9, 2.0**-5  # of rms(y); peers may round partial sums to 16 bits
REFERENCE_ELEMENTS = 2**27  # of float64 intermediates at a time
CHILD_S = 300.0
CEILING_BYTES = {"cuda": 2**31, "cpu": 2**26}
CEILING_SIZE = {"cuda": 8192, "cpu": 1024}  # of the square product that measures the ceiling
SPARSE_RATIO = 2.0  # 2:4 products per second over dense ones, of the hardware

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ceilings:
    """What this machine gave: TB/s of a read, dense TFLOPS of a large product."""

    read_tb_s: float
    copy_tb_s: float
    dense_tflops: float

    def share(self, us: float, moved: int, flops: int, sparse: bool) -> tuple[float, str]:
        """(time of the nearest roof / us, "memory" or "compute")."""
        memory = moved / self.read_tb_s / 1e6
        compute = flops / (self.dense_tflops * (SPARSE_RATIO if sparse else 1.0)) / 1e6
        return max(memory, compute) / us, "memory" if memory >= compute else "compute"


@dataclass
class Row:
    """One kernel in one cell. us: quantiles per call, empty when nothing was timed (see status)."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str
    device: str
    kernel: str
    variant: str
    status: str  # "ok", or why there is no time
    check: str = ""
    timer: str = ""
    us: dict[str, float] = field(default_factory=dict)
    bytes: int = 0  # that a call reads and writes at least
    flops: int = 0  # 2 · tokens · out_features · in_features: dense-equivalent
    roof: float | None = None
    bound: str = ""
    speedup: float | None = None  # over dense, of the same cell
    during: dict[str, float] = field(default_factory=dict)  # clocks and power while it was timed

    def text(self) -> str:
        """The row as a line of the table."""
        cells = [f"{self.out_features}x{self.in_features}", str(self.tokens), self.kernel]
        if self.status != "ok":
            return _line(*cells) + self.status
        cells += [
            f"{self.us['p50']:.2f}",
            "" if self.speedup is None else f"{self.speedup:.2f}",
            "" if self.roof is None else f"{self.roof:.0%} {self.bound}",
            f"{self.during['clock_sm_mhz']:.0f}" if "clock_sm_mhz" in self.during else "",
            f"{self.during['power_draw_w']:.0f}" if "power_draw_w" in self.during else "",
        ]
        return _line(*cells) + self.variant


_WIDTHS = (12, 6, 14, 10, 8, 12, 6, 6)
_HEAD = ("out x in", "tokens", "kernel", "us", "x dense", "of roof", "MHz", "W")


def _line(*cells: str) -> str:
    return "".join(cell.rjust(width) + "  " for cell, width in zip(cells, _WIDTHS))


# ---- a kernel of your own ------------------------------------------------------------------------


@dataclass(frozen=True)
class UserKernel:
    """A kernel from a file; see `load_kernel`."""

    name: str
    layout: str
    build: Callable[[Sparse24, int], Linear]


def load_kernel(path: str | Path) -> UserKernel:
    """Register a kernel from a Python file, which is executed.

    The file defines one of

        def linear(x, w24): ...            y = x · Wᵀ
        def build(w24, tokens): ...        a function f(x) -> y; its making is not timed

    with x [tokens, in_features] contiguous, y [tokens, out_features] of the dtype of x, and w24 the
    Sparse24 weight; and may define NAME (else the file's name) and LAYOUT, "rowmajor" (default) or
    "tile64". On a GPU calls run on the current stream, and must not wait for it: they are captured
    in a CUDA graph.

    Raises:
        FileNotFoundError: no such file.   ValueError: code that does not run, neither function, or
        an unknown layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{OP}: no file at {path}.")
    spec = importlib.util.spec_from_file_location(f"_kernel_{path.stem}", path)
    check(spec is not None, OP, "--kernel to be a .py file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        remedy = f"Try: python {path}."
        raise ValueError(message(OP, f"--kernel {path} to run", got, remedy)) from error
    layout = getattr(module, "LAYOUT", "rowmajor")
    check(layout in ("rowmajor", "tile64"), OP, "LAYOUT 'rowmajor' or 'tile64'", repr(layout))
    build: Any = getattr(module, "build", None)
    both = "a function linear(x, w24) or build(w24, tokens)"
    found = callable(build) or callable(getattr(module, "linear", None))
    check(found, OP, both, f"neither in {path}")
    if build is None:

        def build(w24: Sparse24, tokens: int) -> Linear:
            return lambda x: module.linear(x, w24)

    return UserKernel(str(getattr(module, "NAME", path.stem)), layout, build)


# ---- checks --------------------------------------------------------------------------------------


def wrong(y: object, x: Tensor, weight: Tensor, exact: bool, slack: float) -> str:
    """Why y is not x · weightᵀ; empty when it is.

    exact: every element is the float64 result rounded once (whole numbers); else
    |y - y64| <= roundoff · |y64| + slack · rms(y64).
    """
    wanted = (x.shape[0], weight.shape[0])
    if not isinstance(y, Tensor) or y.shape != wanted or y.dtype != x.dtype:
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        return f"expected y {wanted} {x.dtype}, got {got}"
    x64, bad, first = x.double(), 0, ""
    step = max(1, REFERENCE_ELEMENTS // max(x.shape))
    for start in range(0, weight.shape[0], step):
        y64 = x64 @ weight[start : start + step].double().t()
        part = y[:, start : start + step]
        if exact:
            good = y64.to(y.dtype) == part
        else:
            roundoff = slack if slack == PEER_SLACK else 1.01 * ROUNDOFF[y.dtype]
            bound = roundoff * y64.abs() + slack * y64.square().mean().sqrt()
            good = (part.double() - y64).abs() <= bound
        count = int((~good).sum())
        if count and not first:
            token, column = (~good).nonzero()[0].tolist()
            value, right = part[token, column].item(), y64[token, column].item()
            first = f"first at token {token}, out_feature {start + column}: {value} not {right}"
        bad += count
    return f"wrong in {bad} of {y.numel()} elements, {first}" if bad else ""


# ---- measuring -----------------------------------------------------------------------------------


class Problem:
    """Weights and inputs of one shape; `cell` measures it at one number of tokens."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)
        weight = torch.empty(shape, dtype=dtype, device=device)
        weight.normal_(0, shape[1] ** -0.5, generator=self.generator)
        self.dense = weight
        self.rows = compress(weight, magnitude_mask(weight))
        self.pruned = decompress(self.rows)
        whole = self.whole(torch.empty_like(weight))
        self.whole_rows = prune_compress(whole)
        self.whole_dense = decompress(self.whole_rows)

    def whole(self, like: Tensor) -> Tensor:
        """Fills with whole numbers from -2 to 2: every sum is exact in float32."""
        return like.random_(0, 5, generator=self.generator).sub_(2)

    def x(self, tokens: int) -> Tensor:
        x = torch.empty(tokens, self.shape[1], dtype=self.dtype, device=self.device)
        return x.normal_(generator=self.generator)

    def copies(self, nbytes: int, x: Tensor) -> int:
        if self.device.type != "cuda":
            return 1
        return int(copies_beyond_cache(nbytes, x.nbytes))

    def in_layout(self, w24: Sparse24, layout: str) -> Sparse24:
        return pack(w24) if layout == "tile64" else w24


@dataclass
class Candidate:
    """A kernel in a cell: calls to time, or status and why there are none."""

    name: str
    variant: str
    status: str
    check: str = ""
    calls: Sequence[timer.Call] = ()
    bytes: int = 0
    sparse: bool = True


def candidate(
    problem: Problem,
    x: Tensor,
    name: str,
    layout: str,
    build: Callable[[Sparse24], Linear],
    variant: str = "",
) -> Candidate:
    """A kernel on 2:4 weights that must be exact, checked; whatever it raises is its status."""
    try:
        whole = problem.whole(torch.empty_like(x))
        y = build(problem.in_layout(problem.whole_rows, layout))(whole)
        if why := wrong(y, whole, problem.whole_dense, True, 0.0):
            return Candidate(name, variant, f"FAILED on whole numbers: {why}")
        first = problem.in_layout(problem.rows, layout)
        if why := wrong(build(first)(x), x, problem.pruned, False, EXACT_SLACK):
            return Candidate(name, variant, f"FAILED: {why}")
        weights = [first]
        weights += [first.clone() for _ in range(problem.copies(first.nbytes, x) - 1)]
        functions = [build(weight) for weight in weights]
        _wait(problem.device)
    except Exception as error:
        return Candidate(name, variant, f"FAILED: {_brief(error)}")
    calls = [lambda f=f: f(x) for f in functions]
    return Candidate(name, variant, "ok", "exact+bounded", calls, first.nbytes)


def dense(problem: Problem, x: Tensor) -> Candidate:
    """torch on the weight before it was pruned."""
    y = torch.nn.functional.linear(x, problem.dense)
    if why := wrong(y, x, problem.dense, False, PEER_SLACK):
        return Candidate("dense", "", f"FAILED: {why}", sparse=False)
    nbytes = problem.dense.nbytes
    weights = [problem.dense]
    weights += [problem.dense.clone() for _ in range(problem.copies(nbytes, x) - 1)]
    calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    what = "cuBLAS" if problem.device.type == "cuda" else "torch"
    return Candidate("dense", what, "ok", "bounded", calls, nbytes, False)


def ours(problem: Problem, x: Tensor) -> list[Candidate]:
    """sparsekern's kernels: the native one's best variant and Triton, or the backend there is."""

    def by(backend: str) -> Callable[[Sparse24], Linear]:
        return lambda w24: lambda x: ops.linear(x, w24, backend=backend)

    def config(w24: Sparse24, backend: str) -> str:
        shown = ops.explain(x, w24, backend=backend)
        return f"{shown.backend} {shown.config}".strip()

    if problem.device.type != "cuda":
        name = config(problem.rows, "cpu")
        return [candidate(problem, x, "sparsekern", "rowmajor", by("cpu"), name)]
    found = []
    if cuda_backend.packs(problem.device, problem.dtype):
        found.append(_native_best(problem, x))
    else:
        reason = _native.reason() or f"no native kernels for {problem.dtype} here"
        found.append(Candidate("sparsekern", "", f"absent: {reason}"))
    from sparsekern.backends import triton

    if triton.reason():
        found.append(Candidate("triton", "", f"absent: {triton.reason()}"))
    else:
        name = config(problem.rows, "triton")
        found.append(candidate(problem, x, "triton", "rowmajor", by("triton"), name))
    return found


def _native_best(problem: Problem, x: Tensor) -> Candidate:
    """The fastest variant that is exact, found as `sparsekern tune` finds it."""
    from sparsekern.profiling import tune

    tokens, device = x.shape[0], problem.device
    try:
        layer = tune.Layer(*problem.shape, problem.dtype, device)
        layer.warm_up()
        at = layer.cell(tokens)
        rule = rounds.rule(tokens, *problem.shape)
        best = tune.tune_cell(tokens, layer.names(tokens), at.sampler, at.wrong, rule=rule)
    except Exception as error:
        return Candidate("sparsekern", "", f"FAILED: {_brief(error)}")
    if best is None:
        return Candidate("sparsekern", "", "FAILED: no variant is exact")
    variant, space = best.best, layer.workspace

    def build(w24: Sparse24) -> Linear:
        def run(x: Tensor) -> Tensor:
            y = x.new_empty(x.shape[0], w24.shape[0])
            cuda_backend.launcher(variant, x, w24, y, space)()
            return y

        return run

    return candidate(problem, x, "sparsekern", "tile64", build, variant)


def cusparselt_row(shape: tuple[int, int], tokens: int, dtype: str, device: str) -> dict[str, Any]:
    """What the child process says of cuSPARSELt: {"status", "variant", "us", "bytes"}."""
    command = [sys.executable, "-m", __name__, *map(str, shape), str(tokens), dtype, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S)
    except subprocess.TimeoutExpired:
        return {"status": f"FAILED: no answer of the child process within {CHILD_S:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and "status" in answer:
                return answer
    last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    return {"status": f"FAILED: the child process ended with {done.returncode}: {last[:160]}"}


def _child(arguments: Sequence[str]) -> dict[str, Any]:
    """Searches, checks and times cuSPARSELt; run in a process of its own."""
    out_features, in_features, tokens = map(int, arguments[:3])
    dtype, device = getattr(torch, arguments[3]), torch.device(arguments[4])
    from sparsekern.backends.cusparselt import library, linear, search

    if device.type != "cuda" or not torch.cuda.is_available():
        return {"status": "absent: no CUDA GPU"}
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    if why := library.refusal(index, dtype) or library.shape_refusal(out_features, in_features):
        return {"status": f"absent: {why}"}
    problem = Problem((out_features, in_features), dtype, torch.device("cuda", index))
    x, first = problem.x(tokens), linear.pack(problem.rows)
    search.search(first, tokens, store=False)
    variant = str(linear.config(x, first))
    y = ops.linear(x, first, backend="cusparselt")
    if why := wrong(y, x, problem.pruned, False, PEER_SLACK):
        return {"status": f"FAILED: {why}", "variant": variant}
    weights = [first, *(first.clone() for _ in range(problem.copies(first.nbytes, x) - 1))]
    calls = [lambda w=w: ops.linear(x, w, backend="cusparselt") for w in weights]
    with provenance.watch() as during:
        timing = timer.compare({"cusparselt": calls}, "graph", RULES["cuda"])["cusparselt"]
    us = {name: round(value, 4) for name, value in timing.us.items()}
    answer = {"status": "ok", "variant": variant, "us": us, "bytes": first.nbytes}
    return {**answer, "check": "bounded", "timer": "graph, own process", "during": during()}


RULES = {
    "cuda": timer.StopRule(0.005, min_rounds=10, min_s=0.3, budget_s=1.5),
    "cpu": timer.StopRule(0.02, min_rounds=3, budget_s=1.0),
}


def ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Bandwidth of a read and a copy of a large buffer, and the rate of a large dense product."""
    kind = device.type
    source = torch.rand(CEILING_BYTES[kind] // 4, dtype=torch.float32, device=device)
    target, n = torch.empty_like(source), CEILING_SIZE[kind]
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    calls: dict[str, Sequence[timer.Call]] = {
        "read": [lambda: source.sum()],
        "copy": [lambda: target.copy_(source)],
        "product": [lambda: a @ b.t()],
    }
    rule = timer.StopRule(0.01, min_rounds=5, budget_s=3.0)
    times = timer.compare(calls, "events" if kind == "cuda" else "wall", rule)
    us = {name: timing.median for name, timing in times.items()}
    nbytes = source.nbytes
    return Ceilings(
        nbytes / us["read"] / 1e6, 2 * nbytes / us["copy"] / 1e6, 2 * n**3 / us["product"] / 1e6
    )


def cell(
    problem: Problem, tokens: int, limits: Ceilings, kernels: Sequence[UserKernel] = ()
) -> Iterator[Row]:
    """The rows of one cell: dense first, then the others; all are timed in turns."""
    x = problem.x(tokens)
    with torch.inference_mode():
        found = [dense(problem, x), *ours(problem, x)]
        for kernel in kernels:

            def build(w24: Sparse24, kernel: UserKernel = kernel) -> Linear:
                return kernel.build(w24, tokens)

            found.append(candidate(problem, x, kernel.name, kernel.layout, build))
        kind = problem.device.type
        which = "graph" if kind == "cuda" else "wall"
        samplers: dict[str, timer.Sampler] = {}
        for one in found:
            if one.status != "ok":
                continue
            try:
                samplers[one.name] = timer.SAMPLERS[which](one.calls, 0.05)
            except Exception as error:  # what cannot be captured
                one.status = f"FAILED while it was captured: {_brief(error)}"
        sustained = kind == "cuda" and rounds.rule(tokens, *problem.shape) is rounds.SUSTAINED
        rule = rounds.SUSTAINED if sustained else RULES[kind]
        with provenance.watch() as during:
            standing = rounds.contest(samplers, rule, peers=samplers) if samplers else None
    state = during()
    samples = {} if standing is None else standing.values
    failed = {} if standing is None else standing.failed
    traffic = x.nbytes + tokens * problem.shape[0] * x.element_size()
    reference: float | None = None
    for one in found:
        if one.status == "ok" and one.name not in samples:
            one.status = f"FAILED while it was timed: {failed.get(one.name, 'as all did')}"
        row = _row(problem, tokens, one.name, one.variant, one.status)
        if one.status == "ok":
            taken = samples[one.name]
            row.us = {f"p{p}": round(timer.quantile(taken, p / 100), 4) for p in (20, 50, 80)}
            row.check, row.timer, row.bytes, row.during = one.check, which, one.bytes, state
            _judge(row, traffic, limits, one.sparse, reference)
            reference = row.us["p50"] if one.name == "dense" else reference
            if row.speedup is not None and standing is not None:  # round by round
                row.speedup = round(1 / standing.ratio(one.name, "dense").middle, 4)
        yield row
    if kind == "cuda":
        answer = cusparselt_row(problem.shape, tokens, _name(problem.dtype), str(problem.device))
        row = _row(
            problem, tokens, "cusparselt", answer.get("variant", ""), str(answer.pop("status"))
        )
        if row.status == "ok":
            for key in ("us", "bytes", "check", "timer", "during"):
                setattr(row, key, answer[key])
            _judge(row, traffic, limits, True, reference)
        yield row


def _row(problem: Problem, tokens: int, kernel: str, variant: str, status: str) -> Row:
    flops = 2 * tokens * problem.shape[0] * problem.shape[1]
    device = problem.device.type
    row = Row(*problem.shape, tokens, _name(problem.dtype), device, kernel, variant, status)
    row.flops = flops
    return row


def _judge(row: Row, traffic: int, limits: Ceilings, sparse: bool, dense: float | None) -> None:
    """Adds the bytes of x and y, the share of the roof and the speed-up."""
    row.bytes += traffic
    share, row.bound = limits.share(row.us["p50"], row.bytes, row.flops, sparse)
    row.roof = round(share, 4)
    if dense is not None:
        row.speedup = round(dense / row.us["p50"], 4)


def bench_kernels(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    kernels: Sequence[UserKernel] = (),
    out: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[Row], Ceilings]:
    """Measure all cells, a line to `say` for each row as it is known.

    Args:
        shapes: (out_features, in_features), in_features a multiple of 4.
        tokens: numbers of tokens.   dtype, device: of weights and activations.
        kernels: further ones, from `load_kernel`.
        out: file to which a JSON object per row is appended.
        say: gets the head of the table, then its rows.
    Returns:
        (rows, ceilings).
    Raises:
        ValueError: a size is not positive, in_features no multiple of 4, or two kernels of a name.
    """
    for out_features, in_features in shapes:
        good = min(out_features, in_features, *tokens) > 0 and in_features % 4 == 0
        got = f"{out_features}x{in_features}, tokens {list(tokens)}"
        check(good, OP, "positive sizes, in_features a multiple of 4", got)
    names = ["dense", "sparsekern", "triton", "cusparselt", *(k.name for k in kernels)]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, OP, "kernels of different names", repr(twice), "Set NAME in the file.")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    run = {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    rows: list[Row] = []
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        limits = ceilings(dtype, device)
        say(
            f"roofs: read {limits.read_tb_s:.3g} TB/s, copy {limits.copy_tb_s:.3g} TB/s, dense "
            f"{limits.dense_tflops:.4g} TFLOPS (2:4: twice that); {_name(dtype)}, {run['machine']}"
        )
        say(_line(*_HEAD) + "variant")
        for shape in shapes:
            problem = Problem(shape, dtype, device)
            for number in tokens:
                for row in cell(problem, number, limits, kernels):
                    rows.append(row)
                    say(row.text())
                    if out is not None:
                        entry = {**run, **asdict(row), "ceilings": asdict(limits)}
                        with open(out, "a", encoding="utf-8") as file:
                            file.write(json.dumps(entry) + "\n")
    return rows, limits


# ---- shared parts --------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a kernel may read weights before queued work has ended


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1:])))
