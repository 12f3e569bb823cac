"""sparsekern._C.Linear: what a launcher is given, and what is refused, by name.

On a probe (linear_probe.cpp): the type as it is, over kernels that say what they were given.
"""

import gc
import inspect
import sys
import timeit

import pytest

from python_tests.csrc.building import build_probe

FIXED = dict(
    kernel="prefill",
    config=3,
    tokens=5,
    out_features=640,
    in_features=2**31 - 1,
    x_stride=2**40,
    y_stride=648,
    residual_stride=2**41,
    dtype="bfloat16",
    activation="gelu",
)
ADDRESSES = dict(x=2**63 + 16, values=2, metadata=3, y=4, stream=5)
OPTIONAL = dict(bias=6, residual=7, workspace=8)
KERNELS = ("decode", "decode_gated", "prefill", "split", "narrow", "mma", "naive")
WEIGHTS = {"narrow": "int4"}  # of kernels that have none of 16 bits
GATED = 5  # SK_DECODE_GATED of csrc/linear/configs.h


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    source = "linear/linear_type.cpp"
    return build_probe(folder, "linear_probe", source, cuda=True, optimize="-O2")


def linear(probe, **changes):
    return probe.Linear(**{**FIXED, **changes})


# ---- what arrives --------------------------------------------------------------------------------


def test_every_field_arrives_in_its_place(probe):
    assert linear(probe)(**ADDRESSES, **OPTIONAL) is None
    nothing = dict(up_values=0, up_metadata=0, channel_scale=0, token_scale=0)
    types = dict(
        weight_dtype="bfloat16", x_dtype="bfloat16", launched=("bfloat16",) * 3, scale_group=0
    )
    expected = {**FIXED, **ADDRESSES, **OPTIONAL, **nothing, **types, "activation": 2}
    assert probe.last_launch() == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_named_kernel_is_launched_with_the_named_config_and_types(probe, kernel):
    up = dict(up_values=9, up_metadata=10) if kernel == "decode_gated" else {}
    for row in probe.kernels()[kernel]:
        plain = {("float16",) * 3, ("bfloat16",) * 3}
        missing = row.get("promoted") or kernel == "decode_gated" and row["index"] >= GATED
        missing = missing or kernel in WEIGHTS
        assert plain.isdisjoint(row["types"]) if missing else plain <= {*row["types"]}
        for types in row["types"]:
            names = dict(zip(("weight_dtype", "x_dtype", "dtype"), types, strict=True))
            of = linear(probe, kernel=kernel, config=row["index"], activation=None, **names)
            of(**ADDRESSES, **up)
            seen = probe.last_launch()
            assert (seen["kernel"], seen["config"]) == (kernel, row["index"])
            assert seen["launched"] == types
            assert {name: seen[name] for name in (*names, *up)} == {**names, **up}


EIGHT = ("float8_e4m3fn", "int8")


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_belong_to_the_operands_of_8_bits(probe, kernel, dtype):
    up = dict(up_values=9, up_metadata=10) if kernel == "decode_gated" else {}
    for row in probe.kernels()[kernel]:
        for weight, x, y in row["types"]:
            if weight != dtype:
                continue
            names = dict(weight_dtype=weight, x_dtype=x, dtype=y)
            of = linear(probe, kernel=kernel, config=row["index"], activation=None, **names)
            of(**ADDRESSES, **up, channel_scale=11)
            assert probe.last_launch()["channel_scale"] == 11
            if x in EIGHT:
                of(**ADDRESSES, **up, token_scale=12)
                assert probe.last_launch()["token_scale"] == 12
            elif kernel != "naive":
                with pytest.raises(ValueError, match="expected token_scale 0 with kernel"):
                    of(**ADDRESSES, **up, token_scale=12)


def test_the_naive_kernel_takes_8_bit_weights_with_8_bit_x(probe):
    (row,) = probe.kernels()["naive"]
    eight = {(dtype, dtype, y) for dtype in EIGHT for y in ("float16", "bfloat16")}
    assert eight <= set(row["types"])


def test_scales_arrive_at_the_kernel_that_has_them(probe):
    linear(probe, kernel="naive", config=0)(**ADDRESSES, channel_scale=11, token_scale=12)
    seen = probe.last_launch()
    assert (seen["channel_scale"], seen["token_scale"]) == (11, 12)


def test_what_is_left_out_is_null_again(probe):
    of = linear(probe)
    of(**ADDRESSES, **OPTIONAL)
    of(**ADDRESSES)
    assert [probe.last_launch()[name] for name in OPTIONAL] == [0, 0, 0]


def test_call_sites_with_other_names_take_turns(probe):
    of = linear(probe)
    for number in range(20):
        of(x=number + 1, values=2, metadata=3, y=4, stream=0)
        assert (probe.last_launch()["x"], probe.last_launch()["bias"]) == (number + 1, 0)
        of(bias=number, stream=1, y=5, metadata=6, values=7, x=8)
        assert [probe.last_launch()[name] for name in ("x", "y", "bias")] == [8, 5, number]


def test_activations_and_defaults(probe):
    of = probe.Linear(**{k: v for k, v in FIXED.items() if k not in ("residual_stride",)})
    of(**ADDRESSES)
    assert probe.last_launch()["residual_stride"] == 0
    for number, activation in enumerate((None, "relu", "gelu", "silu")):
        linear(probe, activation=activation, weight_dtype="bfloat16")(**ADDRESSES)
        assert probe.last_launch()["activation"] == number


def test_needs_workspace(probe):
    """The prefill kernel, and the split kernel across clusters."""
    needs = {
        kernel: linear(
            probe, kernel=kernel, config=0, activation=None, weight_dtype=WEIGHTS.get(kernel)
        )
        for kernel in KERNELS
    }
    assert [kernel for kernel, of in needs.items() if of.needs_workspace] == ["prefill"]
    for row in probe.kernels()["split"]:
        of = linear(probe, kernel="split", config=row["index"], activation=None)
        assert of.needs_workspace == row["across"]
    with pytest.raises(AttributeError):
        needs["mma"].needs_workspace = True
    linear(probe, kernel="mma", config=0)(**ADDRESSES, workspace=8)  # left alone


def test_the_workspace_has_counters_and_a_tile_of_sums_per_multiprocessor(probe):
    tile = 256 * 224 * 4
    assert probe.prefill_workspace_bytes() == probe.PREFILL_COUNTER_BYTES + 132 * tile


def test_the_signature_is_that_of_the_stub(probe):
    parameters = inspect.signature(probe.Linear).parameters
    added = {"weight_dtype", "x_dtype", "scale_group", "stored_dtype"}
    assert set(parameters) == {*FIXED, *added}
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    optional = {name for name, p in parameters.items() if p.default is not p.empty}
    assert optional == {"residual_stride", "activation", *added}


# ---- a weight that is widened first --------------------------------------------------------------


WIDE = dict(out_features=70, in_features=132, x_stride=136)  # of 2 x 3 tiles


@pytest.mark.parametrize("kernel", ["prefill", "split", "mma", "naive", "decode"])
@pytest.mark.parametrize("stored, group", [("float8_e4m3fn", 0), ("int8", 0), ("int4", 128)])
def test_a_narrow_weight_is_widened_before_the_kernel_reads_it(probe, kernel, stored, group):
    more = dict(stored_dtype=stored, scale_group=group, config=0, activation=None)
    of = linear(probe, kernel=kernel, **WIDE, **more)
    assert of.widened_bytes == 6 * (4096 + 512)
    of(**ADDRESSES, bias=6, channel_scale=11, widened=2**20)
    assert probe.last_widened() == {
        "out_features": 70,
        "in_features": 132,
        "from": stored,
        "to": "bfloat16",
        "scale_group": group,
        "values": ADDRESSES["values"],
        "metadata": ADDRESSES["metadata"],
        "channel_scale": 11,
        "widened": 2**20,
    }
    seen = probe.last_launch()
    assert seen["launched"] == ("bfloat16",) * 3 and seen["bias"] == 6
    assert (seen["values"], seen["metadata"]) == (2**20, 2**20 + 6 * 4096)
    assert seen["channel_scale"] == 0, "the numbers have their scales"
    linear(probe)(**ADDRESSES)
    assert probe.last_widened() == {}


def test_nothing_is_widened_for_no_tokens(probe):
    linear(probe)(**ADDRESSES)
    of = linear(probe, **WIDE, stored_dtype="int8")
    of(**ADDRESSES, widened=2**20)
    assert probe.last_widened()
    linear(probe)(**ADDRESSES)
    none = linear(probe, **{**WIDE, "tokens": 0}, stored_dtype="int8")
    none(**ADDRESSES)
    assert probe.last_widened() == {}


def test_widening_needs_its_memory_and_nothing_else_takes_it(probe):
    of = linear(probe, **WIDE, stored_dtype="int4")
    with pytest.raises(ValueError, match="expected an address as widened of kernel 'prefill', got"):
        of(**ADDRESSES)
    plain = linear(probe)
    assert plain.widened_bytes == 0
    with pytest.raises(ValueError, match="expected widened 0 with kernel 'prefill'"):
        plain(**ADDRESSES, widened=16)


@pytest.mark.parametrize(
    "changes",
    [
        dict(stored_dtype="float16"),
        dict(stored_dtype="bfloat16", weight_dtype="int8", x_dtype="int8"),
        dict(stored_dtype="int4", weight_dtype="int8", x_dtype="int8"),
        dict(stored_dtype="int8", kernel="decode_gated", config=0, activation=None),
    ],
)
def test_what_cannot_be_widened(probe, changes):
    with pytest.raises(ValueError, match="Linear: expected stored_dtype None, or of 8 or 4 bits"):
        linear(probe, **changes)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(kernel="decod"), "expected kernel to be one of 'decode', .*got 'decod'. See"),
        (dict(config=-1), "expected a config index below 20 with kernel 'prefill', got -1. See"),
        (dict(config=20), "expected a config index below 20 with kernel 'prefill', got 20. See"),
        (dict(kernel="naive", config=1), "expected a config index below 1 with kernel 'naive'"),
        (dict(dtype="float32"), "expected dtype to be one of 'float16', .*, got 'float32'"),
        (dict(weight_dtype="int9"), "expected weight_dtype to be one of .*got 'int9'"),
        (dict(x_dtype="int9"), "expected x_dtype to be one of .*got 'int9'"),
        (
            dict(weight_dtype="float16"),
            r"expected \(weight_dtype, x_dtype, dtype\) of kernel 'prefill' to be one of "
            r"\(float16, float16, float16\), .*, got \(float16, bfloat16, bfloat16\). Convert",
        ),
        (
            dict(kernel="naive", config=0, weight_dtype="int8", x_dtype="float8_e4m3fn"),
            r"expected .* of kernel 'naive' .*, got \(int8, float8_e4m3fn, bfloat16\)",
        ),
        (
            dict(dtype="int8"),
            r"expected .* of kernel 'prefill' .*, got \(int8, int8, int8\)",
        ),
        (dict(activation="tanh"), "expected activation to be None or one of 'relu', .*got 'tanh'"),
        (dict(tokens=-1), r"expected tokens >= 0 \(0\), got -1"),
        (dict(out_features=-1), r"expected out_features >= 0 \(0\), got -1"),
        (dict(in_features=-1), r"expected in_features >= 0 \(0\), got -1"),
        (dict(x_stride=-1), r"expected x_stride >= 0 \(0\), got -1"),
        (dict(y_stride=-1), r"expected y_stride >= 0 \(0\), got -1"),
        (dict(residual_stride=-1), r"expected residual_stride >= 0 \(0\), got -1"),
        (dict(kernel="decode", tokens=65), r"expected tokens <= max_tokens \(64\), got 65. Use"),
        (dict(kernel="decode_gated", tokens=33), r"expected tokens <= max_tokens \(32\), got 33"),
        (dict(kernel="decode_gated"), "expected activation None with kernel 'decode_gated'"),
    ],
)
def test_a_fixed_part_that_no_kernel_takes_is_a_value_error(probe, changes, text):
    with pytest.raises(ValueError, match=f"^sparsekern._C.Linear: {text}"):
        linear(probe, **changes)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(kernel=3), "expected kernel as a str, got 3"),
        (dict(dtype=0), "expected dtype as a str, got 0"),
        (dict(activation=1), "expected activation as a str, got 1"),
        (dict(tokens=2**31), "expected tokens as a signed integer of 32 bits, got 2147483648"),
        (dict(config=1.0), "expected config as a signed integer of 32 bits, got 1.0"),
        (dict(x_stride=2**63), "expected x_stride as a signed integer of 64 bits"),
        (dict(stride=1), "expected known keyword arguments, got 'stride'"),
    ],
)
def test_a_fixed_part_of_other_types_is_a_type_error(probe, changes, text):
    with pytest.raises(TypeError, match=f"^sparsekern._C.Linear: {text}"):
        linear(probe, **changes)


@pytest.mark.parametrize("name", [name for name in FIXED if name != "residual_stride"])
def test_a_missing_part_is_named(probe, name):
    rest = {key: value for key, value in FIXED.items() if key != name}
    if name == "activation":
        probe.Linear(**rest)
        return
    with pytest.raises(TypeError, match=f"expected the keyword argument {name}, got none"):
        probe.Linear(**rest)


def test_positional_arguments_are_refused(probe):
    with pytest.raises(TypeError, match="expected keyword arguments alone, got 2 positional"):
        probe.Linear("prefill", 3)
    with pytest.raises(TypeError, match="expected keyword arguments alone, got 1 positional"):
        linear(probe)(1, values=2)


@pytest.mark.parametrize("name", list(ADDRESSES))
def test_a_missing_address_is_named(probe, name):
    rest = {key: value for key, value in ADDRESSES.items() if key != name}
    with pytest.raises(TypeError, match=f"Linear: expected the keyword argument {name}, got none"):
        linear(probe)(**rest)
    if name == "stream":  # the default stream
        linear(probe)(**rest, stream=0)
        return
    with pytest.raises(ValueError, match=f"expected an address as {name} of kernel 'prefill', got"):
        linear(probe)(**{**ADDRESSES, name: 0})
    for size in ("tokens", "out_features", "in_features"):  # an empty tensor has no address
        linear(probe, **{size: 0})(**{**ADDRESSES, name: 0})


def test_addresses_of_other_types_are_refused_by_name(probe):
    for value in (-1, 2**64, 1.5, None, "1"):
        with pytest.raises(TypeError) as caught:
            linear(probe)(**{**ADDRESSES, "bias": value})
        expected = f"expected bias as an unsigned integer of 64 bits, got {value!r}. See"
        assert str(caught.value).startswith(f"sparsekern._C.Linear: {expected}")
        assert caught.value.__context__ is None
    with pytest.raises(TypeError, match="expected known keyword arguments, got 'biases'"):
        linear(probe)(**ADDRESSES, biases=1)


@pytest.mark.parametrize(
    "kernel, operands",
    [
        (kernel, ("channel_scale", "token_scale"))
        for kernel in KERNELS
        if kernel not in ("naive", *WEIGHTS)
    ]
    + [(kernel, ("token_scale",)) for kernel in WEIGHTS]
    + [(kernel, ("up_values", "up_metadata")) for kernel in KERNELS if kernel != "decode_gated"]
    + [("decode_gated", ("bias", "residual"))],
)
def test_an_operand_that_a_kernel_does_not_have_is_never_ignored(probe, kernel, operands):
    weight = WEIGHTS.get(kernel)
    of = linear(probe, kernel=kernel, config=0, activation=None, weight_dtype=weight)
    up = dict(up_values=1, up_metadata=1) if kernel == "decode_gated" else {}
    for operand in operands:
        with pytest.raises(ValueError, match=f"expected {operand} 0 with kernel '{kernel}', which"):
            of(**ADDRESSES, **{**up, operand: 16})
        of(**ADDRESSES, **{**up, operand: 0})


def test_a_gated_kernel_needs_both_weights(probe):
    of = linear(probe, kernel="decode_gated", config=0, activation=None)
    for given in (dict(), dict(up_values=1), dict(up_metadata=1)):
        with pytest.raises(ValueError, match="expected an address as up_.* of kernel 'decode_gat"):
            of(**ADDRESSES, **given)


def test_a_status_of_the_launcher_becomes_an_exception(probe):
    with pytest.raises(NotImplementedError, match="^63 tokens$"):
        linear(probe, tokens=63)(**ADDRESSES)


# ---- the type ------------------------------------------------------------------------------------


def test_the_type_is_final_and_its_objects_are_freed(probe):
    with pytest.raises(TypeError):
        type("Mine", (probe.Linear,), {})
    with pytest.raises(TypeError):
        probe.Linear.__call__ = None
    names = dict.fromkeys(["x", "values", "metadata", "y", "stream"], 1)
    gc.collect()
    before = sys.getrefcount(probe.Linear)
    for _ in range(100):
        linear(probe)(**names)
        with pytest.raises(ValueError, match="config"):
            linear(probe, config=99)
    gc.collect()
    assert sys.getrefcount(probe.Linear) <= before + 2


def test_a_call_by_name_costs_less_than_pybind11_with_positional_integers(probe):
    """Names are compared as one pointer: a call costs what its addresses cost."""
    of, pointer = linear(probe, kernel="decode", config=0, activation=None), 140_000_000_000_000

    def named():
        of(x=pointer, values=pointer, metadata=pointer, y=pointer, stream=pointer, bias=pointer)

    def positional():
        probe.by_pybind11(
            pointer, pointer, pointer, pointer, 0, pointer, 1, 4096, 4096, 4096, 4096, 0, 1, 0, 1, 5
        )

    probe.record(False)
    times = {named: [], positional: []}
    for _ in range(15):
        for call, seen in times.items():
            seen.append(timeit.timeit(call, number=2000))
    probe.record(True)
    assert min(times[named]) < min(times[positional])
