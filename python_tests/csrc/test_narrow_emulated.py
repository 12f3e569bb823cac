"""The narrow kernel without a GPU: its source, run by narrow_emulator.cpp, against float64.

Addresses, fragments of wgmma.sp in registers, metadata, the widening, scales of groups, edges, both
rings, x shared by a cluster and parts of K; registers that stay as they are while wgmma reads them.
Not that the hardware does what the PTX ISA says.
"""

import pytest
import torch

from python_tests.csrc.emulated_linear import builder, call, configs, problem, wrong
from python_tests.linear_cases import PAIRS, random_input

F16, BF16 = torch.float16, torch.bfloat16
CONFIGS = {row[1:]: row[0] for row in configs("SK_NARROW_CONFIGS")}  # (tokens, rows, parts)
# (type of x, columns that share a scale of the metadata)
TYPES = [(F16, 0), (BF16, 64), (BF16, 128)]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """As `builder`, of narrow_emulator.cpp."""
    return builder("narrow_emulator.cpp", tmp_path_factory)


@pytest.mark.parametrize(
    "tokens, dtype, group",
    [(64, BF16, 128), (96, BF16, 128), *((tokens, *of) for tokens in (32, 128) for of in TYPES)],
    ids=str,
)
def test_exact_at_the_edges(build, tokens, dtype, group):
    """Less and more than a tile, in clusters that share x or K or both; both landing times."""
    for case, shape, freedoms in (
        ((1, 7, 4), (1, 1), dict(late=True)),
        ((tokens, 257, 132), (2, 1), dict(late=False, falling=True)),
        ((tokens - 9, 70, 520), (1, 2), dict(late=True, falling=True)),
    ):
        what = dict(weight="int4", group=group, **freedoms)
        assert not wrong(build(), CONFIGS[(tokens, *shape)], *problem(*case, dtype), **what)


@pytest.mark.parametrize("late, falling", [(True, False), (False, True)])
def test_clusters_of_both_kinds(build, late, falling):
    """More tokens than a tile, four CTAs: the last tile row is beyond the weight, the last part of
    K is shorter."""
    what = dict(weight="int4", group=128, late=late, falling=falling)
    assert not wrong(build(), CONFIGS[32, 2, 2], *problem(40, 600, 700), **what)
    assert not wrong(build(), CONFIGS[32, 4, 1], *problem(25, 300, 300), **what)
    assert not wrong(build(), CONFIGS[32, 1, 3], *problem(17, 65, 500), **what)


@pytest.mark.parametrize("late", [True, False])
def test_more_stages_than_the_rings(build, late):
    what = dict(weight="int4", group=64, late=late)
    assert not wrong(build(), CONFIGS[32, 1, 1], *problem(5, 67, 256 * 9 - 60), **what)


@pytest.mark.parametrize("dtype, group", TYPES, ids=str)
def test_every_value_in_every_place(build, dtype, group):
    """All codes, in every column of a tile and every row of a panel."""
    w = torch.zeros(64, 256)
    for row in range(64):
        for column in range(64):
            first, second = PAIRS[(row + column) % 6].tolist()
            w[row, 4 * column + first] = (row * 7 + column * 2) % 16 - 8
            w[row, 4 * column + second] = (row * 7 + column * 2 + 1) % 16 - 8
    for first in (0, 128):
        x = torch.eye(256, dtype=dtype)[first : first + 128]
        assert not wrong(build(), CONFIGS[128, 1, 1], w, x, weight="int4", group=group)


@pytest.mark.parametrize("dtype, group", TYPES, ids=str)
def test_epilogue(build, dtype, group):
    """The scale comes before the bias; aligned rows and others."""
    for out_features, shape in ((264, (1, 1)), (197, (1, 2))):
        w, x = problem(25, out_features, 132, dtype)
        bias = random_input((out_features,), dtype, seed=2, integers=True)
        residual = random_input((25, out_features), dtype, seed=3, integers=True)
        scale = 2.0 ** (torch.arange(out_features) % 3 - 1)
        what = dict(weight="int4", group=group, scale=scale, bias=bias, residual=residual)
        assert not wrong(build(), CONFIGS[(32, *shape)], w, x, activation="relu", **what)


def test_numbers_are_rounded_once(build, dtype=BF16):
    """Any float32 scale: level times scale as `weight.to(dtype)` has it, but for what lies near the
    middle of two numbers: the scale's low part has few bits."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(64, 2, generator=generator) * 0.1 + 1e-3
    w = torch.zeros(64, 256)
    w[:, 0::4] = torch.arange(64).float() % 7 + 1
    w[:, 1::4] = torch.arange(64).float() % 9 - 8
    exact = w.double() * scale.double().repeat_interleave(128, 1)
    for first in (0, 128):
        x = torch.eye(256, dtype=dtype)[first : first + 128]
        columns = slice(first, first + 128)
        what = dict(weight="int4", group=128, of_groups=scale)
        broken, output = call(build(), CONFIGS[128, 1, 1], w, x, **what)
        y = output.y
        assert not broken
        error = (y.double() - exact[:, columns].t()).abs()
        unit = torch.finfo(dtype).eps / 2
        bound = exact[:, columns].t().abs() * unit * (1 + 2**-7)
        assert bool((error <= bound).all())
        rounded = exact[:, columns].t().float().to(dtype)
        assert (y != rounded).float().mean() < 0.01


@pytest.mark.parametrize(
    "old, new",
    [
        ("ptx::mbarrier_wait(smem.full_x(x.stage), x.parity);", ""),
        ("ptx::wgmma_wait<1>();  // `odd` of the half before", ""),
        ("ptx::cluster_sync();  // all sums are there", ""),
        ("of[r % 2], step * 2 + r / 2", "of[r / 2], step * 2 + r % 2"),
    ],
)
def test_the_emulator_sees_mistakes(build, old, new):
    cases = [
        (CONFIGS[32, 1, 2], problem(17, 65, 256 * 5)),
        (CONFIGS[32, 1, 1], problem(9, 65, 256 * 5)),
    ]

    def found(emulate):
        what = dict(weight="int4", group=128)
        return any(
            wrong(emulate, config, *case, late=late, **what)
            for config, case in cases
            for late in (True, False)
        )

    assert found(build("narrow_sm90.cuh", old, new))
    assert not found(build()), "without the edit all is right"
