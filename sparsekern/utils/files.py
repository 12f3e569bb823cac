"""Files that are written whole or not at all, and files that are read only if they are files."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from sparsekern.errors import message

# The first bytes of what git leaves in place of a large file that was not fetched.
LFS_POINTER = b"version https://git-lfs"


class NotRegular(OSError):
    """A pipe, a device or a folder where a file is expected."""


def require_reachable(op: str, what: str, folder: str | os.PathLike[str]) -> None:
    """OSError, of the system's kind, for a folder that cannot be looked into (no permission, a
    name that is too long, a circle of links), and ValueError for a name that is no UTF-8, which
    safetensors cannot open. A folder that is not there, or is a file, passes."""
    text = os.fspath(folder)
    remedy = "Give another path."
    try:
        text.encode()
        os.stat(os.path.join(text, "x"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError:
        raise ValueError(
            message(op, f"{what} to be a path in UTF-8", ascii(text), remedy)
        ) from None
    except OSError as error:
        got = f"{text}: {error.strerror}"
        expected = f"{what} to be a path that can be looked into"
        raise type(error)(error.errno, message(op, expected, got, remedy)) from error


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, opened for reading without waiting, as somebody at the other end of a pipe
    could make one do. A link to a regular file is one.

    Raises:
        FileNotFoundError: nothing of that name.   NotRegular: something else.   OSError: not
        readable.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            raise NotRegular(f"{os.fspath(path)} is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        FileNotFoundError, OSError: as open_regular; OSError for more than max_bytes.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(f"{os.fspath(path)} has more than {max_bytes} bytes")
    return data


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename; flushed to
    disk before the rename.

    Raises:
        OSError: with the file, the reason and the remedy; a file of that name is as it was.
    """
    target = os.path.abspath(os.fspath(path))
    temporary = None
    try:
        folder = os.path.dirname(target)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno:
            remedy = "Make room, or give another place, and do it again."
            text = message("sparsekern", f"{target} to be written", str(error.strerror), remedy)
            raise OSError(error.errno, text) from error
        raise


@contextlib.contextmanager
def renamed(op: str, partial: Path, path: Path, remedy: str) -> Iterator[None]:
    """Within: others (torch.save, safetensors) write the file `partial`, which becomes `path` at
    the end, flushed. What goes wrong is an OSError with the remedy, and leaves `path` as it was."""
    try:
        yield
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        text = message(op, f"{path} to be written", str(error), remedy)
        raise OSError(number, text) from error
    finally:
        partial.unlink(missing_ok=True)


def open_lock(path: str | os.PathLike[str]) -> BinaryIO:
    """A file to hold a lock on, made where there is none and never emptied.

    Raises:
        OSError: something else of that name, or the folder cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(f"{os.fspath(path)} is no regular file")
    return os.fdopen(descriptor, "ab")
