"""Transformers' own load and save functions on pruned models.

    import sparsekern
    model = AutoModelForCausalLM.from_pretrained(DIR)   # the 2:4 model
    model.save_pretrained(OTHER)                        # the folder that sparsekern writes

Loading goes through Transformers' extension points for quantizers (`register_quantization_config`,
`register_quantizer`) under the quant_method "sparsekern": Transformers loads every dense tensor,
and compressed layers come from the files without ever being dense. Without this package the same
call ends with an error that names it (formats/config_json.py, UNREADABLE_WITHOUT_US).

No extension point sees a model that was pruned after loading, so `save_pretrained` of
PreTrainedModel, which Trainer calls too, is wrapped: models without a SparseLinear pass through
unchanged. None sees a folder whose entry a caller's `config=` hides, so `from_pretrained` is
wrapped, too. `import sparsekern` imports nothing of Transformers; it registers at once where
Transformers is there already, and otherwise when `transformers.modeling_utils` is imported.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import threading
import warnings
from collections.abc import Mapping
from typing import Any, cast

from sparsekern.checkpoint.save import save_pretrained
from sparsekern.formats.config_json import METHOD, sparsity_entry
from sparsekern.integrations import attention
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.safetensors_io import SUMS_FILE, require
from sparsekern.utils.when_imported import when_imported

OP = "sparsekern.integrations.transformers"
WATCHED = "transformers.modeling_utils"
HUB_WORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

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
        _wrap_load(PreTrainedModel)
        _registered = True


def _wrap_save(cls: Any) -> None:
    original = cls.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if adapters_only:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        asked = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        if not any(isinstance(m, SparseLinear) for m in self.modules()):
            written = original(self, *args, **kwargs)
            if asked.get("is_main_process", True):  # of a pruned model that was there before
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(asked["save_directory"], SUMS_FILE))
            return written
        return save_pretrained(asked.pop("self"), asked.pop("save_directory"), **asked)

    cls.save_pretrained = wrapped


def _wrap_load(cls: Any) -> None:
    original: Any = cls.from_pretrained.__func__

    @functools.wraps(original)
    def wrapped(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        fits = not any(str(key).endswith(".bitmask") for key in kwargs.get("state_dict") or ())
        remedy = "Use load_state_dict on a model that has SparseLinear layers."
        require(fits, OP, "a folder of safetensors files", "a state_dict", remedy)
        if name is not None and kwargs.get("gguf_file") is None:
            kwargs = _as_the_folder_says(cls, name, kwargs)
        return original(cls, name, *args, **kwargs)

    cls.from_pretrained = classmethod(cast(Any, wrapped))


def _as_the_folder_says(cls: Any, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of from_pretrained, where a caller's config (Auto classes pass one, too) gets
    the folder's own entry about weights of ours: it may have none, by quantization_config=None
    too, or that of a model loaded before, or that of the releases that wrote the method of
    compressed-tensors."""
    from transformers import PretrainedConfig

    from sparsekern.integrations._transformers_quantizer import SparsekernConfig

    config = kwargs.get("config")
    said: Any = getattr(config, "quantization_config", None)
    entry, raw = said, {}
    hub = {key: kwargs[key] for key in HUB_WORDS if key in kwargs}
    if said is None or isinstance(said, SparsekernConfig):
        with contextlib.suppress(OSError):  # no config.json, as a caller of an own may have it
            raw = PretrainedConfig.get_config_dict(name, **hub)[0]
        entry = raw.get("quantization_config") or raw.get("compression_config")
    current = isinstance(entry, Mapping) and entry.get("quant_method") == METHOD
    ours = current or sparsity_entry(entry) is not None
    # The class's config may be a part of the folder's (CLIPTextModel), and the entry is above it.
    kind = raw.get("model_type")
    whole = config is None and kind == getattr(cls.config_class, "model_type", kind)
    if (current and whole) or not (ours or isinstance(said, SparsekernConfig)):
        return kwargs
    if not isinstance(config, PretrainedConfig):
        rest = {key: value for key, value in kwargs.items() if key not in (*hub, "config")}
        home, words = (name, hub) if config is None else (config, {})
        build = cls.config_class.from_pretrained
        config, rest = build(home, return_unused_kwargs=True, **words, **rest)
        kwargs = {**hub, **rest}
    config = copy.copy(config)
    config.quantization_config = {**entry, "quant_method": METHOD} if ours else None
    return {**kwargs, "config": config}


# ---- when Transformers comes after sparsekern ---------------------------------------------------


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
    when_imported(WATCHED, _try_register)
