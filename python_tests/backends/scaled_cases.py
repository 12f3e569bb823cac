"""Problems and calls shared by the tests of the 8-bit kernels and by sanitizer_child.py: weights
and x of levels of one 8-bit type, with scales."""

import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import BF16, DEVICE, stream, workspace
from python_tests.linear_cases import random_input, random_weight
from sparsekern import _native
from sparsekern.formats.tile64 import pack

E4M3, INT8 = "float8_e4m3fn", "int8"
STORAGES = (E4M3, INT8)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def configs():
    """[(storage, kernel, config index)] of every 8-bit kernel with 8-bit x."""
    if not _native.available():
        return []
    found = []
    for kernel, rows in _native.module().kernels().items():
        for row in rows:
            for weight, x, y in row["types"]:
                if weight == x and weight in STORAGES and y == "bfloat16":
                    found.append((weight, kernel, row["index"]))
    return found


CONFIGS = configs()


def promoted(kernel, index):
    return bool(_native.module().kernels()[kernel][index].get("promoted"))


class Problem:
    """A packed weight of levels, x of levels with gaps between its rows, scales, and the product of
    the levels in float64, exactly."""

    def __init__(self, tokens, out_features, in_features, storage, dtype, w=None, x=None):
        self.storage, self.dtype = storage, dtype
        self.out_features, self.in_features = out_features, in_features
        w = random_weight(out_features, in_features, BF16, integers=True) if w is None else w
        ones = torch.ones(out_features, 1)
        w24 = sk.quantize(sk.compress(w), "fp8" if storage == E4M3 else storage, scale=ones)
        self.w24 = pack(w24.to(dtype).to(DEVICE))
        x = random_input((tokens, in_features), torch.float32, integers=True) if x is None else x
        kind = self.w24.values.dtype
        wide = torch.full((tokens, -(-in_features // 16) * 16 + 16), 0x7F, dtype=torch.uint8)
        wide[:, :in_features] = x.to(kind).view(torch.uint8)  # the gaps are NaN, or 127
        self.x = wide.to(DEVICE).view(kind)[:, :in_features]
        self.product = x.double().to(DEVICE) @ w.double().to(DEVICE).t()
        self.bias = random_input((out_features,), dtype, seed=2, integers=True).to(DEVICE)
        shape = (tokens, out_features)
        self.residual = random_input(shape, dtype, seed=3, integers=True).to(DEVICE)
        channel = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5]).repeat(out_features // 5 + 1)
        self.channel = channel[:out_features].contiguous().to(DEVICE)
        token = torch.tensor([1.0, 0.25, 2.0]).repeat(tokens // 3 + 1)
        self.token = token[:tokens].contiguous().to(DEVICE)


def call(kernel, index, p, tokens, y, cut_k=True, activation=None, **operands):
    """One launch on the first tokens of a problem. operands: tensors by their names."""
    residual = operands.get("residual")
    linear = _native.module().Linear(
        kernel=kernel,
        config=index,
        tokens=tokens,
        out_features=p.out_features,
        in_features=p.in_features,
        x_stride=p.x.stride(0),
        y_stride=y.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        dtype=name_of(p.dtype),
        weight_dtype=p.storage,
        x_dtype=p.storage,
        activation=activation,
    )
    if linear.needs_workspace and cut_k:
        operands["workspace"] = workspace()
    linear(
        x=p.x.data_ptr(),
        values=p.w24.values.data_ptr(),
        metadata=p.w24.metadata.data_ptr(),
        y=y.data_ptr(),
        stream=stream(),
        **{name: tensor.data_ptr() for name, tensor in operands.items()},
    )
