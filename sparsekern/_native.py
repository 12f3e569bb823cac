"""Access to the CUDA module sparsekern._C, which an installation may lack.

Importing this file never fails. The module is looked for on first use; `reason()` says in one
sentence why it is not there, and `sparsekern doctor` prints that sentence.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

_ABSENT = (
    "this installation has no CUDA module: it was installed where no nvcc was found, or with "
    "SPARSEKERN_NO_CUDA=1. Install a CUDA toolkit (or: pip install nvidia-cuda-nvcc "
    "nvidia-cuda-runtime nvidia-cuda-cccl), then install sparsekern again"
)


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Returns (module, "") or (None, reason)."""
    from sparsekern import __version__

    name = f"{__package__}._C"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"the CUDA module does not import: {error}"
        return None, _ABSENT
    except Exception as error:  # a damaged file or a missing system library: reported, never fatal
        return None, f"the CUDA module does not import: {type(error).__name__}: {error}"
    built = module.build_info()["version"]
    if built != __version__:
        return None, (
            f"the CUDA module was built for sparsekern {built}, this is {__version__}. "
            "Install sparsekern again"
        )
    return module, ""


def available() -> bool:
    """True when the CUDA module is installed, imports, and belongs to this version.

    Says nothing of a GPU: see `module().device_count()`.
    """
    return _load()[0] is not None


def reason() -> str:
    """Why the module is not available, as one sentence; empty when it is."""
    return _load()[1]


@cache
def module() -> ModuleType:
    """The module sparsekern._C.

    Raises:
        RuntimeError: it is not available; the message is that of `reason()`.
    """
    found, why = _load()
    if found is None:
        raise RuntimeError(f"sparsekern: {why}.")
    return found
