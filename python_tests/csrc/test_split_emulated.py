"""The split kernel without a GPU: its source, run by split_emulator.cpp, against float64.

Addresses, descriptors of wgmma.sp, metadata, edges, the ring of stages, sums that a cluster
exchanges, both ways to y and how wide its stores are; not that the hardware does what the PTX ISA
says.
"""

import pytest
import torch

from python_tests.csrc.emulated_linear import (
    builder,
    configs,
    ends_on_16_bytes,
    problem,
    reaches_y,
    wide_stores,
    wrong,
)
from python_tests.csrc.staged_cases import patterns, scalings, silu_is_rounded_once, ways_to_y
from python_tests.linear_cases import random_input

F16, BF16 = torch.float16, torch.bfloat16
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
CONFIGS = {row[1:]: row[0] for row in configs("SK_SPLIT_CONFIGS")}  # (panels, tokens, split)
# What split_emulator.cpp compiles.
TYPES = [
    *((BF16, of) for of in ((1, 64, 1), (1, 64, 3), (1, 64, 6), (1, 96, 2), (1, 128, 3))),
    *((BF16, of) for of in ((2, 64, 1), (2, 96, 2), (2, 128, 2))),
    *((F16, of) for of in ((1, 64, 2), (2, 128, 1))),
]
BYTES = [(E4M3, BF16, (1, 64, 3)), (INT8, F16, (2, 96, 2))]
HEADERS = ("core/device.h", "core/tensor_map.h")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """As `builder`, of split_emulator.cpp."""
    return builder("split_emulator.cpp", tmp_path_factory, MISTAKES, HEADERS)


def faults(emulate, of, w, x, dtype=None, **what):
    """What is wrong with y, in words, or with the number of its stores of 16 bytes."""
    what = dict(weight=x.dtype, dtype=dtype, clusters=1, **what)
    found, y_shape = wrong(emulate, CONFIGS[of], w, x, **what), (x.shape[0], w.shape[0])
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
EPILOGUE = "prefill_epilogue_sm90.cuh"
MISTAKES = [
    # (file of csrc/linear, in its source, instead, which of CASES shows it)
    ("splitk_sm90.cuh", "min(token + p.column_tokens, p.tokens)", "p.tokens", "odd"),
    ("splitk_sm90.cuh", "k * (rank + 1) / Cfg::kSplits", "(k * (rank + 1) / 3 - rank / 2)", "odd"),
    ("splitk_sm90.cuh", "column_tokens * 128", "Cfg::kXBytes", "odd"),
    ("splitk_sm90.cuh", "ptx::wait_for_predecessor();", ";", "odd"),
    ("splitk_sm90.cuh", "after - 1", "0", "odd"),
    (
        "splitk_sm90.cuh",
        "@ptx::cluster_wait();\n"
        "    scatter_sums<Cfg>(d, smem, rank, part.token_end - part.token);@",
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
    ("epilogue.cuh", "(@first@ + token * static_cast<uint32_t>(y_stride)", "0", "odd"),
    ("epilogue.cuh", "i < count && bias", "bias != nullptr", "odd and added to"),
    ("epilogue.cuh", "is_aligned16(p.y.data, p.y.stride)", "true", "unaligned"),
    ("epilogue.cuh", "@i < count@) out[i]", "true", "odd and added to"),
]


def fault_of(emulate, case, late):
    shape, what = CASES[case]
    what = dict(late=late, falling=not late, **what)
    return faults(emulate, (1, 64, 3), *problem(*shape), **what)


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_emulator_sees_mistakes(build, number):
    emulate, case = build.with_mistake(number), MISTAKES[number][-1]
    assert fault_of(emulate, case, late=True) or fault_of(emulate, case, late=False)


def test_without_mistakes_all_is_right(build):
    emulate = build.with_mistake(-1)
    assert not any(fault_of(emulate, case, late) for case in CASES for late in (True, False))
