"""Writing model folders of which a reader never sees half: shards, index, renames at the end.

By hand: safetensors writes one file and huggingface_hub splits a state_dict; neither makes several
files appear together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparsekern.errors import check, message
from sparsekern.utils.files import require_reachable
from sparsekern.utils.safetensors_io import (
    CONFIG_FILE,
    INDEX_FILE,
    OP,
    SINGLE_FILE,
    SUMS_FILE,
    sha256,
)

SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PREFIX = ".sparsekern-"  # of temporary folders
LOCK_NAME = ".lock"
ASIDE = ".aside"  # in a temporary folder: what stood in the place of its files
STALE_SECONDS = 3600  # a temporary folder without a lock file, of an older release


class HalfWritten(OSError):
    """Files that could neither be put in their place nor taken back; it says where they are."""


@contextlib.contextmanager
def writing(op: str, folder: Path) -> Iterator[None]:
    """Turns what goes wrong while writing into an OSError that says what is left and what to do."""
    remedy = (
        "Nothing was lost: the model in memory is unchanged, and so are finished files in the "
        "folder. Make room or give another folder, and save again."
    )
    try:
        yield
    except HalfWritten:
        raise
    except SafetensorError as error:
        got = f"{error} in {folder}"
        full = "No space" in str(error)
        text = message(op, "a folder that can be written", got, remedy)
        raise OSError(errno.ENOSPC if full else errno.EIO, text) from error
    except OSError as error:
        got = f"{error.strerror or error} in {folder}"
        text = message(op, "a folder that can be written", got, remedy)
        raise type(error)(error.errno or errno.EIO, text) from error


def check_writable(folder: str | os.PathLike[str], op: str = OP) -> Path:
    """Ask before a long computation whether its result can be saved; creates nothing that stays.

    Also removes temporary folders that killed processes left there.

    Args:
        folder: of the output, existing or not. op: first word of the message.
    Returns:
        The folder as a Path.
    Raises:
        OSError (FileExistsError, NotADirectoryError, PermissionError, ...): it names the folder, a
            file above it or a dangling link, or cannot be written.
    """
    path = Path(folder)
    require_reachable(op, "the folder", path)
    remedy = "Give another folder for the output."

    def refuse(kind: type[OSError], number: int, got: str) -> None:
        raise kind(number, message(op, "a folder that can be written", got, remedy))

    place = path
    while not place.is_dir():
        if place.is_symlink() and not place.exists():
            refuse(FileNotFoundError, errno.ENOENT, f"{place}, a link to nothing")
        if place.exists():
            kind = FileExistsError if place == path else NotADirectoryError
            refuse(kind, errno.ENOTDIR, f"{place}, which is a file")
        place = place.parent
    remove_leftovers(path)
    try:
        probe = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    except OSError as error:
        refuse(type(error), error.errno or errno.EACCES, f"{place}: {error.strerror or error}")
    os.rmdir(probe)
    return path


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete temporary folders below `folder` whose process is gone; returns them."""
    gone = []
    for path in folder.glob(f"{PREFIX}*") if folder.is_dir() else ():
        if path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            if not (path / LOCK_NAME).exists():
                if time.time() - path.stat().st_mtime < STALE_SECONDS:
                    continue
            else:
                descriptor = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails: still in use
                finally:
                    os.close(descriptor)
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path)
    return gone


class StagedFolder:
    """Write files into a folder all or nothing: `path` is a temporary folder inside it,
    `commit()` renames its files out and lists their sums in SHA256SUMS.

    Leaving the `with` block without commit() (an exception, too) removes what was staged and
    leaves the folder as it was, and so does a commit that fails: the files of before, which it has
    set aside, are put back. During commit the old config.json goes first and the new one comes
    last, so a process that is killed between two renames leaves a folder that no reader takes for
    a model, never a mixture of two models. A config.json must be among the files. What a killed
    process leaves is removed by the next StagedFolder there.
    """

    path: Path

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> StagedFolder:
        self._made = not self.folder.exists()
        self._keep = False
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.folder))
        self._lock = os.open(self.path / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # the system drops it with the process
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        if self._made:
            with contextlib.suppress(OSError):  # committed, or somebody else writes there
                self.folder.rmdir()

    def write_json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(
            json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    def commit(self) -> None:
        staged = [str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()]
        staged = sorted(name for name in staged if name not in (LOCK_NAME, SUMS_FILE))
        sums = [f"{sha256(self.path / n, OP)}  {n}\n" for n in staged if os.sep not in n]
        (self.path / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
        staged.append(SUMS_FILE)
        staged.sort(key=lambda name: ((name == INDEX_FILE) + 2 * (name == CONFIG_FILE), name))
        mode = (self.path / CONFIG_FILE).stat().st_mode & 0o777  # safetensors alone makes 0o600
        for name in staged:
            os.chmod(self.path / name, mode)
            with open(self.path / name, "rb+") as handle:
                os.fsync(handle.fileno())
        for name in staged:
            if (self.folder / name).is_dir():  # no rename would replace it
                raise IsADirectoryError(errno.EISDIR, f"a folder named {name}")
        shards = [p.name for p in self.folder.glob("model*.safetensors") if p.is_file()]
        shards = [name for name in shards if SHARD_NAME.fullmatch(name)]  # of an earlier checkpoint
        earlier = dict.fromkeys([CONFIG_FILE, INDEX_FILE, SUMS_FILE, *shards, *staged])
        aside = self.path / ASIDE
        renames = [(self.folder / name, aside / name) for name in earlier]
        renames = [(now, then) for now, then in renames if os.path.lexists(now)]
        renames += [(self.path / name, self.folder / name) for name in staged]
        done: list[tuple[Path, Path]] = []
        try:
            for now, then in renames:
                then.parent.mkdir(parents=True, exist_ok=True)
                done.append((now, then))
                os.replace(now, then)
            if hasattr(os, "O_DIRECTORY"):
                folder = os.open(self.folder, os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except BaseException as error:
            self._take_back(done, error)
            raise

    def _take_back(self, done: list[tuple[Path, Path]], error: BaseException) -> None:
        """Undo these renames, of which the last may not have happened."""
        self._keep = True
        for now, then in reversed(done):
            try:
                if os.path.lexists(then):
                    os.replace(then, now)
            except OSError as second:
                earlier = then.is_relative_to(self.path / ASIDE)
                kind, place = ("earlier", self.path / ASIDE) if earlier else ("new", self.path)
                got = f"{error}, and {second.strerror} where files were put back"
                remedy = (
                    f"Nothing reads {self.folder} as a model now. Before anything is saved there "
                    f"again, move what {place} holds to it, config.json last: the {kind} model."
                )
                expected = f"a folder that can be written, {self.folder}"
                number = second.errno or errno.EIO
                raise HalfWritten(number, message(OP, expected, got, remedy)) from error
        self._keep = False


Group = tuple[int, Callable[[], dict[str, Tensor]]]


def write_shards(stage: StagedFolder, groups: Sequence[Group], max_shard_size: int) -> None:
    """Write groups of tensors as safetensors shards plus index into a StagedFolder; holds one
    shard in memory at a time.

    Args:
        groups: list of (nbytes, make) with make() -> {name: CPU tensor}; a group never straddles
            two shards.
        max_shard_size: bytes; a larger group gets a shard of its own.
    """
    check(max_shard_size > 0, OP, "max_shard_size > 0", max_shard_size)
    shards: list[list[Callable[[], dict[str, Tensor]]]] = [[]]
    used = 0
    for nbytes, make in groups:
        if shards[-1] and used + nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(make)
        used += nbytes

    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        check(
            SHARD_NAME.fullmatch(file) is not None,
            OP,
            "at most 99999 shards",
            len(shards),
            "Raise max_shard_size.",
        )
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, tensor in (item for make in shard for item in make().items()):
            storage = tensor.untyped_storage()
            if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
                tensor = tensor.clone()  # safetensors refuses tensors that share memory
            storages.add(tensor.untyped_storage().data_ptr())
            tensors[name] = tensor
        save_file(tensors, stage.path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        stage.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
