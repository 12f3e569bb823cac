"""Old import paths of public names: `from sparsekern.sparse24 import Sparse24` and pickles that
name such a path keep working.

The modules of 0.1.0 lay flat in the package. Each name below stands in sys.modules for the module
that holds the public names now and imports it when one of them is asked for. Being there already,
none is ever set as an attribute of the package, so `sparsekern.linear` stays the function.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

MOVED = {
    "compression": "formats.codec",
    "driver": "oneshot.prune_model",
    "evaluate": "eval.perplexity",
    "export": "checkpoint.export",
    "gated": "ops.gated_op",
    "linear": "nn.sparse_linear",
    "pack": "formats.tile64",
    "report": "oneshot.report",
    "skip": "oneshot.skip",
    "sparse24": "formats.sparse24",
    "texts": "eval.texts",
}


# Public names that lie in another module than the rest of theirs.
MOVED_NAMES = {
    "sparse24": dict.fromkeys(
        ("compress", "decompress", "prune_compress", "verify"), "ops.compress"
    ),
}


class _Moved(ModuleType):
    """Stands for a module under its old name."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self._new = new
        self._elsewhere = MOVED_NAMES.get(old.rpartition(".")[2], {})

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        elsewhere = self._elsewhere.get(name)
        module = self._new if elsewhere is None else f"sparsekern.{elsewhere}"
        return getattr(importlib.import_module(module), name)


def install() -> None:
    """Put the old names into sys.modules."""
    for old, new in MOVED.items():
        name = f"sparsekern.{old}"
        sys.modules.setdefault(name, _Moved(name, f"sparsekern.{new}"))
