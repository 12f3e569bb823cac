"""The Triton kernel on the sparse tensor cores: its shapes by an emulation of mma.sp, its machine
code, when it is chosen; and its results, on a GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from python_tests.backends.test_triton_linear import inner_loop, stack_bytes
from python_tests.backends.triton_linear_cases import check, check_quantized, problem
from sparsekern import quantize
from sparsekern.backends import triton as triton_backend
from sparsekern.backends.protocol import problem_of
from sparsekern.backends.triton import configs
from sparsekern.backends.triton.backend import TritonBackend
from sparsekern.backends.triton.configs import Expanded, FewTokens, LinearConfig, MmaSp
from sparsekern.formats.sparse24 import compress
from sparsekern.ops.linear_op import linear

try:
    from sparsekern.backends.triton import mma_sp
except (ImportError, AttributeError):
    mma_sp = None
needs_gluon = pytest.mark.skipif(mma_sp is None, reason="this Triton has no Gluon that it needs")

# As they are chosen for each number of tokens; and small ones, of several tiles and warps.
CHOSEN = [configs.mma_config(tokens, 28672, 4096) for tokens in (2, 16, 32, 64, 128, 512)]
SMALL = [MmaSp(64, 32, 2, 2, 4, 3), MmaSp(64, 16, 2, 1, 2, 4), MmaSp(16, 8, 1, 1, 4, 2)]
A100, RTX_4090 = 166_912, 101_376  # bytes of shared memory for a thread block


def mma_sp_m16n8k32(a, b, e, selector):
    """What one warp's mma.sp adds to its accumulators, [32 lanes, 4], by the tables of the PTX ISA
    ("Matrix Fragments for sparse mma.m16n8k32", 16-bit types).

    Args:
        a, b: [32, 4, 2], the two 16-bit numbers of each register.      e: [32] words.
    """
    dense, full = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for lane, i in np.ndindex(32, 8):
        group, t = lane // 4, lane % 4
        row, chunk = group + 8 * (i // 2 % 2), t + 4 * (i // 4)
        # Lanes 0 and 1 of four, or 2 and 3: metadata of the first and of the last 16 columns.
        word = int(e[4 * group + 2 * selector + chunk // 4])
        nibble = word >> (16 * (row >= 8) + 4 * (chunk % 4)) & 15
        column = nibble >> 2 if i % 2 else nibble & 3
        dense[row, 4 * chunk + column] = a[lane, i // 2, i % 2]
        full[8 * (i // 2) + 2 * t + i % 2, group] = b[lane, i // 2, i % 2]
    product, sums = dense @ full, np.zeros((32, 4), np.int64)
    for lane, i in np.ndindex(32, 4):
        sums[lane, i] = product[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
    return sums


@needs_gluon
@pytest.mark.parametrize("config", SMALL, ids=str)
def test_shapes_and_orders_of_fragments(config):
    """A stage of the kernel in numpy: its shapes, its orders of dimensions and its selectors, and
    mma.sp by its tables."""
    out, tokens, columns = config.block_out, config.block_tokens, 32 * config.steps
    rng = np.random.default_rng(0)
    places = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    index = places[rng.integers(0, 6, (out, columns // 4))]
    values = rng.integers(-9, 10, (out, columns // 4, 2))
    x = rng.integers(-9, 10, (tokens, columns))
    dense = np.zeros((out, columns // 4, 4), np.int64)
    np.put_along_axis(dense, index, values, 2)
    nibbles = index[..., 0] | index[..., 1] << 2
    metadata = (nibbles.reshape(out, -1, 8) << 4 * np.arange(8)).sum(2)

    warps_out, warps_tokens = config.warps_out, config.warps_tokens
    tiles_out, tiles_tokens = out // (16 * warps_out), tokens // (8 * warps_tokens)
    e = metadata.reshape(tiles_out, warps_out, 2, 8, config.steps // 2, 2)
    e = e.transpose(mma_sp.E_DIMS.value)
    acc = np.zeros((tiles_out, tiles_tokens, warps_out, warps_tokens, 32, 4), np.int64)
    for step in range(config.steps):
        a = values[:, 8 * step : 8 * step + 8].reshape(tiles_out, warps_out, 2, 8, 2, 2, 2, 2)
        a = a.transpose(*mma_sp.A_DIMS.value, 7)
        b = x.reshape(tokens, -1, 2)[:, 16 * step : 16 * step + 16]
        b = b.reshape(tiles_tokens, warps_tokens, 8, 2, 2, 2, 2, 2)
        b = b.transpose(*mma_sp.B_DIMS.value, 7)
        for i, j, p, q in np.ndindex(acc.shape[:4]):
            low, high = np.moveaxis(e[i, p, :, :, step // 2], 2, 0)  # rows g and g + 8: [g, t1]
            even = low & 0xFFFF | (high & 0xFFFF) << 16  # prmt 0x5410
            odd = low >> 16 | high >> 16 << 16  # prmt 0x7632
            words = np.stack((even, odd), 2).reshape(32)
            fragments = a[i, p].reshape(32, 4, 2), b[j, q].reshape(32, 4, 2)
            acc[i, j, p, q] += mma_sp_m16n8k32(*fragments, words, step % 2)
    acc = acc.reshape(*acc.shape[:4], 8, 2, 2, 2, 2)
    y = acc.transpose(mma_sp.C_DIMS.value).reshape(out, tokens)
    assert (y == dense.reshape(out, columns) @ x.T).all()


def compiled_for(
    config, architecture, monkeypatch, folder, even=True, epilogue=False, storage="plain", group=0
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    names = mma_sp.mma_sp_kernel.arg_names
    fixed = {"TYPE": "bf16", "HAS_BIAS": epilogue, "ACTIVATION": "silu" if epilogue else None}
    fixed |= {"EVEN": even, **mma_sp.constants(config)} | ({} if epilogue else {"bias_ptr": None})
    fixed |= {"STORAGE": storage, "GROUP": group, "HAS_X_SCALE": storage != "plain"}
    fixed |= {"scale_ptr": None, "x_scale_ptr": None} if storage == "plain" else {}
    types = {"out_ptr": "*fp32" if config.split_in > 1 else "*bf16", "bias_ptr": "*bf16"}
    types |= {"x_ptr": "*i32", "metadata_ptr": "*i32", "scale_ptr": "*fp32", "x_scale_ptr": "*fp32"}
    types["values_ptr"] = f"*i{8 * config.element_bytes}"
    types |= dict.fromkeys(fixed, "constexpr")
    aligned = [i for i, name in enumerate(names) if name not in fixed and name != "tokens"]
    source = GluonASTSource(
        mma_sp.mma_sp_kernel,
        {name: types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in fixed.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.warps_out * config.warps_tokens}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@needs_gluon
@pytest.mark.parametrize("architecture, room", [(80, A100), (89, RTX_4090), (90, None)])
@pytest.mark.parametrize("config", CHOSEN, ids=str)
def test_a_step_is_ldmatrix_and_mma_sp(config, architecture, room, tmp_path, monkeypatch):
    """No spill, no exchange between threads, and no shared memory but the ring; in the loop one
    mma.sp for each 16 rows, 8 tokens and 32 columns, and an ldmatrix for each fragment."""
    config = config if room is None else config.fitting(room)
    assert room is None or config.shared_bytes <= room
    compiled = compiled_for(config, architecture, monkeypatch, tmp_path)
    assert compiled.metadata.shared == config.shared_bytes
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0
    loop = inner_loop(compiled.asm["cubin"], tmp_path)
    names = [line.split()[0] for line in loop]
    rows = config.block_out // (16 * config.warps_out)
    tokens = config.block_tokens // (8 * config.warps_tokens)
    products = config.steps * rows * tokens
    assert sum(name.startswith("HMMA.SP.16832.F32.BF16") for name in names) == products
    assert sum(name.startswith("LDSM") for name in names) == config.steps * (rows + tokens)
    assert not any(name.startswith(("SHFL", "STS", "LDL", "STL")) for name in names)
    assert sum(name.startswith("LDS") and "LDSM" not in name for name in names) <= 2 * rows * 2 + 4


@needs_gluon
@pytest.mark.parametrize("storage, group", [("int8", 0), ("float8_e4m3fn", 0), ("int4", 128)])
@pytest.mark.parametrize("tokens", [8, 64, 511])
def test_levels_are_widened_in_registers(tokens, storage, group, tmp_path, monkeypatch):
    """No spill, no exchange, and for 16 rows and 32 columns four loads of the levels of two."""
    config = configs.quantized_config(tokens, 28672, 4096, 4 if group else 8, group)
    config = config.fitting(RTX_4090)
    compiled = compiled_for(
        config, 80, monkeypatch, tmp_path, epilogue=True, storage=storage, group=group
    )
    assert compiled.metadata.shared == config.shared_bytes <= RTX_4090
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0
    names = [line.split()[0] for line in inner_loop(compiled.asm["cubin"], tmp_path)]
    rows = config.block_out // (16 * config.warps_out)
    load = "LDS.U8" if group else "LDS.U16"
    assert sum(name.startswith(load) for name in names) == 4 * config.steps * rows
    assert not any(name.startswith(("SHFL", "STS", "LDL", "STL")) for name in names)


@needs_gluon
@pytest.mark.parametrize("config", [CHOSEN[1], CHOSEN[-1]], ids=str)
def test_columns_that_are_not_there_and_the_epilogue_compile(config, tmp_path, monkeypatch):
    whole = compiled_for(config, 90, monkeypatch, tmp_path, even=False, epilogue=True)
    parts = config._replace(split_in=2)
    part = compiled_for(parts, 90, monkeypatch, tmp_path, even=False)
    for compiled in (whole, part):
        assert "mma.sp::ordered_metadata" in compiled.asm["ptx"]
        assert compiled.metadata.shared == config.shared_bytes


def test_tiles_and_rings_fit_the_gpu():
    """The parts of in_features stay, and with them the sums."""
    config = configs.mma_config(512, 4096, 4096)
    assert config == MmaSp(256, 128, 4, 2, 4, 3, split_in=2)
    assert config.fitting(232_448) == config
    assert config.fitting(A100) == MmaSp(128, 128, 2, 2, 2, 4, split_in=2)
    assert config.fitting(RTX_4090) == MmaSp(128, 128, 2, 2, 2, 3, split_in=2)
    assert configs.mma_config(512, 4096, 4160) == config.fitting(A100)
    assert configs.mma_config(64, 4096, 4096).fitting(RTX_4090).stages == 4
    assert configs.mma_config(16, 4096, 4096).fitting(RTX_4090).steps == 4


@pytest.mark.parametrize(
    "tokens, in_features, dtype, bits, kind",
    [
        (1, 4096, torch.bfloat16, None, FewTokens),
        (2, 4096, torch.float16, None, MmaSp),
        (767, 4096, torch.bfloat16, None, MmaSp),
        (768, 4096, torch.bfloat16, None, Expanded),
        (16, 4112, torch.bfloat16, None, LinearConfig),
        (2, 4112, torch.bfloat16, None, FewTokens),
        (16, 4096, torch.float32, None, LinearConfig),
        (16, 4096, torch.bfloat16, 8, MmaSp),
        (1, 4096, torch.float16, 4, MmaSp),
        (511, 4096, torch.float16, 4, MmaSp),
        (512, 4096, torch.float16, 4, Expanded),
        (16, 4112, torch.bfloat16, 4, LinearConfig),
        (16, 0, torch.bfloat16, None, LinearConfig),
        (0, 4096, torch.bfloat16, None, LinearConfig),
    ],
)
def test_which_kernel(tokens, in_features, dtype, bits, kind):
    config = configs.pick_config(tokens, 4096, in_features, dtype, bits, mma_sp=True)
    assert isinstance(config, kind), str(config)


def test_parts_fill_the_gpu_and_have_some_columns():
    for tokens in (2, 16, 64, 100, 200, 767):
        for shape in ((4096, 4096), (28672, 4096), (64, 28672), (4096, 32), (64, 1024)):
            config = configs.mma_config(tokens, *shape)
            programs = -(-shape[0] // config.block_out) * -(-tokens // config.block_tokens)
            assert config.split_in == 1 or shape[1] >= 256 * config.split_in
            most = config.split_in == configs.MAX_SPLIT_IN or shape[1] < 512 * config.split_in
            assert most or programs * config.split_in >= 118
    assert configs.mma_config(16, 4096, 4096).split_in == 4
    assert configs.mma_config(16, 28672, 4096).split_in == 1
    parts = [
        configs.quantized_config(64, rows, 8192, 8, 0).split_in for rows in (28672, 8192, 4096)
    ]
    assert parts == [1, 4, 8]


def test_explain_says_why_not(monkeypatch):
    w24 = compress(torch.ones(64, 256).bfloat16() * torch.tensor([1, 0, 1, 0]).repeat(64))
    x = torch.ones(16, 256, dtype=torch.bfloat16)
    monkeypatch.setattr(triton_backend, "mma_sp_reason", lambda: "")
    told = TritonBackend().explain(problem_of(x, w24.spec))
    assert told.config == "mma_sp_out128_tokens16_split1_w4x1_in128_s4"
    assert "sparse tensor cores" not in told.why and "slower" not in told.why
    levels = TritonBackend().explain(problem_of(x, quantize(w24, "int4", group=128).spec))
    assert levels.config == "mma_sp_out128_tokens16_split1_w4x1_in128_s4"
    many = TritonBackend().explain(problem_of(x.repeat(8, 1), w24.spec))
    assert "slower than dense wherever it was timed" in many.why
    monkeypatch.setattr(triton_backend, "mma_sp_reason", lambda: "no Gluon")
    told = TritonBackend().explain(problem_of(x, w24.spec))
    assert told.config.startswith("out64") and "sparse tensor cores: no Gluon" in told.why


def test_a_kernel_that_does_not_compile_is_done_without(monkeypatch):
    """Said once."""
    monkeypatch.setattr(triton_backend, "_broken", [])
    with pytest.warns(RuntimeWarning, match="no attribute 'slice'.*used instead"):
        triton_backend.mma_sp_failed(RuntimeError("at 3:4:\nno attribute 'slice'"))
    assert "no attribute 'slice'" in triton_backend.mma_sp_reason()
    triton_backend.mma_sp_failed(RuntimeError("another"))
    assert "another" not in triton_backend.mma_sp_reason()


def test_linear_goes_on_with_another_kernel(monkeypatch):
    """Whatever Triton says: that it does not compile, or that the GPU has no room."""
    from triton.runtime.errors import OutOfResources

    from sparsekern.backends.triton import linear as kernels

    launched = []

    def launch(config, *arguments):
        launched.append(type(config))
        if isinstance(config, MmaSp):
            raise OutOfResources(208_896, 101_376, "shared memory")
        arguments[-1].fill_(7)

    monkeypatch.setattr(triton_backend, "_broken", [])
    monkeypatch.setattr(triton_backend, "_gluon_reason", lambda: "")
    monkeypatch.setattr(kernels, "_launch_other", launch)
    w24 = compress(torch.ones(8, 64).bfloat16() * torch.tensor([1, 0, 1, 0]).repeat(16))
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="shared memory.*used instead"):
        y = kernels.linear(x, w24.values, w24.metadata, 64)
    assert torch.equal(y, torch.full((2, 8), 7.0).bfloat16())
    assert torch.equal(y, kernels.linear(x, w24.values, w24.metadata, 64)), "asked once"
    assert launched == [MmaSp, FewTokens, FewTokens]


# ---- on a GPU ------------------------------------------------------------------------------------

# (case, config): rows and tokens that are not whole tiles, columns that are not whole stages, parts
# that end within a stage and that begin beyond the last column, one step.
CASES = [
    ((16, 256, 512, "relu", True), None),
    ((13, 250, 544, "gelu", True), MmaSp(128, 16, 4, 1, 4, 4, 4)),
    ((2, 3, 32, None, False), MmaSp(128, 8, 4, 1, 4, 4, 1)),
    ((300, 130, 96, "silu", True), MmaSp(256, 128, 4, 2, 4, 3, 1)),
    ((200, 640, 1056, None, False), MmaSp(64, 128, 1, 4, 2, 4, 2)),
    ((33, 70, 1088, "relu", True), MmaSp(128, 64, 4, 1, 4, 3, 8)),
    ((100, 100, 160, "relu", False), MmaSp(128, 128, 2, 2, 2, 2, 1)),
]


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case, config", CASES, ids=str)
def test_on_gpu(case, config, dtype):
    """With rows of x that are aligned, and not."""
    assert triton_backend.mma_sp_reason() == ""
    for gap in (8, 3):
        check(case, dtype, "cuda", config, gap)


QUANTIZED = [
    (storage, 0, *shape, activation, True, activation is None)
    for storage in ("float8_e4m3fn", "int8")
    for shape, activation in (((1, 64, 1024), None), ((9, 250, 544), "relu"), ((140, 70, 96), None))
]
QUANTIZED += [
    ("int4", 128, 1, 64, 1024, None, False, False),
    ("int4", 64, 9, 250, 1056, "relu", True, False),
    ("int4", 64, 33, 70, 1088, None, True, False),
    ("int4", 128, 100, 70, 416, "relu", True, False),
    ("int4", 128, 300, 130, 4096, None, True, False),
    ("int4", 32, 3, 6, 32, None, True, False),
]


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_weights_on_gpu(case, dtype):
    check_quantized(case, dtype, "cuda")


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("tokens", [2, 5, 16, 40, 64, 128, 129, 600])
def test_larger_shapes_on_gpu(tokens):
    check((tokens, 1000, 2080, "silu", True), torch.bfloat16, "cuda", gap=8)


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("case, config", CASES, ids=str)
def test_writes_what_it_should_and_is_deterministic(case, config):
    x, w, bias, activation = problem(case, torch.bfloat16, False)
    w24, x = compress(w).to("cuda"), x.cuda()
    bias = None if bias is None else bias.cuda()
    config = config or configs.mma_config(*case[:3])
    guard = torch.full((3, *case[:2]), float("nan"), dtype=torch.bfloat16, device="cuda")
    mma_sp.launch(x, w24.values, w24.metadata, bias, activation, config, guard[1])
    assert guard[0].isnan().all() and guard[2].isnan().all() and not guard[1].isnan().any()
    for smaller in (config, config, config.fitting(0)):
        again = torch.empty_like(guard[1])
        mma_sp.launch(x, w24.values, w24.metadata, bias, activation, smaller, again)
        assert torch.equal(again, guard[1]), "the ring changes no sum"


@pytest.mark.gpu
@needs_gluon
def test_what_is_pruned_is_not_touched():
    """Infinite numbers of x that meet no kept value, and rows of NaN beyond the last token."""
    w = torch.ones(64, 128).bfloat16() * torch.tensor([1, 0, 0, 1]).repeat(32)
    x = torch.ones(4, 128).bfloat16()
    x[:, 1::4] = float("inf")
    rows = torch.full((8, 128), float("nan")).bfloat16()
    rows[:4] = x
    y = linear(rows.cuda()[:4], compress(w.bfloat16()).cuda(), backend="triton")
    assert torch.equal(y.cpu(), torch.full((4, 64), 64.0).bfloat16())
