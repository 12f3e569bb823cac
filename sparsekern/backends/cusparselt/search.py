"""The search for cuSPARSELt's fastest algorithm of a problem; `search` is explicit, never hidden.

The library numbers its algorithms and lets most of them split K; its default is often not the
fastest, its own search misses the best, and some algorithms of some versions compute wrong or
changing results (pytorch#155333). So every candidate must first compute this exactly:

    whole numbers    every sum is exact in float32, so y must be the result rounded once, bit for
                     bit; into an output full of NaN, plain and with bias and relu, or at 8 bits
                     with channel scales that are powers of two
    again            after it was timed, since some change from run to run

and only then may it win: median of CUDA events, L2 overwritten before every call, as between layers
of a model. Candidates close to the best are timed again, in turn.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from sparsekern import _native
from sparsekern.backends import quantize_rows
from sparsekern.backends.compress import decompress, prune_compress
from sparsekern.backends.cusparselt import linear as backend
from sparsekern.backends.cusparselt.library import DTYPES, refusal, scales_channels
from sparsekern.backends.cusparselt.linear import LAYOUT, Algorithm
from sparsekern.errors import check
from sparsekern.formats.layouts import ROWMAJOR
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24

# (split_k, split_k_mode) beside (1, 0): modes 1 and 2 sum in one kernel and in two; -1 is the
# library's "segment-K". What a version or an algorithm does not have, it refuses.
SPLITS = ((1, 0), *((parts, mode) for parts in (2, 4, 8) for mode in (1, 2)), (-1, 0))
_FIRST_SAMPLES, _FINAL_SAMPLES = 5, 25
_CLOSE, _FINALISTS = 1.15, 6  # who is timed again


@dataclass(frozen=True)
class SearchResult:
    """What `search` found; us are medians of one call."""

    key: str
    algorithm: Algorithm
    us: float
    default_us: float | None  # of the library's own choice; None when that is wrong or refused
    tried: int
    refused: tuple  # of Algorithm: what the library does not do
    wrong: tuple  # of Algorithm: what it computes wrong

    def __str__(self):
        default = "wrong" if self.default_us is None else f"{self.default_us:.1f} us"
        return (
            f"{self.key}: {self.algorithm}, {self.us:.1f} us (default: {default}); "
            f"{self.tried} tried, {len(self.refused)} refused, {len(self.wrong)} wrong"
        )


def search(w24, tokens, *, store=True, splits=None):
    """The fastest algorithm of cuSPARSELt that computes x · Wᵀ right; used from now on.

    Args:
        w24: Sparse24 in layout "cusparselt".
        tokens: >= 1; rounded up to a multiple of 8, as calls are.
        store: also write the result to the user's file (cusparselt_backend.store_path()).
        splits: (split_k, split_k_mode) that are tried with every algorithm; None: SPLITS.
    Returns:
        SearchResult.
    Raises:
        ValueError: another layout, or no tokens.   NotImplementedError: the library refuses this
        dtype or GPU.   RuntimeError: no candidate is right, or a kernel dies.   OSError: the file
        cannot be written; the result is used by this process all the same.
    Notes:
        Takes seconds, and for a moment the memory of a second weight and of the dense one in
        float32. A kernel that dies takes the CUDA context with it: search in a process of its own.
    """
    op = "sparsekern.backends.cusparselt.search.search"
    check(
        w24.layout == LAYOUT,
        op,
        "a weight in layout 'cusparselt'",
        repr(w24.layout),
        "Call weight.to_layout('cusparselt').",
    )
    check(tokens >= 1, op, "tokens >= 1", tokens)
    storage = w24.spec.element.storage
    index, tokens = w24.values.get_device(), backend.padded_tokens(tokens, storage)
    why = refusal(index, storage)
    check(not why, op, "a usable cuSPARSELt", why, "Use another layout.", NotImplementedError)
    with torch.cuda.device(index), torch.no_grad():
        problem = _Problem(w24, tokens, index, SPLITS if splits is None else splits)
        right, refused, wrong = [], [], []
        candidates = problem.candidates()
        for algorithm in candidates:
            verdict = problem.verdict(algorithm)
            {"right": right, "refused": refused, "wrong": wrong}[verdict].append(algorithm)
        winner, us, default_us = _fastest(problem, right, wrong)
    found = f"{len(refused)} refused and {len(wrong)} wrong ones"
    check(
        winner is not None,
        op,
        "an algorithm that computes right",
        found,
        "Use another layout.",
        RuntimeError,
    )
    key = backend.algorithm_key(index, backend.types_of(w24.spec), *w24.shape, tokens)
    backend.remember(key, winner, us, store)
    return SearchResult(key, winner, us, default_us, len(candidates), tuple(refused), tuple(wrong))


def _fastest(problem, right, wrong):
    """(winner, its median, the default's median); those that change their bits move to `wrong`."""
    first = {algorithm: problem.sample(algorithm, _FIRST_SAMPLES) for algorithm in right}
    for algorithm in [algorithm for algorithm in right if not problem.still_right(algorithm)]:
        wrong.append(algorithm)
        del first[algorithm]
    order = sorted(first, key=lambda algorithm: statistics.median(first[algorithm]))
    if not order:
        return None, None, None
    bound = _CLOSE * statistics.median(first[order[0]])
    finalists = [a for a in order[:_FINALISTS] if statistics.median(first[a]) <= bound]
    default = Algorithm()
    timed = finalists if default in finalists or default not in first else [*finalists, default]
    samples = {algorithm: [] for algorithm in timed}
    for _ in range(_FINAL_SAMPLES):
        for algorithm in timed:
            samples[algorithm] += problem.sample(algorithm, 1)
    for algorithm in [algorithm for algorithm in timed if not problem.still_right(algorithm)]:
        wrong.append(algorithm)
        del samples[algorithm]
    if not samples:
        return None, None, None
    medians = {algorithm: statistics.median(taken) for algorithm, taken in samples.items()}
    winner = min(medians, key=medians.get)
    return winner, medians[winner], medians.get(default)


class _Problem:
    """The timed weight with random inputs, and a weight and inputs of whole numbers beside it."""

    def __init__(self, w24, tokens, index, splits):
        self.native, self.w24, self.tokens, self.index = _native.module(), w24, tokens, index
        (out_features, in_features), device = w24.shape, w24.device
        self.splits = splits
        self.storage, self.plain_type = w24.spec.element.storage, w24.spec.element.plain
        self.vector = scales_channels(self.storage)
        generator = torch.Generator(device).manual_seed(0)

        def integers(*shape):
            drawn = torch.randint(-2, 3, shape, generator=generator, device=device)
            return drawn.to(w24.dtype)

        rowmajor = prune_compress(integers(out_features, in_features))
        exact = integers(tokens, in_features)
        self.whole_x, self.bias = exact.to(self.storage), integers(out_features)
        exact = exact.float() @ decompress(rowmajor).float().t()
        if self.plain_type:
            self.whole24 = backend.pack(rowmajor)
            self.plain = exact.to(w24.dtype)
            self.fused = (exact + self.bias.float()).relu().to(w24.dtype)
        else:
            scale = torch.randint(-2, 3, (out_features, 1), generator=generator, device=device)
            scale = torch.exp2(scale.float())
            self.whole24 = backend.pack(_with_levels(w24.spec, rowmajor, scale))
            exact = exact * scale.view(-1) if self.vector else exact
            self.plain = exact.to(backend.product_dtype(w24.spec))
        x = torch.empty(tokens, in_features, dtype=w24.dtype, device=device)
        x.normal_(generator=generator)
        self.x = x if self.plain_type else quantize_rows.quantize(x, w24.spec.storage)[0]
        self.y = torch.empty_like(self.plain)
        self.flush = None
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(index).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def candidates(self):
        count = self._plan(Algorithm(), False)[2]
        split = [Algorithm(number, *parts) for number in range(count) for parts in self.splits]
        return [Algorithm(), *split]

    def verdict(self, algorithm):
        """ "right", "refused" (by the library) or "wrong"; an error of the GPU is raised."""
        wanted = [(False, self.plain)] + ([(True, self.fused)] if self.plain_type else [])
        for fused, expected in wanted:
            y = self._output()
            try:
                self._call(algorithm, fused, self.whole24, self.whole_x, y)()
            except (NotImplementedError, ValueError, RuntimeError):
                if self.flush is not None:
                    torch.cuda.synchronize()  # raises when it was the GPU that failed
                return "refused"
            if not torch.equal(y, expected):
                return "wrong"
        return "right"

    def still_right(self, algorithm):
        y = self._output()
        self._call(algorithm, False, self.whole24, self.whole_x, y)()
        return torch.equal(y, self.plain)

    def sample(self, algorithm, count):
        """Microseconds of `count` calls, one by one."""
        call = self._call(algorithm, False, self.w24, self.x, self.y)
        call()
        if self.flush is None:
            return [_wall_us(call) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.current_stream().synchronize()
        return [start.elapsed_time(end) * 1000 for start, end in events]

    def _output(self):
        return torch.full_like(self.plain, float("nan"))

    def _plan(self, algorithm, fused):
        out_features, in_features = self.w24.shape
        bias = self.bias.data_ptr() if fused else 0
        return self.native.cusparselt_plan(
            device=self.index,
            dtype=DTYPES[self.storage],
            y_dtype=DTYPES[self.plain.dtype],
            out_features=out_features,
            tokens=self.tokens,
            in_features=in_features,
            x_stride=in_features,
            y_stride=out_features,
            bias=bias,
            relu=fused,
            channel_scale=self.vector,
            **algorithm._asdict(),
        )

    def _call(self, algorithm, fused, w24, x, y):
        plan, workspace_bytes, _ = self._plan(algorithm, fused)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=x.device)

        scale = w24.tensors[SCALE].data_ptr() if self.vector else 0

        def call():
            addresses = w24.values.data_ptr(), x.data_ptr(), y.data_ptr()
            stream, space = backend.current_stream(self.index), workspace.data_ptr()
            missing = backend.multiply(self.native, plan, addresses, space, scale, stream)
            if missing:
                raise RuntimeError("sparsekern.cusparselt: the plan has left the cache")

        return call


def _with_levels(spec, rowmajor, scale):
    """The quantised row-major weight whose levels are the numbers of a plain one."""
    levels = rowmajor.values.to(spec.element.storage)
    tensors = {"values": levels, "metadata": rowmajor.metadata, SCALE: scale}
    return Sparse24.from_tensors(spec.with_(layout=ROWMAJOR), tensors)


def _wall_us(call):
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6
