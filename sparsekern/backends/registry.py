"""The backends by name, and which of them computes a problem.

    cuda        backends/cuda/backend.py, with the native module (sparsekern/_native.py)
    cuda-mma    the same with one kernel for every GPU, which is never preferred on Hopper
    cuda-precise  quantised weights, with the sums of e4m3 in float32; only on request
    cuda-a16    quantised weights, with x in its 16 bits whatever the tokens; only on request
    triton      backends/triton/backend.py
    cpu         backends/cpu.py
    cusparselt  backends/cusparselt/backend.py, for weights that were packed for it

The weight's layout, the device and the shapes choose; nothing global does. backends/__init__.py
registers these, and `register_backend` others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsekern.backends.protocol import Backend, Problem
from sparsekern.errors import check, message
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.utils.arguments import shown

_BACKENDS: dict[str, Backend] = {}
_PREFERENCE: dict[str, list[str]] = {}  # {device type: names, the first one is asked first}
_watchers: list[Callable[[], None]] = []


def register_backend(
    backend: Backend, device: str | None = None, before: str | None = None
) -> Backend:
    """Make a backend known to `sparsekern.linear`, from inside or outside the package.

    Args:
        backend: see protocol.Backend.
        device: type of device, "cpu" or "cuda", on which it is asked without being named; None:
            only where `backend=` names it.
        before: name of the backend that it is asked before; None: it is asked last.
    Returns:
        backend.
    Raises:
        TypeError: it lacks one of the methods, or is a class.   ValueError: the name is taken,
        another type of device, or `before` is not asked on this one.
    """
    op = "sparsekern.register_backend"
    if not isinstance(backend, Backend) or isinstance(backend, type):
        expected = "a backend, an object with name, supports, bind and explain"
        raise TypeError(message(op, expected, type(backend).__name__, "See protocol.Backend."))
    name = backend.name
    check(isinstance(name, str), op, "text as the backend's name", shown(name), exc=TypeError)
    check(name not in _BACKENDS, op, "a new name", repr(name), "Choose another.")
    check(_is_device_type(device), op, "device: a type such as 'cpu' or 'cuda'", shown(device))
    asked = _PREFERENCE.setdefault(device, []) if device is not None else []
    known = before is None or before in asked
    remedy = "Leave it None." if device is not None else "Say on which type: device='cpu'."
    check(known, op, f"before among {asked} (device {device!r})", repr(before), remedy)
    asked.insert(len(asked) if before is None else asked.index(before), name)
    _BACKENDS[name] = backend
    changed()
    return backend


def _is_device_type(device: object) -> bool:
    try:
        return device is None or torch.device(device).type == device  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False


def unregister_backend(name: str) -> None:
    """Take back what `register_backend` did.

    Raises:
        ValueError: no such backend.
    """
    check(name in _BACKENDS, "sparsekern.unregister_backend", "a backend's name", repr(name))
    del _BACKENDS[name]
    for names in _PREFERENCE.values():
        if name in names:
            names.remove(name)
    changed()


def backends() -> tuple[str, ...]:
    """Names of all backends, in the order in which they were registered."""
    return tuple(_BACKENDS)


def preference(device: str) -> tuple[str, ...]:
    """Names of the backends that are asked on this type of device, in order."""
    return tuple(_PREFERENCE.get(device, ()))


def watch(forget: Callable[[], None]) -> None:
    """Have `forget` called whenever a problem may be computed otherwise than before."""
    _watchers.append(forget)


def changed() -> None:
    """To be called by whoever changes what `choose`, or a backend's `bind`, would return."""
    for forget in _watchers:
        forget()


def _refusal(backend: Backend, problem: Problem) -> str | None:
    if problem.gated is not None and not getattr(backend, "gated", False):
        return f"backend {backend.name!r} has no kernel for a gated pair"
    if problem.quantized is not None and not getattr(backend, "quantized", False):
        return f"backend {backend.name!r} has no kernel for quantised x"
    return backend.supports(problem)


def find(problem: Problem) -> tuple[Backend | None, list[str]]:
    """The first backend of the problem's device that can compute it, or None, and why not others.

    The one whose own layout the weight has comes first.
    """
    names, layout = _PREFERENCE.get(problem.device.type, []), problem.spec.layout
    refusals: list[str] = []
    for name in sorted(names, key=lambda name: _own_layout(name) != layout):
        backend = _BACKENDS[name]
        why = _refusal(backend, problem)
        if why is None:
            return backend, refusals
        refusals.append(f"not {name}: {why}")
    return None, refusals


def _own_layout(name: str) -> str | None:
    return getattr(_BACKENDS[name], "layout", None)


def check_name(op: str, name: str | None) -> None:
    """ValueError for a name that no backend has; None has no need of one."""
    if name is not None and not (isinstance(name, str) and name in _BACKENDS):
        names = ", ".join(map(repr, _BACKENDS))
        raise ValueError(message(op, f"backend in {names}", repr(name), "Leave it None."))


def choose(problem: Problem, name: str | None = None, op: str = "sparsekern.linear") -> Backend:
    """The backend that computes the problem: the best one, or the one that is asked for by name.

    Raises:
        ValueError: unknown name.   NotImplementedError: the one asked for, or every one, cannot
        compute it; the message says why.
    """
    if name is None:
        found, refusals = find(problem)
        if found is not None:
            return found
        got = "; ".join(refusals) or f"device {problem.device}"
        remedy = "Move x and the weight to the CPU, or use weight.rowmajor()."
        raise NotImplementedError(message(op, "a backend for this problem", got, remedy))
    check_name(op, name)
    why = _refusal(_BACKENDS[name], problem)
    if why is not None:
        expected = f"a problem that backend {name!r} can run"
        raise NotImplementedError(message(op, expected, why, "Leave backend=None."))
    return _BACKENDS[name]


def best_layout(spec: WeightSpec, device: torch.device) -> str:
    """The layout in which such a weight is best kept on this device.

    That of the first backend that prefers one; "rowmajor" where none does, and for empty weights.
    """
    for backend in _BACKENDS.values() if 0 not in spec.shape else ():
        prefers = getattr(backend, "prefers", None)
        wanted: str | None = prefers(spec, device) if prefers is not None else None
        if wanted is not None:
            return wanted
    return ROWMAJOR
