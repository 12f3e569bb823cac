"""Fingerprints of a model and of a function: what a resumed run has to share with the one that it
continues.

Both are sha256 over everything that decides the result, position by position: of a model the bits
of every parameter and buffer, the classes of its modules with the code of their forwards, their
plain attributes (eps, number of heads, scaling, ...), their hooks and the configuration; of a
function its code, defaults, closure and the globals that it names. They guard against mixing up two
runs. What cannot be told apart is refused, not guessed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import message
from sparsekern.nn.wrappers import bare, named_modules

OP = "sparsekern.prune_model(resume=)"
# Attributes of modules that say where a model came from or what was done with it, not what it
# computes.
_NOT_THE_MODEL = frozenset({"training", "name_or_path", "warnings_issued", "model_tags"})
_NOT_THE_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}
)
# What nn.Module itself keeps in every module, and what Transformers, accelerate and torch.compile
# leave there.
_INTERNAL = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "_hf_hook",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_is_torch_compile",
    "_old_forward",
    "_weight_conversions",
}
# What Transformers notes in a class the first time that it is asked.
_CACHED = frozenset(
    {
        "_auto_class",
        "_can_set_attn_implementation_cached_value",
        "_can_set_experts_implementation_cached_value",
    }
)
# Choices of a config that its to_dict leaves out, and that results depend on.
_CHOICES = ("_attn_implementation", "_experts_implementation")
# Modules whose functions are what their names say; everything else is read.
_LIBRARIES = frozenset({"torch", "numpy", "transformers", "sparsekern"}) | sys.stdlib_module_names
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


# {id: (value, its fingerprint)} of what a walk has met; "again" while it is still inside.
Seen = dict[int, tuple[Any, str]]


def of_model(model: nn.Module) -> str:
    """A text of 64 letters that changes when anything does that the model's outputs depend on."""
    sha = hashlib.sha256()
    codes: dict[type, str] = {}
    seen: Seen = {}
    given, model = model, bare(model)
    # A method of one of them is not a model of its own.
    for name, module in (*named_modules(given), *model.named_modules()):
        seen[id(module)] = module, f"module {name}"
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in codes:
            codes[kind] = _of_class(kind, seen)
        sha.update(f"{name} {kind.__module__}.{kind.__qualname__} {codes[kind]}\n".encode())
        for key, value in sorted(vars(module).items()):
            if key in _INTERNAL or key in _NOT_THE_MODEL or isinstance(value, nn.Module):
                continue
            part = _attribute(value, seen)
            if part is not None:
                sha.update(f"{key}={part}\n".encode())
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in hooks.values():
                sha.update(f"hook {_attribute(hook, seen) or ''}\n".encode())
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    known: dict[int, str] = {}
    for name, tensor in tensors:
        if id(tensor) not in known:
            known[id(tensor)] = of_tensor(tensor)
        sha.update(f"{name} {known[id(tensor)]}\n".encode())
    config = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)):
        sha.update(_of_config(config).encode())
    return sha.hexdigest()


def of_tensor(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bits."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        sha.update(bits_of(tensor.cpu()).numpy().data)
    return sha.hexdigest()


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 [bytes]; no copy where it is contiguous."""
    flat = tensor.detach().contiguous()
    # A contiguous tensor may have any stride in a dimension of one element.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def of_tensors(tensors: Iterable[tuple[str, Tensor]], *texts: str) -> str:
    """sha256 over named tensors and texts, in order."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{len(name)} {name} {of_tensor(tensor)}\n".encode())
    for text in texts:
        sha.update(f"{len(text)} {text}\n".encode())
    return sha.hexdigest()


def of_function(function: Callable[..., Any]) -> str:
    """A text that changes when the function's code, defaults, closure, bound arguments, or a global
    that it names does.

    Raises:
        ValueError: it depends on something whose content cannot be read.
    """
    return hashlib.sha256(_of_value(function, {}).encode()).hexdigest()


def _attribute(value: Any, seen: Seen) -> str | None:
    """The fingerprint of a module's attribute; None for what has none (caches, handles, ...)."""
    try:
        return _of_value(value, seen)
    except ValueError:
        return None


def _of_config(config: Any) -> str:
    """A Transformers config, without what changes no result."""
    text = _of_value(_configuration(config.to_dict()), {})
    return text + "".join(f" {key}={getattr(config, key, None)!r}" for key in _CHOICES)


def _configuration(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: _configuration(v) for k, v in value.items() if k not in _NOT_THE_CONFIG}
        return {str(k): kept[k] for k in sorted(kept, key=str)}
    if isinstance(value, (list, tuple)):
        return [_configuration(v) for v in value]
    return value if isinstance(value, _PLAIN) else str(value)


def _of_class(kind: type, seen: Seen) -> str:
    """The functions and attributes of a class, its bases up to nn.Module included; of functions
    outside libraries what they read from their globals, too."""
    texts = []
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in sorted(vars(base).items()):
            value = value.fget if isinstance(value, property) else value
            inner: Any = getattr(value, "__func__", value)
            function = inspect.unwrap(inner)
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType):
                whole = None if _of_library(base.__module__) else _attribute(function, seen)
                texts.append(f"{name} {whole or _of_code(code)}")
            elif not name.startswith("__") and name not in _CACHED:
                texts.append(f"{name} {_attribute(value, seen) or ''}")
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _of_code(code: CodeType) -> str:
    constants = [
        _of_code(c)
        if isinstance(c, CodeType)
        else repr(sorted(c, key=repr) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    parts = (code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _of_value(value: Any, seen: Seen) -> str:
    """The content of a value as text."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, enum.Enum):
        return f"enum:{value!r}"
    if isinstance(value, ModuleType):
        return f"module:{value.__name__}"
    if id(value) not in seen:
        seen[id(value)] = value, "again"
        try:
            text = _of_object(value, seen)
        except BaseException:
            del seen[id(value)]
            raise
        seen[id(value)] = value, hashlib.sha256(text.encode()).hexdigest()
    return seen[id(value)][1]


def _of_object(value: Any, seen: Seen) -> str:
    def inner(part: Any) -> str:
        return _of_value(part, seen)

    if isinstance(value, Tensor):
        return f"tensor:{of_tensor(value)}"
    if isinstance(value, type):
        text = f"class:{value.__module__}.{value.__qualname__}"
        return text if _of_library(value.__module__) else f"{text}({_of_class(value, seen)})"
    if hasattr(value, "to_json_string") and callable(getattr(value, "to_dict", None)):
        return f"config:{_of_config(value)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(k)}: {inner(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (set, frozenset)):
        return "set(" + ", ".join(sorted(inner(v) for v in value)) + ")"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}(" + ", ".join(inner(v) for v in value) + ")"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, MethodType):
        return f"method({inner(value.__func__)}, {inner(value.__self__)})"
    if isinstance(value, BuiltinFunctionType) or type(value).__name__ in (
        "builtin_function_or_method",
        "method_descriptor",
        "wrapper_descriptor",
    ):
        return f"builtin:{getattr(value, '__module__', '')}.{value.__qualname__}"
    if isinstance(value, FunctionType):
        return _of_python_function(value, inner)
    if isinstance(value, nn.Module):
        return f"nn.Module:{of_model(value)}"
    if type(value).__module__ == "numpy":
        return inner(torch.as_tensor(value))
    if dataclasses.is_dataclass(value) or (hasattr(value, "__dict__") and callable(value)):
        kind = type(value)
        code = _of_class(kind, seen)
        return f"{kind.__module__}.{kind.__qualname__}({code}, {inner(vars(value))})"
    expected = "functions and models made of code, tensors and plain values"
    got = f"a {type(value).__module__}.{type(value).__qualname__}"
    remedy = (
        "Whether it is the same as before cannot be told: leave resume out, or pass it as a value."
    )
    raise ValueError(message(OP, expected, got, remedy))


def _of_python_function(function: FunctionType, inner: Callable[[Any], str]) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if _of_library(function.__module__):
        return f"function:{name}:{_of_code(function.__code__)}"
    parts = [name, _of_code(function.__code__)]
    parts += [inner(function.__defaults__), inner(function.__kwdefaults__)]
    for cell in function.__closure__ or ():
        try:
            parts.append(inner(cell.cell_contents))
        except ValueError as error:
            if "empty" in str(error):
                parts.append("empty cell")
            else:
                raise
    names = _global_names(function.__code__)
    for key in names:
        if key not in function.__globals__:
            continue
        value = function.__globals__[key]
        parts.append(f"{key}={inner(value)}")
        if isinstance(value, ModuleType) and not _of_library(value.__name__):
            # Names that the code reads from it: which of them, the code says.
            found = {k: vars(value)[k] for k in names if k in vars(value)}
            parts += [f"{key}.{k}={inner(v)}" for k, v in found.items()]
    return f"function({', '.join(parts)})"


def _of_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES


def _global_names(code: CodeType) -> list[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= set(_global_names(constant))
    return sorted(names)
