"""The prefill kernel without a GPU: its source and its launch, run by prefill_emulator.cpp, against
float64.

Addresses, descriptors of wgmma.sp, metadata, edges, clusters that share x and weights, whole tiles
in turn, a last wave that is cut or streamed, both ways to y and how wide its stores are; not that
the hardware does what the PTX ISA says.
"""

import pytest
import torch

from python_tests.csrc.emulated_linear import (
    builder,
    configs,
    problem,
    reaches_y,
    wide_stores,
    wrong,
)
from python_tests.csrc.staged_cases import patterns, scalings, silu_is_rounded_once, ways_to_y
from python_tests.linear_cases import random_input

F16, BF16 = torch.float16, torch.bfloat16
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
# (panels, tokens, cluster along out_features, along tokens, streamed, promoted)
CONFIGS = {row[1:]: row[0] for row in configs("SK_PREFILL_CONFIGS")}
ALONE_64, PAIR_64 = (2, 64, 1, 1, 0, 0), (2, 64, 2, 1, 0, 0)
ALONE_128, STREAMED = (2, 128, 1, 1, 0, 0), (2, 128, 2, 1, 1, 0)
PAIR_128, COLUMNS_128, FOUR_128 = ((2, 128, *of, 0, 0) for of in ((2, 1), (1, 2), (2, 2)))
PAIR_208, COLUMNS_208 = (2, 208, 2, 1, 0, 0), (2, 208, 1, 2, 0, 0)
# What prefill_emulator.cpp compiles.
TYPES = [
    *((BF16, of) for of in (ALONE_64, PAIR_64, ALONE_128, PAIR_128, COLUMNS_128, FOUR_128)),
    *((BF16, of) for of in (STREAMED, PAIR_208, COLUMNS_208)),
    *((F16, of) for of in (ALONE_64, PAIR_64, (2, 96, 1, 1, 0, 0))),
]
BYTES = [
    (E4M3, F16, (1, 128, 1, 1, 0, 1)),
    (E4M3, F16, (1, 128, 2, 1, 0, 1)),
    (INT8, BF16, PAIR_208),
]
EPILOGUE = "prefill_epilogue_sm90.cuh"
HEADERS = ("core/device.h", "core/tensor_map.h")
MISTAKES = [
    # (file of csrc/linear, in its source, instead, which of CASES shows it)
    ("prefill_sm90.cuh", "ptx::wait_for_predecessor();", ";", "boxes"),
    ("prefill_sm90.cuh", "@cluster_m * share * 128@;", "0", "pair"),
    ("prefill_sm90.cuh", "@Cfg::kXBytes@);", "share * 128", "pair"),
    ("prefill_sm90.cuh", "of_share = @min(max(last + 1 - wanted, 0), share)@;", "share", "pair"),
    ("prefill_sm90.cuh", "expected = @unfilled > 0@ ?", "true", "pair"),
    ("prefill_sm90.cuh", "slots = @unfilled > 0@ ?", "false", "odd"),
    (
        "prefill_sm90.cuh",
        "its barriers.\n  @ptx::cluster_sync();@\n}",
        ";",
        "pair of which one lags",
    ),
    ("mainloop_sm90.cuh", "lane < cluster.m + cluster.n - 1", "lane < 1", "pair"),
    ("mainloop_sm90.cuh", "at.w = static_cast<int>(ring.state);", "at.w = 0;", "boxes"),
    ("mainloop_sm90.cuh", "      @ptx::wgmma_wait<0>();@\n    }\n    const int last", ";", "boxes"),
    (
        "tile_scheduler_sm90.cuh",
        "k_tiles * (split + 1) / p.splits",
        "(k_tiles * (split + 1) / p.splits - split)",
        "shared",
    ),
    ("tile_scheduler_sm90.cuh", "end - start - k_tiles", "(end - start - k_tiles - 1)", "streamed"),
    (
        EPILOGUE,
        "__threadfence();\n  @ptx::named_barrier_sync(1 + consumer, 128);@",
        ";",
        "shared, and a warp lags",
    ),
    (EPILOGUE, "__threadfence();", ";", "shared"),
    (EPILOGUE, "__threadfence();", ";", "streamed"),
    (EPILOGUE, "@ptx::named_barrier_sync(1 + consumer, 128);@\n  own = split;", ";", "shared"),
    (EPILOGUE, "@block_of<Cfg>(step) != own@) write_block", "step > 0", "shared"),
    (EPILOGUE, "arrived[0] = 0;", ";", "shared"),
    (EPILOGUE, "arrived[1] = 0;", ";", "shared"),
    (EPILOGUE, "counter[0] = 0;", ";", "streamed"),
    (EPILOGUE, "@first@; other < cluster", "first + 1", "streamed"),
    (EPILOGUE, "@(cluster - first)@) {", "(1)", "streamed by three"),
    (EPILOGUE, "ptx::fence_before_tensor_store();", ";", "boxes"),
    (EPILOGUE, "@order.z@) ptx::tensor_store_wait_read<0>", "false", "boxes"),
    (EPILOGUE, "@ptx::tensor_store_wait<0>();@\n}", ";", "boxes"),
    (EPILOGUE, "(piece ^ line)", "piece", "boxes"),
    (EPILOGUE, "order.x + m * 64", "order.x", "boxes"),
    (
        EPILOGUE,
        "ptx::named_barrier_sync(free_barrier(consumer, slot), kSlotThreads);",
        ";",
        "boxes",
    ),
    (EPILOGUE, "d[m][i + half * 2 + 1] += bias;", ";", "boxes"),
    (EPILOGUE, "boxes, kBlockTokens, @at.row@,", "0", "odd"),
    (EPILOGUE, "@at.token + first@, p.tokens);", "at.token", "odd"),
    (
        EPILOGUE,
        "met everybody at the barrier of the step between.\n      "
        "@ptx::named_barrier_sync(1 + consumer, 128);@",
        ";",
        "odd",
    ),
    (EPILOGUE, "at().owns(block_of<Cfg>(part * kSumTokens / kBlockTokens))", "true", "shared, odd"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """As `builder`, of prefill_emulator.cpp."""
    return builder("prefill_emulator.cpp", tmp_path_factory, MISTAKES, HEADERS)


def faults(emulate, of, w, x, dtype=None, clusters=2, **what):
    """What is wrong with y, in words, or with the number of its widest stores by a thread.

    clusters: that the GPU holds at once.
    """
    tokens, out_features = x.shape[0], w.shape[0]
    found = wrong(
        emulate, CONFIGS[of], w, x, weight=x.dtype, dtype=dtype, clusters=clusters, **what
    )
    rounded, aligned = reaches_y(out_features, **what)
    elements, shifts = (4, False) if of[1] > 192 else (8, rounded)
    where = dict(stride=what.get("stride"), shift=what.get("shift", 0), elements=elements)
    expected = 0
    if not rounded and aligned or shifts and not aligned:
        expected = wide_stores(tokens, out_features, 64 * of[0], **where)
    stores = emulate.library.stores_of(2 * elements)
    return found or ("" if stores == expected else f"{stores} wide stores, not {expected}")


@pytest.mark.parametrize("dtype, of", TYPES, ids=str)
def test_whole_tiles(build, dtype, of):
    """Less and more than a tile and a cluster, all tiles by one cluster in turn or side by side."""
    _, tokens, cluster_m, cluster_n, *_ = of
    rows = 256 * cluster_m
    for case, freedoms in (
        ((1, 7, 4), dict(late=True)),
        ((tokens, 256, 64), dict(late=False, falling=True)),
        ((tokens * cluster_n + 1, rows + 130, 96), dict(late=True, falling=True, clusters=1)),
        ((tokens - 9, 65, 200), dict(late=False, clusters=3)),
        ((tokens + 40, 323, 136), dict(late=True, clusters=1, stride=323)),
    ):
        assert not faults(build(), of, *problem(*case, dtype), **freedoms)


@pytest.mark.parametrize("dtype, of", TYPES, ids=str)
@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_panels_that_there_are_not(build, dtype, of, panels):
    """Of the last tile, in more stages than the ring has; tiles of which all are there before and
    after it. Of a cluster's thread blocks some may have none."""
    _, tokens, cluster_m, cluster_n, *_ = of
    rows = 256 * cluster_m + 64 * panels - 7
    case = problem(tokens * cluster_n + 1, rows, 64 * 18, dtype)
    assert not faults(build(), of, *case, clusters=1, late=True)


# (type of x and y, config, problem, clusters that the GPU holds), of which the last wave is cut
SHARED = [
    (BF16, ALONE_64, (64, 256, 512), 2),
    (BF16, ALONE_64, (3 * 64 - 10, 250, 520), 2),  # two whole tiles first
    (BF16, ALONE_128, (128, 256, 768), 3),
    (BF16, ALONE_128, (100, 300, 1020), 4),
    (BF16, PAIR_128, (130, 700, 768), 3),
    (BF16, FOUR_128, (129, 257, 512), 2),
    (BF16, PAIR_208, (150, 323, 512), 2),
    (BF16, COLUMNS_208, (210, 65, 512), 2),
    (F16, (2, 96, 1, 1, 0, 0), (96, 256, 512), 2),
]


@pytest.mark.parametrize("dtype, of, case, clusters", SHARED, ids=str)
@pytest.mark.parametrize("late", [True, False])
def test_tiles_whose_k_is_shared(build, dtype, of, case, clusters, late):
    """Rounded boxes; rows that are not aligned."""
    bias = random_input((case[1],), dtype, seed=2, integers=True)
    for more in (dict(bias=bias), dict(stride=case[1] + 1 - case[1] % 2, bias=bias)):
        what = dict(clusters=clusters, late=late, falling=not late, **more)
        assert not faults(build(), of, *problem(*case, dtype), **what), more.keys()
        assert build().library.clusters_together() == clusters


@pytest.mark.parametrize(
    "case, clusters",
    [
        ((129, 512, 384), 3),  # the second cluster has an end and a beginning
        ((257, 300, 512), 2),  # two whole tiles first
        ((300, 323, 384), 4),
        ((100, 300, 768), 3),  # three share a tile
    ],
    ids=str,
)
@pytest.mark.parametrize("late", [True, False])
def test_a_streamed_rest(build, case, clusters, late):
    for more in (dict(), dict(stride=case[1] + 1 - case[1] % 2)):
        what = dict(clusters=clusters, late=late, falling=not late, **more)
        assert not faults(build(), STREAMED, *problem(*case), **what), more.keys()
        assert build().library.clusters_together() == clusters


@pytest.mark.parametrize("late", [True, False])
def test_more_stages_than_the_ring(build, late):
    for of, columns in ((PAIR_64, 64 * 19 - 40), (COLUMNS_208, 64 * 9)):
        assert not faults(build(), of, *problem(9, 65, columns), late=late)


@pytest.mark.parametrize("dtype, of", [TYPES[0], TYPES[7], TYPES[11]], ids=str)
@pytest.mark.parametrize("out_features", [320, 323, 322, 324, 65, 7])
def test_rows_of_y_that_are_not_aligned(build, dtype, of, out_features):
    w, x = problem(33, out_features, 96, dtype)
    for what in ways_to_y(33, out_features, dtype):
        assert not faults(build(), of, w, x, **what), what.keys()


def test_silu(build):
    silu_is_rounded_once(build(), CONFIGS[PAIR_64])


@pytest.mark.parametrize("dtype, of", TYPES, ids=str)
def test_almost_all_stores_are_wide(build, dtype, of):
    """Of 323 out_features, whose rows begin anywhere: all but the ends of a warpgroup's rows; but
    in the widest tile."""
    tokens, out_features = 40, 323
    assert not faults(build(), of, *problem(tokens, out_features, 64, dtype), stride=out_features)
    share = build().library.stores_of(16) * 8 / (tokens * out_features)
    assert share > 0.9 if of[1] <= 192 else share == 0


@pytest.mark.parametrize("weight, dtype, of", BYTES, ids=str)
def test_8_bits(build, weight, dtype, of):
    """K that is shared, too."""
    for out_features, in_features in ((320, 128 * 5 + 44), (323, 128), (65, 1024)):
        w, x = problem(35, out_features, in_features, weight)
        for what in scalings(35, out_features, dtype):
            assert not faults(build(), of, w, x, dtype, **what)


@pytest.mark.parametrize("weight, dtype, of", [(BF16, BF16, PAIR_64), *BYTES[1:]], ids=str)
def test_every_pattern_in_every_place(build, weight, dtype, of):
    for w, x in patterns(256, weight):
        assert not faults(build(), of, w, x, dtype)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    "of, case, clusters",
    [(PAIR_64, (70, 323, 520), 2), (STREAMED, (129, 300, 384), 3)],
    ids=str,
)
def test_threads_that_lag(build, of, case, clusters, late):
    """A thread block, and a warp of each role, that run when nothing else can."""
    for stride in (None, 323):
        for lag in ((0, 384), (384, 384), (32, 32), (384 + 128, 32), (288, 32), (384 + 320, 32)):
            lagging = dict(lag_first=lag[0], lag_count=lag[1], clusters=clusters, stride=stride)
            assert not faults(build(), of, *problem(*case), late=late, **lagging)


# ---- the emulator itself -------------------------------------------------------------------------

CASES = {
    "boxes": (ALONE_64, (130, 200, 136), dict(clusters=1)),
    "odd": (ALONE_64, (70, 323, 136), dict(stride=323, shift=1)),
    "pair": (PAIR_64, (9, 323, 64 * 19), dict(clusters=1)),
    "pair of which one lags": (PAIR_64, (9, 323, 136), dict(lag_first=384, lag_count=384)),
    "shared": (ALONE_64, (64, 256, 512), dict()),
    "shared, odd": (ALONE_64, (64, 65, 512), dict(stride=65, activation="relu")),
    "shared, and a warp lags": (ALONE_64, (64, 256, 512), dict(lag_first=32, lag_count=32)),
    "streamed": (STREAMED, (129, 512, 384), dict(clusters=3)),
    "streamed by three": (STREAMED, (100, 300, 768), dict(clusters=3)),
}


def fault_of(emulate, case, late):
    of, shape, what = CASES[case]
    bias = random_input((shape[1],), BF16, seed=2, integers=True)
    what = dict(late=late, falling=not late, bias=bias, **what)
    return faults(emulate, of, *problem(*shape), **what)


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_emulator_sees_mistakes(build, number):
    emulate, case = build.with_mistake(number), MISTAKES[number][-1]
    assert fault_of(emulate, case, late=True) or fault_of(emulate, case, late=False)


def test_without_mistakes_all_is_right(build):
    emulate = build.with_mistake(-1)
    assert not any(fault_of(emulate, case, late) for case in CASES for late in (True, False))
