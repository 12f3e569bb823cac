"""Measures every variant of the CUDA kernels on every problem: what `sparsekern tune` does.

A cell is a shape, the types of weight and x (KINDS), and a number of tokens. In which order they
come, and which of several processes has which: tune_plan.py. How the variant of one is found:
tune_cell.py. A sample is one replay of a CUDA graph of calls whose weights rotate among copies, so
that no call finds its weight in the cache. Cells are stored after each job, with where they come
from: tune_table.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from sparsekern import _native
from sparsekern.backends import quantize_rows
from sparsekern.backends.cuda import coefficients, narrow_model
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.configs import Types
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.variant import variant_name
from sparsekern.errors import message
from sparsekern.formats import dtypes
from sparsekern.formats.tile64 import pack
from sparsekern.ops.compress import decompress, prune_compress
from sparsekern.ops.quantize import quantize
from sparsekern.profiling import provenance, timer, tune_plan, tune_table
from sparsekern.profiling.layer_bench import copies_beyond_cache
from sparsekern.profiling.timer import graph_replay as graph_sampler
from sparsekern.profiling.tune_cell import Cell, tune_cell

OP = "sparsekern tune"
DTYPES = {dtypes.PLAIN[dtype].name: dtype for dtype in dtypes.NATIVE}
# What can be tuned, by the names that tables use. Of quantised weights with x of 16 bits up to
# DECODE_TOKENS alone, since more tokens are quantised, or, of int4, up to the narrow kernel's; y in
# the 16-bit type of the widest range.
QUANTIZED = tuple(kind.name for kind in dtypes.elements() if kind.scaled)
EIGHT = tuple(name for name in QUANTIZED if dtypes.element(name).bits == 8)
_16 = dtypes.PLAIN[dtypes.DEFAULT_16_BIT].name
KINDS = {
    types.key: types
    for types in (
        *(Types.of(name) for name in DTYPES),
        *(Types(name, name, _16) for name in EIGHT),
        *(Types(name, _16, _16) for name in QUANTIZED),
    )
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
# (out_features, in_features) of Llama-3 1B, 3B, 8B and 70B, one line each: q+k+v, o, gate+up, down,
# then gate or up alone, k or v alone.
SHAPES = (
    *((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (8192, 2048), (512, 2048)),
    *((5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192), (8192, 3072), (1024, 3072)),
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096), (1024, 4096)),
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (28672, 8192), (1024, 8192)),
)
# For the length of a graph alone: what no GPU of today exceeds.
BYTES_PER_US, FLOPS_PER_US, LEAST_US = 4.0e6, 1.5e9, 2.0
SAMPLE_US = 200.0  # a replay should last so long: events resolve 0.5 us


class Layer:
    """One shape and its types on a GPU: weights for timing, weights of whole numbers for the check.

    dtype is that of y; types: those of weight and x, too, where they are not the same.
    """

    def __init__(self, out_features, in_features, dtype, device, types: Types | None = None):
        self.shape, self.dtype, self.device = (out_features, in_features), dtype, device
        self.types = Types.of(dtypes.PLAIN[dtype].name) if types is None else types
        self.generator = torch.Generator(device).manual_seed(0)
        weight = torch.empty(self.shape, dtype=dtype, device=device)
        weight.normal_(0, in_features**-0.5, generator=self.generator)
        plain = self.types.weight == self.types.y
        timed = prune_compress(weight)
        self.weights = [pack(timed if plain else quantize(timed, self.types.weight))]
        count = copies_beyond_cache(self.weights[0].nbytes)
        self.weights += [self.weights[0].clone() for _ in range(count - 1)]
        rows = prune_compress(self._integers(weight), layout="rowmajor")
        self.exact_dense = decompress(rows)
        self.dense = [weight] if plain else []  # of quantised weights there is no one dense product
        self.exact = pack(rows if plain else self._levels(rows))
        size = _native.module().prefill_workspace_bytes()
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)  # kernels may read weights before queued work has ended

    def _levels(self, rows):
        """Whole numbers, each its own level."""
        spec = self.weights[0].spec
        groups = -(-rows.in_features // spec.group) if spec.group else 1
        ones = torch.ones(rows.out_features, groups, device=self.device, dtype=torch.float32)
        return quantize(rows, self.types.weight, scale=ones)

    def _integers(self, like):
        """A tensor like `like` of whole numbers from -2 to 2: every sum is exact in float32."""
        return torch.empty_like(like).random_(0, 5, generator=self.generator).sub_(2)

    def names(self, tokens: int) -> list[str]:
        """The variants that can run, in the order to try them: heuristics' choice first, then that
        of the tuned tables as they are."""
        index = self.device.index
        runnable = cuda_backend.runnable(index, self.types)
        kernels = {name: kernel for name, (kernel, _) in runnable.items()}
        most = {"decode": heuristics.DECODE_TOKENS, "narrow": heuristics.NARROW_TOKENS}
        if all(kernel in most and tokens > most[kernel] for kernel in kernels.values()):
            return []
        chosen = cuda_backend.heuristic(tokens, *self.shape, index, self.types)
        multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count

        bits = self.types.bits
        problem = tokens, *self.shape, multiprocessors, bits
        built = {variant_name(variant): variant for variant in cuda_backend.built(self.types)}
        modelled = coefficients.table(bits)

        def predicted(name):
            variant = built.get(name)
            if variant in modelled or isinstance(variant, NarrowTile):
                return heuristics.predicted_us(variant, *problem)
            return math.inf

        decode = tokens <= heuristics.DECODE_TOKENS
        mma = heuristics.mma_considered(tokens, *self.shape) or "prefill" not in kernels.values()
        many = max(tokens, heuristics.PREFILL_TOKENS) if bits.x == 8 else tokens
        split = heuristics.split_considered(many, *self.shape)
        wanted = {"prefill": True, "decode": decode, "mma": mma, "split": split}
        wanted["narrow"] = narrow_model.considered(tokens)
        same = {name for name, v in built.items() if heuristics.same_as_another(v, *problem)}
        names = [name for name, kernel in kernels.items() if wanted[kernel] and name not in same]
        gpu = tuning.gpu_name(index)
        tuned = tuning.lookup(gpu, self.types.key, *self.shape, tokens, runnable)
        present = [] if tuned is None else [tuned.variant]
        return list(dict.fromkeys([chosen, *present, *sorted(names, key=predicted)]))

    def warm_up(self) -> None:
        """Run each variant once: the first launch of a kernel loads it, which a capture forbids."""
        for tokens in (1, 9, 17, 33, 65):  # one of each form of the decode kernel, and beyond
            cell = self.cell(tokens)
            for name in self.names(tokens):
                cell.launcher(name, self.weights[0])()
        torch.cuda.synchronize(self.device)

    def cell(self, tokens: int) -> LayerCell:
        return LayerCell(self, tokens)


class LayerCell:
    """A layer at one number of tokens: `sampler` and `wrong` as `tune_cell` wants them."""

    def __init__(self, layer: Layer, tokens: int):
        self.layer, self.tokens = layer, tokens
        out_features, in_features = layer.shape
        options = dict(dtype=layer.dtype, device=layer.device)
        self.x = torch.empty(tokens, in_features, **options).normal_(generator=layer.generator)
        self.x_scale = self.ones = None
        if layer.types.x != layer.types.y:
            self.x, self.x_scale = quantize_rows.quantize(self.x, layer.types.x, 16)
            self.ones = torch.ones_like(self.x_scale)
        self.y = torch.empty(tokens, out_features, **options)
        self.expected = self.exact_x = None

    def launcher(self, name, weight, x=None):
        x, x_scale = (self.x, self.x_scale) if x is None else (x, self.ones)
        scale = () if x_scale is None else (x_scale,)
        return cuda_backend.launcher(name, x, weight, self.y, self.layer.workspace, *scale)

    def sampler(self, name: str) -> Callable[[], float]:
        out_features, in_features = self.layer.shape
        weight_bytes = self.layer.weights[0].nbytes
        used = copies_beyond_cache(weight_bytes, self.x.nbytes + self.y.nbytes)
        weights = self.layer.weights[:used]
        at_least = max(
            weight_bytes / BYTES_PER_US,
            2 * self.tokens * out_features * in_features / FLOPS_PER_US,
            LEAST_US,
        )
        passes = max(1, math.ceil(SAMPLE_US / (at_least * len(weights))))
        return graph_sampler([self.launcher(name, weight) for weight in weights], passes)

    @property
    def dense(self) -> Callable[[], timer.Sampler] | None:
        """Makes the sampler of the product with the weight before it was pruned; None: no such."""
        return self._dense_sampler if self.layer.dense else None

    def _dense_sampler(self) -> timer.Sampler:
        weights = self.layer.dense
        used = copies_beyond_cache(weights[0].nbytes, self.x.nbytes + self.y.nbytes)
        while len(weights) < used:
            weights.append(weights[0].clone())
        calls = [functools.partial(torch.mm, self.x, w.t(), out=self.y) for w in weights[:used]]
        return timer.graph_sampler(calls, warm_s=0.0, min_us=SAMPLE_US)

    def wrong(self, name: str) -> str:
        layer = self.layer
        if self.expected is None:
            numbers = layer._integers(self.y.new_empty(self.x.shape))
            with _full_precision_sums():
                self.expected = torch.nn.functional.linear(numbers, layer.exact_dense)
            self.exact_x = numbers.to(self.x.dtype)
        self.y.fill_(float("nan"))
        self.launcher(name, layer.exact, self.exact_x)()
        if torch.equal(self.y, self.expected):
            return ""
        count = int((self.y != self.expected).sum())
        return f"{count} of {self.y.numel()} elements are wrong"


@contextlib.contextmanager
def _full_precision_sums():
    """cuBLAS adds partial sums in float32, so that those of whole numbers are exact."""
    flags = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in zip(names, before):
            setattr(flags, name, value)


def tune(
    shapes: Iterable[tuple[int, int]],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    device,
    path=None,
    budget: float = math.inf,
    say: Callable[[str], None] = print,
    make_layer: Callable = Layer,
    clock: Callable[[], float] = time.perf_counter,
    log=None,
    *,
    shard: tuple[int, int] = (1, 1),
    most_s: float | None = None,
) -> list[Cell]:
    """Measure all cells and store the winners; returns them.

    Args:
        shapes: (out_features, in_features), in_features a multiple of 4.
        tokens: numbers of tokens. dtypes: names of KINDS.
        device: a GPU that has the CUDA kernels.
        path: of the table file; None: the user's own. Several processes may write to one.
        budget: seconds; no cell is begun after them. Most tokens come first (tune_plan.py).
        say: gets one line per cell.
        log: file to which a line of JSON per cell is added (`logged`), for `python -m bench.fit`.
        shard: (number, of how many): the part of the cells that this process measures.
        most_s: seconds of a cell's last rounds at most; None: as rounds.py has it.
    Raises:
        NotImplementedError: the device has no kernels to choose among.
        ValueError: a size is not positive, in_features is no multiple of 4, or no such shard.
    """
    device = torch.device(device)
    index = torch.cuda.current_device() if _bare_cuda(device) else device.index
    _check(shapes := list(shapes), tokens, device, index)
    device = torch.device("cuda", index)
    gpu, path = tuning.gpu_name(index), path or tuning.user_path()
    jobs = tune_plan.jobs(dtypes, shapes, tokens, shard)
    begin, cells, untuned = clock(), [], 0
    count, about = sum(len(job.tokens) for job in jobs), sum(job.seconds(most_s) for job in jobs)
    say(f"{gpu}: {count} cells, about {math.ceil(about)} s, into {path}")
    run = tune_table.Run(path, gpu, index, shard)
    with torch.cuda.device(device), provenance.watch() as during:
        for job in jobs:
            if clock() - begin >= budget:
                untuned += len(job.tokens)
                continue
            dtype, shape, types, found = job.dtype, job.shape, KINDS[job.dtype], []
            more = () if dtype in DTYPES else (types,)
            layer = make_layer(*shape, DTYPES[types.y], device, *more)
            layer.warm_up()
            for number in job.tokens:
                if clock() - begin >= budget:
                    untuned += 1
                    continue
                at, what = layer.cell(number), f"{dtype} {shape[0]}x{shape[1]}"
                rule = tune_plan.rule(number, *shape, most_s)
                names = layer.names(number)
                if not names:
                    continue
                cell = tune_cell(number, names, at.sampler, at.wrong, rule=rule, dense=at.dense)
                say(f"{what}, {cell or f'{number} tokens: NO CORRECT VARIANT'}")
                found += [cell] if cell else []
                if cell and log:
                    with open(log, "a") as file:
                        file.write(json.dumps(logged(cell, shape, dtype, gpu)) + "\n")
            if found:
                chosen = {cell.tokens: (cell.best, cell.us) for cell in found}
                dense = {cell.tokens: us for cell in found if (us := cell.dense_us) is not None}
                run.store(dtype, shape, chosen, dense, during())
            cells += found
    cuda_backend.forget_plans()
    say(summary(cells, untuned, clock() - begin))
    return cells


def logged(cell: Cell, shape: tuple[int, int], dtype: str, gpu: str) -> dict:
    """What the log says of a cell: all its times, names as in cuda_backend.variants."""
    return dict(
        shape=list(shape),
        tokens=cell.tokens,
        best=cell.best,
        us=cell.us,
        h=cell.heuristic,
        hus=cell.heuristic_us,
        refused=cell.refused,
        times=cell.times,
        dense_us=cell.dense_us,
        gpu=gpu,
        dtype=dtype,
    )


def summary(cells: Sequence[Cell], untuned: int, seconds: float) -> str:
    """One line: cells, how far the heuristics were, what was refused or not reached."""
    text = f"{len(cells)} cells tuned in {seconds:.0f} s"
    if cells:
        mean = statistics.fmean(cell.gap for cell in cells)
        worst = max(cells, key=lambda cell: cell.gap).gap
        text += f"; heuristics were {mean:.1%} slower on average, {worst:.1%} at worst"
    if slower := sum(cell.dense_us is not None and cell.dense_us < cell.us for cell in cells):
        text += f"; dense is faster in {slower}"
    if refused := sum(len(cell.refused) for cell in cells):
        text += f"; {refused} wrong results refused"
    return text + (f"; {untuned} cells not reached in the budget" if untuned else "")


def _bare_cuda(device):
    return device.type == "cuda" and device.index is None


def _check(shapes, tokens, device, index):
    remedy = "Elsewhere there is one kernel, and nothing to tune."
    reason = f"device {device}" if device.type != "cuda" else cuda_backend.refusal(index)
    if reason:
        raise NotImplementedError(message(OP, "a GPU with the CUDA kernels", reason, remedy))
    for out_features, in_features in shapes:
        if min(out_features, in_features, *tokens) < 1 or in_features % 4:
            got = f"{out_features}x{in_features}, tokens {list(tokens)}"
            raise ValueError(message(OP, "positive sizes, in_features a multiple of 4", got))
