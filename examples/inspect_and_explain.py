"""Look into a compressed weight, ask what would compute it, and time it against the dense layer."""

import torch

import sparsekern as sk
from sparsekern.profiling.layer_bench import bench_shape, table


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dense = torch.randn(256, 512, device=device, dtype=dtype)
    w24 = sk.prune_compress(dense)
    print(w24)
    share = w24.nbytes / (dense.numel() * dense.element_size())
    print(f"bytes: {w24.nbytes}, {share:.4f} of dense")
    rows = w24.rowmajor()
    print("row 0, first groups, values:", [round(v, 3) for v in rows.values[0, :6].tolist()])
    nibbles = [f"{byte & 15:#x} {byte >> 4:#x}" for byte in rows.metadata[0, :2].tolist()]
    print("row 0, first groups, metadata:", *nibbles)
    for tokens in (1, 64, 1024):
        x = torch.randn(tokens, 512, device=device, dtype=dtype)
        print(f"{tokens:>5} tokens: {sk.explain(x, w24)}")
    print(table([bench_shape(256, 512, 16, dtype=dtype, device=device)]))


if __name__ == "__main__":
    main()
