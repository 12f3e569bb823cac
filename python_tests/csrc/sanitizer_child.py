"""Runs every kernel of the native module once or twice: what test_sanitizer.py watches.

Data is made and checked on the CPU, so that little but our kernels runs under the tool. A wrong
result is an error, too: exit code 1. With the arguments "few PART PARTS" it runs the first problem
in bfloat16 alone, and of the launches every PARTS-th: racecheck, which follows every access to
shared memory, takes minutes for that.
"""

import itertools
import sys

import torch

import sparsekern as sk
from python_tests.backends import scaled_cases
from python_tests.backends.cuda_cases import (
    BF16,
    F16,
    Problem,
    call,
    guarded,
    variants,  # those of this GPU,
)
from python_tests.backends.widened_cases import INT4, launcher
from python_tests.backends.widened_cases import Problem as Widened
from python_tests.linear_cases import random_weight
from sparsekern import _native
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack

# (tokens, out_features, in_features): ragged everywhere; more steps of 64 than stages; few tiles of
# long in_features, which clusters share.
SHAPES = ((60, 325, 900), (9, 64, 64), (200, 1100, 132), (40, 130, 4100))


def hopper():
    return any(kernel == "prefill" for kernel, _ in variants())


def main(few, part, parts):
    wrong, launches = [], itertools.count()

    def others():
        """Whether the next launch is of another part."""
        return next(launches) % parts != part

    for dtype in (BF16,) if few else (BF16, F16):
        for shape in SHAPES[:1] if few else SHAPES:
            p = Problem(*shape, dtype)
            expected = (p.product + p.bias.double() + p.residual.double()).cpu().to(dtype)
            for kernel, variant in variants():
                if others():
                    continue
                tokens = min(shape[0], 64) if kernel == "decode" else shape[0]
                _, y = guarded(tokens, p.out_features, dtype)
                call(kernel, variant, p, tokens, y, bias=p.bias, residual=p.residual)
                torch.cuda.synchronize()
                if not torch.equal(y.cpu(), expected[:tokens]):
                    wrong.append((kernel, variant, shape, dtype))
        for storage, kernel, index in scaled_cases.CONFIGS if dtype is BF16 else ():
            for shape in SHAPES[:1] if few else SHAPES:
                p = scaled_cases.Problem(*shape, storage, dtype)
                y64 = p.product * p.channel.double() * p.token.double()[:, None]
                expected = (y64 + p.bias.double() + p.residual.double()).cpu().to(dtype)
                for rest in (dict(bias=p.bias, residual=p.residual), {}):
                    if others():
                        continue
                    _, y = guarded(shape[0], p.out_features, dtype)
                    scales = dict(channel_scale=p.channel, token_scale=p.token)
                    scaled_cases.call(kernel, index, p, shape[0], y, **scales, **rest)
                    torch.cuda.synchronize()
                    wanted = expected if rest else y64.cpu().to(dtype)
                    if not torch.equal(y.cpu(), wanted):
                        wrong.append((storage, kernel, index, shape, bool(rest)))
        for shape in SHAPES[:1] if few else SHAPES:
            p = Widened(*shape, INT4, 128, dtype)
            expected = (p.product + p.bias.double() + p.residual.double()).cpu().to(dtype)
            for row in _native.module().kernels()["narrow"] if hopper() else ():
                if others():
                    continue
                _, y = guarded(shape[0], p.out_features, dtype)
                rest = dict(bias=p.bias, residual=p.residual, scaled=False)
                launcher(p, row["index"], shape[0], y, kernel="narrow", **rest)()
                torch.cuda.synchronize()
                if not torch.equal(y.cpu(), expected):
                    wrong.append(("narrow", row, shape, dtype))
        gate, up = (pack(compress(random_weight(325, 900, dtype, seed)).cuda()) for seed in (0, 1))
        for tokens in (1, 16, 32):
            if others():
                continue
            y = sk.gated_linear(torch.ones(tokens, 900, dtype=dtype).cuda(), gate, up)
            if not y.cpu().isfinite().all():
                wrong.append(("decode_gated", tokens, dtype))
    print(f"{len(wrong)} wrong results", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(len(sys.argv) > 1, *map(int, sys.argv[2:] or (0, 1))))
