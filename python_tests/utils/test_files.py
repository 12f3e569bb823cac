"""A file that others write appears whole, or not at all and with what to do."""

import os

import pytest
import torch
from safetensors.torch import save_file

from sparsekern.utils.files import renamed


def refuse(*_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_file_that_cannot_be_put_in_its_place(step, tmp_path, monkeypatch):
    path, partial = tmp_path / "state.safetensors", tmp_path / "state.part"

    def write(value):
        with renamed("op", partial, path, "Make room."):
            save_file({"x": torch.full((2,), value)}, "/" if step == "write" else partial)

    path.write_bytes(b"before")
    if step != "write":
        monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="op: expected .*state.safetensors to be written, got .*Make"):
        write(1.0)
    monkeypatch.undo()
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == [path.name]
    step = ""
    write(2.0)
    assert os.listdir(tmp_path) == [path.name] and path.stat().st_size > 20
