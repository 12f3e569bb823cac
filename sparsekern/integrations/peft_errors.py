"""What peft would do with a SparseLinear in silence, or refuse without saying what to do, as errors
that name the remedy. `import sparsekern` imports nothing of peft: they are put in its place once
peft is imported. What works is in peft.py."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from sparsekern.errors import check
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.safetensors_io import listed
from sparsekern.utils.when_imported import when_imported

OP = "sparsekern.integrations.peft"
OTHERWISE = "Take LoRA, or sparsekern.decompress_model(model) first."


def _install() -> None:
    try:
        _wrap()
    except (ImportError, AttributeError) as error:  # another peft must still be importable
        text = f"{OP}: this peft is not known ({error}): modules_to_save of 2:4 layers do not train"
        warnings.warn(text, stacklevel=2)


def _wrap() -> None:
    from peft.tuners.adaption_prompt.config import prepare_config  # type: ignore[import-not-found]
    from peft.tuners.adaption_prompt.model import (  # type: ignore[import-not-found]
        AdaptionPromptModel,
    )
    from peft.tuners.lora.layer import Linear  # type: ignore[import-not-found]
    from peft.tuners.tuners_utils import (  # type: ignore[import-not-found]
        BaseTuner,
        BaseTunerLayer,
    )
    from peft.utils.other import ModulesToSaveWrapper  # type: ignore[import-not-found]

    start, inject = BaseTuner.__init__, BaseTuner.inject_adapter
    update, prompted = ModulesToSaveWrapper.update, AdaptionPromptModel.add_adapter

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

    @functools.wraps(start)
    def started(
        self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        alone = not isinstance(peft_config, dict)
        _refuse(self, model, peft_config if alone else peft_config.get(adapter_name))
        start(self, model, peft_config, adapter_name, *args, **kwargs)

    @functools.wraps(inject)
    def injected(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        _refuse(self, model, self.peft_config[adapter_name])  # of a further adapter
        return inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(prompted)
    def added(self: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> Any:
        """What it puts around attention asks its layers for Parameters."""
        wanted = prepare_config(config, self.model).target_modules
        held = self.model.named_modules()
        inside = [name for name, module in held if isinstance(module, SparseLinear)]
        _check_none(config, [name for name in inside if f".{wanted}." in name], OTHERWISE)
        return prompted(self, adapter_name, config, *args, **kwargs)

    def merging(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def merged(self: Any, *args: Any, **kwargs: Any) -> Any:
            """Before the first layer changes: only LoRA's merge keeps 2:4."""
            for name, module in self.model.named_modules():
                own = isinstance(module, BaseTunerLayer) and not isinstance(module, Linear)
                base = module._modules.get("base_layer") if own else None
                expected = "adapters of LoRA, to merge into 2:4 layers"
                got = f"{name} of {type(module).__module__}"
                remedy = "Call sparsekern.decompress_model(model) first."
                check(not isinstance(base, SparseLinear), OP, expected, got, remedy)
            return call(self, *args, **kwargs)

        return merged

    def adopting(call: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(call)
        def adopted(self: Any, *args: Any, **kwargs: Any) -> None:
            from sparsekern.integrations.peft import SparseLora, adopt

            sparse = issubclass(adopt(self), SparseLora)
            own = getattr(self, call.__name__) if sparse else functools.partial(call, self)
            own(*args, **kwargs)

        return adopted

    for name in {"merge_adapter", "merge_and_unload"} & vars(BaseTuner).keys():
        setattr(BaseTuner, name, merging(getattr(BaseTuner, name)))
    Linear.merge, Linear.unmerge = adopting(Linear.merge), adopting(Linear.unmerge)
    BaseTuner.__init__, BaseTuner.inject_adapter = started, injected
    ModulesToSaveWrapper.update, AdaptionPromptModel.add_adapter = updated, added


def _refuse(tuner: Any, model: nn.Module, config: Any) -> None:
    """ValueError where a config wants adapters for a SparseLinear and does not know it: before
    peft changes the model. Some of its methods fail, each with another error, others leave such
    layers out or train nothing of them."""
    if SparseLinear in (getattr(config, "_custom_modules", None) or ()):
        return
    # X-LoRA reads configs of LoRA from disk.
    kinds = [c.peft_type for c in (config, *vars(tuner).get("peft_config", {}).values())]
    lora = all(getattr(kind, "value", kind) == "LORA" for kind in kinds)
    remedy = (
        f"Call accept(config, model=model) first, of {OP}; saved adapters: "
        "peft.PeftModel.from_pretrained(model, folder, config=accept(PeftConfig.from_pretrained("
        "folder)))."
    )
    remedy = remedy if lora else OTHERWISE
    _check_none(config, _targets(tuner, model, config), remedy)


def _check_none(config: Any, names: list[str], remedy: str) -> None:
    expected = "a config that knows SparseLinear, for target_modules"
    check(not names, OP, expected, f"{type(config).__name__} for {listed(names, 4)}", remedy)


def _targets(tuner: Any, model: nn.Module, config: Any) -> list[str]:
    """The 2:4 layers that a config means, by peft's own rules; those of earlier adapters are
    none."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # type: ignore[import-not-found]

    modules = dict(model.named_modules())
    taken = tuple(f"{name}." for name, m in modules.items() if isinstance(m, BaseTunerLayer))
    sparse = [name for name, module in modules.items() if isinstance(module, SparseLinear)]
    sparse = [name for name in sparse if name and not name.startswith(taken)]
    if not sparse:
        return []
    try:
        config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
        wanted = config.target_modules
        if isinstance(wanted, str) and wanted.lower() == "all-linear":  # peft: all nn.Linear
            return sparse
        return [name for name in sparse if tuner._check_target_module_exists(config, name)]
    except (AttributeError, TypeError, ValueError):  # no such config: peft says what is wrong
        return []


def install_when_imported() -> None:
    """Now where peft is imported already, else when it is."""
    when_imported("peft", _install)
