"""LoRA on SparseLinear with Hugging Face's peft, by its own extension point.

    config = accept(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    model = peft.get_peft_model(model, config)          # a model with SparseLinear layers
    ... train ...
    merge(model)                                        # prints what the mask costs
    model = model.merge_and_unload()                    # SparseLinear again, still 2:4

The base weight stays compressed and frozen: gradients for x go through sparsekern's own op, and no
dense copy of the weight is made. A merge adds the adapter at the slots that the weight stores; what
falls outside the mask is lost, and said (finetune/lora.py). With accept(..., masked_product=True)
the adapter is trained under the mask, so that nothing is lost. Merges that would break 2:4 do not
exist here; variants of LoRA that need the dense weight (DoRA, PiSSA, OLoRA, ...) are refused. The
adapters of a PeftModel that was pruned afterwards train as they are, and `merge` takes them, too.

Tested with peft 0.21; older releases with the same extension point (0.11 and later) may work.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparsekern.errors import check, message
from sparsekern.finetune import lora
from sparsekern.nn.replace import is_linear
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.arguments import checked, shown

try:
    from peft.tuners.lora.layer import Linear as PeftLinear  # type: ignore[import-not-found]
    from peft.tuners.tuners_utils import check_adapters_to_merge  # type: ignore[import-not-found]
except ImportError as error:
    raise ModuleNotFoundError(
        "sparsekern.integrations.peft: peft is missing. pip install peft.", name="peft"
    ) from error

OP = "sparsekern.integrations.peft"
DENSE_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
# Skip rule for prune_model on a PeftModel: the adapters stay dense, the base layers are pruned.
ADAPTERS = r"re:.*\.lora_[AB]\..*"


def accept(config: Any, masked_product: bool = False, model: nn.Module | None = None) -> Any:
    """Make a LoraConfig put its adapters on SparseLinear layers, too; other layers as before.

    Args:
        config: peft.LoraConfig; changed in place.
        masked_product: train (B·A)∘M instead of B·A: merges then lose nothing but rounding, at the
            price of one dense product per layer and pass, some rows at a time.
        model: what the adapters are for; needed for target_modules="all-linear", which becomes the
            names of its linear layers, dense and 2:4, but the head's.
    Returns:
        The config.
    Raises:
        ValueError: an option that needs the dense weight, "all-linear" without a model.
        TypeError: the config of another method than LoRA.
    """
    op = f"{OP}.accept"
    lora_type = getattr(getattr(config, "peft_type", None), "value", None) == "LORA"
    good = lora_type and not isinstance(config, type)
    remedy = "Other methods need dense layers: sparsekern.decompress_model(model)."
    check(good, op, "config: a peft.LoraConfig", shown(config), remedy, TypeError)
    targets = config.target_modules
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    if all_linear:  # peft itself looks for nn.Linear alone
        remedy = "Pass accept(config, model=model), or name them: ['q_proj', 'v_proj']."
        expected = "a model for target_modules='all-linear'"
        check(isinstance(model, nn.Module), op, expected, shown(model), remedy)
    _check_config(op, config)
    if all_linear and model is not None:
        config.target_modules = _all_linear(model, config.task_type)
    config._register_custom_module(
        {SparseLinear: MaskedSparseLora if masked_product else SparseLora}
    )
    return config


def _all_linear(model: nn.Module, task_type: Any) -> set[str]:
    """Names of the linear layers but the head's, which peft leaves alone as well: the output
    embedding, or a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    heads = [get_head()] if callable(get_head) else []
    if str(getattr(task_type, "value", task_type)) in ("SEQ_CLS", "TOKEN_CLS"):
        heads += [getattr(model, name, None) for name in ("score", "classifier")]
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, SparseLinear) or is_linear(module))
        and not any(module is head for head in heads)
    }


class SparseLora(PeftLinear):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """peft's LoRA layer with a SparseLinear as base: y = base(x) + s·B(A(dropout(x))).

    Attributes:
        merge_losses: adapter name -> share of its output that the last merge lost.
    """

    masked = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.merge_losses: dict[str, float] = {}
        self._unmerged: Any = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """peft's way to a first adapter and to further ones."""
        if (config := kwargs.get("config")) is not None:
            _check_config(OP, config)
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """peft's call: `add`, with a UserWarning where the mask takes a part of an adapter.

        Args:
            safe_merge: of no effect: a result that is not finite is always refused.
            adapter_names: None for the active ones.
        """
        if adopt(self) is PeftLinear:
            PeftLinear.merge(self, safe_merge, adapter_names)
            return
        if self.add(adapter_names) > 0:
            expected, got = "adapters inside the masks", "some that reach outside, where it is lost"
            remedy = (
                "Call merge(model) of sparsekern.integrations.peft, which prints how much, keep "
                "them unmerged, or train with accept(config, masked_product=True)."
            )
            warnings.warn(message(f"{OP}.merge", expected, got, remedy), stacklevel=2)

    def add(self, adapter_names: list[str] | None) -> float:
        """Add the adapters at the slots that the weight stores; 2:4 and metadata stay.

        Returns:
            The largest share of an adapter that is lost.
        Notes:
            The values before the first merge are kept on the host, for an exact `unmerge`.
        """
        names = check_adapters_to_merge(self, adapter_names)
        base = self.get_base_layer()
        for name in names:
            if name not in self.lora_A:
                continue
            self.check_mergeable(name)
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            merged = lora.merge(base.weight, a, b, self.scaling[name])
            if self._unmerged is None:
                self._unmerged = base.weight.rowmajor().cpu().clone()
            base.weight = merged.weight.to(dtype=base.weight.dtype)
            # Trained under the mask, what lies outside it was never part of the output.
            self.merge_losses[name] = 0.0 if self.masked else merged.loss
            self.merged_adapters.append(name)
        return max((self.merge_losses[name] for name in names if name in self.lora_A), default=0.0)

    def check_mergeable(self, name: str) -> None:
        """ValueError for an adapter that no merge can take, TypeError for such a base weight."""
        op, remedy = f"{OP}.merge", "Keep the adapter unmerged."
        biased = self.lora_bias.get(name)
        check(not biased, op, f"lora_bias=False in adapter {name!r}", biased, remedy)
        remedy = "Merge before sparsekern.decompress_model(model)."
        expected = "a 2:4 layer under an adapter with masked_product=True"
        held = isinstance(self.get_base_layer(), SparseLinear)
        check(held, op, expected, "one that was made dense", remedy)
        lora.check_mergeable(op, self.get_base_layer().weight)

    def unmerge(self) -> None:
        """The weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        expected, got = "weights from before the merge", "a model pruned after the merge"
        check(self._unmerged is not None, f"{OP}.unmerge", expected, got, "Keep it merged.")
        base = self.get_base_layer()
        got = "a layer that was made dense after the merge"
        check(
            isinstance(base, SparseLinear), f"{OP}.unmerge", "a 2:4 layer", got, "Keep it merged."
        )
        base.weight = self._unmerged.to(base.weight.device)
        self._unmerged = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense product under the mask, s·(B·A)∘M [out, in]: for inspection."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        delta: Tensor = (b @ a) * self.scaling[adapter]
        mask: Tensor = self.get_base_layer().weight.mask().to(delta.device)
        return delta * mask


class MaskedSparseLora(SparseLora):
    """SparseLora trained under the mask: y = base(x) + s·x·((B·A)∘M)ᵀ."""

    masked = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        bitmask = self.get_base_layer().weight.bitmask()
        self.register_buffer("kept_bits", bitmask, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            remedy = "Switch adapters with set_adapter."
            raise ValueError(message(OP, "one adapter per batch", "adapter_names", remedy))
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            inner = self.lora_dropout[name](x.to(a.dtype))
            product = lora.masked_product(inner, a, b, self.kept_bits, self.scaling[name])
            if self.lora_bias[name]:
                product = product + self.lora_B[name].bias * self.scaling[name]
            result = result + product.to(result.dtype)
        return result


def adopt(module: nn.Module) -> Any:
    """Make peft's own layer, whose base was pruned afterwards, a SparseLora, and the other way
    round one whose base was made dense; the class that it has then."""
    sparse = isinstance(module._modules.get("base_layer"), SparseLinear)
    if type(module) is PeftLinear and sparse:
        module.__class__ = SparseLora
        module.__dict__.update(merge_losses={}, _unmerged=None)
    elif type(module) is SparseLora and not sparse and not module.merged:
        module.__class__ = PeftLinear
    return type(module)


@checked("sparsekern.integrations.peft.merge")
def merge(
    model: nn.Module, adapter_names: Sequence[str] | None = None, quiet: bool = False
) -> float:
    """Merge the adapters of every SparseLinear of a PeftModel and print what the mask took.

    Args:
        model: a PeftModel, or any module above its layers; it may have been pruned afterwards.
        adapter_names: None: active ones.
        quiet: do not print.
    Returns:
        The largest loss of a layer, ‖(1 − M)∘ΔW‖² / ‖ΔW‖²: 0 for what was trained under the mask.
    Raises:
        ValueError: no such layers or adapters, or lora_bias; nothing is merged.
    """
    op = f"{OP}.merge"
    for module in model.modules():
        adopt(module)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SparseLora)]
    remedy = "Call accept(config) before get_peft_model."
    check(layers, op, "LoRA layers on SparseLinear", "none", remedy)
    names = None if adapter_names is None else list(adapter_names)
    known = sorted({name for _, layer in layers for name in layer.lora_A})
    expected = f"adapter_names in {known}"
    check(set(names or ()) <= set(known), op, expected, names, "None means the active ones.")
    for _, layer in layers:  # all of them, before the first one changes
        for name in layer.active_adapters if names is None else names:
            layer.check_mergeable(name)
    losses = {name: layer.add(names) for name, layer in layers}
    worst = max(losses, key=lambda name: losses[name])
    if not quiet:
        mean = sum(losses.values()) / len(losses)
        print(
            f"merged {len(losses)} layers, masks kept; the masks took {mean:.1%} of the adapters "
            f"(‖(1 − M)∘ΔW‖² / ‖ΔW‖²) on average, {losses[worst]:.1%} at worst ({worst})"
        )
    return losses[worst]


def unmerge(model: nn.Module) -> None:
    """Undo `merge` in every layer, bit for bit."""
    for module in model.modules():
        if isinstance(module, SparseLora) and module.merged:
            module.unmerge()


def _check_config(op: str, config: Any) -> None:
    """Refuse what needs the dense weight."""
    init = config.init_lora_weights
    dense = isinstance(init, str) and init.startswith(DENSE_INITS)
    remedy = "SparseLinear has no dense weight: use init_lora_weights=True."
    check(not dense, op, "init_lora_weights without the base weight", repr(init), remedy)
    variants = {f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")}
    for name in sorted(variants | {"use_dora"}):
        value = getattr(config, name, None)
        check(not value, op, f"a plain LoRA, without {name}", shown(value), "Leave it out.")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and compressed weights of a model."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    return total + sum(m.weight.nbytes for m in sparse)


__all__ = [
    "ADAPTERS",
    "MaskedSparseLora",
    "SparseLora",
    "accept",
    "merge",
    "unmerge",
    "weight_bytes",
]
