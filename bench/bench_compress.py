"""Fused prune and compress, and packing, against the copy bandwidth of the same run.

Bytes are counted once read and once written: the dense weight in, values and metadata out (for
pack both ways the compressed weight). Before timing, a slice is compared with the CPU's result bit
for bit, and the packed weight is unpacked again and compared as a whole.
"""

from __future__ import annotations

import torch

from sparsekern import Sparse24, _native, decompress, prune_compress
from sparsekern.formats.layouts import ROWMAJOR
from sparsekern.formats.tile64 import pack, unpack

from . import ceilings, timing
from .options import Run, parser, watchdog

SIZE = (28672, 8192)
CHECKED_ROWS = 512
HANG_S = 240.0  # the first call compiles Triton kernels


def make_parser():
    result = parser("compress", "Time prune_compress and pack against a copy.", budget=60)
    result.add_argument("--shape", default="x".join(map(str, SIZE)), metavar="OUTxIN")
    result.add_argument("--dtype", default="bfloat16")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    size = tuple(int(part) for part in args.shape.split("x"))
    with watchdog(HANG_S + args.budget):
        measure(run, size, getattr(torch, args.dtype))
    run.close()
    return 0


def measure(run: Run, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Times and records copy, prune_compress, the kernel inside it, pack and decompress."""
    generator = torch.Generator(run.device).manual_seed(0)
    weight = torch.empty(size, dtype=dtype, device=run.device)
    weight.normal_(0, size[1] ** -0.5, generator=generator)
    w24 = prune_compress(weight, layout=ROWMAJOR)
    check_slice(weight, w24)
    cases = {
        "prune_compress": (
            lambda: prune_compress(weight, layout=ROWMAJOR),
            weight.nbytes + w24.nbytes,
        ),
        "decompress": (lambda: decompress(w24), weight.nbytes + w24.nbytes),
    }
    if run.device.type == "cuda":
        from sparsekern.backends.triton import compress as kernels

        kernel = lambda: kernels.compress(weight, "magnitude")  # noqa: E731
        cases["prune_compress, kernel alone"] = (kernel, cases["prune_compress"][1])
        if _native.available():
            packed = pack(w24)
            check_same(unpack(packed), w24)
            cases["pack"] = (lambda: pack(w24), w24.nbytes + packed.nbytes)
        else:
            run.say(f"pack is not timed: {_native.reason()}")
    copies, copied = ceilings.copy_calls(weight.nbytes // 4 * 4, run.device)
    times = timing.compare(
        {"copy": copies, **{name: [call] for name, (call, _) in cases.items()}},
        "events" if run.timer == "graph" else run.timer,
        timing.StopRule(0.005, *((5, 50) if run.quick else (50, 2000)), budget_s=5.0),
    )
    copy_tb_s = copied / times["copy"].median / 1e6
    run.say(f"copy: {copy_tb_s:.3f} TB/s")
    for name, (_, moved) in cases.items():
        us = times[name].median
        metrics = {
            "bytes": moved,
            "us": round(us, 2),
            "tb_s": round(moved / us / 1e6, 4),
            "copy_tb_s": round(copy_tb_s, 4),
            "fraction": round(moved / us / 1e6 / copy_tb_s, 4),
        }
        case = f"{name}, {size[0]}x{size[1]} {str(dtype).removeprefix('torch.')}"
        run.add(
            op="compress",
            backend=run.device.type,
            check="exact",
            case=case,
            timer=times[name].timer,
            metrics=metrics,
        )
        run.say(f"{case}: {us:.1f} us, {metrics['tb_s']} TB/s, {metrics['fraction']:.1%} of copy")


def check_slice(weight: torch.Tensor, w24: Sparse24) -> None:
    """The first rows must be what the CPU computes, and the whole must keep what it keeps."""
    rows = slice(0, CHECKED_ROWS)
    values, metadata = w24.values[rows], w24.metadata[rows]
    size = (values.shape[0], w24.shape[1])
    check_same(Sparse24(values, metadata, size), prune_compress(weight[rows].cpu()))
    dense = decompress(w24)
    if not bool(((dense == weight) | (dense == 0)).all()):
        raise RuntimeError("bench.compress: expected kept weights unchanged, got others.")


def check_same(got: Sparse24, wanted: Sparse24) -> None:
    """RuntimeError unless values and metadata are equal, bit for bit."""
    for name in ("values", "metadata"):
        a, b = getattr(got, name), getattr(wanted, name)
        if not torch.equal(a.to(b.device), b):
            raise RuntimeError(f"bench.compress: expected equal {name}, got different ones.")
