"""The real cuSPARSELt, in a process of its own: python cusparselt_child.py CASE.

A fault of the library poisons the CUDA context of its process, so test_cusparselt.py starts this
file once per case. It prints "CASE: right", "skip: why", or fails with a traceback.
"""

import copy
import sys

import torch

from python_tests.linear_cases import assert_within, error_bound, random_input, random_weight
from sparsekern import SparseLinear, explain, linear, linear_quantized, reference
from sparsekern.backends.cusparselt import library as vendor
from sparsekern.backends.cusparselt import linear as backend
from sparsekern.backends.cusparselt.linear import Algorithm
from sparsekern.backends.cusparselt.search import search
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24, compress, decompress

DEVICE = "cuda"
BF16 = torch.bfloat16
# (out_features, in_features): the smallest, odd multiples of 16, layers.
SHAPES = ((32, 32), (48, 272), (1040, 528), (4096, 4096), (2048, 8192))
TOKENS = (1, 7, 8, 16, 33, 64, 257, 1024)


def problem(out_features, in_features, dtype=BF16, integers=True):
    w = random_weight(out_features, in_features, dtype, integers=integers)
    w24 = compress(w).to(DEVICE)
    return w.to(DEVICE), w24, backend.pack(w24)


def rows(tokens, in_features, dtype=BF16, integers=True, seed=1):
    return random_input((tokens, in_features), dtype, seed, integers).to(DEVICE)


def exact(x, w, bias=None, activation=None):
    """The float64 result rounded once, for whole numbers."""
    bias = None if bias is None else bias.double()
    return reference.linear(x.double(), w.double(), bias, activation).to(x.dtype)


def check_linear(dtype=BF16):
    for shape in SHAPES:
        w, w24, packed = problem(*shape, dtype)
        bias = rows(1, shape[0], dtype, seed=2)[0]
        for tokens in TOKENS:
            x = rows(tokens, shape[1], dtype)
            where = f"{shape}, {tokens} tokens, {explain(x, packed)}"
            assert torch.equal(linear(x, packed), exact(x, w)), where
            fused = linear(x, packed, bias, "relu")
            assert torch.equal(fused, exact(x, w, bias, "relu")), where
        z = exact(x, w, bias).float()
        assert torch.equal(linear(x, packed, bias, "silu"), torch.nn.functional.silu(z).to(dtype))
        strided = rows(16, shape[1] + 8, dtype)[:, : shape[1]]
        assert torch.equal(linear(strided, packed), exact(strided, w)), f"{shape}, strided"
        assert linear(x[:0], packed).shape == (0, shape[0])
    w, _, packed = problem(1024, 4096, dtype, integers=False)
    x, bias = rows(100, 4096, dtype, integers=False), rows(1, 1024, dtype, integers=False)[0]
    y64 = reference.linear(x.double(), w.double(), bias.double()).cpu()
    y = linear(x, packed, bias)
    assert_within(y, y64, error_bound(x.cpu(), w.cpu(), bias.cpu(), y64, dtype))
    assert torch.equal(y, linear(x, packed, bias)), "the same bits again"


def workspace_bytes():
    """Of the plans that the backend keeps, the most."""
    return max(size for plans in backend._plans.values() for _, size in plans.values())


def check_again():
    """Calls like one before, which skip the checks; on two streams and in a graph, with an
    algorithm that needs a workspace where the library has one."""
    w, _, packed = problem(2048, 8192)
    x = rows(16, 8192)
    bias = rows(1, 2048, seed=2)[0]
    key = backend.algorithm_key(0, BF16, 2048, 8192, 16)
    splits = [Algorithm(number, 4, mode) for mode in (2, 1) for number in range(8)]
    with torch.inference_mode():
        for algorithm in (*splits, Algorithm()):
            backend.remember(key, algorithm, 1.0, store=False)
            try:
                right = torch.equal(linear(x, packed), exact(x, w)) and torch.equal(
                    linear(x, packed, bias, "relu"), exact(x, w, bias, "relu")
                )
            except (NotImplementedError, ValueError, RuntimeError):
                continue
            if right and (algorithm == Algorithm() or workspace_bytes()):
                break
        print(f"{algorithm}, workspace {workspace_bytes()} bytes")
        xs = [rows(16, 8192, seed=seed) for seed in range(4)]
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        got = []
        for turn in range(60):
            with torch.cuda.stream(streams[turn % 3]):
                got.append(linear(xs[turn % 4], packed, bias if turn % 2 else None, "relu"))
        torch.cuda.synchronize()
        for turn, y in enumerate(got):
            right = exact(xs[turn % 4], w, bias if turn % 2 else None, "relu")
            assert torch.equal(y, right), f"turn {turn}"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[1]):  # a stream that has a workspace
            captured = [linear(one, packed) for one in xs]
        for turn in range(20):  # replays on one stream beside calls on another
            with torch.cuda.stream(streams[2]):
                graph.replay()
            with torch.cuda.stream(streams[1]):
                y = linear(xs[turn % 4], packed)
            torch.cuda.synchronize()
            assert torch.equal(y, exact(xs[turn % 4], w))
            assert all(torch.equal(y, exact(one, w)) for one, y in zip(xs, captured))
        for bad in (x.cpu(), x.half()):
            try:
                linear(bad, packed)
            except (TypeError, ValueError) as error:
                assert "weight" in str(error)
            else:
                raise AssertionError("not refused")
        for tokens in TOKENS:
            one = rows(tokens, 8192)
            for _ in range(2):
                assert torch.equal(linear(one, packed), exact(one, w)), tokens


def check_module():
    for shape in SHAPES:
        w, w24, packed = problem(*shape, integers=False)
        back = packed.rowmajor()
        assert torch.equal(back.values, w24.values), shape
        assert torch.equal(back.metadata, w24.metadata), shape
        if min(shape) >= 512:
            assert packed.nbytes <= 0.60 * w.nbytes, f"{shape}: {packed.nbytes / w.nbytes}"
    bias = rows(1, shape[0], integers=False)[0]
    plain = SparseLinear.from_sparse24(w24, bias, packed=False)
    module = SparseLinear.from_sparse24(w24, bias.clone(), packed="cusparselt")
    x = rows(16, shape[1], integers=False)
    y = module(x)
    assert explain(x, module.weight).backend == "cusparselt"
    for key, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[key], tensor), key
    other = SparseLinear(shape[1], shape[0], dtype=BF16, device=DEVICE, packed="cusparselt")
    other.load_state_dict(module.state_dict())
    for again in (other, copy.deepcopy(module), module.cpu().to(DEVICE)):
        assert again.weight.layout == "cusparselt" and torch.equal(again(x), y)
    assert module.cpu().weight.layout == "rowmajor"
    small = x.detach().requires_grad_()
    other(small).sum().backward()
    dense = torch.ones(16, shape[0], dtype=BF16, device=DEVICE) @ decompress(w24)
    assert torch.allclose(small.grad.float(), dense.float(), rtol=2**-6, atol=2**-4)


def check_graph():
    w, _, packed = problem(1024, 2048)
    for tokens in (5, 64):
        x = rows(tokens, 2048)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = linear(x, packed)
        stream.synchronize()
        assert torch.equal(y, exact(x, w)), "on another stream"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, packed)
        x.copy_(rows(tokens, 2048, seed=5))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, exact(x, w)), "replayed with new inputs"
    compiled = torch.compile(lambda x: linear(x, packed), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), exact(x, w)), "torch.compile"


def check_search():
    w, _, packed = problem(2048, 4096)
    for tokens in (16, 1024):
        result = search(packed, tokens)
        print(result)
        x = rows(tokens, 4096)
        assert str(result.algorithm) in explain(x, packed).config
        assert torch.equal(linear(x, packed), exact(x, w))
        assert result.default_us is None or result.us <= result.default_us


def check_float16():
    why = vendor.refusal(0, torch.float16)
    if why:
        assert "illegal instruction" in why, why
        try:
            problem(64, 64, torch.float16)
        except NotImplementedError as error:
            assert why in str(error)
            return
        raise AssertionError("float16 was not refused")
    check_linear(torch.float16)


def check_levels(storage):
    """Weights of 8 bits: the blob gives back the levels; whole numbers and scales that are powers
    of two exactly, padded tokens and a graph among them."""
    kind = getattr(torch, storage)
    if why := vendor.refusal(0, kind):
        print(f"skip: {why}")
        sys.exit()
    generator = torch.Generator().manual_seed(0)
    whole = compress(random_weight(256, 512, BF16, integers=True))
    scale = torch.exp2(torch.randint(-2, 3, (256, 1), generator=generator).float())
    tensors = {"values": whole.values.float().to(kind), "metadata": whole.metadata}
    spec = WeightSpec.of((256, 512), storage, "rowmajor", BF16)
    w24 = Sparse24.from_tensors(spec, {**tensors, "weight_scale": scale}).cuda()
    packed = w24.to_layout("cusparselt")
    back = packed.rowmajor()
    for name, tensor in w24.tensors.items():
        assert torch.equal(back.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for tokens in (1, 16, 40, 300):
        q = torch.randint(-2, 3, (tokens, 512), generator=generator).float().to(kind)
        x_scale = torch.exp2(torch.randint(-2, 3, (tokens,), generator=generator).float())
        wanted = linear_quantized(q, x_scale, w24.cpu())
        arguments = q.cuda(), x_scale.cuda(), packed
        y = linear_quantized(*arguments, backend="cusparselt")
        assert torch.equal(y.cpu(), wanted), f"{tokens} tokens"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear_quantized(*arguments, backend="cusparselt")
        graph.replay()
        assert torch.equal(captured, y), f"{tokens} tokens in a graph"
    print(search(packed, 40, store=False))


CASES = {
    "float8_e4m3fn": lambda: check_levels("float8_e4m3fn"),
    "int8": lambda: check_levels("int8"),
    "linear": check_linear,
    "again": check_again,
    "module": check_module,
    "graph": check_graph,
    "search": check_search,
    "float16": check_float16,
}


def main(case):
    if why := vendor.refusal(0, BF16):
        print(f"skip: {why}")
        return
    CASES[case]()
    torch.cuda.synchronize()
    print(f"{case}: right with {vendor.library()[0].name}, {vendor.library()[0].path}")


if __name__ == "__main__":
    main(sys.argv[1])
