"""The Triton kernels of sparsekern.linear: on a GPU, interpreted, and compiled for sm_90."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from python_tests.backends.triton_linear_cases import (
    FEW,
    MANY,
    QUANTIZED,
    QUANTIZED_MANY,
    TILES,
    check,
    check_few,
    check_quantized,
    check_tiles,
    problem,
)
from python_tests.linear_cases import (
    ACTIVATIONS,
    DTYPES,
    assert_within,
    error_bound,
)
from sparsekern import linear_quantized, quantize, quantize_rows, reference
from sparsekern.backends import triton as triton_backend
from sparsekern.backends.protocol import problem_of
from sparsekern.backends.triton import configs
from sparsekern.backends.triton.backend import TritonBackend
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24, compress, decompress
from sparsekern.ops.linear_op import linear

# ---- without a GPU -------------------------------------------------------------------------------


def test_groups_that_no_tile_ends_with_are_refused(monkeypatch):
    """A tile of columns has one scale: a smaller group, or one of 96, would get another's."""
    from sparsekern.backends import triton as backend

    monkeypatch.setattr(backend, "available", lambda: True)
    cases = ((32, 256, 0), (96, 192, 0), (64, 256, 1), (256, 512, 1), (96, 96, 1))
    for group, columns, fits in cases:
        spec = WeightSpec.of((8, columns), "int4", "rowmajor", torch.bfloat16, None, group)
        on_gpu = SimpleNamespace(device=torch.device("cuda"), spec=spec, in_features=columns)
        reason = TritonBackend().supports(on_gpu)
        assert reason == (
            None if fits else f"backend 'triton' needs groups of a multiple of 64, got {group}"
        )


def test_kernels_in_the_interpreter():
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "triton_linear_cases.py")
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    child = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout.splitlines()[-1])
    assert len(results) == len(TILES) + 2 * len(FEW) + len(MANY + QUANTIZED + QUANTIZED_MANY)
    assert {case: error for case, error in results.items() if error is not None} == {}


def compile_for_hopper(kernel, constants, types, options):
    """What Triton makes of a kernel for sm_90, with the hints that the sizes of models give it.

    Sizes are int32 and, but for tokens and out_features, multiples of 16; pointers are aligned.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, divisible = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else types.get(argument, "i32")
        if argument not in constants and argument not in ("tokens", "out_features"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_compiles_for_hopper_without_spills(dtype, tokens, tmp_path, monkeypatch):
    """16 bit must reach the tensor cores, float32 must stay off TF32, and no register may spill."""
    from sparsekern.backends.triton import linear as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = configs.tile_config(tokens, 4096, 4096, dtype)
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    out = "*fp32" if config.split_in > 1 else pointer
    types = {"x_ptr": pointer, "values_ptr": pointer, "metadata_ptr": "*u8", "bias_ptr": pointer}
    constants = {
        "scale_ptr": None,
        "x_scale_ptr": None,
        "STORAGE": "plain",
        "GROUP": 0,
        "HAS_X_SCALE": False,
        "HAS_BIAS": True,
        "ACTIVATION": "gelu",
        "SPLIT_IN": config.split_in,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "BLOCK_TOKENS": config.block_tokens,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_for_hopper(
        kernels.sparse_linear_kernel, constants, {**types, "out_ptr": out}, options
    )
    ptx = compiled.asm["ptx"]
    products = set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.\S*?(tf32|bf16|f16)\.", ptx))
    expected = {torch.float32: set(), torch.float16: {"f16"}, torch.bfloat16: {"bf16"}}[dtype]
    assert products == expected
    assert dtype != torch.float32 or "fma.rn.f32" in ptx
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("storage", ["int8", "float8_e4m3fn", "int4"])
def test_quantised_weights_compile_for_hopper_without_spills(storage, tmp_path, monkeypatch):
    from sparsekern.backends.triton import linear as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = configs.tile_config(1, 4096, 4096, torch.bfloat16)
    values = "*i8" if storage == "int8" else "*u8"
    types = {"x_ptr": "*bf16", "values_ptr": values, "metadata_ptr": "*u8", "bias_ptr": "*bf16"}
    types |= {"scale_ptr": "*fp32", "x_scale_ptr": "*fp32", "out_ptr": "*fp32"}
    constants = {
        "STORAGE": storage,
        "GROUP": 128 if storage == "int4" else 0,
        "HAS_X_SCALE": storage != "int4",
        "HAS_BIAS": True,
        "ACTIVATION": None,
        "SPLIT_IN": config.split_in,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "BLOCK_TOKENS": config.block_tokens,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_for_hopper(kernels.sparse_linear_kernel, constants, types, options)
    products = re.findall(
        r"(?:wgmma\.mma_async|mma)\.sync\.\S*?(tf32|bf16|f16)\.", compiled.asm["ptx"]
    )
    assert set(products) == {"bf16"}
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_reduction_compiles_for_hopper(bias, tmp_path, monkeypatch):
    from sparsekern.backends.triton import epilogue

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HAS_BIAS": bias, "ACTIVATION": "silu", "SPLIT_IN": 8, "BLOCK": 1024}
    constants |= {} if bias else {"bias_ptr": None}
    types = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    compiled = compile_for_hopper(epilogue.split_reduce_kernel, constants, types, {"num_warps": 4})
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_few_tokens_compile_to_few_instructions(tokens, tmp_path, monkeypatch):
    """No spill; wide loads; nothing passes through shared memory in the loop; and at one token a
    third of the instructions of a tile's expansion, which has 8 per dense weight."""
    from sparsekern.backends.triton import few_tokens

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = configs.few_config(28672, 4096)
    types = {"x_ptr": "*i64", "values_ptr": "*i64", "metadata_ptr": "*u8"}
    constants = {
        "TOKENS": tokens,
        "ROWS": config.rows,
        "HAS_BIAS": True,
        "ACTIVATION": "silu",
        "HALF": False,
        "EVEN": True,
        "SPLIT_IN": 1,
        "BLOCK": 32 * config.num_warps,
        "UNROLL": config.unroll,
    }
    types |= {"bias_ptr": "*bf16", "out_ptr": "*bf16"}
    options = {"num_warps": config.num_warps}
    compiled = compile_for_hopper(few_tokens.few_tokens_kernel, constants, types, options)
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0
    loop = inner_loop(compiled.asm["cubin"], tmp_path)
    names = [line.split()[0] for line in loop]
    weights = 8 * config.rows * config.unroll  # dense ones of a thread in a turn
    assert not any(name.startswith(("STS", "LDS", "BAR", "SHFL")) for name in names)
    loads = [name for name in names if name.startswith("LDG")]
    assert len(loads) == config.unroll * (tokens + 2 * config.rows)
    assert sum(name.startswith("LDG.E.128") for name in loads) == config.unroll * tokens
    assert len(names) / weights < {1: 4.5, 2: 6.3, 4: 10.0}[tokens]


def inner_loop(cubin, folder):
    """The instructions of the largest loop of a compiled kernel, without predicates."""
    from triton import knobs

    file = folder / "loop.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.nvdisasm.path, "-c", file]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines, places, loops = [], {}, [[]]
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(lines)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*(.*?);", line):
            lines.append(found[1])
            back = re.match(r"BRA\S*\s.*`\((\.L_x_\d+)\)", found[1])
            if back and back[1] in places:
                loops.append(lines[places[back[1]] :])
    return max(loops, key=len)


def stack_bytes(cubin, folder):
    """Bytes of stack per thread, where spilled registers live, read from the compiled kernel."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", file]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"Function \w+_kernel:\s+REG:\d+ STACK:(\d+)", usage)
    return int(stack)


def test_split_keeps_whole_tiles_and_covers_every_column():
    splits = set()
    for dtype in DTYPES:
        for tokens in (1, 16, 17, 64, 65, 1000):
            for out_features in (1, 64, 4096, 28672):
                for in_features in (4, 128, 1024, 4100, 14336):
                    config = configs.tile_config(tokens, out_features, in_features, dtype)
                    length = -(-in_features // config.split_in)
                    assert config.split_in == 1 or length >= 2 * config.block_in
                    assert min(config.block_out, config.block_in, config.block_tokens) >= 16
                    splits.add(config.split_in)
    assert splits == {1, 2, 4, 8}


def test_few_tokens_fill_the_gpu_where_they_can():
    for out_features, in_features in ((4096, 4096), (28672, 4096), (1024, 14336), (64, 28672)):
        config = configs.few_config(out_features, in_features)
        warps = -(-out_features // config.rows) * config.num_warps * config.split_in
        part = in_features / config.split_in
        assert part >= 256 * config.unroll * config.num_warps, "each warp has a turn"
        whole = config.num_warps == 4 and config.split_in == configs.MAX_SPLIT_IN
        assert warps >= configs.WARPS_WANTED or whole
    assert configs.few_config(28672, 4096) == configs.FewTokens(2, 2, 1, 1)
    assert configs.few_config(8, 8) == configs.FewTokens(2, 2, 1, 1)


@pytest.mark.parametrize(
    "tokens, in_features, dtype, bits, kind",
    [
        (1, 4096, torch.bfloat16, None, configs.FewTokens),
        (4, 4096, torch.float16, None, configs.FewTokens),
        (5, 4096, torch.float16, None, configs.LinearConfig),
        (1, 4100, torch.float16, None, configs.LinearConfig),
        (1, 4096, torch.float32, None, configs.LinearConfig),
        (1, 4096, torch.bfloat16, 8, configs.LinearConfig),
        (0, 4096, torch.bfloat16, None, configs.LinearConfig),
        (511, 4096, torch.bfloat16, None, configs.LinearConfig),
        (512, 4100, torch.bfloat16, None, configs.Expanded),
        (511, 4096, torch.bfloat16, 8, configs.LinearConfig),
        (512, 4096, torch.bfloat16, 8, configs.Expanded),
        (512, 4096, torch.float32, None, configs.LinearConfig),
    ],
)
def test_which_kernel(tokens, in_features, dtype, bits, kind):
    config = configs.pick_config(tokens, 4096, in_features, dtype, bits)
    assert isinstance(config, kind), str(config)


@pytest.mark.parametrize(
    "tokens, storage, config, slower",
    [
        (1, None, "few_rows2_unroll2_split1_w1", False),
        (16, None, "out64_in128_tokens16_split1_w4_s3", True),
        (512, None, "expanded_rows512", True),
        (1, "int8", "out64_in128_tokens16_split1_w4_s3", True),
    ],
)
def test_explain_tells_the_kernel_and_what_was_timed(tokens, storage, config, slower, monkeypatch):
    """Where mma.sp is not to be had."""
    monkeypatch.setattr(triton_backend, "mma_sp_reason", lambda: "no Gluon")
    w24 = compress(torch.ones(64, 256).bfloat16() * torch.tensor([1, 0, 1, 0]).repeat(64))
    w24 = w24 if storage is None else quantize(w24, storage)
    x = torch.ones(tokens, 256, dtype=torch.bfloat16)
    told = TritonBackend().explain(problem_of(x, w24.spec))
    assert told.config == config
    assert ("slower than dense wherever it was timed" in told.why) == slower


@pytest.mark.parametrize("shape", [(57344, 8192), (8192, 28672), (640, 2048), (1, 4)])
@pytest.mark.parametrize("tokens", [512, 8192, 10**6])
def test_expanded_rows_are_bounded(shape, tokens):
    rows = configs.pick_config(tokens, *shape, torch.bfloat16).rows
    assert rows % 64 == 0 and rows >= configs.EXPANDED_ROWS
    assert rows == configs.EXPANDED_ROWS or (
        rows * shape[1] * 2 <= configs.EXPANDED_BYTES
        and rows * tokens * 4 <= configs.SUMS_BYTES
        and rows < shape[0] + 64
    )


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles_on_gpu(case, dtype):
    check_tiles(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case, config", FEW, ids=str)
def test_few_tokens_on_gpu(case, config, dtype):
    check_few(case, config, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case, config", MANY, ids=str)
def test_many_tokens_on_gpu(case, config, dtype):
    check(case, dtype, "cuda", config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_weights_on_gpu(case, dtype):
    check_quantized(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case, config", QUANTIZED_MANY, ids=str)
def test_quantized_weights_with_many_tokens_on_gpu(case, config, dtype):
    check_quantized(case, dtype, "cuda", config)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["float8_e4m3fn", "int8"])
def test_quantized_x_on_gpu(storage):
    """Through the public function. The sums of int8 are exact; what a split of in_features rounds
    is each part's product with the scales, and their sum."""
    x, w, bias, _ = problem((40, 96, 256, None, True), torch.bfloat16, False)
    w24 = quantize(compress(w), storage)
    q, scale = quantize_rows(x, storage)
    levels = dtypes.scaled_codec(storage).unpack(w24.values)
    w64 = decompress(Sparse24(levels, w24.metadata, w24.shape)).double()
    w64 *= w24.tensors["weight_scale"].double()
    x64 = q.double() * scale.double()[:, None]
    y64 = reference.linear(x64, w64, bias, "relu")
    if storage == "int8":
        sums = 8 * 2.0**-24 * (x64.abs() @ w64.abs().t() + bias.double().abs())
        bound = sums + 2.0**-8 * y64.abs()
    else:
        bound = error_bound(x64, w64, bias, y64, torch.bfloat16)
    assert_within(linear_quantized(q, scale, w24, bias, "relu"), y64, bound)
    on_gpu = q.cuda(), scale.cuda(), w24.cuda(), bias.cuda()
    assert_within(linear_quantized(*on_gpu, "relu", backend="triton"), y64, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 16, 40, 64, 300, 600])
def test_larger_shapes_on_gpu(tokens, dtype):
    """in_features % 8 == 4, which the kernel for few tokens does not take, and 0."""
    for activation in ACTIVATIONS:
        check((tokens, 1000, 2052, activation, True), dtype, "cuda")
        check((tokens, 1000, 2056, activation, True), dtype, "cuda", gap=4)


@pytest.mark.gpu
@pytest.mark.parametrize("split_in", [1, 2, 8])
def test_every_split_is_exact_and_deterministic(split_in):
    from sparsekern.backends.triton import linear as kernels

    config = configs.LinearConfig(64, 128, 16, split_in, 4, 3)
    check((3, 100, 2052, "relu", True), torch.bfloat16, "cuda", config)
    x, w, bias, activation = problem((3, 100, 2052, "silu", True), torch.bfloat16, False)
    w24 = compress(w).to("cuda")
    arguments = (x.cuda(), w24.values, w24.metadata, 2052, bias.cuda(), activation, config)
    first = kernels.linear(*arguments)
    assert all(torch.equal(first, kernels.linear(*arguments)) for _ in range(5))


@pytest.mark.gpu
def test_outputs_are_written_completely_and_nowhere_else():
    """Into the middle of a block of NaN: the result fills its place, the guards stay NaN."""
    from sparsekern.backends.triton import linear as kernels

    x, w, _, _ = problem((5, 70, 260, None, False), torch.bfloat16, True)
    w24 = compress(w).to("cuda")
    expected = kernels.linear(x.cuda(), w24.values, w24.metadata, 260)
    guard = torch.full((3, 5, 70), float("nan"), dtype=torch.bfloat16, device="cuda")
    kernels.sparse_linear_kernel[(2, 1)](
        x.cuda(),
        w24.values,
        w24.metadata,
        None,
        None,
        None,
        guard[1],
        5,
        70,
        260,
        260,
        w24.values.stride(0),
        w24.metadata.stride(0),
        0,
        320,
        HAS_BIAS=False,
        HAS_X_SCALE=False,
        ACTIVATION=None,
        STORAGE="plain",
        GROUP=0,
        SPLIT_IN=1,
        BLOCK_OUT=64,
        BLOCK_IN=64,
        BLOCK_TOKENS=16,
    )
    assert torch.equal(guard[1], expected)
    assert guard[0].isnan().all() and guard[2].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("case, config", FEW, ids=str)
def test_few_tokens_write_what_they_should_and_are_deterministic(case, config):
    from sparsekern.backends.triton import few_tokens

    x, w, bias, activation = problem(case, torch.bfloat16, False)
    w24, x = compress(w).to("cuda"), x.cuda()
    bias = None if bias is None else bias.cuda()
    config = config or configs.pick_config(*case[:3], torch.bfloat16)
    guard = torch.full((3, *case[:2]), float("nan"), dtype=torch.bfloat16, device="cuda")
    few_tokens.launch(x, w24.values, w24.metadata, bias, activation, config, guard[1])
    assert guard[0].isnan().all() and guard[2].isnan().all() and not guard[1].isnan().any()
    for _ in range(5):
        again = torch.empty_like(guard[1])
        few_tokens.launch(x, w24.values, w24.metadata, bias, activation, config, again)
        assert torch.equal(again, guard[1])


@pytest.mark.gpu
def test_an_output_of_more_than_2_31_elements():
    from sparsekern.backends.triton import linear as kernels

    tokens, out_features = 131_200, 16_400
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free memory")
    x, w, _, _ = problem((300, out_features, 64, None, False), torch.bfloat16, True)
    x, w24 = x.cuda().repeat(438, 1)[:tokens], compress(w).to("cuda")
    tiles = configs.tile_config(tokens, out_features, 64, torch.bfloat16)
    for config in (tiles, configs.pick_config(tokens, out_features, 64, torch.bfloat16)):
        y = kernels.linear(x, w24.values, w24.metadata, 64, config=config)
        assert y.numel() > 2**31
        for part in (slice(0, 2), slice(130_940, 130_942), slice(tokens - 2, tokens)):
            y64 = x[part].cpu().double() @ w.double().t()
            assert torch.equal(y[part].cpu(), y64.to(torch.bfloat16)), str(config)
        del y


@pytest.mark.gpu
def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w, _, _ = problem((5, 70, 260, None, False), torch.bfloat16, True)
    y = linear(x.to("cuda:1"), compress(w).to("cuda:1"), backend="triton")
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), linear(x, compress(w)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_cpu_backend(dtype):
    """The same problem on both backends, through the public function, integers bit for bit."""
    x, w, bias, activation = problem((33, 129, 132, "relu", True), dtype, True)
    w24 = compress(w)
    on_gpu = linear(x.cuda(), w24.cuda(), bias.cuda(), activation, backend="triton")
    assert torch.equal(on_gpu.cpu(), linear(x, w24, bias, activation))
