"""The decode kernel without a GPU: its source, run by decode_emulator.cpp, against float64.

Addresses, fragments, metadata, the widening of 8-bit and 4-bit values, edges, the ring of stages,
clusters and who waits for whom; not that the hardware does what the PTX ISA says.
"""

import ctypes
import re

import pytest
import torch

from python_tests.csrc.building import ROOT
from python_tests.csrc.emulated_linear import builder, configs, problem, wrong
from python_tests.linear_cases import PAIRS, random_input

F16, BF16 = torch.float16, torch.bfloat16
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
CONFIGS = configs("SK_DECODE_CONFIGS")  # (index, panels, split, paired)
assert len(CONFIGS) >= 20
CONFIGS = [config for config in CONFIGS if config[2] != 4]
LIMIT = r"#define SK_DECODE_NARROW (\d+)"  # the first config that only weights of 16 bits have
NARROW_CONFIGS = int(re.search(LIMIT, (ROOT / "csrc/linear/configs.h").read_text()).group(1))
PLAIN = [config for config in CONFIGS if config[0] >= NARROW_CONFIGS]
HEADERS = ("core/device.h", "core/tensor_map.h")
NARROW = [(w, x) for w in (E4M3, INT8) for x in (F16, BF16)]
# (weight, x, columns that share a scale of the metadata)
TYPES = [
    (BF16, BF16, 0),
    *((*types, 0) for types in NARROW),
    ("int4", F16, 0),
    ("int4", BF16, 64),
    ("int4", F16, 128),
    ("int4", BF16, 128),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """As `builder`, of decode_emulator.cpp."""
    return builder("decode_emulator.cpp", tmp_path_factory, own=HEADERS)


@pytest.mark.parametrize("config, panels, split, paired", CONFIGS)
@pytest.mark.parametrize("weight, dtype, group", TYPES, ids=str)
def test_exact_at_the_edges(build, config, panels, split, paired, weight, dtype, group):
    """Less and more than a tile, a row block and a cluster; both landing times and orders."""
    if weight != dtype and config >= NARROW_CONFIGS:
        assert "a config that is compiled" in wrong(
            build(), config, *problem(1, 7, 4, dtype), weight=weight, group=group
        )
        return
    emulate, rows = build(), 64 * panels
    for case, freedoms in (
        ((1, 7, 4), dict(late=True)),
        ((9, rows + 1, 132), dict(late=False, falling=True)),
        ((16, 65, 264), dict(late=True, falling=True)),
        ((64, 70, 644), dict(late=False)),
    ):
        what = dict(weight=weight, group=group, **freedoms)
        assert not wrong(emulate, config, *problem(*case, dtype), **what)


@pytest.mark.parametrize(
    "config, weight, group",
    [(0, E4M3, 0), (4, E4M3, 0), *((at, "int4", 128) for at in (0, 4, 8, 12, 13, 14))],
)
@pytest.mark.parametrize("late", [True, False])
def test_more_stages_than_the_ring(build, config, weight, group, late):
    """Every turn of the ring, and more row blocks than clusters where there is no split."""
    _, panels, split, _ = next(entry for entry in CONFIGS if entry[0] == config)
    case = problem(5, 64 * panels + 3, (256 if group else 128) * split * 13 - 60)
    what = dict(weight=weight, group=group, late=late, clusters=1)
    assert not wrong(build(), config, *case, **what)


@pytest.mark.parametrize("config, panels, split, paired", PLAIN)
@pytest.mark.parametrize("tokens", [1, 8, 13, 64])
def test_long_in_features(build, config, panels, split, paired, tokens):
    """One stage less and one more than every CTA or team has, a whole ring, and its second turn;
    row blocks beside each other in a tile row group, which is shorter at the end."""
    parts, emulate = split * (2 if panels == 1 else 1), build()
    for stages, freedoms in (
        (parts - 1, dict(late=True)),
        (parts + 1, dict(late=False, falling=True)),
        (12 * parts + 1, dict(late=True, falling=True)),
        (26 * parts - 3, dict(late=True)),
    ):
        out_features = 70 if stages > 12 * parts else 64 * 5 + 3
        w, x = problem(tokens, out_features, 64 * stages - 36)
        bias = random_input((out_features,), BF16, seed=2, integers=True)
        residual = random_input((tokens, out_features), BF16, seed=3, integers=True)
        what = dict(weight=BF16, bias=bias, residual=residual, activation="relu", **freedoms)
        assert not wrong(emulate, config, w, x, **what), stages


@pytest.mark.parametrize("config", [config for config, _, split, _ in PLAIN if split == 16])
def test_half_the_cluster_where_sixteen_do_not_fit(build, config):
    library = build().library
    largest = ctypes.c_int.in_dll(library, "largest_cluster")
    launched = ctypes.c_int.in_dll(library, "launched_cluster")
    case = problem(5, 130, 64 * 21 - 4)
    try:
        for largest.value in (16, 8):
            assert not wrong(build(), config, *case, weight=BF16)
            assert launched.value == largest.value
        largest.value = 4
        assert "a cluster that fits" in wrong(build(), config, *case, weight=BF16)
    finally:
        largest.value = 16


def codes_of(weight):
    """All numbers of a storage type."""
    if weight == "int4":
        return torch.arange(-8.0, 8.0)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(weight).float()
    return codes[codes.isfinite() & ((codes > -128) | (weight != INT8))]


@pytest.mark.parametrize("weight, dtype, group", TYPES[1:], ids=str)
def test_every_value_in_every_place(build, weight, dtype, group):
    """All codes of the storage type, in every column of a tile and every row of an m16 tile."""
    codes = codes_of(weight)
    w = torch.zeros(64, 256)
    for row in range(64):
        for column in range(64):
            first, second = PAIRS[(row + column) % 6].tolist()
            w[row, 4 * column + first] = codes[(row * 7 + column * 2) % len(codes)]
            w[row, 4 * column + second] = codes[(row * 7 + column * 2 + 1) % len(codes)]
    for first in range(0, 256, 64):
        x = torch.eye(256, dtype=dtype)[first : first + 64]
        assert not wrong(build(), 0, w, x, weight=weight, group=group)


@pytest.mark.parametrize("weight, dtype, group", TYPES[1:], ids=str)
def test_epilogue(build, weight, dtype, group):
    """The scale comes before the bias; aligned rows and others."""
    for out_features in (264, 197):
        w, x = problem(35, out_features, 132, dtype)
        bias = random_input((out_features,), dtype, seed=2, integers=True)
        residual = random_input((35, out_features), dtype, seed=3, integers=True)
        scale = 2.0 ** (torch.arange(out_features) % 3 - 1)
        what = dict(weight=weight, group=group, scale=scale, bias=bias, residual=residual)
        for config in (0, 4):
            assert not wrong(build(), config, w, x, activation="relu", **what)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("decode_sm90.cuh", "ptx::mbarrier_wait(smem.full(ring.stage), ring.parity);", ""),
        ("decode_sm90.cuh", "ptx::mbarrier_wait(smem.empty(ring.stage), ring.parity ^ 1);", ""),
        ("decode_sm90.cuh", "sync();  // all sums are there", ""),
        ("decode_sm90.cuh", "ptx::wait_for_predecessor();\n    store", "store"),
        ("decode_widen.cuh", "lane_idx % 2 != 0", "false"),
        ("decode_widen.cuh", "r % 2 * 32 + r / 2 * 8", "r / 2 * 32 + r % 2 * 8"),
        ("decode_widen.cuh", "lane_idx % 2 * 4", "0"),
        ("decode_widen.cuh", "0x7531", "0x7513"),
        ("decode_widen.cuh", "0x87F087F0", "0x07F007F0"),
        ("decode_widen.cuh", "(t / 2) ^ g", "(t / 2)"),
    ],
)
def test_the_emulator_sees_mistakes(build, file, old, new):
    cases = [(0, problem(9, 65, 128 * 11)), (4, problem(16, 65, 260))]
    assert_found(build, (file, old, new), cases, E4M3)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("decode_sm90.cuh", "rank + team * ranks, ranks * Cfg::kTeams", "rank, ranks"),
        ("decode_sm90.cuh", "smem.first = team * Cfg::kStages;", ""),
        ("decode_sm90.cuh", "warp_idx - team * Cfg::kTeamWarps", "warp_idx"),
        ("decode_sm90.cuh", "s < Cfg::kAllStages", "s < Cfg::kStages"),
        ("decode_sm90.cuh", "Cfg::kTeamWarps * ptx", "Cfg::kConsumerWarps * ptx"),
        ("decode_tile_sm90.cuh", "full(stage) + Cfg::kAllStages", "full(stage) + Cfg::kStages"),
        (
            "decode_sm90.cuh",
            "ptx::named_barrier_sync(kConsumerBarrier,\n"
            + " " * 30
            + "Cfg::kConsumerThreads);  //",
            "//",
        ),
        ("decode_sm90.cuh", "ptx::load_shared_f32(address) + v", "v"),
        (
            "decode_tile_sm90.cuh",
            "+ kWeights * kWeightBytes, 1024) * 1024",
            "+ kWeightBytes, 512) * 512",
        ),
        ("decode_sm90.cuh", "(rank + first + i) & (ranks - 1)", "(rank + first + i) & 7"),
        ("decode_sm90.cuh", "blockIdx.x & (ranks - 1)", "blockIdx.x & 7"),
        ("decode_sm90.cuh", "row_block % kBlocksPerGroup * Cfg::kPanels", "0"),
    ],
)
def test_the_emulator_sees_mistakes_of_teams_and_clusters_of_sixteen(build, file, old, new):
    cases = [(config, problem(9, 130, 64 * 33 - 4)) for config, *_ in PLAIN]
    cases += [(18, problem(2, 64, 64 * (12 * 8 * 2 + 1)))]  # a second turn of a ring
    assert_found(build, (file, old, new), cases, BF16)


def assert_found(build, edit, cases, weight):
    """The edit shows in one of the cases; without it all are right."""

    def found(emulate):
        return any(
            wrong(emulate, config, *case, weight=weight, late=late)
            for config, case in cases
            for late in (True, False)
        )

    assert found(build(*edit))
    unchanged = build(edit[0], "#pragma once", "#pragma once")
    assert not found(unchanged), "without the edit all is right"
