"""The mma.sp kernel against cuBLAS's dense mma.sync kernels, on one GPU.

    python -m bench dense_mma --budget 540
    python -m bench dense_mma --shapes 4096x4096 --tokens 16,2048 --dtype bfloat16,float16

On Hopper torch's cuBLAS runs wgmma kernels, which say nothing about what the mma.sp kernel gains
over the dense kernels of the GPUs that it is for. cuBLASLt has these kernels on Hopper, too. For
each cell (shape, tokens, dtype):

    1. of every algorithm of cuBLASLt (cublaslt.py) a few configurations are launched under torch's
       profiler; an algorithm goes on when the name of a kernel says mma.sync (`is_mma_sync`);
    2. as many configurations of these as SCREEN_S allows are launched in the same way, and those
       that ran mma.sync kernels alone are ranked by the profiler's times;
    3. the outputs of the first FINALISTS are checked, and the right ones timed against each other;
    4. so are all tiles of the mma.sp kernel;
    5. the best of both and "dense" (torch: what cuBLAS prefers on this GPU) are timed in turns.

The winners of 3 and 4 are chosen on this machine for this cell, so neither side depends on how good
its heuristics are. Without a profiler that sees kernels nothing is measured.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import cublaslt, sweep, timing
from .bench_linear import stop_rule
from .layers import OURS_SLACK, PEER_SLACK, Layer, WrongResult, check_bounded
from .monitor import Monitor
from .options import Run, parser, watchdog
from .shapes import select, token_counts

SHAPES, TOKENS = "28672x4096,8192x8192,4096x4096", "16,128,2048,8192"
PEER, OURS, TORCH = "dense mma.sync", "cuda-mma", "dense"
HANG_S, MARGIN_S = 180.0, 20.0
DECODE_TOKENS = 64  # up to here a cell is timed as decode in bench_linear
SPLIT_TOKENS = 256  # up to here in_features are also split, into SPLITS
SPLITS = (1, 2, 4)
PROBES = 6  # configurations of an algorithm that tell what kernels it has
SCREEN_S, MOST = 4.0, 1024  # of the ranking by the profiler: seconds, launches
SLOW_FLOPS, SLOW_BYTES = 2e14, 1e12  # per second, of a bad configuration, for that estimate alone
FINALISTS = 8

Kernel = tuple[str, float]  # name, microseconds


class ProfilerBlind(RuntimeError):
    """torch's profiler does not see the kernels of this machine."""


def make_parser():
    result = parser("dense_mma", "mma.sp against cuBLAS's dense mma.sync kernels.", budget=540)
    result.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or both")
    result.add_argument("--shapes", default=SHAPES, help=f"as in linear (default {SHAPES})")
    result.add_argument("--tokens", default=TOKENS, help=f"comma-separated (default {TOKENS})")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run, failures = Run(path, args), []
    dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
    shapes, tokens_list = select(args.shapes, "prefill"), token_counts(args.tokens, "prefill")
    try:
        with watchdog(HANG_S):
            library = prepare(run.device)
        run.say(f"cuBLASLt {library.version}")
        with Monitor() as monitor:
            for dtype in dtypes:
                for shape in shapes:
                    if not _shape(run, monitor, library, shape, dtype, tokens_list, failures):
                        raise RuntimeError("bench: the CUDA context is gone.")
    except RuntimeError as error:  # of `prepare`, or the context is gone
        failures.append(str(error))
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    run.close()
    return 1 if failures else 0


def prepare(device: torch.device) -> cublaslt.Library:
    """cuBLASLt, on a machine where kernels have names.

    Raises:
        CublasLtError: no GPU or no library.      ProfilerBlind: no kernel is seen.
    """
    if device.type != "cuda":
        raise cublaslt.CublasLtError(
            f"bench: dense_mma: expected a CUDA GPU, got device {device}. It has no dry run."
        )
    # Graphs are captured between sessions; taking the profiler's library down and up again around
    # them has crashed (github.com/pytorch/pytorch/pull/150957).
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    square = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    torch.mm(square, square)  # makes the context, and torch loads its library
    (kernels,) = launched([lambda: torch.mm(square, square)], marker(device))
    if not kernels:
        raise ProfilerBlind(
            "bench: expected torch.profiler to name the kernel of a matrix product, got none. "
            "Without names mma.sync kernels cannot be told; nothing was measured."
        )
    return cublaslt.load()


# ---- cells ---------------------------------------------------------------------------------------


def _shape(run: Run, monitor, library, shape, dtype, tokens_list, failures: list[str]) -> bool:
    """All cells of one shape for which there is time; False when the GPU's context is gone."""
    name = str(dtype).removeprefix("torch.")
    case = dict(
        op="mma_era", out_features=shape.out_features, in_features=shape.in_features, dtype=name
    )
    layer = None
    for tokens in tokens_list:
        if run.has(**case, tokens=tokens):
            continue
        what = f"{shape} {tokens} tokens {name}"
        if run.left < MARGIN_S:
            run.say(f"no time for {what}")
            continue
        try:
            with watchdog(HANG_S):
                layer = layer or Layer(shape, dtype, run.device, (OURS, TORCH))
                _cell(run, monitor, library, layer, {**case, "tokens": tokens}, failures)
        except (RuntimeError, NotImplementedError) as error:
            failures.append(f"{what}: {error}")
            run.say(failures[-1])
            if "CUDA error" in str(error):
                return False
    return True


def _cell(run: Run, monitor, library, layer: Layer, case: dict, failures: list[str]) -> None:
    tokens = case["tokens"]
    x = layer.inputs(tokens)
    dense = layer.providers[TORCH].weight
    weights = [dense, *(dense.clone() for _ in range(layer.copies - 1))]
    sizes = layer.shape.out_features, layer.shape.in_features, tokens
    with contextlib.closing(cublaslt.Problem(library, *sizes, layer.dtype)) as problem:
        peer, peer_calls, details = best_peer(run, Peer(problem, weights, x), failures)
        ours, our_calls, picked = best_of_ours(run, layer, x, failures)
        calls = {PEER: peer_calls, OURS: our_calls, TORCH: layer.calls(TORCH, x)}
        checks = {PEER: "bounded", OURS: "exact+bounded", TORCH: layer.check(TORCH, x)}
        rule = stop_rule("decode" if tokens <= DECODE_TOKENS else "prefill", run.quick)
        monitor.clear()
        times = timing.compare(calls, run.timer, rule, warm_s=rule.min_s / 8)
        during = monitor.medians()
    configs = {PEER: peer, OURS: ours, TORCH: ""}
    more = {PEER: details, OURS: {"picked": picked}, TORCH: {}}
    traffic = x.nbytes + tokens * layer.shape.out_features * x.element_size()
    weight_bytes = {PEER: dense.nbytes, OURS: layer.packed.nbytes, TORCH: dense.nbytes}
    for name, timed in times.items():
        run.add(
            **case,
            backend=name,
            check=checks[name],
            config=configs[name],
            copies=layer.copies,
            bytes=weight_bytes[name] + traffic,
            during=during,
            details=more[name],
            **timed.row(),
        )
    text = ", ".join(f"{name} {timed.median:.1f}" for name, timed in times.items())
    ratio = times[PEER].median / times[OURS].median
    run.say(f"{layer.shape}, {tokens} tokens: {text} us; {ratio:.3f} x {peer}; {ours}")


def _fastest(run: Run, calls: dict[str, list[timing.Call]]) -> str:
    """The name of the fastest, by a short timing of all."""
    rule = timing.StopRule(0.01, min_rounds=3 if run.quick else 5, min_s=0.1, budget_s=1.5)
    times = timing.compare(calls, run.timer, rule, warm_s=0.02)
    return min(times, key=lambda name: times[name].median)


def best_of_ours(run: Run, layer: Layer, x: Tensor, failures: list[str]):
    """(fastest tile of the mma.sp kernel, its calls, the tile that heuristics pick)."""
    from sparsekern.backends.cuda import linear as cuda_backend

    calls = sweep.checked(run, layer, x, sweep.configs(x.shape[0], mma=True), failures)
    if not calls:
        raise WrongResult("bench: no tile of the mma.sp kernel is right.")
    name = _fastest(run, calls)
    check_bounded(name, calls[name][-1](), x, layer.providers[OURS].weight, OURS_SLACK)
    return name, calls[name], cuda_backend.mma_config(x, layer.packed)


# ---- the peer ------------------------------------------------------------------------------------


class Peer:
    """The dense layer by any candidate of cuBLASLt.

    Args:
        weights: copies of W [out_features, in_features] that rotate.      x: [tokens, in_features].
    """

    def __init__(self, problem: cublaslt.Problem, weights: list[Tensor], x: Tensor):
        self.problem, self.weights, self.x = problem, weights, x
        size = cublaslt.WORKSPACE_BYTES
        self.workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        self.refusals: list[str] = []

    def calls(self, candidate: cublaslt.Candidate) -> list[timing.Call]:
        """One call per copy of the weights."""

        def call(weight):
            y = self.x.new_empty(self.x.shape[0], weight.shape[0])
            self.problem.launch(candidate, weight, self.x, y, self.workspace)
            return y

        return [lambda weight=weight: call(weight) for weight in self.weights]

    def kernels(self, candidates: Sequence[cublaslt.Candidate]) -> list[list[Kernel]]:
        """The kernels that each candidate launches; none where the library refuses."""

        def attempt(number, candidate):
            calls = self.calls(candidate)
            try:
                calls[number % len(calls)]()
            except cublaslt.CublasLtError as error:
                self.refusals.append(f"{candidate.config}: {error}")

        calls = [lambda n=n, c=c: attempt(n, c) for n, c in enumerate(candidates)]
        return launched(calls, marker(self.x.device))

    def check(self, candidate: cublaslt.Candidate) -> None:
        """Checks an output in memory that held no numbers.

        Raises:
            WrongResult: an element is not within the bound of peers.
        """
        weight = self.weights[-1]
        y = self.x.new_full((self.x.shape[0], weight.shape[0]), float("nan"))
        self.problem.launch(candidate, weight, self.x, y, self.workspace)
        check_bounded(str(candidate.config), y, self.x, weight, PEER_SLACK, ours=False)


def best_peer(run: Run, peer: Peer, failures: list[str]):
    """(the fastest right mma.sync candidate in words, its calls, how it was found).

    Raises:
        RuntimeError: there is none.
    """
    tokens = peer.x.shape[0]
    splits = SPLITS if tokens <= SPLIT_TOKENS else (1,)
    algorithms = peer.problem.algorithms()
    probes = _candidates(peer, algorithms, PROBES, splits)
    found = zip(probes, peer.kernels(probes))
    era = sorted({c.config.algo for c, kernels in found if is_mma_sync(kernels)})
    if not era:
        raise RuntimeError(
            f"bench: expected mma.sync kernels among {len(algorithms)} algorithms of cuBLASLt, "
            f"got none in {len(probes)} launches ({len(peer.refusals)} refused)."
        )
    limit = _launches(peer.weights[0], tokens) // len(era)
    candidates = _candidates(peer, era, limit, splits)
    kernels = peer.kernels(candidates)
    ranked = ranking(candidates, kernels)
    details = {
        "algorithms": era,
        "launched": len(candidates),
        "kernels": len(ranked),
        "cublaslt": peer.problem.library.version,
    }
    run.say(
        f"{tokens} tokens: mma.sync in algorithms {era} of {len(algorithms)}; "
        f"{len(candidates)} configurations, {len(ranked)} kept"
    )
    for refusal in peer.refusals[:3]:
        run.say(f"refused ({len(peer.refusals)} in all): {refusal}")
    calls = {}
    for name, candidate in ranked[:FINALISTS]:
        try:
            peer.check(candidate)
        except (WrongResult, cublaslt.CublasLtError) as error:
            failures.append(f"{tokens} tokens {name}: {error}")
            run.say(failures[-1])
            continue
        calls[f"{name}; {candidate.config}"] = peer.calls(candidate)
    if not calls:
        raise RuntimeError("bench: no mma.sync kernel of cuBLASLt computes right.")
    name = _fastest(run, calls)
    return name, calls[name], details


def _candidates(peer: Peer, algorithms, limit: int, splits) -> list[cublaslt.Candidate]:
    found = []
    for algo in algorithms:
        try:
            found += peer.problem.candidates(algo, limit, splits)
        except cublaslt.CublasLtError as error:
            peer.refusals.append(f"algo {algo}: {error}")
    return found


def _launches(weight: Tensor, tokens: int) -> int:
    """How many bad configurations run in SCREEN_S."""
    seconds = 2 * tokens * weight.numel() / SLOW_FLOPS + weight.nbytes / SLOW_BYTES
    return min(MOST, int(SCREEN_S / seconds))


def ranking(
    candidates: Sequence[cublaslt.Candidate], kernels: Sequence[Sequence[Kernel]]
) -> list[tuple[str, cublaslt.Candidate]]:
    """(kernel in short, candidate) of those that ran mma.sync kernels alone, fastest first; of
    several that launched the same kernel with the same split and swizzling the fastest alone."""
    best: dict = {}
    for candidate, launches in zip(candidates, kernels):
        if not is_mma_sync(launches):
            continue
        us = sum(time for _, time in launches)
        names = tuple(name for name, _ in launches)
        key = (names, candidate.config.split, candidate.config.scheme, candidate.config.swizzle)
        if key not in best or us < best[key][0]:
            best[key] = (us, short_name(launches), candidate)
    return [(name, candidate) for _, name, candidate in sorted(best.values(), key=lambda b: b[0])]


# ---- names of kernels ----------------------------------------------------------------------------

_MMA_SYNC = re.compile(r"ampere|sm80|cutlass_80|16816")
_OTHER = re.compile(r"sm9\d|sm1\d\d|cutlass_9\d|nvjet|hopper|gmma|simt|sgemm")
_HELPER = re.compile(r"splitkreduce|^memset")  # sums of a split; counters set to zero
_MARKER = "FillFunctor"  # of torch's fill_
SESSIONS = 3


def is_mma_sync(kernels: Sequence[Kernel]) -> bool:
    """True when these kernels are of the Ampere generation, on mma.sync, and helpers of them.

    Told by cuBLAS's names: ampere_bf16_s16816gemm_..., sm80_xmma_gemm_...,
    cutlass_80_tensorop_...; a name that is not known counts as another kind.
    """
    names = [name.lower() for name, _ in kernels]
    main = [name for name in names if not _HELPER.search(name)]
    return bool(main) and all(_MMA_SYNC.search(n) and not _OTHER.search(n) for n in main)


def short_name(kernels: Sequence[Kernel]) -> str:
    """The kernel's own name, without what C++ puts around it; helpers are left out."""
    names = [name for name, _ in kernels if not _HELPER.search(name.lower())]
    words = (re.search(r"\w*(?:ampere|sm80|cutlass_80|16816)\w*", name, re.I) for name in names)
    return " + ".join(word[0] if word else name for word, name in zip(words, names))


def marker(device: torch.device) -> timing.Call:
    """A call of which the profiler shows one kernel, with _MARKER in its name."""
    flag = torch.zeros(64, device=device)
    return lambda: flag.fill_(1.0)


def launched(calls: Sequence[timing.Call], mark: timing.Call) -> list[list[Kernel]]:
    """The kernels that each call launches, in order, seen in one session of the profiler.

    A session that does not show a marker before each call is repeated: sessions can lose kernels
    while the profiler starts.

    Raises:
        ProfilerBlind: SESSIONS of them were not whole.
    """
    for _ in range(SESSIONS - 1):
        with contextlib.suppress(ProfilerBlind):
            return by_call(_session(calls, mark), len(calls))
    return by_call(_session(calls, mark), len(calls))


def _session(calls: Sequence[timing.Call], mark: timing.Call) -> list[Kernel]:
    """What the GPU did meanwhile, in the order of time."""
    with profile(activities=[ProfilerActivity.CUDA]) as session:
        for call in calls:
            mark()
            call()
        torch.cuda.synchronize()
    seen = [event for event in session.events() if event.device_type == DeviceType.CUDA]
    seen.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in seen]


def by_call(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """Kernels in the order of time, cut at the markers into those of `count` calls.

    Raises:
        ProfilerBlind: there are not as many markers as calls.
    """
    groups: list[list[Kernel]] = []
    for kernel in kernels:
        if _MARKER in kernel[0]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    if len(groups) != count:
        raise ProfilerBlind(
            f"bench: expected torch.profiler to show the {count} marker kernels of this session, "
            f"got {len(groups)} among {len(kernels)} events. Without names mma.sync kernels cannot "
            "be told."
        )
    return groups
