"""The package and its CUDA module: what ptxas said, build_info, life without the module, wheels.

The ptxas gate is tested on texts of logs and on a kernel with a known mistake, so that it is known
to fail; then it judges the logs that the build of this checkout left in build/ptxas.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import sparsekern
from sparsekern import _native

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "ptxas"
KERNELS = ROOT / "csrc"


def load_ptxas_log():
    spec = importlib.util.spec_from_file_location("ptxas_log", ROOT / "csrc/tools/ptxas_log.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptxas_log"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


ptxas_log = load_ptxas_log()
needs_module = pytest.mark.skipif(not _native.available(), reason=_native.reason() or "present")

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 2.082 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90a'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers
"""
LOSS = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
NOTES = [
    f"ptxas info    : (C75{number}) {text} in function '_Z4goodPf'"
    for number, text in [
        (10, f"{LOSS} crossing a function boundary"),
        (11, f"{LOSS} insufficient register resources for the wgmma pipeline"),
        (13, f"{LOSS} non wgmma instructions defining input registers"),
        (14, f"{LOSS} dynamic indexing of accumulator registers"),
        (15, f"{LOSS} non wgmma instructions defining accumulator registers"),
        (17, "warpgroup.wait is injected in around line 292 by compiler"),
        (19, "warpgroup.arrive is injected in around line 290 by compiler"),
        (20, f"{LOSS} divergent control flow"),
    ]
]


def problems_of(text, stack_frames=None):
    reports, notes = ptxas_log.parse(text, "x.cu")
    return notes + [problem for report in reports for problem in report.problems(stack_frames)]


def test_parser_reads_every_architecture():
    reports, notes = ptxas_log.parse(CLEAN, "x.cu")
    assert notes == []
    assert [(r.name, r.arch, r.registers, r.smem) for r in reports] == [
        ("_Z4goodPf", "sm_80", 40, 1024),
        ("_Z4goodPf", "sm_90a", 42, 0),
    ]
    assert problems_of(CLEAN) == []


@pytest.mark.parametrize("stores, loads", [(8, 0), (0, 8), (128, 256)])
def test_spills_are_problems(stores, loads):
    text = CLEAN.replace(
        "0 bytes spill stores, 0 bytes spill loads",
        f"{stores} bytes spill stores, {loads} bytes spill loads",
        1,
    )
    (problem,) = problems_of(text)
    assert "_Z4goodPf (sm_80)" in problem and f"spills {stores} bytes" in problem


def test_stack_frames_are_problems_unless_allowed():
    text = CLEAN.replace("0 bytes stack frame", "48 bytes stack frame", 1)
    (problem,) = problems_of(text, {})
    assert "stack frame of 48 bytes, allowed 0" in problem
    assert problems_of(text, {"good": 48}) == []
    assert len(problems_of(text, {"good": 40})) == 1
    assert len(problems_of(text, {"other": 48})) == 1


@pytest.mark.parametrize("note", NOTES, ids=lambda note: re.search("C75..", note).group())
def test_wgmma_notes_are_problems(note):
    assert problems_of(f"{note}\n{CLEAN}") == [note]
    assert problems_of(f"{CLEAN}{note}\n") == [note]


def test_a_device_function_with_spills_is_a_problem():
    text = CLEAN + (
        "ptxas info    : Function properties for _Z6helperv\n"
        "    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads\n"
    )
    assert [("_Z6helperv" in problem) for problem in problems_of(text)] == [True, True]


def test_a_kernel_without_resources_is_a_problem():
    text = "ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'\n"
    (problem,) = problems_of(text)
    assert "reported no resources" in problem


def test_check_wants_a_log_with_kernels_for_every_source(tmp_path):
    for name in ("good", "empty", "missing"):
        (tmp_path / f"{name}.cu").touch()
    (tmp_path / "good.log").write_text(CLEAN)
    (tmp_path / "empty.log").write_text("")
    reports, problems = ptxas_log.check(tmp_path, tmp_path)
    assert len(reports) == 2
    assert [problem.split(":")[0] for problem in problems] == ["empty.cu", "missing.cu"]


def test_run_keeps_the_log_of_a_success_only(tmp_path):
    log = tmp_path / "logs" / "x.log"
    command = [sys.executable, "-c", "import sys; print('note', file=sys.stderr); sys.exit(0)"]
    assert ptxas_log.run(log, command) == 0 and log.read_text() == "note\n"
    assert ptxas_log.run(log, [*command[:2], "import sys; sys.exit(3)"]) == 3
    assert not log.exists()


@needs_module
def test_kernels_of_this_checkout_pass_the_gate():
    if not LOGS.is_dir():
        pytest.skip(f"no {LOGS}: the module was not built from this checkout")
    reports, problems = ptxas_log.check(LOGS, KERNELS)
    assert problems == []
    archs = {report.arch.removeprefix("sm_") for report in reports}
    named = set(_native.module().build_info()["archs"])
    assert named <= archs <= named | {"89"}, "mma_e4m3_sm89.cu is always there"


@needs_module
def test_build_info():
    info = _native.module().build_info()
    assert info["version"] == sparsekern.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert info["cudart"] // 1000 == int(info["nvcc"].split(".")[0])
    assert sorted(info["kernels"]) == sorted(path.stem for path in KERNELS.rglob("*.cu"))
    assert {"-O3", "-lineinfo", "-Xptxas=-v"} <= set(info["flags"])
    assert _native.reason() == ""


@needs_module
def test_device_info_refuses_a_device_that_is_not_there():
    count = _native.module().device_count()
    for device in (-1, count):
        with pytest.raises(ValueError, match=rf"expected device .*, got {device}\."):
            _native.module().device_info(device)


@needs_module
@pytest.mark.gpu
def test_device_info_agrees_with_torch():
    import torch

    info = _native.module().device_info(0)
    properties = torch.cuda.get_device_properties(0)
    assert _native.module().device_count() == torch.cuda.device_count()
    assert info["name"] == properties.name
    assert info["capability"] == torch.cuda.get_device_capability(0)
    assert info["multiprocessors"] == properties.multi_processor_count
    assert info["l2_bytes"] == properties.L2_cache_size


WITHOUT_MODULE = """
import sys
{hide}
import sparsekern
from sparsekern import _native
assert not _native.available()
print(_native.reason())
try:
    _native.module()
except RuntimeError as error:
    assert _native.reason() in str(error)
else:
    raise SystemExit("module() returned")
"""
HIDDEN = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "sparsekern._C":
            raise ModuleNotFoundError("No module named 'sparsekern._C'", name=name)
sys.meta_path.insert(0, Hide())
"""
BROKEN = HIDDEN.replace(
    "raise ModuleNotFoundError(\"No module named 'sparsekern._C'\", name=name)",
    'raise ImportError("libmissing.so.1: cannot open shared object file")',
)
STALE = """
import types
stale = types.ModuleType("sparsekern._C")
stale.build_info = lambda: {"version": "0.0.0"}
sys.modules["sparsekern._C"] = stale
"""


@pytest.mark.parametrize(
    "hide, reason",
    [
        (HIDDEN, "has no CUDA module.*pip install nvidia-cuda-nvcc"),
        (BROKEN, r"does not import: ImportError: libmissing\.so\.1"),
        (STALE, r"was built for sparsekern 0\.0\.0, this is"),
    ],
    ids=["absent", "broken", "stale"],
)
def test_the_package_works_without_the_module(hide, reason):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODULE.format(hide=hide)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(reason, done.stdout)


def build_wheel(tmp_path, kernel=None, **environment):
    """Builds a wheel from a copy of the checkout, without network.

    With `kernel`, its text replaces all our kernels and bindings: the machinery is under test then.
    Returns (exit status, all output, wheels).
    """
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").touch()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", *(["*.cu", "*.cpp"] if kernel else []))
    for folder in ("csrc", "sparsekern"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    if kernel:
        (copy / "csrc/linear/scale.cu").write_text(kernel)
        (copy / "csrc/bindings.cpp").write_text(EMPTY_MODULE)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(copy),
        ],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if kernel and "installing without the CUDA module" in done.stdout:
        pytest.skip("no nvcc to compile with")
    return done.returncode, done.stdout, list(tmp_path.glob("*.whl"))


EMPTY_MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, {}, {}, {}, {}, {}};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
SCALE = """
__global__ void scale_kernel(float* x, float factor) { x[threadIdx.x] *= factor; }
"""
# Touches a wgmma accumulator while it is in flight: ptxas compiles it and serialises the pipeline.
TRAP = """
__global__ void trap_kernel(float* out, unsigned long long a, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
                 " {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i));
    d[0] *= 2.0f;
  }
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


@pytest.fixture
def build_tools():
    for module in ("setuptools", "pybind11"):
        pytest.importorskip(module, reason=f"{module} is needed to build a wheel")
    for tool in ("cmake", "ninja"):
        if not (shutil.which(tool, path=sysconfig.get_path("scripts")) or shutil.which(tool)):
            pytest.skip(f"{tool} is needed to build a wheel")


def test_wheel_without_cuda(tmp_path, build_tools):
    status, output, wheels = build_wheel(tmp_path, SPARSEKERN_NO_CUDA="1")
    assert status == 0, output
    assert "installing without the CUDA module" in output
    (wheel,) = wheels
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparsekern/_native.py" in names and "sparsekern/_C.pyi" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sparsekern").rglob("*.py")}
    assert modules <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sparsekern"}


def test_wheel_with_cuda(tmp_path, build_tools):
    status, output, wheels = build_wheel(tmp_path, kernel=SCALE, SPARSEKERN_CUDA_ARCHS="80, 90a")
    assert status == 0, output
    assert "archs 80;90a" in output
    (wheel,) = wheels
    (module,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("sparsekern/_C.c")]
    assert module.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    reports, problems = ptxas_log.check(
        tmp_path / "checkout/build/ptxas", tmp_path / "checkout/csrc"
    )
    assert problems == [] and [report.arch for report in reports] == ["sm_80", "sm_90a"]


def test_the_gate_catches_a_serialised_wgmma_pipeline(tmp_path, build_tools):
    """What today's ptxas really says about the mistake, through the whole build."""
    status, output, _ = build_wheel(tmp_path, kernel=TRAP, SPARSEKERN_CUDA_ARCHS="90a")
    assert status == 0, output
    reports, problems = ptxas_log.check(
        tmp_path / "checkout/build/ptxas", tmp_path / "checkout/csrc"
    )
    assert len(reports) == 1
    assert any("C7517" in problem and "trap_kernel" in problem for problem in problems)


@pytest.mark.parametrize(
    "kernel, archs, message",
    [
        (SCALE.replace("factor;", "factr;"), "80", "factr"),
        (SCALE.replace("{", "{ int unused;"), "80", "unused"),
        (SCALE, "80;sm_90", "expected entries such as 80 or 90a, got 'sm_90'"),
    ],
    ids=["error", "warning", "arch"],
)
def test_a_kernel_that_does_not_compile_fails_the_install(
    tmp_path, build_tools, kernel, archs, message
):
    status, output, wheels = build_wheel(tmp_path, kernel=kernel, SPARSEKERN_CUDA_ARCHS=archs)
    assert status != 0 and wheels == []
    assert message in output
    assert "compiling the CUDA module" in output
