"""Rules of the house that no single module can break alone: layering, types, tables, docstrings."""

import ast
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import sparsekern as sk

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparsekern"
MODULES = sorted(PACKAGE.rglob("*.py"))
README_BYTES = 14 * 1024


def name_of(path):
    """Path from the root, as text."""
    return str(path.relative_to(ROOT))


def run(*command, cwd=ROOT):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


# ------------------------------------------------------------------------------------------------
# layering


def test_imports_point_down_and_go_in_no_circle():
    """The contracts in pyproject.toml; imports inside functions count."""
    pytest.importorskip("importlinter", reason="needs import-linter (make lint installs it)")
    tool = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
    tool = tool or shutil.which("lint-imports") or pytest.skip("no lint-imports on PATH")
    code, output = run(tool, "--no-logo", "--no-cache", "pyproject.toml")
    assert code == 0, output


def test_the_contract_sees_an_upward_import(tmp_path):
    """The same contract on a package that breaks it, so that it is known to fail."""
    pytest.importorskip("importlinter", reason="needs import-linter (make lint installs it)")
    tool = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
    tool = tool or shutil.which("lint-imports") or pytest.skip("no lint-imports on PATH")
    config = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(config[config.index("[tool.importlinter]") :])
    package = tmp_path / "sparsekern"
    layers = config.split("\nlayers = [")[1].split("\n]")[0]
    floors = re.findall(r"\"(.*)\"", layers)
    names = [name for floor in floors for name in re.findall(r"\w+", floor)]
    assert names[0] == "cli" and names[-1] == "utils"
    for name in names:
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    command = (tool, "--no-logo", "--no-cache", "pyproject.toml")
    assert run(*command, cwd=tmp_path)[0] == 0
    lazy = "def f():\n    from sparsekern.ops import linear\n"
    (package / "formats" / "__init__.py").write_text(lazy)
    (package / "ops" / "linear.py").touch()
    code, output = run(*command, cwd=tmp_path)
    assert code == 1 and "sparsekern.formats -> sparsekern.ops.linear" in output
    (package / "formats" / "__init__.py").write_text("")
    (package / "novel.py").touch()
    code, output = run(*command, cwd=tmp_path)
    assert code == 1 and "novel" in output


IMPORTED = """
import sys
import sparsekern
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_importing_the_package_loads_nothing_heavy():
    """torch, numpy, tqdm and safetensors are needed; the rest is loaded by who uses it."""
    code, output = run(sys.executable, "-c", IMPORTED)
    assert code == 0, output
    heavy = {"transformers", "tokenizers", "triton", "gguf", "datasets", "matplotlib", "pytest"}
    alone = run(sys.executable, "-c", IMPORTED.replace("import sparsekern", "import torch"))[1]
    assert heavy & set(output.split()) <= set(alone.split())
    assert "torch" in output.split()


# ------------------------------------------------------------------------------------------------
# types


def test_a_users_script_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy (make lint installs it)")
    code, output = run(sys.executable, "-m", "mypy", "python_tests/typing_user.py")
    assert code == 0, output
    script = (ROOT / "python_tests/typing_user.py").read_text()
    used = set(re.findall(r"\bsk\.(\w+)", script))
    assert used >= set(sk.__all__), f"not in typing_user.py: {set(sk.__all__) - used}"


def public():
    """(name, function) of all that sparsekern.__all__ and sparsekern.prune.__all__ offer."""
    for prefix, module in (("sparsekern", sk), ("sparsekern.prune", sk.prune)):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield f"{prefix}.{name}", thing
            elif inspect.isclass(thing) and thing.__module__.startswith("sparsekern"):
                for method, function in vars(thing).items():
                    function = getattr(function, "__func__", function)
                    wanted = method == "__init__" or not method.startswith("_")
                    own = getattr(function, "__qualname__", "") == f"{name}.{method}"
                    if wanted and own and inspect.isfunction(function):
                        yield f"{prefix}.{name}.{method}", function


def test_every_public_function_is_annotated():
    missing = []
    for name, function in public():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in ("self", "cls") and parameter.annotation is parameter.empty:
                missing.append(f"{name}({parameter.name})")
        if "return" not in function.__annotations__:
            missing.append(f"{name} ->")
    assert missing == []


# What a base class or the class itself documents, and what its name says.
PLAIN = (".__init__", ".extra_repr", ".cpu", ".cuda", ".clone", ".detach")


def test_every_public_function_says_what_it_does():
    assert [n for n, function in public() if not function.__doc__ and not n.endswith(PLAIN)] == []


# ------------------------------------------------------------------------------------------------
# one table of element types

DTYPE = re.compile(r"float16|bfloat16|float32|float64|half|double|float8_\w+|float4_\w+")
TABLES = {
    "sparsekern/formats/dtypes.py",
    "sparsekern/utils/safetensors_io.py",  # what the safetensors format calls torch's dtypes
}


def dtype_tables(tree):
    """Lines of literals that list two or more floating-point dtypes of torch."""
    for node in ast.walk(tree):
        columns = []
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            columns = [node.elts]
        elif isinstance(node, ast.Dict):
            columns = [node.keys, node.values]
        for column in columns:
            names = [entry.attr for entry in column if _is_of_torch(entry)]
            if sum(bool(DTYPE.fullmatch(name)) for name in names) >= 2:
                yield node.lineno


def _is_of_torch(node):
    is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return is_attribute and node.value.id == "torch"


def test_dtypes_are_listed_in_one_place():
    found = [
        f"{name_of(path)}:{line}"
        for path in MODULES
        if name_of(path) not in TABLES
        for line in dtype_tables(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text, lines",
    [
        ("A = {torch.float16: 1, torch.bfloat16: 2}", [1]),
        ("A = {'F16': torch.float16, 'BF16': torch.bfloat16}", [1]),
        ("x = 1\nif d in (torch.float32, torch.float16, torch.bfloat16):\n    pass", [2]),
        ("A = (torch.uint8, torch.int8)", []),
        ("f(torch.float32, torch.float16)", []),
    ],
)
def test_the_search_finds_tables_of_dtypes(text, lines):
    assert list(dtype_tables(ast.parse(text))) == lines


FLOATS = "ones zeros empty full eye rand randn linspace".split()
MAKERS = {
    "dtype": {f"torch.{name}" for name in FLOATS},
    "device": {f"torch.{name}" for name in (*FLOATS, "arange", "tensor", "randperm", "randint")},
}
# The specification, and vLLM's loader, which builds layers on the default device.
ON_THE_DEFAULT_DEVICE = {"sparsekern/reference.py", "sparsekern/integrations/_vllm_method.py"}


@pytest.mark.parametrize("option", ["dtype", "device"])
def test_new_tensors_do_not_follow_torchs_defaults(option):
    """torch.set_default_dtype and set_default_device are the caller's."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        if option == "dtype" or name_of(path) not in ON_THE_DEFAULT_DEVICE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in MAKERS[option]
        and not {option, None} & {keyword.arg for keyword in node.keywords}
    ]
    assert found == []


def test_cpp_decides_by_dtype_in_one_place():
    """`dtype == DType::k...` and `switch` on it belong into csrc/core/dtype.cuh."""
    found = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".cu", ".cuh", ".cpp", ".h") or path.parent.name == "core":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"[=!]= *DType::k|case DType::k|switch \(.*dtype", line):
                found.append(f"{name_of(path)}:{number}")
    assert found == []


# ------------------------------------------------------------------------------------------------
# texts


def test_every_module_has_a_docstring():
    assert [
        name_of(path)
        for path in MODULES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


def test_every_module_imports_or_says_what_it_needs():
    """Each module by itself, so that no import works only after another one."""
    optional = {"transformers", "tokenizers", "gguf", "triton", "datasets", "numpy", "peft", "vllm"}
    for module in pkgutil.walk_packages(sk.__path__, "sparsekern."):
        if module.name.endswith("__main__") or module.name == "sparsekern._C":
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert (error.name or "").split(".")[0] in optional, module.name


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


def test_no_path_of_a_machine():
    """What is committed names no home, no scratch folder and no registry of whoever wrote it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs the git checkout")
    code, listing = run("git", "ls-files", "-co", "--exclude-standard")
    if code:
        pytest.skip("git does not read this checkout")
    pattern = re.compile(r"(?<![\w.$}{~/-])/(home|root|Users|work|mnt|scratch)/[\w.-]+")
    texts = {".py", ".pyi", ".md", ".toml", ".cu", ".cuh", ".cpp", ".h", ".jsonl", ""}
    found = []
    for name in listing.splitlines():
        path = ROOT / name
        if path.suffix in texts and path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []
