"""Host time of one eager call of sk.linear and SparseLinear, of whichever checkout is on the path.

Given to Python on its standard input by bench_hosttime.py, and run with older checkouts too, so it
uses only what every version has. Prints a line of JSON.
"""

import json
import statistics
import sys
import time

import torch

import sparsekern as sk

CALLS = 64  # of one batch: far below the length of a stream's queue


def host_us(call, synchronize, batches):
    """Median microseconds of the host's time per call."""
    for _ in range(CALLS):
        call()
    taken = []
    for _ in range(batches):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - start) * 1e6 / CALLS)
    return statistics.median(taken)


def main(device, size, tokens_list, batches):
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    synchronize = torch.cuda.synchronize if on_gpu else (lambda: None)
    torch.manual_seed(0)
    weight = torch.randn(size, size, device=device).to(dtype) * size**-0.5
    w24 = sk.prune_compress(weight)
    pruned = sk.decompress(w24)
    layer = sk.SparseLinear.from_sparse24(w24)
    packed = layer.weight
    us = {}
    with torch.inference_mode():
        for tokens in tokens_list:
            x = torch.randn(tokens, size, device=device).to(dtype)
            expected = x.double() @ pruned.double().t()
            calls = {
                "sparsekern.linear": lambda x=x: sk.linear(x, packed),
                "SparseLinear": lambda x=x: layer(x),
            }
            for name, call in calls.items():
                error = (call().double() - expected).abs().max().item()
                if not error <= 0.05 * expected.abs().max().item():
                    raise RuntimeError(f"{name} is wrong at {tokens} tokens: {error}")
                us[f"{name}, {tokens} tokens"] = host_us(call, synchronize, batches)
    print(json.dumps({"file": sk.__file__, "us": us}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(n) for n in sys.argv[3].split(",")], int(sys.argv[4]))
