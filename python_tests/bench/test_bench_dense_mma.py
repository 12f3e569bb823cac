"""bench dense_mma on the CPU: names of kernels, cuBLASLt's calls against a stand-in that computes
what the column-major descriptors say, the search for the peer, and a whole run with its table."""

import contextlib
import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

from bench import bench_dense_mma as bench  # noqa: E402
from bench import cublaslt, layers, sweep, table  # noqa: E402

# ---- names ---------------------------------------------------------------------------------------

AMPERE = "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn"
XMMA = "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize96x128x32_stage4_warpsize2x2x1_kernel"
REDUCE = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)"
CUTLASS_SHORT = "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_64x3_tn_align8"
CUTLASS = f"void cutlass::Kernel2<{CUTLASS_SHORT}>({CUTLASS_SHORT}::Params)"
OTHERS = [
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_kernel",
    "cutlass3x_sm90_tensorop_s64x128x16gemm_bf16_f32",
    "void gemv2T_kernel_val<int, float>(...)",
    "cutlass_80_simt_sgemm_128x32_8x5_tn_align1",
    "ampere_sgemm_128x64_tn",
    "hopper_16816_gmma_gemm",
]


def kernels(*names):
    return [(name, 1.0) for name in names]


@pytest.mark.parametrize("name", [AMPERE, XMMA, CUTLASS])
def test_names_of_mma_sync_kernels(name):
    assert bench.is_mma_sync(kernels(name))
    assert bench.is_mma_sync(kernels("Memset (Device)", name, REDUCE))
    assert not bench.is_mma_sync(kernels(name, OTHERS[0]))


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_kernels(name):
    assert not bench.is_mma_sync(kernels(name))


def test_helpers_alone_are_no_kernel():
    assert not bench.is_mma_sync([]) and not bench.is_mma_sync(kernels(REDUCE, "Memset (Device)"))


def test_short_names():
    assert bench.short_name(kernels(AMPERE)) == AMPERE
    assert bench.short_name(kernels("Memset (Device)", CUTLASS, REDUCE)) == CUTLASS_SHORT


def test_kernels_are_cut_at_the_markers():
    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>"
    seen = kernels("early", fill, "a", "b", fill, fill, "c")
    assert bench.by_call(seen, 3) == [kernels("a", "b"), [], kernels("c")]
    for blind in (seen[:2], []):
        with pytest.raises(bench.ProfilerBlind, match=f"3 marker kernels .* got {len(blind) // 2}"):
            bench.by_call(blind, 3)


def test_a_session_that_lost_kernels_is_repeated(monkeypatch):
    fill, sessions = f"at::native::{bench._MARKER}", []

    def session(calls, mark):
        sessions.append(len(calls))
        return kernels(fill, "a") if len(sessions) == whole else kernels("a")

    monkeypatch.setattr(bench, "_session", session)
    for whole in (1, 2, 3):
        sessions.clear()
        assert bench.launched([print], print) == [kernels("a")] and len(sessions) == whole
    whole = 4
    sessions.clear()
    with pytest.raises(bench.ProfilerBlind, match="got 0 among 1 events"):
        bench.launched([print], print)


def test_a_session_is_read_in_the_order_of_time(monkeypatch):
    def event(name, start, us, kind=bench.DeviceType.CUDA):
        span = SimpleNamespace(start=start, elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=span)

    @contextlib.contextmanager
    def profile(activities):
        assert activities == [bench.ProfilerActivity.CUDA]
        yield SimpleNamespace(
            events=lambda: [
                event("b", 5.0, 2.0),
                event("cudaLaunchKernel", 0.0, 9.0, bench.DeviceType.CPU),
                event("a", 1.0, 3.0),
            ]
        )

    done = []
    monkeypatch.setattr(bench, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("end"))
    calls = [lambda: done.append("first"), lambda: done.append("second")]
    assert bench._session(calls, lambda: done.append("mark")) == [("a", 3.0), ("b", 2.0)]
    assert done == ["mark", "first", "mark", "second", "end"]


# ---- the library ---------------------------------------------------------------------------------


class FakeLt:
    """cuBLASLt's functions over memory of the CPU, matrices column-major as its headers say.

    Algorithm 6 has `ampere` kernels with 2 tiles, 3 stages, swizzling and splits, whose parts are
    added in place or in the type of the output; algorithm 66 one configuration of another kind; 7
    does not take the types. Stages 13 do not run on tile 20, and
    `wrong` is the tile that computes wrong. `failing`: {function: status}.
    """

    NAMES = {0: None, 7: b"CUBLAS_STATUS_INVALID_VALUE", 15: b"CUBLAS_STATUS_NOT_SUPPORTED"}
    CAPS = {
        6: {0: [1], 1: [5], 2: [1], 6: [18, 20], 7: [0], 13: [13, 15, 17]},
        66: {0: [0], 1: [0], 2: [0], 6: [], 7: [0], 13: []},
    }

    def __init__(self, wrong=None, **failing):
        self.wrong, self.failing = wrong, failing
        self.things, self.launched, self.freed = {}, [], 0

    def __getattr__(self, name):
        if name not in cublaslt.SIGNATURES:
            raise AttributeError(name)
        status = self.failing.get(name, 0)
        return lambda *a: status or getattr(self, "do_" + name.removeprefix("cublasLt"))(*a) or 0

    def cublasLtGetStatusName(self, status):
        return self.NAMES.get(status)

    def cublasLtGetVersion(self):
        return 130100

    def _make(self, where, *thing):
        where._obj.value = len(self.things) + 1
        self.things[where._obj.value] = list(thing)

    def do_Create(self, where):
        self._make(where, "handle")

    def do_MatmulDescCreate(self, where, compute, scale):
        assert (compute, scale) == (68, 0)
        self._make(where, {})

    def do_MatmulDescSetAttribute(self, desc, attribute, value, size):
        assert size == 4
        self.things[desc.value][0][attribute] = value._obj.value

    def do_MatrixLayoutCreate(self, where, kind, rows, columns, ld):
        self._make(where, kind, rows, columns, ld)

    def do_MatrixLayoutDestroy(self, layout):
        self.freed += 1

    do_MatmulDescDestroy = do_MatrixLayoutDestroy

    def do_MatmulAlgoGetIds(self, handle, *rest):
        *types, limit, ids, count = rest
        assert types == [68, 0, 14, 14, 14, 14] and limit >= 3
        ids[0], ids[1], ids[2], count._obj.value = 6, 7, 66, 3

    def do_MatmulAlgoInit(self, handle, *rest):
        *_, algo, where = rest
        where._obj.data[0] = algo
        return 15 if algo == 7 else 0

    def do_MatmulAlgoCapGetAttribute(self, algorithm, attribute, buffer, size, written):
        values = self.CAPS[algorithm._obj.data[0]][attribute]
        written._obj.value = 4 * len(values)
        if size:
            assert size == 4 * len(values)
            target = getattr(buffer, "_obj", buffer)  # byref, or an array
            ctypes.memmove(ctypes.addressof(target), (ctypes.c_uint32 * len(values))(*values), size)

    def do_MatmulAlgoConfigSetAttribute(self, algorithm, attribute, value, size):
        assert size == 4
        algorithm._obj.data[attribute] = value._obj.value

    def do_MatmulAlgoCheck(self, handle, desc, a, b, c, d, algorithm, result):
        data = algorithm._obj.data
        result._obj.workspaceSize = 2**20 * (data[2] if data[2] < 4 else 64)  # split
        return 15 if (data[1], data[6]) == (20, 13) else 0

    def do_Matmul(
        self,
        handle,
        desc,
        alpha,
        a,
        a_layout,
        b,
        b_layout,
        beta,
        c,
        c_layout,
        d,
        d_layout,
        algorithm,
        workspace,
        size,
        stream,
    ):
        assert self.things[desc.value] == [{3: 1}] and size == cublaslt.WORKSPACE_BYTES
        assert alpha._obj.value == 1 and beta._obj.value == 0 and c == d and workspace

        def matrix(address, layout):
            """A view [rows, columns] of column-major memory."""
            kind, rows, columns, ld = self.things[layout.value]
            assert (kind, ld) == (14, rows)
            memory = (ctypes.c_uint16 * (rows * columns)).from_address(address)
            return torch.frombuffer(memory, dtype=torch.bfloat16).view(columns, rows).t()

        product = matrix(a, a_layout).t().float() @ matrix(b, b_layout).float()
        data = algorithm._obj.data
        self.launched.append(tuple(data[:7]))
        matrix(d, d_layout).copy_(product + (data[1] == self.wrong))


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


def problem(fake, tokens=5):
    return cublaslt.Problem(cublaslt.Library(fake), 48, 32, tokens, torch.bfloat16)


def test_sizes_of_the_structs():
    assert ctypes.sizeof(cublaslt.Algo) == 64 and ctypes.sizeof(cublaslt.HeuristicResult) == 96
    fields = ("algo", "workspaceSize", "state", "wavesCount", "reserved")
    offsets = [getattr(cublaslt.HeuristicResult, name).offset for name in fields]
    assert offsets == [0, 64, 72, 76, 80]


def test_every_configuration_that_runs_is_listed():
    fake = FakeLt()
    made = problem(fake)
    assert made.algorithms() == [6, 7, 66]
    whole = made.candidates(6, 100)
    assert sorted(c.config[1:3] for c in whole) == sorted(
        [(18, 13), (18, 15), (18, 17), (20, 15), (20, 17)] * 2
    )
    assert {c.config.swizzle for c in whole} == {0, 1} and {c.config.split for c in whole} == {1}
    split = made.candidates(6, 100, (1, 2, 4))  # in 4 parts it wants more workspace than there is
    assert {(c.config.split, c.config.scheme) for c in split} == {(1, 0), (2, 1)}
    assert len(split) == 20 and len({c.config for c in split}) == 20
    one = next(c for c in split if c.config.split == 2)
    assert list(one.algorithm.data[:7]) == [
        6,
        one.config.tile,
        2,
        one.config.scheme,
        one.config.swizzle,
        0,
        one.config.stages,
    ]
    assert [c.config for c in made.candidates(6, 7)] == [c.config for c in whole[:7]]
    assert made.candidates(7, 100) == []
    assert [str(c.config) for c in made.candidates(66, 100, (1, 2))] == ["algo 66 split 1"]
    made.close()
    assert fake.freed == 4


def test_launch_computes_the_layer(stream):
    made = problem(FakeLt())
    weight, x = (torch.randn(n, 32).bfloat16() for n in (48, 5))
    y = torch.full((5, 48), float("nan"), dtype=torch.bfloat16)
    workspace = torch.empty(cublaslt.WORKSPACE_BYTES, dtype=torch.uint8)
    made.launch(made.candidates(6, 1)[0], weight, x, y, workspace)
    layers.check_bounded("a", y, x, weight, 2.0**-12)


@pytest.mark.parametrize(
    "name", ["cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatrixLayoutCreate"]
)
def test_errors_name_the_call_and_the_status(name):
    wanted = f"{name}: expected CUBLAS_STATUS_SUCCESS, got CUBLAS_STATUS_INVALID_VALUE \\(7\\)"
    with pytest.raises(cublaslt.CublasLtError, match=wanted):
        problem(FakeLt(**{name: 7}))
    with pytest.raises(cublaslt.CublasLtError, match="got unknown \\(99\\)"):
        problem(FakeLt(**{name: 99}))


def test_other_dtypes_and_missing_libraries():
    with pytest.raises(ValueError, match="got torch.float32"):
        cublaslt.Problem(cublaslt.Library(FakeLt()), 8, 8, 8, torch.float32)
    with pytest.raises(cublaslt.CublasLtError, match="expected a libcublasLt .* /no/such.so: "):
        cublaslt.load(["/no/such.so"])
    libm = "libm.so.6"  # loads, but has none of the functions
    with pytest.raises(cublaslt.CublasLtError, match="cublasLtCreate"):
        cublaslt.load([libm])
    assert cublaslt.candidates()[-2:] == list(cublaslt.SONAMES)


# ---- the search ----------------------------------------------------------------------------------


def names_of(data):
    """Kernels of a launch of FakeLt; tile 20 has the faster one, algorithm 66 a fast other kind."""
    algo, tile, split, *_ = data
    if algo == 66:
        return [(OTHERS[0], 1.0)]
    gemm = (AMPERE, 30.0) if tile == 20 else (CUTLASS, 50.0)
    return [gemm, (REDUCE, 25.0)] if split > 1 else [gemm]


@pytest.fixture
def profiled(monkeypatch, stream):
    """`launched` runs the calls and says what names_of tells of each launch of this FakeLt."""

    def use(fake):
        def launched(calls, mark):
            groups = []
            for call in calls:
                before = len(fake.launched)
                call()
                groups.append([k for data in fake.launched[before:] for k in names_of(data)])
            return groups

        monkeypatch.setattr(bench, "launched", launched)
        return fake

    return use


def run_of(tmp_path, *arguments):
    args = bench.make_parser().parse_args(["--device", "cpu", "--quick", *arguments])
    return bench.Run(tmp_path / "r.jsonl", args)


def make_peer(fake, tokens=5):
    weight, x = (torch.randn(n, 32).bfloat16() for n in (48, tokens))
    return bench.Peer(problem(fake, tokens), [weight, weight.clone()], x)


def test_the_fastest_mma_sync_kernel_is_found(tmp_path, profiled):
    failures = []
    fake = profiled(FakeLt())
    name, calls, details = bench.best_peer(run_of(tmp_path), make_peer(fake), failures)
    assert name.startswith((f"{AMPERE}; algo 6 tile 20", f"{CUTLASS_SHORT}; algo 6 tile 18"))
    assert len(calls) == 2 and not failures
    assert details["algorithms"] == [6] and details["cublaslt"] == 130100
    assert details["launched"] == 20 and details["kernels"] == 8  # 2 tiles, 2 swizzles, 2 splits


def test_ranking_takes_the_sum_of_the_kernels():
    made = problem(FakeLt()).candidates(6, 100, (1, 2))
    groups = [names_of(c.algorithm.data[:3]) for c in made]
    order = [c.config.tile * 10 + c.config.split for _, c in bench.ranking(made, groups)]
    assert order == [201] * 2 + [181] * 2 + [202] * 2 + [182] * 2
    assert bench.ranking(made[:1], [[(OTHERS[0], 1.0)]]) == []
    same = [c for c in made if (c.config.tile, c.config.split, c.config.swizzle) == (18, 1, 0)]
    for times in ((3.0, 2.0, 4.0), (1.0, 2.0, 4.0)):
        groups = [[(AMPERE, us)] for us in times]
        assert bench.ranking(same, groups) == [(AMPERE, same[times.index(min(times))])]


def test_a_wrong_kernel_is_not_timed(tmp_path, profiled):
    failures = []
    fake = profiled(FakeLt(wrong=20))
    name, *_ = bench.best_peer(run_of(tmp_path), make_peer(fake), failures)
    assert "algo 6 tile 18" in name
    assert len(failures) == 4 and all("is wrong in 240 of 240 elements" in f for f in failures)


def test_refused_launches_are_counted_and_no_kernel_is_an_error(tmp_path, profiled):
    fake = profiled(FakeLt(cublasLtMatmul=15))
    with pytest.raises(RuntimeError, match="got none in 7 launches \\(7 refused\\)"):
        bench.best_peer(run_of(tmp_path), make_peer(fake), [])


def test_an_algorithm_that_tells_nothing_is_left_out(tmp_path, profiled):
    fake = profiled(FakeLt(cublasLtMatmulAlgoCapGetAttribute=7))
    with pytest.raises(RuntimeError, match="got none in 0 launches \\(2 refused\\)"):
        bench.best_peer(run_of(tmp_path), make_peer(fake), [])


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch, profiled):
    """The CPU computes what the GPU would, for the mma.sp kernel with two tiles."""
    from sparsekern.backends.cuda import linear as cuda_backend

    def unpacked(x, w24, bias=None, activation=None):
        return layers.ops.linear(x, w24.rowmajor(), backend="cpu")

    tiles = {"mma a": ("mma", 0), "mma b": ("mma", 1)}
    monkeypatch.setattr(layers._native, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda_backend, "mma_config", lambda x, w24: "mma b")
    monkeypatch.setattr(sweep, "configs", lambda tokens, mma: tiles)
    monkeypatch.setattr(sweep, "workspace", lambda device: None)
    monkeypatch.setattr(sweep, "launch", lambda space, kind, index, x, w24: unpacked(x, w24))
    fake = profiled(FakeLt())
    monkeypatch.setattr(bench, "prepare", lambda device: cublaslt.Library(fake))
    return fake


RUN = ["--device", "cpu", "--quick", "--shapes", "64x128", "--tokens", "5,80", "--campaign", "c"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_and_their_table(tmp_path, capsys, stand_ins):
    path = tmp_path / "r.jsonl"
    assert bench.main(path, RUN) == 0
    found = lines_of(path)
    assert [(e["tokens"], e["backend"], e["check"]) for e in found] == [
        (tokens, *of)
        for tokens in (5, 80)
        for of in (
            ("dense mma.sync", "bounded"),
            ("cuda-mma", "exact+bounded"),
            ("dense", "bounded"),
        )
    ]
    peer, ours, dense = found[:3]
    assert {e["op"] for e in found} == {"mma_era"} and {e["dtype"] for e in found} == {"bfloat16"}
    assert (peer["out_features"], peer["in_features"]) == (64, 128)
    assert "; algo 6 tile" in peer["config"] and peer["details"]["algorithms"] == [6]
    assert ours["config"] in ("mma a", "mma b") and ours["details"] == {"picked": "mma b"}
    assert peer["bytes"] == dense["bytes"] > ours["bytes"]
    assert set(peer["us"]) == {"p20", "p50", "p80"}
    assert bench.main(path, RUN) == 0 and len(lines_of(path)) == 6  # nothing is measured twice

    clean = [
        {**e, "dirty": False, "gpu": "GPU X", "us": {"p50": us}}
        for e, us in zip(found, (20.0, 10.0, 8.0, 30.0, 40.0, 15.0))
    ]
    text = table.render(clean).splitlines()
    assert text[0].startswith("**Where we lose**, GPU X")
    text = text[next(i for i, line in enumerate(text) if line.startswith("**mma.sp")) :]
    assert text[0].startswith("**mma.sp against dense mma.sync kernels on this GPU**, GPU X")
    assert text[2:] == [
        "| out x in | tokens | dtype | dense mma.sync us | cuda-mma us | dense us | campaign |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 64 x 128 | 5 | bfloat16 | 20 | 10 (2.00x) | 8 (2.50x) | c |",
        "| 64 x 128 | 80 | bfloat16 | 30 | 40 (0.75x) | 15 (2.00x) | c |",
    ]


def test_a_cell_that_fails_is_reported_and_the_others_are_measured(tmp_path, capsys, stand_ins):
    real, fake = sweep.launch, stand_ins
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "launch", lambda s, k, i, x, w: real(s, k, i, x, w) + (len(x) == 5))
        assert bench.main(tmp_path / "r.jsonl", RUN) == 1
    assert [e["tokens"] for e in lines_of(tmp_path / "r.jsonl")] == [80] * 3
    out = capsys.readouterr().out
    assert "FAILED 64x128 5 tokens mma a: bench: mma a is wrong in" in out
    assert "FAILED 64x128 5 tokens bfloat16: bench: no tile of the mma.sp kernel is right" in out
    assert fake.freed == 8  # the descriptors of both cells


def test_without_a_gpu_nothing_is_recorded(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert bench.main(path, RUN) == 1 and not path.exists()
    assert "dense_mma: expected a CUDA GPU, got device cpu" in capsys.readouterr().out


def test_with_a_blind_profiler_nothing_is_recorded(tmp_path, capsys, monkeypatch):
    def blind(device):
        raise bench.ProfilerBlind("bench: no names")

    monkeypatch.setattr(bench, "prepare", blind)
    assert bench.main(tmp_path / "r.jsonl", RUN) == 1 and not (tmp_path / "r.jsonl").exists()
    assert "FAILED bench: no names" in capsys.readouterr().out


@pytest.mark.gpu
def test_every_mma_sync_kernel_of_a_small_layer_is_right():
    device = torch.device("cuda")
    library = bench.prepare(device)
    weight, x = (torch.randn(n, 256, device=device).bfloat16() for n in (512, 64))
    made = cublaslt.Problem(library, 512, 256, 64, torch.bfloat16)
    peer = bench.Peer(made, [weight], x)
    candidates = bench._candidates(peer, made.algorithms(), 3, (1, 2))
    ranked = bench.ranking(candidates, peer.kernels(candidates))
    assert candidates and ranked, peer.refusals
    for _, candidate in ranked:
        peer.check(candidate)
    made.close()
