"""The split kernel without a GPU: its source, run by split_emulator.cpp, against float64.

Addresses, descriptors of wgmma.sp, metadata, edges, the ring of stages, sums that a cluster
exchanges, sums that clusters share, both ways to y and how wide its stores are; not that the
hardware does what the PTX ISA says.
"""

import pytest
import torch

from python_tests.csrc.emulated_linear import (
    builder,
    call,
    configs,
    ends_on_16_bytes,
    problem,
    reaches_y,
    wide_stores,
    wrong,
)
from python_tests.csrc.staged_cases import patterns, scalings, silu_is_rounded_once, ways_to_y
from python_tests.linear_cases import random_input, random_weight

F16, BF16 = torch.float16, torch.bfloat16
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
# {(panels, tokens, split): index}, and of those that share tiles across clusters
CONFIGS, ACROSS = (
    {row[1:4]: row[0] for row in configs("SK_SPLIT_CONFIGS") if row[4] == across}
    for across in (0, 1)
)
# What split_emulator.cpp compiles.
TYPES = [
    *((BF16, of) for of in ((1, 64, 1), (1, 64, 3), (1, 64, 6), (1, 96, 2), (1, 128, 3))),
    *((BF16, of) for of in ((2, 64, 1), (2, 96, 2), (2, 128, 2))),
    *((F16, of) for of in ((1, 64, 2), (2, 128, 1))),
]
SHARED = [
    *((BF16, of) for of in ((1, 64, 4), (1, 64, 8), (1, 128, 1), (1, 128, 4))),
    *((BF16, of) for of in ((2, 128, 1), (2, 128, 2))),
    (F16, (1, 128, 2)),
]
BYTES = [(E4M3, BF16, (1, 64, 3)), (INT8, F16, (2, 96, 2))]
HEADERS = ("core/device.h", "core/tensor_map.h")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """As `builder`, of split_emulator.cpp."""
    return builder("split_emulator.cpp", tmp_path_factory, MISTAKES, HEADERS)


def faults(emulate, of, w, x, dtype=None, config=None, **what):
    """What is wrong with y, in words, or with the number of its stores of 16 bytes."""
    what = dict(weight=x.dtype, dtype=dtype, **{"clusters": 1, **what})
    found = wrong(emulate, CONFIGS[of] if config is None else config, w, x, **what)
    y_shape = x.shape[0], w.shape[0]
    where = dict(stride=what.get("stride"), shift=what.get("shift", 0))
    expected = any(reaches_y(w.shape[0], **what)) and wide_stores(*y_shape, 64 * of[0], **where)
    stores = emulate.library.stores_of(16)
    return found or ("" if stores == expected else f"{stores} wide stores, not {expected}")


@pytest.mark.parametrize("dtype, of", TYPES, ids=str)
def test_exact_at_the_edges(build, dtype, of):
    """Less and more than a tile, K of one column tile and of one per part and more."""
    panels, tokens, split = of
    rows = 128 * panels
    for case, freedoms in (
        ((1, 7, 4), dict(late=True)),
        ((tokens, rows, 64 * split), dict(late=False, falling=True)),
        ((tokens + 1, rows + 130, 64 * split - 32), dict(late=True, falling=True)),
        ((2 * tokens + 3, 65, 200), dict(late=True)),
        ((tokens - 9, rows - 1, 64 * (split + 1) + 8), dict(late=False)),
    ):
        assert not faults(build(), of, *problem(*case, dtype), **freedoms)


@pytest.mark.parametrize("late", [True, False])
def test_more_stages_than_the_ring(build, late):
    for of, columns in (((1, 64, 3), 64 * 3 * 20 - 40), ((2, 128, 2), 64 * 2 * 7)):
        assert not faults(build(), of, *problem(9, 65, columns), late=late)


@pytest.mark.parametrize(
    "of, clusters, rows, columns",
    [
        ((1, 64, 1), 9, 70, 8),  # of 40 tokens: 9 of 34 would not be a multiple of 8
        ((1, 64, 1), 99, 70, 10),  # half as wide
        ((1, 64, 1), 4, 70, 5),
        ((1, 64, 1), 99, 129, 2 * 5),  # two rows of tiles
        ((1, 64, 3), 7, 70, 7),
        ((2, 64, 1), 99, 200, 10),
    ],
)
def test_as_many_columns_as_run_at_once(build, of, clusters, rows, columns):
    """Where one row of tiles has all of the weight and x has more rows."""
    case = problem(300, rows, 64 * 4 * of[2])
    assert not faults(build(), of, *case, clusters=clusters, late=True)
    assert build().library.clusters_launched() == columns


@pytest.mark.parametrize("dtype, of", [TYPES[1], TYPES[6], TYPES[9]], ids=str)
@pytest.mark.parametrize("out_features", [320, 323, 322, 324, 65, 7])
def test_rows_of_y_that_are_not_aligned(build, dtype, of, out_features):
    w, x = problem(33, out_features, 96 * of[2], dtype)
    for what in ways_to_y(33, out_features, dtype):
        assert not faults(build(), of, w, x, **what), what.keys()


def test_silu(build):
    silu_is_rounded_once(build(), CONFIGS[1, 64, 2])


@pytest.mark.parametrize("panels, dtype, of", [(of[0], dtype, of) for dtype, of in TYPES], ids=str)
def test_almost_all_stores_are_wide(build, panels, dtype, of):
    """Of 323 out_features, whose rows begin anywhere: all but the ends of a warpgroup's rows."""
    tokens, out_features = 40, 323
    case = problem(tokens, out_features, 64 * of[2], dtype)
    assert not faults(build(), of, *case, stride=out_features)
    stores = build().library.stores_of(16)
    assert stores * 8 / (tokens * out_features) > (0.85 if panels == 1 else 0.9)


@pytest.mark.parametrize("weight, dtype, of", BYTES, ids=str)
def test_8_bits(build, weight, dtype, of):
    for out_features in (320, 323, 65):
        w, x = problem(35, out_features, 128 * of[2] + 44, weight)
        for what in scalings(35, out_features, dtype):
            assert not faults(build(), of, w, x, dtype, **what)


@pytest.mark.parametrize("weight, of", [(BF16, (1, 64, 3)), (E4M3, (1, 64, 3))], ids=str)
def test_every_pattern_in_every_place(build, weight, of):
    for w, x in patterns(128, weight):
        assert not faults(build(), of, w, x, dtype=BF16)


@pytest.mark.parametrize("late", [True, False])
def test_threads_that_lag(build, late):
    """A thread block of a cluster, and a warp of each role, that run when nothing else can."""
    case = problem(70, 129, 400)
    for lag in ((0, 384), (384, 384), (768, 384), (32, 32), (384 + 128, 32), (768 + 288, 32)):
        lagging = dict(lag_first=lag[0], lag_count=lag[1])
        assert not faults(build(), (1, 64, 3), *case, late=late, stride=129, **lagging)
        assert not faults(build(), (1, 64, 3), *case, late=late, **lagging)


# ---- across clusters -----------------------------------------------------------------------------


def tiles_of(of, tokens, out_features):
    return -(-out_features // (128 * of[0])) * -(-tokens // of[1])


def faults_across(emulate, of, sharing, w, x, **what):
    """As `faults`, of so many clusters that share each tile, as many as the GPU holds."""
    tiles, clusters = tiles_of(of, x.shape[0], w.shape[0]), what.pop("clusters", None)
    clusters = clusters or tiles * sharing
    found = faults(emulate, of, w, x, config=ACROSS[of], clusters=clusters, **what)
    launched = emulate.library.clusters_launched()
    expected = tiles * sharing
    return found or ("" if launched == expected else f"{launched} clusters, not {expected}")


@pytest.mark.parametrize("dtype, of", SHARED, ids=str)
def test_clusters_that_share_a_tile(build, dtype, of):
    """2, 3 and 5 of them, parts of K that are not equally long, the first as the last and together;
    each twice, on the same workspace."""
    panels, tokens, split = of
    rows = 128 * panels
    for sharing, case, freedoms in (
        (2, (tokens, rows, 64 * 4 * 2 * split), dict(late=True)),
        (2, (tokens + 1, rows + 2, 64 * 4 * 2 * split + 36), dict(falling=True, beside=8)),
        (3, (9, 65, 64 * (4 * 3 * split + 1)), dict(late=True, falling=True)),
        (5, (min(tokens, 70), 120, 64 * (4 * 5 * split + split + 1) - 20), dict(beside=3)),
    ):
        what = dict(again=1, **freedoms)
        assert not faults_across(build(), of, sharing, *problem(*case, dtype), **what), case


def test_how_many_clusters_share_a_tile(build):
    """As many as are resident, up to 16, with four column tiles each at least; one: the kernel that
    shares nothing."""
    of, tile = (1, 64, 4), (9, 65)
    for sharing, columns, clusters in (
        (1, 64 * 31, 9),
        (2, 64 * 32, 9),
        (2, 64 * 47, 9),
        (3, 64 * 48, 3),
        (1, 64 * 48, 1),
        (1, 64 * 2, 9),
        (16, 64 * 16 * 17, 33),
    ):
        what = dict(clusters=clusters, late=False)
        assert not faults_across(build(), of, sharing, *problem(*tile, columns), **what), columns
    case = problem(65, 129, 64 * 64)  # four tiles
    assert not faults_across(build(), of, 2, *case, clusters=11)
    assert not faults_across(build(), of, 1, *case, clusters=7)


@pytest.mark.parametrize("dtype, of", [SHARED[0], SHARED[2], SHARED[5], SHARED[6]], ids=str)
@pytest.mark.parametrize("out_features", [320, 323, 65])
def test_rows_that_are_not_aligned_and_shared(build, dtype, of, out_features):
    w, x = problem(33, out_features, 64 * 8 * of[2] + 20, dtype)
    for what in ways_to_y(33, out_features, dtype):
        assert not faults_across(build(), of, 2, w, x, **what), what.keys()


def cancelling(tokens, rows, sharing, split):
    """A problem in which the first and the last of so many clusters have large sums of which
    nothing is left: of each other order of additions something else."""
    each = 64 * 4 * split
    w = random_weight(rows, each * sharing, BF16).float()
    x = random_input((tokens, each * sharing), BF16)
    w[:, -each:], x[:, :each] = -w[:, :each], x[:, :each] * 2**18
    x[:, -each:] = x[:, :each]
    return w, x


@pytest.mark.parametrize("of", [(1, 64, 4), (2, 128, 1)], ids=str)
def test_the_order_of_arrival_changes_no_bit(build, of):
    """Each cluster as the last one, each warp that writes sums, all at once and one by one."""
    sharing, threads = 5, 384 * of[2]
    w, x = cancelling(40, 100, sharing, of[2])
    orders = [dict(), dict(falling=True), dict(beside=3), dict(beside=2, falling=True)]
    orders += [
        dict(beside=sharing, lag_first=cluster * threads, lag_count=threads, falling=falling)
        for cluster in range(sharing)
        for falling in (False, True)
    ]
    orders += [dict(beside=sharing, lag_first=32 * warp, lag_count=32) for warp in range(8)]
    expected = None
    for late in (True, False):
        for order in orders:
            what = dict(weight=BF16, clusters=sharing, late=late, **order)
            broken, output = call(build(), ACROSS[of], w, x, **what)
            assert not broken, (broken, order)
            assert build().library.clusters_launched() == sharing
            expected = output.y.clone() if expected is None else expected
            assert not output.differ(expected), order


# ---- the emulator itself -------------------------------------------------------------------------

# Of the config 1, 64, 3: a problem, and more.
BIAS = ends_on_16_bytes(random_input((323,), BF16, seed=2, integers=True))
CASES = {
    "odd": ((70, 323, 200), dict(stride=323, shift=1)),
    "odd and added to": (
        (40, 323, 64),
        dict(stride=323, shift=1, bias=BIAS, activation="relu"),
    ),
    "narrow": ((9, 3, 64), dict(stride=5, shift=1)),
    "rounded": ((70, 200, 200), dict()),
    "a late thread block": ((70, 200, 200), dict(lag_first=384, lag_count=384)),
    "many stages": ((9, 130, 64 * 3 * 20), dict()),
    "unaligned": ((9, 200, 200), dict(stride=204)),
}
# Of the config 1, 64, 4 across clusters: how many share a tile, a problem, and more.
SHARED_CASES = {
    "shared": (3, (40, 130, 64 * 50), dict(again=1)),
    "shared, odd": (2, (64, 65, 64 * 33 + 20), dict(stride=65, beside=4)),
    "shared in any order": (3, (40, 100), dict()),
}
EPILOGUE = "prefill_epilogue_sm90.cuh"
MISTAKES = [
    # (file of csrc/linear, in its source, instead, which of CASES shows it)
    ("splitk_sm90.cuh", "min(token + p.column_tokens, p.tokens)", "p.tokens", "odd"),
    ("splitk_sm90.cuh", "k * (rank + 1) / Cfg::kSplits", "(k * (rank + 1) / 3 - rank / 2)", "odd"),
    ("splitk_sm90.cuh", "p.column_tokens * 128", "Cfg::kXBytes", "odd"),
    ("splitk_sm90.cuh", "ptx::wait_for_predecessor();", ";", "odd"),
    ("splitk_sm90.cuh", "after - 1", "0", "odd"),
    (
        "splitk_sm90.cuh",
        "slots = @k_tile - part.k_begin < Cfg::kStages@",
        "false",
        "many stages",
    ),
    ("splitk_sm90.cuh", "slots * Cfg::kPanelBytes", "Cfg::kValueBytes", "many stages"),
    ("splitk_sm90.cuh", "if (@has_rows@) finish", "false", "odd"),
    (
        "splitk_sm90.cuh",
        "@ptx::cluster_wait();\n"
        "    if (has_rows) scatter_sums<Cfg>(d, smem, rank, part.token_end - part.token);@",
        "scatter_sums<Cfg>(d, smem, rank, part.token_end - part.token); ptx::cluster_wait();",
        "a late thread block",
    ),
    ("splitk_sm90.cuh", "@ptx::cluster_sync();@  // all sums", ";", "odd"),
    ("splitk_sm90.cuh", "(piece ^ own % 8)", "piece", "rounded"),
    ("splitk_sm90.cuh", "row >= out.out_features", "false", "rounded"),
    ("splitk_sm90.cuh", "token >= token_end", "false", "rounded"),
    (
        "splitk_sm90.cuh",
        "@ptx::named_barrier_sync(1 + consumer, 128);@\n  if (!whole_pieces)",
        ";",
        "rounded",
    ),
    (
        "mainloop_sm90.cuh",
        "ptx::mbarrier_wait(smem.full(ring.stage()), ring.parity());",
        ";",
        "odd",
    ),
    ("mainloop_sm90.cuh", "    @ptx::wgmma_wait<1>();@\n    if (k_tile > 0)", ";", "many stages"),
    ("mainloop_sm90.cuh", "      @ptx::wgmma_wait<0>();@\n    }\n    const int last", ";", "odd"),
    ("mainloop_sm90.cuh", "@consumer@ * Cfg::kPanels * Cfg::Tile::kMetadataBytes +", "0", "odd"),
    ("splitk_sm90.cuh", "!whole_pieces", "false", "odd"),
    (EPILOGUE, "|| @row + 8 > rows@)", "false", "odd"),
    (EPILOGUE, "if (@row < 0@ ||", "false", "odd"),
    (EPILOGUE, "piece == 0 ? 0 : @piece * 8 - 8@", "piece * 8", "odd"),
    (EPILOGUE, "beyond & 4", "false", "odd"),
    (EPILOGUE, "beyond & 2", "false", "odd"),
    (EPILOGUE, "beyond & 1", "false", "odd"),
    (EPILOGUE, "@tail < head@ ? head : tail", "false", "narrow"),
    (EPILOGUE, "row & 1 ? @pair >> 16@", "pair", "odd"),
    (EPILOGUE, "row & 2 ? @four.y@", "four.x", "odd"),
    (EPILOGUE, "@row % 8 / 4 * 8@", "0", "odd"),
    (EPILOGUE, "tokens = token_end - first_token;", ";", "odd"),
    (EPILOGUE, "out.y_stride + @first_row + row@;", "row", "odd"),
    (EPILOGUE, "global_token < tokens", "true", "odd and added to"),
    (
        EPILOGUE,
        "@ptx::named_barrier_sync(1 + consumer, 128);@\n#pragma unroll 1",
        ";",
        "odd and added to",
    ),
    (
        EPILOGUE,
        "      }\n    }\n    @ptx::named_barrier_sync(1 + consumer, 128);@\n  }\n}",
        ";",
        "odd and added to",
    ),
    ("splitk_sm90.cuh", "cluster % p.clusters * Cfg::kSplits + rank", "rank", "shared"),
    ("splitk_sm90.cuh", "at * fewest + @min(at, longer)@", "0", "shared"),
    ("splitk_sm90.cuh", "fewest + @(at < longer)@", "0", "shared"),
    ("splitk_sm90.cuh", "tile = @cluster / p.clusters@, thread", "0", "shared"),
    ("splitk_sm90.cuh", "(@of_cluster * Cfg::kSplits@ + kSplit)", "0", "shared"),
    ("splitk_sm90.cuh", "of_cluster * Cfg::kSplits) + @kSplit@)", "0", "shared, odd"),
    ("splitk_sm90.cuh", "(tile * Cfg::kSplits + @kSplit@)", "0", "shared, odd"),
    ("splitk_sm90.cuh", "* kConsumers + @consumer@;\n    return", "0", "shared"),
    ("splitk_sm90.cuh", "* kConsumers + @consumer@;\n    const uint32_t before", "0", "shared"),
    ("splitk_sm90.cuh", "static_cast<uint32_t>(p.clusters - 1)", "1u", "shared"),
    ("splitk_sm90.cuh", "*counter = 0;", ";", "shared"),
    (
        "splitk_sm90.cuh",
        "@ptx::named_barrier_sync(1 + consumer, 128);@\n  if (!ptx::load_shared",
        ";",
        "shared",
    ),
    ("splitk_sm90.cuh", "sums(begin + v)[i] = 0;", ";", "shared"),
    ("splitk_sm90.cuh", "first = @0@; first < p.clusters", "1", "shared"),
    ("splitk_sm90.cuh", "first + i < @p.clusters@)", "p.clusters + 1", "shared"),
    (
        "splitk_sm90.cuh",
        "p.clusters + @first + i@)",
        "(cluster + first + i) % p.clusters",
        "shared in any order",
    ),
    ("prefill_epilogue_sm90.cuh", "__threadfence();", ";", "shared"),
    ("epilogue.cuh", "(@first@ + token * static_cast<uint32_t>(y_stride)", "0", "odd"),
    ("epilogue.cuh", "i < count && bias", "bias != nullptr", "odd and added to"),
    ("epilogue.cuh", "is_aligned16(p.y.data, p.y.stride)", "true", "unaligned"),
    ("epilogue.cuh", "@i < count@) out[i]", "true", "odd and added to"),
]


def fault_of(emulate, case, late):
    if case in CASES:
        shape, what = CASES[case]
        what = dict(late=late, falling=not late, **what)
        return faults(emulate, (1, 64, 3), *problem(*shape), **what)
    sharing, shape, what = SHARED_CASES[case]
    if case == "shared in any order":
        return differs_by_order(emulate, sharing, *shape, late)
    what = dict(late=late, falling=not late, **what)
    return faults_across(emulate, (1, 64, 4), sharing, *problem(*shape), **what)


def differs_by_order(emulate, sharing, tokens, rows, late):
    """Where y of clusters one after the other has other bits in rising and in falling order."""
    w, x = cancelling(tokens, rows, sharing, 4)
    what = dict(weight=BF16, clusters=sharing, late=late)
    rising, falling = (
        call(emulate, ACROSS[1, 64, 4], w, x, falling=falling, **what) for falling in (False, True)
    )
    return rising[0] or falling[0] or falling[1].differ(rising[1].y)


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_emulator_sees_mistakes(build, number):
    emulate, case = build.with_mistake(number), MISTAKES[number][-1]
    assert fault_of(emulate, case, late=True) or fault_of(emulate, case, late=False)


def test_without_mistakes_all_is_right(build):
    emulate = build.with_mistake(-1)
    cases = (*CASES, *SHARED_CASES)
    assert not any(fault_of(emulate, case, late) for case in cases for late in (True, False))
