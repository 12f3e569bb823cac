"""Runs the first Python block of README.md for real, on the real model, and writes what it printed
and how long it took below it:

    python -m python_tests.docs.real_example

Fetches 93 MB once and takes minutes on a CPU.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import torch

import sparsekern  # before the folder changes: that of this tree
from python_tests.docs.pages import ROOT, blocks

BEGIN, END = "<!-- output:begin -->", "<!-- output:end -->"


def run(code: str) -> str:
    """What the code prints in an empty folder, and its time, as the text between the markers."""
    printed, start, busy = io.StringIO(), time.perf_counter(), time.process_time()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)
        try:
            exec(compile(code, "README.md", "exec"), {})
        finally:
            os.chdir(before)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    text = (
        f"{seconds:.0f} s in all, {busy:.0f} s of CPU time, with {torch.get_num_threads()} CPU "
        f"thread(s), torch {torch.__version__}, sparsekern {sparsekern.__version__}."
    )
    return f"{BEGIN}\n```text\n{printed.getvalue()}```\n\n{text}\n{END}"


def main() -> None:
    readme = ROOT / "README.md"
    first = next(block for block in blocks(readme) if block.language == "python")
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    output = run(first.code)
    print(output)
    readme.write_text(before + output + after, encoding="utf-8")


if __name__ == "__main__":
    main()
