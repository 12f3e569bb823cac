"""What the Triton kernels of sparsekern.linear must reproduce, on a GPU and in the interpreter.

As a script, with TRITON_INTERPRET=1 in the environment, this file runs its cases on the CPU and
prints {case: error or null}. bfloat16 is left to the GPU, because Triton's interpreter multiplies
the bit patterns of its operands (3.6) and truncates to it; but for the kernel for few tokens, which
widens its operands itself.
"""

import json

import torch

from python_tests.linear_cases import (
    SHAPES,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from sparsekern import quantize, reference
from sparsekern.backends.triton.configs import Expanded, FewTokens, pick_config, tile_config
from sparsekern.formats import dtypes
from sparsekern.formats.sparse24 import Sparse24, compress, decompress

# (tokens, out_features, in_features, activation, bias). 1024 columns and few rows: split over
# in_features, with tiles that do not divide evenly among the splits at 1156.
TILES = [(*shape, "relu", True) for shape in SHAPES]
TILES += [
    (1, 64, 1024, None, False),
    (2, 9, 1156, "relu", True),
    (5, 6, 20, "gelu", True),
    (5, 6, 20, "silu", False),
    (0, 6, 20, None, True),
    (4, 6, 0, "relu", True),
]

# (case, config) of the kernel for 1 to 4 tokens, whose turns are of 256 to 512 columns: a part of
# one, whole ones, parts of in_features that end with a turn, within one, and that begin beyond the
# end; an odd number of rows; one row a program; three tokens of four.
FEW = [
    ((1, 5, 8, "relu", True), None),
    ((1, 3, 512, None, False), FewTokens(2, 1, 1, 1)),
    ((2, 5, 520, "silu", True), FewTokens(2, 1, 1, 2)),
    ((3, 3, 520, "gelu", True), FewTokens(1, 1, 2, 1)),
    ((4, 3, 1024, "relu", True), FewTokens(2, 2, 2, 1)),
    ((3, 2, 512, None, False), FewTokens(4, 1, 4, 2)),
    ((4, 3, 264, "relu", False), FewTokens(2, 2, 1, 1)),
]
# (case, config): several parts of the rows, the last one shorter; in_features % 8 == 4.
MANY = [
    ((5, 150, 36, "relu", True), Expanded(64)),
    ((3, 64, 64, None, False), Expanded(64)),
    ((2, 9, 8, "silu", True), Expanded(512)),
]

# (storage, group, tokens, out_features, in_features, activation, bias, x_scale): one scale a row, a
# last group that is shorter, tiles that span two groups, in_features % 8 == 4, a split.
QUANTIZED = [
    (storage, 0, *shape, "relu", True, (place + odd) % 2 == 1)
    for odd, storage in enumerate(("float8_e4m3fn", "int8"))
    for place, shape in enumerate(((1, 64, 1024), (5, 9, 268), (33, 70, 132)))
]
QUANTIZED += [
    ("int4", 128, 1, 64, 1024, None, False, False),
    ("int4", 64, 5, 9, 1156, "relu", True, False),
    ("int4", 64, 33, 70, 132, "relu", True, False),
    ("int4", 268, 5, 9, 268, "silu", True, False),
    ("int4", 128, 3, 6, 20, None, True, False),
]
# (case, config): the same for many tokens, several parts of the rows.
QUANTIZED_MANY = [
    (("int8", 0, 3, 70, 36, "relu", True, True), Expanded(64)),
    (("float8_e4m3fn", 0, 3, 70, 36, None, False, False), Expanded(64)),
    (("int4", 64, 3, 70, 132, "relu", True, True), Expanded(64)),
    (("int4", 36, 2, 9, 36, "silu", True, False), Expanded(512)),
]


def check_quantized(case, dtype, device, config=None):
    """Exact on whole levels and scales that are powers of two; within the bound on random data.
    Expanded rounds level times scale of a group to dtype."""
    from sparsekern.backends.triton import linear as kernels

    storage, group, tokens, out_features, in_features, activation, with_bias, with_scale = case
    shape = tokens, out_features, in_features, activation, with_bias
    for integers in (True, False):
        x, w, bias, _ = problem(shape, dtype, integers)
        codec = dtypes.scaled_codec(storage)
        w24 = quantize(compress(w), storage, group=group or None)
        if integers:  # levels are the whole numbers of w, or -7 to 7 in int4
            scale = torch.exp2(torch.randint(-2, 3, w24.tensors["weight_scale"].shape).float())
            stored = codec.pack(compress(w).values.float().clamp(-7, 7))
            tensors = {"values": stored, "metadata": compress(w).metadata, "weight_scale": scale}
            w24 = Sparse24.from_tensors(w24.spec, tensors)
        x_scale = torch.exp2(torch.randint(-2, 3, (tokens,)).float()) if with_scale else None
        tensors = {name: tensor.to(device) for name, tensor in w24.tensors.items()}
        y = kernels.linear(
            x.to(device),
            tensors["values"],
            tensors["metadata"],
            in_features,
            None if bias is None else bias.to(device),
            activation,
            config,
            scale=tensors["weight_scale"],
            group=w24.spec.group,
            x_scale=None if x_scale is None else x_scale.to(device),
        )
        groups = w24.tensors["weight_scale"].shape[1]
        exact = dtype if isinstance(config, Expanded) and groups > 1 else torch.float32
        numbers = w24.numbers(exact).float()
        dense = decompress(Sparse24(numbers, w24.metadata, w24.shape))
        x64 = x.double() if x_scale is None else x.double() * x_scale[:, None]
        y64 = reference.linear(x64, dense, bias, activation)
        assert y.dtype == dtype and y.is_contiguous()
        if integers and activation in (None, "relu"):
            assert torch.equal(y.cpu(), y64.to(dtype)), f"{case} {dtype}"
        else:
            assert_within(y, y64, error_bound(x64, dense, bias, y64, dtype))


def problem(case, dtype, integers):
    tokens, out_features, in_features, activation, with_bias = case
    w = random_weight(out_features, in_features, dtype, integers=integers)
    x = random_input((tokens, in_features), dtype, integers=integers)
    bias = random_input((out_features,), dtype, seed=2, integers=integers) if with_bias else None
    return x, w, bias, activation


def check(case, dtype, device, config=None, gap=3, kinds=(True, False)):
    """Exact on integers (None and relu), within the bound on random data. gap: columns between the
    rows of x; a multiple of 4 keeps them aligned for the kernel for few tokens."""
    from sparsekern.backends.triton import linear as kernels

    for integers in kinds:
        x, w, bias, activation = problem(case, dtype, integers)
        w24 = compress(w).to(device)
        padded = torch.full((x.shape[0], x.shape[1] + gap), float("nan"), dtype=dtype)
        padded[:, : x.shape[1]] = x
        on_device = None if bias is None else bias.to(device)
        y = kernels.linear(
            padded.to(device)[:, : x.shape[1]],
            w24.values,
            w24.metadata,
            w.shape[1],
            on_device,
            activation,
            config,
        )
        y64 = reference.linear(x, w, bias, activation)
        assert y.dtype == dtype and y.is_contiguous()
        if integers and activation in (None, "relu"):
            assert torch.equal(y.cpu(), y64.to(dtype)), f"{case} {dtype} {config}"
        else:
            assert_within(y, y64, error_bound(x, w, bias, y64, dtype))


def check_tiles(case, dtype, device):
    """The kernel that expands tiles, also where another one would be chosen."""
    check(case, dtype, device, tile_config(*case[:3], dtype))


def check_few(case, config, dtype, device, kinds=(True, False)):
    """With rows of x that are aligned, or not."""
    check(case, dtype, device, config, 3 if case[0] == 3 else 4, kinds)


def check_few_bfloat16(case, config, device):
    """bfloat16 with a float32 result, because Triton's interpreter truncates to bfloat16."""
    from sparsekern.backends.triton import few_tokens

    x, w, bias, activation = problem(case, torch.bfloat16, True)
    w24 = compress(w).to(device)
    out = torch.empty(case[0], case[1], device=device)
    config = config or pick_config(*case[:3], torch.bfloat16)
    bias_there = None if bias is None else bias.to(device)
    few_tokens.launch(x.to(device), w24.values, w24.metadata, bias_there, activation, config, out)
    y64 = reference.linear(x, w, bias, activation)
    if activation in (None, "relu"):
        assert torch.equal(out.cpu(), y64.float()), f"{case} {config}"
    else:
        assert_within(out, y64, error_bound(x, w, bias, y64, torch.float32))


def run_interpreted():
    """{case: error or None}."""
    import triton.runtime.interpreter as interpreter

    # NumPy 2.4 refuses int() of the one-element arrays that stand for scalars in Triton 3.6.
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if patch_tensor is not None:
        interpreter._patch_lang_tensor = patch_tensor_and_index
    of_tiles = [torch.float32 if c[3] == "silu" or c[0] == 33 else torch.float16 for c in TILES]
    jobs = [(check_tiles, case, dtype, "cpu") for case, dtype in zip(TILES, of_tiles)]
    random = (False,)  # whole numbers are left to the other dtype: Python is slow
    jobs += [(check_few, case, config, torch.float16, "cpu", random) for case, config in FEW]
    jobs += [(check_few_bfloat16, case, config, "cpu") for case, config in FEW]
    jobs += [(check, case, torch.float16, "cpu", config) for case, config in MANY]
    jobs += [(check_quantized, case, torch.float16, "cpu") for case in QUANTIZED]
    jobs += [(check_quantized, case, torch.float16, "cpu", c) for case, c in QUANTIZED_MANY]
    results = {}
    for function, *arguments in jobs:
        name = f"{function.__name__} {' '.join(map(str, arguments))}"
        try:
            function(*arguments)
            results[name] = None
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:500]
    return results


if __name__ == "__main__":
    print(json.dumps(run_interpreted()))
