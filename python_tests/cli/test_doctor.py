"""sparsekern doctor: says what is there and why something is not, and never fails."""

import json

import pytest
import torch

from sparsekern import _native
from sparsekern.backends import triton as triton_kernels
from sparsekern.backends.cusparselt import library as cusparselt_library
from sparsekern.cli import doctor
from sparsekern.cli import main as cli


def findings():
    return {(finding.section, finding.name): finding for finding in doctor.diagnose()}


def test_it_lists_every_part(capsys):
    found = findings()
    assert list(dict.fromkeys(section for section, _ in found)) == [
        "software",
        "GPU",
        "kernels",
        "libraries",
        "sparse linear layers",
    ]
    assert torch.__version__ in found["software", "torch"].text
    assert found["kernels", "sparsekern._C"].present == _native.available()
    assert found["kernels", "Triton"].present == triton_kernels.available()
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for finding in found.values():
        assert (
            f"{'+' if finding.present else '-'} {finding.name}" in output and finding.text in output
        )


def test_the_tables_that_choose_the_kernels(monkeypatch):
    from sparsekern.backends.cuda import linear as cuda_backend
    from sparsekern.backends.cuda import tuned_tables as tuning

    if not torch.cuda.is_available():
        absent = findings()["kernels", "tuned tables"]
        assert not absent.present and str(tuning.user_path()) in absent.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda_backend, "refusal", lambda index: "too old" if index else "")
    monkeypatch.setattr(tuning, "gpu_name", lambda index: f"GPU {index}")
    tuning.store(tuning.user_path(), "GPU 0", "bfloat16", (64, 64), {1: ("decode a", 1.0)})
    (found,) = doctor._tuned_tables()
    assert (found.name, found.present) == ("tuned tables, cuda:0", True)
    assert found.text == "yours: 1 shapes; heuristics decide for others"
    tuning.user_path().unlink()
    tuning.forget()


def test_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"section", "name", "text", "present"} == set(rows[0])
    assert [row["name"] for row in rows] == [finding.name for finding in doctor.diagnose()]


def test_what_will_run_is_what_the_dispatch_says(device):
    from sparsekern import SparseLinear, explain

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = doctor.PROBE_FEATURES
    weight = SparseLinear(size, size, dtype=dtype, device=device).weight
    for tokens in doctor.PROBE_TOKENS:
        name = f"{device.type}, {str(dtype).removeprefix('torch.')}, {tokens} tokens"
        x = torch.zeros(tokens, size, dtype=dtype, device=device)
        assert findings()["sparse linear layers", name].text == str(explain(x, weight))


@pytest.mark.parametrize(
    "without, text",
    [
        ("", "slower than dense with more than 64 tokens"),
        ("no Gluon", "not on the sparse tensor cores: no Gluon"),
    ],
)
def test_triton_says_where_it_does_not_pay(monkeypatch, without, text):
    monkeypatch.setattr(triton_kernels, "available", lambda: True)
    monkeypatch.setattr(triton_kernels, "mma_sp_reason", lambda: without)
    assert text in findings()["kernels", "Triton"].text


def test_absent_parts_are_reported_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "no module here")
    monkeypatch.setattr(triton_kernels, "available", lambda: False)
    monkeypatch.setattr(triton_kernels, "reason", lambda: "no triton here")
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor, "_nvidia_folders", list)
    monkeypatch.setattr(cusparselt_library, "library", lambda: (None, "no library here"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = findings()
    assert found["kernels", "sparsekern._C"].text == "no module here"
    assert found["kernels", "Triton"].text == "no triton here"
    for key in (
        ("software", "no-such-package"),
        ("libraries", "nvcc"),
        ("libraries", "cuSPARSELt"),
    ):
        assert not found[key].present
    assert found["libraries", "cuSPARSELt"].text == "no library here"


def test_a_built_module_nvcc_and_cusparselt_are_shown(monkeypatch, tmp_path):
    info = {
        "version": "1",
        "nvcc": "13.1",
        "cudart": 13010,
        "archs": ["80", "90a"],
        "kernels": ["spmm_sm80"],
    }
    module = type("Module", (), {"build_info": staticmethod(lambda: info)})
    monkeypatch.setattr(_native, "available", lambda: True)
    monkeypatch.setattr(_native, "module", lambda: module)
    nvcc = tmp_path / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_bytes(b"")
    nvcc.chmod(0o755)
    library = cusparselt_library.Library((0, 8, 0), "/lib/libcusparseLt.so.0")
    monkeypatch.setattr(cusparselt_library, "library", lambda: (library, ""))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cusparselt_library, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr(doctor, "_what_will_run", list)
    cusparselt_library.refusal.cache_clear()
    monkeypatch.setattr(doctor, "_nvidia_folders", lambda: [tmp_path])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    found = findings()
    assert found["kernels", "sparsekern._C"].text == "built with nvcc 13.1 for 80, 90a: spmm_sm80"
    assert found["libraries", "nvcc"].text == str(nvcc)
    text = found["libraries", "cuSPARSELt"].text
    assert text.startswith("0.8.0, /lib/libcusparseLt.so.0; backend 'cusparselt' refuses")
    assert "torch.float16" in text and "bfloat16 or" in text
    cusparselt_library.refusal.cache_clear()
