"""What a folder from elsewhere, a crash or bad input must not achieve."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.checkpoint import (
    check_writable,
    export_dense,
    from_pretrained,
    load_into,
    save_pretrained,
    verify_checkpoint,
)
from sparsekern.checkpoint.skeleton import meta_parameters
from sparsekern.errors import FormatError
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.utils import staging

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def folder(tmp_path):
    """A pruned Llama of which the tests change one thing."""
    path = tmp_path / "folder"
    save_pretrained(cases.sparsify(cases.llama()), path)
    return path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# ---- threads -------------------------------------------------------------------------------------


def test_fifty_threads_load_save_prune_and_build_at_once(tmp_path):
    """Nothing is on meta that should not be, and every result is right."""
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path / "source")
    with torch.no_grad():
        expected = model(TOKENS).logits
    dense = cases.llama()  # not in the threads: torch's random numbers are the process's
    pruned = copy.deepcopy(dense)
    prune_model(pruned, "wanda", TOKENS, progress=False)
    registered = torch.nn.Module.register_parameter
    wrong, start = [], threading.Barrier(50)

    def work(number):
        start.wait()
        try:
            if number % 5 == 0:
                for _ in range(2):
                    loaded = from_pretrained(tmp_path / "source")
                    with torch.no_grad():
                        assert torch.equal(loaded(TOKENS).logits, expected)
            elif number % 5 == 1:
                save_pretrained(model, tmp_path / f"copy-{number}")
                target = cases.llama()
                load_into(target, tmp_path / f"copy-{number}")
            elif number % 5 == 2:
                target = copy.deepcopy(dense)
                prune_model(target, "wanda", TOKENS, progress=False)
                ours, theirs = target.state_dict(), pruned.state_dict()
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            else:
                for _ in range(300):
                    layer = torch.nn.Linear(8, 4)
                    assert not layer.weight.is_meta and layer.weight.dtype == torch.float32
                    assert torch.empty(2).device.type == "cpu"
        except BaseException as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.nn.Module.register_parameter is registered
    assert not torch.nn.Linear(4, 4).weight.is_meta


def test_building_on_meta_is_of_one_thread():
    inside, outside = threading.Event(), threading.Event()
    seen = []

    def other():
        inside.wait(30)
        seen.append(torch.nn.Linear(4, 4).weight.device.type)
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with meta_parameters():
        inside.set()
        assert outside.wait(30)
        assert torch.nn.Linear(4, 4).weight.is_meta
        norm = torch.nn.Module()
        norm.register_buffer("table", torch.arange(3))
        assert torch.equal(norm.table, torch.tensor([0, 1, 2]))
    thread.join()
    assert seen == ["cpu"]


# ---- code and files from elsewhere ---------------------------------------------------------------


def test_no_code_of_the_folder_runs_and_nothing_is_asked(folder, monkeypatch):
    import builtins

    monkeypatch.setattr(builtins, "input", lambda *a: pytest.fail("asked on stdin"))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    change_config(folder, auto_map=dict.fromkeys(names, "evil.Evil"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    )
    loaded = from_pretrained(folder)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not hasattr(loaded.config, "auto_map")
    from sparsekern.integrations.loading import load_tokenizer

    with pytest.raises((ValueError, OSError, KeyError)):
        load_tokenizer(folder)
    change_config(folder, model_type="evil")
    with pytest.raises(FormatError, match="code of the folder is never run"):
        from_pretrained(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "kernels-community/flash-attn2:flash_attn"},
        {"_attn_implementation_internal": "someone/kernel@main"},
        {"experts_implementation": "someone/kernel"},
        {"attn_implementation": {"": "kernels-community/x"}},
        {"text_config": {"attn_implementation": "kernels-community/x"}},
        {"backbone": "hf-hub:someone/model"},
        {"architecture": "hf_hub:someone/model"},
    ],
)
def test_nothing_is_fetched(folder, change):
    change_config(folder, **change)
    with pytest.raises(FormatError, match="fetched"):
        from_pretrained(folder)


def test_an_attention_kernel_as_argument_is_refused(folder):
    with pytest.raises(FormatError, match="attn_implementation.*fetched"):
        from_pretrained(folder, attn_implementation="kernels-community/flash-attn")


SMALL = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
]


@pytest.mark.parametrize("name", [*SMALL, "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "folder"])
def test_files_that_are_none(folder, name, kind):
    """A pipe would hang, /dev/zero would fill the memory."""
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    start = time.monotonic()
    if name == "generation_config.json":
        from_pretrained(folder)  # not a file: as if it were not there
        return
    with pytest.raises(FormatError, match="a regular file|readable"):
        from_pretrained(folder, verify=True)
    assert not verify_checkpoint(folder).ok
    assert time.monotonic() - start < 60


BOMBS = {
    "head_dim": 10**9,
    "vocab_size": 10**9,
    "num_key_value_heads": 10**9,
    "num_hidden_layers": 10**6,
    "max_position_embeddings": 10**12,
    "hidden_size": 10**30,
    "intermediate_size": 2**40,
    "num_labels": 10**9,
    "anything_else": 10**10,
}


@pytest.mark.parametrize("key", BOMBS)
def test_integers_of_a_config_are_bounded_by_the_files(folder, key):
    change_config(folder, **{key: BOMBS[key]})
    start = time.monotonic()
    with pytest.raises(FormatError):
        from_pretrained(folder)
    assert time.monotonic() - start < 60


LIMITED = """
import resource, sys
import sparsekern as sk, transformers
sk.from_pretrained(sys.argv[1])
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
for folder in sys.argv[2:]:
    try:
        sk.from_pretrained(folder)
    except sk.FormatError:
        print("refused")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_bombs_that_a_constructor_allocates_by(tmp_path):
    """Keys that real buffers and lists are built by, under a limit of 1 GiB more memory."""
    save_pretrained(cases.sparsify(cases.gpt2()), tmp_path / "gpt2")
    save_pretrained(cases.sparsify(cases.opt()), tmp_path / "opt")
    folders = []
    for source, changes in (
        ("gpt2", {"n_positions": 10**6}),
        ("gpt2", {"n_layer": 10**5}),
        ("gpt2", {"n_head": 10**7, "n_embd": 10**7}),
        ("opt", {"max_position_embeddings": 10**7}),
        ("opt", {"num_hidden_layers": 10**5}),
        ("opt", {"word_embed_proj_dim": 10**7}),
    ):
        folders.append(tmp_path / f"{source}-{len(folders)}")
        shutil.copytree(tmp_path / source, folders[-1])
        change_config(folders[-1], **changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "gpt2"), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * len(folders)


def test_what_a_constructor_allocates_is_counted_before_it_is():
    with pytest.raises(FormatError, match="buffers to fit"), meta_parameters(nbytes=2**20):
        torch.ones(2**20)
    with pytest.raises(FormatError, match="buffers to fit"), meta_parameters(nbytes=2**20):
        torch.outer(torch.arange(2**10), torch.arange(2**10))
    with pytest.raises(FormatError, match="modules to fit"), meta_parameters(modules=10):
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(100))
    assert torch.ones(2**20).sum() == 2**20


# ---- contents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["norm", "embed", "compressed", "bias"])
def test_numbers_that_are_none_are_reported(tmp_path, kind, value):
    model = cases.sparsify(cases.opt())
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in sorted(tensors) if kind in n.rpartition(".")[2] or kind in n)
    tensors[name].view(-1)[1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "SHA256SUMS").unlink()
    assert not verify_checkpoint(tmp_path).ok
    assert name in verify_checkpoint(tmp_path).table()
    with pytest.raises(FormatError, match="NaN or Inf"):
        from_pretrained(tmp_path, verify=True)


def test_any_changed_byte_is_found(folder):
    """sha256 of every file that save_pretrained wrote."""
    assert verify_checkpoint(folder).sums
    listed = dict(
        line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines()
    )
    assert {"model.safetensors", "config.json", "generation_config.json"} == set(listed)
    path = folder / "model.safetensors"
    good = path.read_bytes()
    for position in (len(good) - 3, len(good) // 2, len(good) * 3 // 4):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        assert "model.safetensors" in verify_checkpoint(folder).problems["sha256"]
        with pytest.raises(FormatError, match="sha256"):
            from_pretrained(folder, verify=True)
        with pytest.raises(FormatError, match="sha256"):
            load_into(cases.llama(), folder, verify=True)
    path.write_bytes(good)
    assert verify_checkpoint(folder).ok
    change_config(folder, rms_norm_eps=0.5)
    assert "config.json" in verify_checkpoint(folder).problems["sha256"]


def test_a_shard_of_a_sibling_checkpoint_is_found(tmp_path):
    for name in ("a", "b"):
        save_pretrained(cases.sparsify(cases.llama()), tmp_path / name, max_shard_size=9000)
    shard = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))[1]
    shutil.copyfile(tmp_path / "b" / shard, tmp_path / "a" / shard)
    from_pretrained(tmp_path / "a")  # the headers agree
    assert shard in verify_checkpoint(tmp_path / "a").problems["sha256"]


def test_files_that_no_loader_reads_need_no_sum(folder):
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")  # as Trainer puts there
    text = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(text.replace("  ", " *"))  # as sha256sum --binary writes it
    assert verify_checkpoint(folder).ok
    from_pretrained(folder, verify=True)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"{}")
        assert f"{name}: not listed" in verify_checkpoint(folder).problems["sha256"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense\n",
        "0" * 64 + "  ../x\n",
        "0" * 64 + "  /etc/passwd\n",
        ("0" * 64 + "  x\n") * 2,
    ],
)
def test_damaged_sums(folder, text):
    (folder / "SHA256SUMS").write_text(text)
    assert not verify_checkpoint(folder).ok
    with pytest.raises(FormatError, match="SHA256SUMS|listed"):
        from_pretrained(folder, verify=True)


def test_foreign_folders_have_no_sums(tmp_path):
    cases.llama().save_pretrained(tmp_path)
    report = verify_checkpoint(tmp_path)
    assert report.ok and not report.sums and "no sha256" in report.table()
    from_pretrained(tmp_path, verify=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model.safetensors"])
def test_export_does_not_follow_links_out_of_the_folder(folder, tmp_path, name):
    secret = tmp_path / "secret"
    if name == "model.safetensors":
        (folder / name).rename(secret)
    else:
        secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(FormatError, match=f"{name}.*a link to"):
        export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


# ---- writing -------------------------------------------------------------------------------------


def test_the_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for bad, error in (
        (tmp_path / "file", FileExistsError),
        (tmp_path / "file" / "below", NotADirectoryError),
        (tmp_path / "dangling", FileNotFoundError),
        (tmp_path / "dangling" / "below", FileNotFoundError),
        ("/proc/sparsekern", OSError),
    ):
        with pytest.raises(error, match="a folder that can be written.*another folder"):
            check_writable(bad)
        with pytest.raises(error, match="a folder that can be written"):
            save_pretrained(torch.nn.Linear(4, 4), bad)
    for good in (tmp_path, tmp_path / "new" / "deep"):
        assert check_writable(good) == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize("kind", ["long", "loop", "bytes"])
def test_paths_that_the_system_cannot_follow(kind, tmp_path):
    path = tmp_path / {"long": "a" * 300, "loop": "loop", "bytes": "\udcff"}[kind]
    if kind == "loop":
        path.symlink_to(path)
    with pytest.raises((OSError, ValueError), match="save_pretrained: expected directory to be"):
        save_pretrained(torch.nn.Linear(4, 4), path)
    with pytest.raises((OSError, ValueError), match="from_pretrained: expected the model to be"):
        from_pretrained(path)
    with pytest.raises((OSError, ValueError), match="the folder to be a path.*another path"):
        check_writable(path)


def test_shards_without_their_index(tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path, max_shard_size=20_000)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="index.json is missing, which names the shards"):
        from_pretrained(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name.replace("model", "model.fp16"))
    with pytest.raises(FormatError, match="Pass variant='fp16'"):
        from_pretrained(tmp_path)
    with pytest.raises(FormatError, match="index.fp16.json is missing"):
        from_pretrained(tmp_path, variant="fp16")


def test_a_failed_save_keeps_the_model_and_says_what_to_do(tmp_path, monkeypatch):
    model = cases.sparsify(cases.llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "save_file", full)
    with pytest.raises(OSError, match="No space left.*model in memory is unchanged") as caught:
        save_pretrained(model, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "new")
    assert caught.value.errno == 28 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save_pretrained(model, tmp_path)


KILLED = """
import os, signal, sys
import torch, sparsekern as sk
from sparsekern.utils import staging
real = staging.save_file
def save_file(*args, **kwargs):
    real(*args, **kwargs)
    print("staged", flush=True)
    signal.pause()
staging.save_file = save_file
sk.save_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), sys.argv[1])
"""


def test_a_killed_save_leaves_nothing_for_long(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"staged\n"
    assert len(list(tmp_path.glob(".sparsekern-*"))) == 1
    check_writable(tmp_path)  # the process lives: its folder stays
    assert len(list(tmp_path.glob(".sparsekern-*"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(tmp_path.glob(".sparsekern-*"))) == 1
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [None, 3, [torch.nn.Linear(4, 4)], {}])
def test_no_model(tmp_path, model):
    with pytest.raises(TypeError, match="an nn.Module"):
        save_pretrained(model, tmp_path / "x")
    with pytest.raises(TypeError, match="an nn.Module"):
        load_into(model, tmp_path)
    assert not (tmp_path / "x").exists()
