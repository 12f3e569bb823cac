"""Transformers' own load and save functions on pruned models.

    import sparsekern
    model = AutoModelForCausalLM.from_pretrained(DIR)   # the 2:4 model
    model.save_pretrained(OTHER)                        # the folder that sparsekern writes

Loading goes through Transformers' extension points for quantizers (`register_quantization_config`,
`register_quantizer`) under the quant_method "sparsekern": Transformers loads every dense tensor,
and compressed layers come from the files without ever being dense. Without this package the same
call ends with an error that names it (formats/disk.py, UNREADABLE_WITHOUT_US).

There is no extension point that sees a model which was pruned after loading, so
`PreTrainedModel.save_pretrained`, which Trainer calls too, is wrapped: models without a
SparseLinear pass through unchanged. `import sparsekern` imports nothing of Transformers; it
registers at once where Transformers is there already, and otherwise when
`transformers.modeling_utils` is imported.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sparsekern.checkpoint.save import save_pretrained
from sparsekern.formats.disk import METHOD
from sparsekern.integrations import attention
from sparsekern.nn.sparse_linear import SparseLinear

OP = "sparsekern.integrations.transformers"
WATCHED = "transformers.modeling_utils"

_lock = threading.RLock()
_registered = False


def register() -> None:
    """Make Transformers read and write folders with compressed layers; once for a process.

    Raises:
        ImportError: no transformers, or one without `register_quantizer`.
    """
    global _registered
    with _lock:
        if _registered:
            return
        from transformers import PreTrainedModel
        from transformers.quantizers import (  # type: ignore[attr-defined]
            register_quantization_config,
            register_quantizer,
        )

        from sparsekern.integrations._transformers_quantizer import (
            SparsekernConfig,
            SparsekernQuantizer,
        )

        register_quantization_config(METHOD)(SparsekernConfig)
        register_quantizer(METHOD)(SparsekernQuantizer)
        attention.register()
        _wrap_save(PreTrainedModel)
        _registered = True


def _wrap_save(cls: Any) -> None:
    original = cls.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if adapters_only or not any(isinstance(m, SparseLinear) for m in self.modules()):
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        asked = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        return save_pretrained(asked.pop("self"), asked.pop("save_directory"), **asked)

    cls.save_pretrained = wrapped


# ---- when Transformers comes after sparsekern ---------------------------------------------------


class _Loader(importlib.abc.Loader):
    """Runs a module's own loader, then `register`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _try_register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds WATCHED through the other finders; knows nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != WATCHED:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(name, path, target)
            if found is not None and found.loader is not None:
                found.loader = _Loader(found.loader)
                return found
        return None


def _try_register() -> None:
    try:
        register()
    except Exception as error:  # a Transformers too old or too new must still be importable
        warnings.warn(
            f"{OP}: this Transformers cannot load or save pruned models by itself ({error}). "
            "Use sparsekern.from_pretrained and sparsekern.save_pretrained.",
            stacklevel=2,
        )


def register_when_imported() -> None:
    """`register` now where Transformers' models are imported already, else when they are."""
    module = sys.modules.get(WATCHED)
    if module is not None and hasattr(module, "PreTrainedModel"):
        _try_register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
