"""What peft would do with a SparseLinear in silence, or refuse without saying what to do, as errors
that name the remedy. `import sparsekern` imports nothing of peft: they are put in its place once
peft is imported. What works is in peft.py."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from sparsekern.errors import check, message
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.when_imported import when_imported

OP = "sparsekern.integrations.peft"


def _install() -> None:
    try:
        _wrap()
    except (ImportError, AttributeError) as error:  # another peft must still be importable
        text = f"{OP}: this peft is not known ({error}): modules_to_save of 2:4 layers do not train"
        warnings.warn(text, stacklevel=2)


def _wrap() -> None:
    from peft import LoraConfig  # type: ignore[import-not-found]
    from peft.tuners.lora.layer import Linear  # type: ignore[import-not-found]
    from peft.tuners.tuners_utils import BaseTuner  # type: ignore[import-not-found]
    from peft.utils.other import ModulesToSaveWrapper  # type: ignore[import-not-found]

    inject, update = BaseTuner.inject_adapter, ModulesToSaveWrapper.update

    @functools.wraps(update)
    def updated(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Its copy of a SparseLinear would have a frozen weight, and nothing would train."""
        held = self.original_module.named_modules()
        frozen = [name for name, module in held if isinstance(module, SparseLinear)]
        kind = type(self.original_module).__name__
        got = f"a {kind} with {frozen[0]!r}" if frozen and frozen[0] else f"a {kind}"
        remedy = "Name it in target_modules, with accept(config), or decompress it: to_linear()."
        expected = "modules_to_save without compressed layers, whose weights are frozen"
        check(not frozen, OP, expected, got, remedy)
        return update(self, adapter_name, *args, **kwargs)

    @functools.wraps(inject)
    def injected(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return inject(self, model, adapter_name, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if SparseLinear.__name__ not in str(error) or str(error).startswith("sparsekern"):
                raise
            config = self.peft_config[adapter_name]
            lora = type(config) is LoraConfig
            remedy = "Call accept(config) first, of sparsekern.integrations.peft."
            remedy = remedy if lora else "Take LoRA, or sparsekern.decompress_model(model) first."
            expected = "a config that knows SparseLinear, for target_modules"
            got = type(config).__name__
            raise ValueError(message(OP, expected, got, remedy)) from error

    def adopting(call: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(call)
        def adopted(self: Any, *args: Any, **kwargs: Any) -> None:
            from sparsekern.integrations.peft import adopt

            own = getattr(self, call.__name__) if adopt(self) else functools.partial(call, self)
            own(*args, **kwargs)

        return adopted

    Linear.merge, Linear.unmerge = adopting(Linear.merge), adopting(Linear.unmerge)
    BaseTuner.inject_adapter = injected
    ModulesToSaveWrapper.update = updated


def install_when_imported() -> None:
    """Now where peft is imported already, else when it is."""
    when_imported("peft", _install)
