"""The kernels of an older build against this one's, in turns in one process.

    python -m bench compat --old OTHER_CHECKOUT/sparsekern/_C.cpython-312-x86_64-linux-gnu.so

Both modules get the same weights, inputs and outputs, and the same variant of a kernel: the one
that is fastest now. Outputs must be equal bit for bit before anything is timed; then CUDA graphs of
many launches, with weights that rotate beyond the L2 cache, are replayed in turns. bfloat16.
Printed and recorded are the ratio new / old of each cell, their geometric mean and the worst.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsekern import _native, prune_compress
from sparsekern.formats.tile64 import pack

from . import timing
from .options import Run, parser, watchdog

HANG_S = 120.0
MARGIN_S = 5.0
DTYPE = torch.bfloat16
_DTYPE_CODE = 1  # of bfloat16, in a binding by position
WORST, MEAN = 0.03, 0.01  # how much slower a cell, and the mean, may be
# Kernel -> cells (out_features, in_features, tokens); the layers of Llama-3 8B.
CELLS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "decode": tuple(
        (out, in_, tokens)
        for out, in_ in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
        for tokens in (1, 16)
    ),
    "split": tuple(
        (out, in_, tokens) for out, in_ in ((4096, 4096), (6144, 4096)) for tokens in (64, 128, 256)
    ),
    "prefill": tuple(
        (out, in_, tokens)
        for out, in_ in ((4096, 4096), (28672, 4096), (4096, 14336))
        for tokens in (512, 2048)
    ),
    "mma": tuple(
        (out, in_, tokens)
        for out, in_ in ((4096, 4096), (28672, 4096))
        for tokens in (16, 128, 1024)
    ),
}

Config = tuple[tuple[str, Any], ...]  # the fields of a config but its index


@dataclass(frozen=True)
class Ratio:
    """One cell: microseconds per call of both builds."""

    kernel: str
    case: str
    old_us: float
    new_us: float

    @property
    def ratio(self) -> float:
        """new / old: above 1 this build is slower."""
        return self.new_us / self.old_us


# ---- two modules ---------------------------------------------------------------------------------


def load_module(path: str | Path, package: str = "sparsekern_old") -> ModuleType:
    """The native module in a file, beside the one of this package.

    Raises:
        FileNotFoundError: no such file.   ImportError: it is no such module.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"bench compat: no file at {path}. Give --old a built _C*.so.")
    name = f"{package}._C"  # the last part names the symbol PyInit__C
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# Of a config, beside what makes it that one. Promoted tiles are not for the 16-bit types of here.
_NOT_FIELDS = ("index", "types", "promoted")


def configs(module: Any, kernel: str) -> dict[Config, int]:
    """{fields: index} of a kernel's configs, of a binding by name or by position."""
    if hasattr(module, "kernels"):
        listed = module.kernels()[kernel]
    else:
        listed = getattr(module, f"{kernel}_configs")()
    return {
        tuple(
            sorted((key, value) for key, value in config.items() if key not in _NOT_FIELDS)
        ): config["index"]
        for config in listed
        if not config.get("promoted")
    }


def launcher(
    module: Any, kernel: str, index: int, x: Tensor, w24: Any, y: Tensor, space: Tensor
) -> timing.Call:
    """A function that computes y = x · Wᵀ by one variant of this module, on the current stream.

    Args:
        x: [tokens, in_features], y: [tokens, out_features], contiguous bfloat16.
        space: workspace of the prefill kernel, zero, of this module alone.
    """
    tokens, (out_features, in_features) = x.shape[0], w24.shape
    keep = x, w24, y, space
    if hasattr(module, "Linear"):
        linear = module.Linear(
            kernel=kernel,
            config=index,
            tokens=tokens,
            out_features=out_features,
            in_features=in_features,
            x_stride=in_features,
            y_stride=out_features,
            dtype="bfloat16",
        )
        named = dict(
            x=x.data_ptr(),
            values=w24.values.data_ptr(),
            metadata=w24.metadata.data_ptr(),
            y=y.data_ptr(),
        )
        if kernel == "prefill":
            named["workspace"] = space.data_ptr()

        def by_name(keep: object = keep) -> None:
            linear(**named, stream=_stream(x))

        return by_name
    run = getattr(module, kernel)
    addresses = x.data_ptr(), w24.values.data_ptr(), w24.metadata.data_ptr(), 0, 0, y.data_ptr()
    sizes = tokens, out_features, in_features, in_features, out_features, 0
    tail = (space.data_ptr(),) if kernel == "prefill" else ()

    def by_position(keep: object = keep) -> None:
        run(*addresses, *sizes, _DTYPE_CODE, 0, index, *tail, _stream(x))

    return by_position


def _stream(x: Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else 0


# ---- cells ---------------------------------------------------------------------------------------


class Cell:
    """One kernel on one problem, for both modules."""

    def __init__(self, modules: Mapping[str, Any], kernel: str, shape: tuple[int, int, int]):
        self.modules, self.kernel, (out_features, in_features, tokens) = modules, kernel, shape
        generator = torch.Generator("cuda").manual_seed(0)
        weight = torch.empty(out_features, in_features, dtype=DTYPE, device="cuda")
        weight.normal_(0, in_features**-0.5, generator=generator)
        first = pack(prune_compress(weight))
        self.weights = [first]
        self.weights += [first.clone() for _ in range(timing.rotations(first.nbytes) - 1)]
        self.x = torch.empty(tokens, in_features, dtype=DTYPE, device="cuda")
        self.x.normal_(generator=generator)
        self.y = torch.empty(tokens, out_features, dtype=DTYPE, device="cuda")
        size = max(module.prefill_workspace_bytes() for module in modules.values())
        self.spaces = {
            name: torch.zeros(size, dtype=torch.uint8, device="cuda") for name in modules
        }
        torch.cuda.synchronize()

    def call(self, name: str, index: int, w24: Any) -> timing.Call:
        module, space = self.modules[name], self.spaces[name]
        return launcher(module, self.kernel, index, self.x, w24, self.y, space)

    def fastest(self) -> tuple[Config, dict[str, int]]:
        """(fields, {module: index}) of the config that is fastest in the new module, of those that
        both have and that take this problem."""
        listed = {name: configs(module, self.kernel) for name, module in self.modules.items()}
        best: tuple[float, Config] | None = None
        for fields in listed["new"].keys() & listed["old"].keys():
            calls = [self.call("new", listed["new"][fields], w) for w in self.weights[:4]]
            try:
                calls[0]()  # a first launch loads the kernel, which a capture forbids
                torch.cuda.synchronize()
            except (ValueError, NotImplementedError):
                continue
            sample = timing.graph_replay(calls)
            us = min(sample() for _ in range(3))
            if best is None or us < best[0]:
                best = us, fields
        if best is None:
            raise RuntimeError(f"bench compat: no config of {self.kernel} takes {self.y.shape}.")
        return best[1], {name: listed[name][best[1]] for name in self.modules}

    def different(self, indices: Mapping[str, int]) -> int:
        """Elements in which the outputs of the two modules differ, bit for bit."""
        outputs = {}
        for name, index in indices.items():
            self.y.fill_(float("nan"))
            self.call(name, index, self.weights[0])()
            outputs[name] = self.y.clone().view(torch.int16)
        return int((outputs["old"] != outputs["new"]).sum())

    def times(self, indices: Mapping[str, int], quick: bool) -> dict[str, timing.Timing]:
        """Both builds in turns."""
        calls = {
            name: [self.call(name, index, w) for w in self.weights]
            for name, index in indices.items()
        }
        rounds, seconds = (20, 0.5) if quick else (100, 2.0)
        rule = timing.StopRule(0.001, min_rounds=rounds, min_s=seconds / 4, budget_s=seconds)
        return timing.compare(calls, "graph", rule, warm_s=0.1)


# ---- the benchmark -------------------------------------------------------------------------------


def main(path: str | Path, arguments: Sequence[str] = ()) -> int:
    options = parser("compat", "Time an older build of the kernels against this one.", budget=300)
    options.add_argument("--old", required=True, metavar="FILE", help="its sparsekern/_C*.so")
    options.add_argument("--kernels", default=",".join(CELLS), help="comma-separated")
    args = options.parse_args(list(arguments))
    modules = {"old": load_module(args.old), "new": _native.module()}
    if not torch.cuda.is_available():
        print("bench compat: both modules load; no CUDA GPU, nothing was timed.")
        return 0
    run, ratios, failures = Run(path, args), [], []
    for kernel in args.kernels.split(","):
        for shape in CELLS[kernel][:: 2 if args.quick else 1]:
            if run.left < MARGIN_S:
                run.say(f"no time for {kernel} {shape}")
                continue
            with watchdog(HANG_S):
                found = measure(run, Cell(modules, kernel, shape), kernel, shape)
            if isinstance(found, str):
                failures.append(found)
                run.say(found)
            else:
                ratios.append(found)
    if ratios:
        metrics = summary(ratios)
        run.add(
            op="compat_summary",
            backend="cuda",
            check="bit for bit",
            case=f"{len(ratios)} cells",
            metrics=metrics,
        )
        print(verdict(metrics), flush=True)
    run.close()
    return 1 if failures else 0


def measure(run: Run, cell: Any, kernel: str, shape: tuple[int, int, int]) -> Ratio | str:
    """Checks, times and records one cell; text instead where the outputs differ."""
    fields, indices = cell.fastest()
    out_features, in_features, tokens = shape
    variant = ", ".join(f"{key} {value}" for key, value in fields)
    case = f"{kernel} {out_features}x{in_features}, {tokens} tokens ({variant})"
    if count := cell.different(indices):
        return f"DIFFERENT: {case}: {count} elements of old and new differ"
    times = cell.times(indices, run.quick)
    ratio = Ratio(kernel, case, times["old"].median, times["new"].median)
    run.add(
        op="compat",
        backend=kernel,
        check="bit for bit",
        case=case,
        out_features=out_features,
        in_features=in_features,
        tokens=tokens,
        dtype="bfloat16",
        metrics={
            "old_us": round(ratio.old_us, 4),
            "new_us": round(ratio.new_us, 4),
            "ratio": round(ratio.ratio, 5),
        },
    )
    run.say(f"{case}: old {ratio.old_us:.2f}, new {ratio.new_us:.2f} us, {ratio.ratio - 1:+.2%}")
    return ratio


def summary(ratios: Sequence[Ratio]) -> dict[str, Any]:
    """{"cells", "geometric_mean", "worst", "worst_case"} of the ratios new / old."""
    worst = max(ratios, key=lambda cell: cell.ratio)
    mean = math.exp(math.fsum(math.log(cell.ratio) for cell in ratios) / len(ratios))
    return {
        "cells": len(ratios),
        "geometric_mean": round(mean, 5),
        "worst": round(worst.ratio, 5),
        "worst_case": worst.case,
    }


def verdict(metrics: Mapping[str, Any]) -> str:
    """Two lines: the mean and the worst cell, and whether they are within MEAN and WORST."""
    mean, worst = metrics["geometric_mean"] - 1, metrics["worst"] - 1
    word: Callable[[bool], str] = lambda good: "within" if good else "BEYOND"  # noqa: E731
    return (
        f"{metrics['cells']} cells, new / old: geometric mean {mean:+.2%} "
        f"({word(mean <= MEAN)} {MEAN:.0%})\n"
        f"worst {worst:+.2%} ({word(worst <= WORST)} {WORST:.0%}): {metrics['worst_case']}"
    )
