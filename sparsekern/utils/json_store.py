"""Small readable JSON files of measured results, safe under concurrent writers.

    {"version": 1, "entries": {"<key>": <anything JSON>, ...}}

A reader needs no lock, because a file appears by rename and is therefore always complete. A writer
holds an exclusive lock (flock on NAME.lock, a file of its own, since a rename replaces NAME) while
it reads, changes and renames, so that no entry of another process is lost. A file that cannot be
used (damaged, or of another version) counts as empty, with one warning per process; the next update
keeps it as NAME.bak.

By hand: the libraries that lock a file (filelock) or replace it (atomicwrites, unmaintained) do one
half each, and the order of the two is what matters.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsekern.utils.files import open_lock, read_regular, write_atomic

VERSION = 1
MAX_BYTES = 2**26  # the shipped tables have some 100 KiB

_warned: set[str] = set()


def cache_folder() -> Path:
    """The user's folder for what can be made again: sparsekern below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekern"


def load(path: str | os.PathLike[str], version: int = VERSION) -> dict[str, Any]:
    """The entries of a file: a dict with str keys, the caller's own.

    Args:
        path: of the file; it need not exist.
        version: what "version" must be in the file. Raise it when the meaning of entries changes.
    Returns:
        {} when there is no file, and with a UserWarning (one per path and process) when it cannot
        be read, is no JSON, or has another version or form.
    """
    entries, why = _read(path, version)
    if why and os.fspath(path) not in _warned:
        _warned.add(os.fspath(path))
        warnings.warn(f"sparsekern: {path} is ignored: {why}", UserWarning, stacklevel=2)
    return entries


def update(
    path: str | os.PathLike[str],
    change: Callable[[dict[str, Any]], None],
    version: int = VERSION,
) -> dict[str, Any]:
    """Change a file's entries under its lock: read, `change(entries)` in place, write by rename.

    Args:
        path: of the file; it and its folder are created when missing.
        change: gets the entries and changes them; when it raises, the file stays as it is. It
            runs under the lock: no measuring in there.
        version: see `load`.
    Returns:
        The entries as they were written.
    Raises:
        OSError: the folder cannot be written.   TypeError: an entry is not JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        entries = load(path, version)
        change(entries)
        content = {"version": version, "entries": entries}
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
        if _read(path, version)[1]:
            os.replace(path, f"{path}.bak")
        write_atomic(path, text.encode())
    return entries


def _read(path: str | os.PathLike[str], version: int) -> tuple[dict[str, Any], str]:
    """(entries, ""), or ({}, why the file cannot be used)."""
    try:
        content = json.loads(read_regular(path, MAX_BYTES), parse_constant=_no_number)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{type(error).__name__}: {error}"
    if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
        return {}, 'expected {"version": ..., "entries": {...}}'
    found = content.get("version")
    if type(found) is not int or found != version:
        return {}, f"expected version {version}, got {found!r:.40}"
    return content["entries"], ""


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of `path`, against other processes and other threads."""
    with open_lock(f"{path}.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
