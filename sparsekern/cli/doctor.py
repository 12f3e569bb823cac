"""What this machine has, and what sparsekern will run on it.

`diagnose()` returns findings, one per line of `sparsekern doctor`. Nothing here fails: an absent
part is a finding with the reason. The last section asks the dispatch itself (`sparsekern.explain`)
about the weight of a SparseLinear, in whatever layout that has here, instead of repeating rules.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGES = ("numpy", "safetensors", "transformers", "tokenizers", "gguf", "triton")
PROBE_FEATURES = 4096  # in_features and out_features of the layer that "what will run" asks about
PROBE_TOKENS = (1, 64, 4096)


@dataclass
class Finding:
    """One line: section ("software", "GPU", ...), name, text, and whether the part is there."""

    section: str
    name: str
    text: str
    present: bool = True


def diagnose() -> list[Finding]:
    """All findings, in the order in which they are printed.

    Returns:
        list of Finding: software, GPU, kernels, libraries, what will run.
    """
    return [*_software(), *_gpus(), *_kernels(), *_libraries(), *_what_will_run()]


def table(findings: Sequence[Finding]) -> str:
    """The findings as text, one section after the other; absent parts are marked with "-"."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ([""] if lines else []) + [section]
        mark = "+" if finding.present else "-"
        lines.append(f"  {mark} {finding.name:<{width}}  {finding.text}")
    return "\n".join(lines)


def _software() -> Iterator[Finding]:
    from sparsekern import __version__

    yield Finding("software", "sparsekern", __version__)
    yield Finding(
        "software",
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    )
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield Finding(
        "software", "torch", f"{torch.__version__} ({cuda}, {torch.get_num_threads()} CPU threads)"
    )
    for name in PACKAGES:
        try:
            yield Finding("software", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("software", name, "not installed", present=False)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = (
            "torch sees no CUDA device"
            if torch.version.cuda
            else "this torch was built without CUDA"
        )
        yield Finding("GPU", "none", f"{why}; everything runs on the CPU", present=False)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            "GPU",
            f"cuda:{index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.1f} GiB",
        )


def _kernels() -> Iterator[Finding]:
    from sparsekern import _native
    from sparsekern.backends import triton as triton_kernels

    if _native.available():
        info = _native.module().build_info()
        kernels = ", ".join(info["kernels"]) or "no kernels"
        yield Finding(
            "kernels",
            "sparsekern._C",
            f"built with nvcc {info['nvcc']} for {', '.join(info['archs'])}: {kernels}",
        )
    else:
        yield Finding("kernels", "sparsekern._C", _native.reason(), present=False)
    usable, what = triton_kernels.available(), triton_kernels.reason()
    if usable:
        from sparsekern.backends.triton.configs import FASTER_TOKENS

        timed = "no records of quantised and float32 weights"
        what = f"usable; slower than dense with more than {FASTER_TOKENS} tokens; {timed}"
        if without := triton_kernels.mma_sp_reason():
            what = f"usable, but not on the sparse tensor cores: {without}"
    yield Finding("kernels", "Triton", what, present=usable)
    yield from _tuned_tables()


def _tuned_tables() -> Iterator[Finding]:
    """Which table chooses among the CUDA kernels, for each GPU that runs them."""
    from sparsekern.backends.cuda import linear as cuda_backend
    from sparsekern.backends.cuda import tuned_tables as tuning

    found = False
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if not cuda_backend.refusal(index):
            found, text = True, tuning.summary(tuning.gpu_name(index))
            yield Finding("kernels", f"tuned tables, cuda:{index}", text)
    if not found:
        text = f"no GPU here runs the CUDA kernels; yours would be {tuning.user_path()}"
        yield Finding("kernels", "tuned tables", text, present=False)


def _libraries() -> Iterator[Finding]:
    nvcc = _find_nvcc()
    yield Finding(
        "libraries",
        "nvcc",
        nvcc or "not in CUDA_HOME, on PATH or in the nvidia wheels",
        present=bool(nvcc),
    )
    yield _cusparselt()


def _cusparselt() -> Finding:
    from sparsekern.backends.cusparselt import library as cusparselt_library

    found, why = cusparselt_library.library()
    if found is None:
        return Finding("libraries", "cuSPARSELt", why, present=False)
    text = f"{found.name.split()[1]}, {found.path}"
    refused = [
        cusparselt_library.refusal(index, dtype)
        for index in range(torch.cuda.device_count())
        for dtype in cusparselt_library.DTYPES
    ]
    return Finding("libraries", "cuSPARSELt", "; ".join([text, *filter(None, refused)]))


def _nvidia_folders() -> list[Path]:
    """Folders of the `nvidia` namespace package, where CUDA wheels are installed."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def _find_nvcc() -> str | None:
    """Path of nvcc, in the order in which setup.py looks for it."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    found = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found += [Path(place) for place in [shutil.which("nvcc")] if place]
    found += [
        path
        for folder in _nvidia_folders()
        for path in sorted(folder.glob("*/bin/nvcc"), reverse=True)
    ]
    return next((str(path) for path in found if os.access(path, os.X_OK)), None)


def _what_will_run() -> Iterator[Finding]:
    devices = [("cpu", torch.float32)] + [("cuda", torch.bfloat16)] * torch.cuda.is_available()
    for device, dtype in devices:
        for tokens in PROBE_TOKENS:
            name = f"{device}, {str(dtype).removeprefix('torch.')}, {tokens} tokens"
            try:
                text = _explained(tokens, dtype, device)
                yield Finding("sparse linear layers", name, text)
            except (NotImplementedError, RuntimeError) as error:
                yield Finding("sparse linear layers", name, str(error), present=False)


def _explained(tokens: int, dtype: torch.dtype, device: str) -> str:
    from sparsekern.nn.sparse_linear import SparseLinear
    from sparsekern.ops.linear_op import explain

    features = PROBE_FEATURES
    weight = SparseLinear(features, features, bias=False, dtype=dtype, device=device).weight
    return str(explain(torch.empty(tokens, features, dtype=dtype, device=device), weight))


def main(json_output: bool = False) -> int:
    """Print the findings; returns the exit code 0, because an absent part is no error."""
    findings = list(diagnose())
    if json_output:
        import json

        json.dump([vars(finding) for finding in findings], sys.stdout, indent=1)
        print()
    else:
        print(table(findings))
    return 0
