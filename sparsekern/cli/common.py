"""What several commands share: folders, devices and dtypes as the command line has them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekern.errors import check, message
from sparsekern.oneshot.presets import Preset
from sparsekern.prune import methods
from sparsekern.utils.arguments import Uses, check_used

# Small files of a model that neither the model nor its tokenizer writes.
BESIDE = ("*processor_config.json", "LICENSE*", "NOTICE*")


def check_flags(op: str, uses: Uses, args: argparse.Namespace) -> None:
    """ValueError for a flag, other than at its default, that nothing reads.

    uses: as of utils.arguments.      args: with the command's parser as `parser`.
    """
    defaults = {name: args.parser.get_default(name) for name in vars(args)}
    check_used(op, uses, vars(args), defaults)


def reads_data(method: str | None, preset: Preset) -> bool:
    """Whether pruning with them reads calibration data."""
    beside = bool(preset.rounds) or preset.rotate or preset.permute
    return beside or methods()[method or preset.method].needs != "weights"


def needed(tokenizer: Any, path: str) -> Any:
    check(
        tokenizer is not None,
        "sparsekern",
        "a tokenizer beside the model",
        f"no tokenizer files in {path}",
        "Copy tokenizer.json and tokenizer_config.json of the model there; a model without text is "
        "calibrated in Python.",
        exc=FileNotFoundError,
    )
    return tokenizer


def new_folder(path: str) -> Path:
    """The folder as a Path, asked before any work is done for it.

    Raises:
        OSError: it cannot be written.   ValueError: something is in it.
    """
    from sparsekern.checkpoint import check_writable

    check(path, "sparsekern", "--out to be a new or empty folder", path, "Name one.")
    folder = check_writable(path, "sparsekern --out")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(empty, "sparsekern", "--out to be a new or empty folder", path, "Choose another name.")
    return folder


def check_apart(op: str, flag: str, folder: str | None, out: Path) -> None:
    """ValueError where a flag names the folder of --out for files of another kind."""
    apart = folder is None or os.path.realpath(folder) != os.path.realpath(out)
    check(apart, op, f"{flag} other than --out", folder, "Give it a folder of its own.")


def check_files(op: str, args: argparse.Namespace, *names: str, makes: bool = False) -> None:
    """Flags that name files to write, asked before any work is done for them.

    Args:
        makes: whether the folder of the file is made with it.
    Raises:
        OSError: one cannot be written.   ValueError: its folder is not there, or it is one.
    """
    from sparsekern.checkpoint import check_writable

    for name in names:
        path = getattr(args, name)
        if path is None:
            continue
        flag, place = f"--{name.replace('_', '-')}", Path(path)
        folder = place.resolve().parent
        expected = f"a folder for {path}, of {flag}"
        check(makes or folder.is_dir(), op, expected, "none", "Make it first.")
        got, remedy = f"the folder {path!r}", "Add a name to it."
        check(not place.is_dir(), op, f"names of files to write with {flag}", got, remedy)
        if not (place.exists() and os.access(place, os.W_OK)):
            check_writable(folder, f"{op} {flag}")


def files_beside(model: str) -> list[Path]:
    """The files of BESIDE in the folder, or cached snapshot of a Hub id, that a model comes from.

    Raises:
        FormatError: a link that leads out of it.
    """
    from sparsekern.checkpoint.arguments import ModelNotFound, find_folder
    from sparsekern.utils.safetensors_io import require_inside

    try:
        folder = find_folder("sparsekern", model)
    except ModelNotFound:
        return []  # loading it says so
    found = sorted({p for pattern in BESIDE for p in folder.glob(pattern) if p.is_file()})
    require_inside(folder, [path.name for path in found])
    return found


def copy_beside(files: Iterable[Path], out: Path) -> None:
    """Copy files into a folder that has none of these names yet."""
    for path in files:
        if not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


@contextlib.contextmanager
def beside_the_model(op: str, out: Path) -> Iterator[None]:
    """Turns what goes wrong with small files, once the model is saved, into an OSError that says
    so."""
    try:
        yield
    except OSError as error:
        expected = f"{out} to take a report and small files of the model"
        remedy = "The model there is whole without them."
        number = error.errno or errno.EIO
        raise OSError(number, message(op, expected, str(error), remedy)) from error


def device_of(name: str | None) -> str:
    """The device as a string; ValueError for one that this process does not have."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    number = index.isascii() and index.isdecimal()
    known = kind in ("cpu", "cuda") and (not index or (kind == "cuda" and number))
    check(known, "sparsekern", "--device cpu, cuda or cuda:N", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    check(
        kind == "cpu" or int(index or 0) < count,
        "sparsekern",
        "a CUDA device that torch can see",
        f"{name} with {count} of them",
        "Run: sparsekern doctor.",
    )
    return name


def device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )


def dtype_of(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name, as the choices of --dtype spell it."""
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


def skip_rules(rules: Sequence[str] | None) -> tuple[str, ...]:
    return ("lm_head",) if rules is None else tuple(rules)
