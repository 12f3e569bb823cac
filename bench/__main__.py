"""Runs the benchmarks: `python -m bench [NAME ...] [options]`, all of bench_*.py without a name.

Every bench_<name>.py has `main(path, arguments)`, which measures, checks its outputs, and appends
records to the file `path` (bench/records/<date>-<gpu>.jsonl). Options go to one benchmark only:
`python -m bench NAME --help`. Without a GPU nothing is measured, and this says so.
`python -m bench table [--check]` writes what the records say into bench/RESULTS.md, README.md and
docs/figures.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the benchmarks: linear for bench_linear.py."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nBenchmarks: {', '.join(names())}")
        return 0
    if arguments[:1] == ["table"]:
        from . import table

        return table.main(arguments[1:])
    first = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    chosen, options = arguments[:first], arguments[first:]
    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        print(f"bench: no benchmark {', '.join(unknown)}; there are: {', '.join(names())}")
        return 2
    if options and len(chosen) != 1:
        print("bench: options go to one benchmark: python -m bench NAME --option ...")
        return 2
    needs_gpu = not {"cpu", "--device=cpu", "-h", "--help"} & set(options)
    if needs_gpu and not torch.cuda.is_available():
        print("bench: no CUDA GPU that torch can use; nothing was measured.")
        return 0
    gpu = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else "cpu"
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu).strip("-")
    path = HERE / "records" / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{gpu}.jsonl"
    code = 0
    # An older build to compare with, a vLLM and room for its folders, minutes of compilation: these
    # run by name alone.
    needs_another = {"compat", "generate", "hosttime", "serve", "vllm"}
    for name in chosen or sorted(set(names()) - needs_another):
        print(f"== {name}", flush=True)
        code |= importlib.import_module(f"bench.bench_{name}").main(path, options) or 0
    return code


if __name__ == "__main__":
    from . import options

    options.BEGAN = options.process_began()
    for stream in (sys.stdout, sys.stderr):  # a pipe has what was said when the process is killed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    sys.exit(main(sys.argv[1:]))
