"""The vendor's 2:4 library through torch, tuned by its own search; and a probe in a child process.

cuSPARSELt 0.8.0 dies with "illegal instruction" in float16 on Hopper, and such a fault takes the
CUDA context of the whole process with it. `probe` therefore tries a dtype in a child first, with a
time limit; what it says is recorded when the library cannot be compared.

    python -m bench.cusparselt float16 4096 4096 16
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import record

ALIGNMENT = 8  # tokens are padded to this: the library takes no fewer


@dataclass(frozen=True)
class Algorithm:
    """What the search chose."""

    alg_id: int
    split_k: int = 1
    split_k_mode: int = -1

    def __str__(self) -> str:
        split = f" split_k {self.split_k} mode {self.split_k_mode}" if self.split_k > 1 else ""
        return f"alg {self.alg_id}{split}"


def available() -> str:
    """Empty when torch has the library, else why not."""
    if not torch.cuda.is_available():
        return "no CUDA GPU that torch can use"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return ""


def compress(pruned: Tensor) -> Tensor:
    """The library's form of a 2:4 weight [out_features, in_features]."""
    return torch._cslt_compress(pruned)


def padded(x: Tensor) -> Tensor:
    """x [tokens, in_features] with zero rows up to a multiple of ALIGNMENT; not timed."""
    missing = -x.shape[0] % ALIGNMENT
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def search(compressed: Tensor, x: Tensor) -> Algorithm:
    """The library's own search over its algorithms and splits for this problem."""
    native = getattr(torch._C, "_cusparselt", None)
    if hasattr(native, "mm_search"):
        return Algorithm(*native.mm_search(compressed, x.t(), None, None, None, True)[:3])
    return Algorithm(torch._cslt_sparse_mm_search(compressed, x.t(), transpose_result=True))


def linear(compressed: Tensor, x: Tensor, algorithm: Algorithm) -> Tensor:
    """x [tokens, in_features] · Wᵀ -> [tokens, out_features]; tokens as from `padded`."""
    return torch._cslt_sparse_mm(
        compressed,
        x.t(),
        transpose_result=True,
        alg_id=algorithm.alg_id,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )


def probe(
    dtype: torch.dtype | str, out_features=4096, in_features=4096, tokens=16, timeout=120
) -> str:
    """Tries the library in a child process; empty when it computes, else what happened.

    dtype: of everything; "float8_e4m3fn" and "int8": of weight and x, in sparsekern's own use of
    the library (backends/cusparselt).
    """
    name = str(dtype).removeprefix("torch.")
    return tried("bench.cusparselt", (name, out_features, in_features, tokens), timeout)


def tried(module: str, arguments: Sequence[object], timeout: float) -> str:
    """Runs a module in a child process; empty when its exit status is 0, else what happened."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        done = subprocess.run(
            command, cwd=record.ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:g} s"
    return "" if done.returncode == 0 else last_error(done.stderr, done.returncode)


def last_error(stderr: str, code: int) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if "Error" in line or "error" in line]
    return lines[-1][:200] if lines else f"exit code {code}"


def main(arguments: list[str]) -> int:
    dtype = getattr(torch, arguments[0])
    out_features, in_features, tokens = map(int, arguments[1:])
    if dtype.itemsize == 1:
        return quantized(arguments[0], out_features, in_features, tokens)
    if reason := available():
        print(f"Error: {reason}", file=sys.stderr)
        return 3
    from sparsekern import decompress, prune_compress

    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device="cuda") * in_features**-0.5
    pruned = decompress(prune_compress(weight.to(dtype)))
    x = padded(torch.randn(tokens, in_features, device="cuda").to(dtype))
    compressed = compress(pruned)
    y = linear(compressed, x, search(compressed, x))
    torch.cuda.synchronize()
    error = (y.double() - x.double() @ pruned.double().t()).abs().max().item()
    print(f"{torch.backends.cusparselt.version()}: largest error {error:.3g}")
    return 0 if error < 0.1 else 1


def quantized(storage: str, out_features: int, in_features: int, tokens: int) -> int:
    """`main` for levels of 8 bits, by backends/cusparselt."""
    from sparsekern import prune_compress, quantize
    from sparsekern.backends.cusparselt import library, linear
    from sparsekern.backends.cusparselt.search import search
    from sparsekern.backends.quantize_rows import quantize as quantize_x
    from sparsekern.formats.scaled import SCALE

    why = library.refusal(torch.cuda.current_device(), getattr(torch, storage))
    if why := why or library.shape_refusal(out_features, in_features, getattr(torch, storage)):
        print(f"Error: {why}", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device="cuda") * in_features**-0.5
    rows = quantize(
        prune_compress(weight.bfloat16(), layout="rowmajor"), storage, layout="rowmajor"
    )
    packed = linear.pack(rows)
    rows_of_x = linear.padded_tokens(tokens, packed.spec.element.storage)
    x, _ = quantize_x(torch.randn(rows_of_x, in_features, device="cuda").bfloat16(), storage)
    found = search(packed, rows_of_x, store=False)
    y = linear.product(x, packed)
    torch.cuda.synchronize()
    numbers = rows.to_dense().double()
    if not library.scales_channels(getattr(torch, storage)):  # the product is of the levels alone
        numbers /= rows.tensors[SCALE].view(-1, 1)
    wanted = x.double() @ numbers.t()
    error = ((y.double() - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{found}; largest error {error:.3g} of the largest output")
    return 0 if error < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
