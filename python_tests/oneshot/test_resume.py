"""prune_model killed and resumed: the result is that of an uninterrupted run, and only the same run
may continue."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsekern
from python_tests.oneshot.driver_models import build, tokens
from sparsekern.errors import FormatError
from sparsekern.oneshot.layerwise import prune_group
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.resume import ResumeDir

HERE = Path(__file__).parent


def run(model, folder=None, **kwargs):
    kwargs = {
        "device": "cpu",
        "batch_size": 2,
        "progress": False,
        "resume": folder,
        "skip": (),
        **kwargs,
    }
    return prune_model(
        model, kwargs.pop("method", "sparsegpt"), kwargs.pop("calibration", tokens()), **kwargs
    )


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key


def stage_files(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix == ".safetensors")


@pytest.mark.parametrize("family, compress", [("llama", True), ("gpt2", False)])
def test_killed_in_mid_run_and_resumed(family, compress, tmp_path):
    """A real process, killed with SIGKILL while block 2 of 4 is being calibrated, loses that block
    only."""
    path = [str(HERE), str(Path(sparsekern.__path__[0]).parent), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, str(HERE / "resume_child.py"), str(tmp_path), family, str(compress)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "inside-block-2").exists():
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline, "the child never reached block 2"
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stderr.close()
    assert child.returncode == -signal.SIGKILL
    assert stage_files(tmp_path) == ["block-00000.safetensors", "block-00001.safetensors"]
    resumed, straight = build(family, layers=4), build(family, layers=4)
    report = run(resumed, tmp_path, compress=compress)
    expected = run(straight, compress=compress)
    assert report.resumed == 2 and expected.resumed == 0
    assert_same_state(resumed, straight)
    assert len(report.layers) == len(expected.layers)
    for a, b in zip(report.layers, expected.layers):
        assert (a.name, a.relative_error, a.damp, a.shape) == (
            b.name,
            b.relative_error,
            b.damp,
            b.shape,
        )


def test_a_finished_run_is_only_loaded(tmp_path, monkeypatch):
    first, again = build("llama"), build("llama")
    run(first, tmp_path)
    assert stage_files(tmp_path) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "head.safetensors",
    ]
    monkeypatch.setattr(
        "sparsekern.oneshot.run.prune_group", lambda *args: pytest.fail("pruned again")
    )
    report = run(again, tmp_path)
    assert report.resumed == 3
    assert_same_state(first, again)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude", "calibration": None, "batch_size": None},
        {"true_sequential": True},
    ],
)
def test_interrupted_inside_a_process(options, tmp_path, monkeypatch):
    """The same without a kill: an exception in the second block, for other kinds of run."""
    seen = []

    def interrupt(layers, hessian, arguments):
        if layers[0].block == 1:
            seen.append(layers[0].name)
            raise KeyboardInterrupt
        return prune_group(layers, hessian, arguments)

    monkeypatch.setattr("sparsekern.oneshot.run.prune_group", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(build("llama"), tmp_path, **options)
    assert len(seen) == 1
    monkeypatch.undo()
    resumed, straight = build("llama"), build("llama")
    assert run(resumed, tmp_path, **options).resumed == 1
    run(straight, **options)
    assert_same_state(resumed, straight)


def other_method(w, hessian):
    return w.abs()


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(calibration=tokens(seed=5)), "calibration: .*sha256"),
        (dict(method="wanda"), "method: 'wanda' here, 'sparsegpt' there"),
        (dict(method=other_method), r"method: '[\w.]*test_resume.other_method' here"),
        (dict(damp=0.1), "damp: 0.1 here, 0.01 there"),
        (dict(skip=("lm_head",)), r"skip: \['lm_head'\] here, \[\] there"),
        (dict(compress=False), "compress: False here, True there"),
        (dict(batch_size=3), r"batch_size: \[3\] here, \[2\] there"),
        (dict(true_sequential=True), "true_sequential: True here"),
        (
            dict(masks={"lm_head": torch.zeros(64, 32, dtype=torch.bool)}),
            "masks: '[0-9a-f]{64}' here, None there",
        ),
    ],
)
def test_another_run_may_not_continue(change, text, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "one-finished-run"
    if not folder.exists():
        run(build("llama"), folder)
    model = build("llama")
    with pytest.raises(ValueError, match=f"expected the run that .*{text}.*another directory"):
        run(model, folder, **change)
    assert_same_state(model, build("llama"))


def test_another_model_may_not_continue(tmp_path):
    run(build("llama"), tmp_path)
    with pytest.raises(ValueError, match="weights: "):
        run(build("llama", seed=1), tmp_path)
    pruned = build("llama")
    run(pruned, skip=("lm_head", 1))
    with pytest.raises(ValueError, match="weights: "):
        run(pruned, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "bitmask", "no reports"])
def test_damaged_files_are_named(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    run(build("llama"), tmp_path)
    file = tmp_path / "block-00001.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 64)
    else:
        tensors = load_file(file)
        if damage == "bitmask":
            tensors["model.layers.1.mlp.up_proj.bitmask"][0, 0] = 0xFF
        metadata = {"reports": json.dumps([{"name": "model.layers.1.mlp.up_proj"}])}
        if damage == "bitmask":
            from safetensors import safe_open

            metadata = safe_open(file, "pt").metadata()
        save_file(tensors, file, metadata)
    with pytest.raises(FormatError, match="block-00001.safetensors is damaged .*Delete it"):
        run(build("llama"), tmp_path)
    file.unlink()
    model, straight = build("llama"), build("llama")
    assert run(model, tmp_path).resumed == 1
    run(straight)
    assert_same_state(model, straight)


def permuted(model):
    """Hidden channels of an MLP in another order: the same sums, another model."""
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        layer = getattr(mlp, name)
        layer.weight.data = layer.weight.data.flip(0)
    mlp.down_proj.weight.data = mlp.down_proj.weight.data.flip(1)


def other_eps(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def other_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def other_theta(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_scaling(model):
    model.model.layers[1].self_attn.scaling = 0.1


def other_config(model):
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize(
    "change", [permuted, other_eps, other_activation, other_theta, other_scaling, other_config]
)
def test_a_changed_model_may_not_continue(change, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "one-finished-run"
    if not folder.exists():
        run(build("llama"), folder)
    model = build("llama")
    change(model)
    with pytest.raises(ValueError, match="weights: "):
        run(model, folder)


def make_score(power, scale=1.0):
    def score(w, hessian):
        return w.abs() ** power * scale

    return score


def weighted(w, hessian, factor):
    return w.abs() * factor


def same_name():
    """Two functions of one qualified name and module."""

    def score(w, hessian):
        return -w.abs()

    score.__qualname__ = make_score(1).__qualname__
    return score


@pytest.mark.parametrize(
    "first, second",
    [
        (make_score(1), make_score(2)),
        (make_score(1), make_score(1, scale=torch.tensor(2.0))),
        (make_score(1), same_name()),
        (functools.partial(weighted, factor=1.0), functools.partial(weighted, factor=2.0)),
    ],
)
def test_another_function_of_the_same_name_may_not_continue(first, second, tmp_path):
    run(build("llama"), tmp_path, method=first)
    assert run(build("llama"), tmp_path, method=first).resumed == 3
    with pytest.raises(ValueError, match="function: "):
        run(build("llama"), tmp_path, method=second)


def test_a_function_that_cannot_be_told_apart_is_refused(tmp_path):
    handle = open(__file__)  # noqa: SIM115

    def score(w, hessian):
        return w.abs() * len(handle.name)

    with pytest.raises(ValueError, match="made of code, tensors and plain values, got a _io"):
        run(build("llama"), tmp_path, method=score)
    handle.close()


def test_every_flipped_byte_is_noticed(tmp_path):
    run(build("llama"), tmp_path)
    file = tmp_path / "block-00001.safetensors"
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(8, len(content), (12,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1
        file.write_bytes(bytes(damaged))
        with pytest.raises(FormatError, match="block-00001"):
            run(build("llama"), tmp_path)


def test_stages_of_another_run_or_without_a_manifest_are_refused(tmp_path):
    run(build("llama"), tmp_path / "a")
    run(build("llama"), tmp_path / "b", damp=0.1)
    name = "block-00001.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(FormatError, match="or of another run"):
        run(build("llama"), tmp_path / "a")
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json beside the stages .* got none"):
        run(build("llama"), tmp_path / "b", damp=0.1)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for place, error in (
        ("file", FileExistsError),
        ("file/below", NotADirectoryError),
        ("link", FileNotFoundError),
    ):
        with pytest.raises(error, match="resume=.: expected a folder that can be written, got"):
            run(model, tmp_path / place)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    held = ResumeDir(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="to be free, got another process"):
        ResumeDir(tmp_path, {"a": 1})
    held.close()
    ResumeDir(tmp_path, {"a": 1}).close()


def test_damaged_manifest(tmp_path):
    run(build("llama"), tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema"')
    with pytest.raises(FormatError, match="manifest.json to hold JSON"):
        run(build("llama"), tmp_path)


def test_a_link_as_lock_empties_nothing(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    ResumeDir(tmp_path / "run", {"a": 1}).close()
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["manifest.json", "block-00001.safetensors", "lock"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "link to nothing"])
def test_what_is_no_file_is_refused_without_waiting(name, kind, tmp_path):
    run(build("llama"), tmp_path)
    file = tmp_path / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(tmp_path / "nowhere" / "x")
    model = build("llama")
    with pytest.raises((FormatError, OSError), match=name.replace(".", r"\.")):
        run(model, tmp_path)
    if not name.startswith("block"):  # else the block before it is pruned, as it was stored
        assert_same_state(model, build("llama"))


def test_a_disk_that_is_full_is_said_with_its_remedy(tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("block-00001.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"block-00001.* to be written, got No space.*Make room"):
        run(build("llama"), tmp_path)
    monkeypatch.undo()
    assert run(build("llama"), tmp_path).resumed == 1
