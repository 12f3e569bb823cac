"""The module sparsekern._C against its stub: the same functions with the same parameters, none with
more than six positional ones, and the tables of csrc as Python sees them."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from sparsekern import _native

ROOT = Path(__file__).resolve().parents[2]
STUB = ast.parse((ROOT / "sparsekern" / "_C.pyi").read_text())
FUNCTIONS = {node.name: node.args for node in STUB.body if isinstance(node, ast.FunctionDef)}
CONFIGS = (ROOT / "csrc/linear/configs.h").read_text()
TABLES = ("kernels.h", "configs.h")  # a column of the latter is called "split", too
MOST = 6


@pytest.fixture
def native():
    if not _native.available():
        pytest.skip(_native.reason())
    return _native.module()


def positional(arguments):
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]


def named(arguments):
    return [argument.arg for argument in arguments.kwonlyargs]


def parameters(function):
    """(positional, keyword-only) names by the function itself; pybind11 writes its own doc."""
    if line := re.match(rf"{function.__name__}\((.*)\) -> ", function.__doc__ or ""):
        names = [part.split(":")[0] for part in line.group(1).split(", ") if part]
        return names, []
    kinds = inspect.signature(function).parameters.values()
    by_name = [p.name for p in kinds if p.kind is p.KEYWORD_ONLY]
    return [p.name for p in kinds if p.kind is not p.KEYWORD_ONLY], by_name


def test_the_stub_has_no_call_with_more_than_six_positional_arguments():
    methods = {
        f"{node.name}.{method.name}": method.args
        for node in STUB.body
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }
    assert "Linear.__call__" in methods and "cusparselt_matmul" in FUNCTIONS
    for name, arguments in {**FUNCTIONS, **methods}.items():
        assert len(positional(arguments)) <= MOST, name
        assert arguments.vararg is None and arguments.kwarg is None, name


def test_the_module_has_what_the_stub_says_and_nothing_else(native):
    functions = {n for n in vars(native) if callable(getattr(native, n)) and n != "Linear"}
    assert {name for name in functions if not name.startswith("_")} == set(FUNCTIONS)
    constants = {n.target.id for n in STUB.body if isinstance(n, ast.AnnAssign)}
    assert all(isinstance(getattr(native, name), int) for name in constants)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_take_the_parameters_of_the_stub(native, name):
    by_position, by_name = parameters(getattr(native, name))
    assert len(by_position) <= MOST
    assert by_name == named(FUNCTIONS[name])
    wanted = positional(FUNCTIONS[name])
    assert len(by_position) == len(wanted)
    assert by_position == wanted or all(p.startswith("arg") for p in by_position)


@pytest.mark.parametrize("name", sorted(n for n in FUNCTIONS if FUNCTIONS[n].kwonlyargs))
def test_named_functions_refuse_positions_and_gaps(native, name):
    function, names = getattr(native, name), named(FUNCTIONS[name])
    with pytest.raises(TypeError, match=f"{name}: expected keyword arguments alone"):
        function(*range(len(names)))
    for missing in names:
        rest = dict.fromkeys((n for n in names if n != missing), 0)
        with pytest.raises(TypeError, match=f"{name}: expected the keyword argument {missing}"):
            function(**rest)
    kinds = {argument.arg: argument.annotation.id for argument in FUNCTIONS[name].kwonlyargs}
    for wrong in names:
        bad = "0.5" if kinds[wrong] == "float" else 0.5
        with pytest.raises(TypeError, match=rf"{name}: expected {wrong} as .*, got '?0\.5"):
            function(**{n: bad if n == wrong else n == "relu" for n in names})


def test_kernels_are_the_rows_of_configs_h(native):
    columns = dict(
        decode=("index", "rows", "split", "paired"),
        decode_gated=("index", "rows", "split", "paired"),
        prefill=(
            *("index", "rows", "tokens", "cluster_rows", "cluster_tokens", "streamed", "promoted"),
        ),
        split=("index", "rows", "tokens", "split", "across"),
        narrow=("index", "rows", "tokens", "cluster_rows", "split"),
        mma=("index", "rows", "tokens", "warps_rows", "warps_tokens", "split", "stages"),
        naive=("index", "rows", "tokens"),
    )
    row_unit = dict(decode=64, prefill=128, split=128, mma=1, naive=1)
    kernels = native.kernels()
    assert list(kernels) == [*columns]
    for kernel, names in columns.items():
        listed_as = kernel.removesuffix("_gated").upper()
        table = re.search(rf"#define SK_{listed_as}_CONFIGS\(X\)(.*?)\n\n", CONFIGS, re.S)
        rows = [
            list(map(int, re.findall(r"\d+", r))) for r in re.findall(r"X\(([\d, ]+)\)", table[1])
        ]
        assert rows and [row[0] for row in rows] == list(range(len(rows)))
        for row in rows:
            if kernel == "narrow":
                row.insert(1, 256)
            else:
                row[1] *= row_unit[listed_as.lower()]
        listed = [{k: v for k, v in row.items() if k != "types"} for row in kernels[kernel]]
        assert listed == [dict(zip(names, row, strict=True)) for row in rows]
    assert all(type(row["streamed"]) is bool for row in kernels["prefill"])
    assert all(type(row["across"]) is bool for row in kernels["split"])
    (first,) = re.findall(r"#define SK_SPLIT_ACROSS (\d+)", CONFIGS)
    assert [row["index"] for row in kernels["split"] if row["across"]][0] == int(first)
    assert all(row["across"] for row in kernels["split"][int(first) :])


def test_which_types_a_config_takes(native):
    """Of the weight, x and y. Promoted tiles are for e4m3 alone; the first rows for all types."""
    halves, eight = ("float16", "bfloat16"), ("float8_e4m3fn", "int8")
    plain = {(y, y, y) for y in halves}
    w8a8, w8a16 = (
        {(w, w, y) for w in eight for y in halves},
        {(w, y, y) for w in eight for y in halves},
    )
    taken = dict(
        decode=plain | w8a16,
        decode_gated=plain,
        prefill=plain | w8a8,
        split=plain | w8a8,
        naive=plain | w8a8,
    )
    taken["mma"] = plain | w8a8
    taken["narrow"] = {("int4", y, y) for y in halves}
    taken["decode"] |= taken["narrow"]
    limits = dict(re.findall(r"#define (SK_\w+) (\d+) +//", CONFIGS))
    first = {("mma", True): "SK_MMA_BOTH", ("split", True): "SK_SPLIT_BOTH"}
    first[("decode", True)] = "SK_DECODE_NARROW"
    first[("decode_gated", False)] = "SK_DECODE_GATED"
    kernels = native.kernels()
    for kernel, types in taken.items():
        for row in kernels[kernel]:
            fits = {(w, x, y) for w, x, y in types if not row.get("promoted") or w == eight[0]}
            for narrow in (True, False):
                limit = first.get((kernel, narrow))
                if limit and row["index"] >= int(limits[limit]):
                    fits = {of for of in fits if (of[0] not in halves) != narrow}
            assert fits == set(row["types"]), (kernel, row)


def test_a_kernel_without_a_gpu_says_so(native):
    """With one, a launch that is empty does nothing."""
    of = native.Linear(
        kernel="mma",
        config=0,
        tokens=0,
        out_features=64,
        in_features=64,
        x_stride=64,
        y_stride=64,
        dtype="bfloat16",
    )
    call = dict(x=0, values=0, metadata=0, y=0, stream=0)
    if native.device_count():
        assert of(**call) is None
    else:
        with pytest.raises(RuntimeError, match=r"^sparsekern\.linear: cudaGetDevice.* failed"):
            of(**call)


def test_an_unknown_plan_of_cusparselt_is_told(native):
    missing = native.cusparselt_matmul(2**64 - 1, 0, 0, 0, 0, 0)
    assert missing == native.CUSPARSELT_UNKNOWN_PLAN


def test_the_config_of_a_gated_pair():
    """The split doubles up to 96 thread blocks; half the rows where a split of 2 is few."""
    if not _native.available():
        pytest.skip(_native.reason())
    from sparsekern.backends.cuda.native import _indices, gated_config

    _indices.cache_clear()  # other tests ask it about modules of their own
    gated_config.cache_clear()
    rows = _native.module().kernels()["decode_gated"]

    def chosen(out_features, in_features):
        row = rows[gated_config(out_features, in_features)]
        assert row["index"] == gated_config(out_features, in_features)
        return row["rows"], row["split"]

    assert chosen(256, 64) == (256, 1)  # one column tile cannot be split
    assert chosen(256, 64 * 8) == (256, 4)
    assert chosen(256, 64 * 16) == (256, 8)
    assert chosen(4096, 4096) == (256, 4)  # 16 groups, 64 blocks
    assert chosen(8192, 8192) == (128, 2)  # 32 groups, 64 blocks
    assert chosen(14336, 4096) == (256, 1)  # 56 groups: 112 blocks would be too many
    assert chosen(64, 0) == (256, 1)


def test_element_types_stand_in_one_table():
    """No other file of csrc chooses by an element type's name."""
    kept = ("core/dtype.h", "core/dtype.cuh", "ptx/wgmma_sp.cuh")
    # An instruction for each of the two 16-bit types: the larger number. Types of x.
    kept += ("activations/quantize_rows.cuh", "activations/quantize_rows.cu")
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cuh", ".cu", ".cpp"):
            continue
        name = str(path.relative_to(ROOT / "csrc"))
        if name in kept or name.startswith("linear/instantiate/"):
            continue
        found = re.findall(r"kBFloat16|kFloat16|__nv_bfloat16|__half\b", path.read_text())
        assert found == [], name


def test_kernels_are_named_in_their_table_alone():
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp") and path.name not in TABLES:
            found = re.findall(
                r'"(?:decode|decode_gated|prefill|split|mma|naive)"', path.read_text()
            )
            assert found == [], path
