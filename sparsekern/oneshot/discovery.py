"""Reading and editing models: which Linear layers exist, which can be pruned, and where the decoder
blocks are.

Works on any nn.Module; nothing here names a model family. The decoder blocks are the largest
nn.ModuleList whose members are of one class and hold Linear layers: that finds `model.layers`
(Llama, Mistral, Qwen, Gemma, Phi), `model.decoder.layers` (OPT) and `transformer.h` (GPT-2) alike.
Transformers' Conv1D (GPT-2) is a Linear whose weight is stored transposed, as [in_features,
out_features]; every weight that leaves this file is [out_features, in_features].
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsekern.errors import check

OP = "sparsekern.prune_model"
PRUNABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Modules that read child.weight themselves, so that a child of theirs has to stay an nn.Linear.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Layer:
    """One Linear layer of a model.

    name: full module name.  module: nn.Linear or Conv1D.  block: index of its decoder block, None
        outside the blocks.
    reason: why it stays dense, None if it is to be pruned.
    """

    name: str
    module: nn.Module
    block: int | None = None
    reason: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple(dense_weight(self.module).shape)


def is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D, recognised without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (any subclass) or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight as [out_features, in_features]; for Conv1D a transposed view."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


@torch.no_grad()
def write_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Overwrite the dense weight in place with `weight` [out_features, in_features]; the Parameter
    stays the same object."""
    module.weight.copy_(weight.t() if is_conv1d(module) else weight)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at every place of the tree where `old` stands (a module may be registered under
    several names)."""
    new.train(old.training)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder blocks: (name of their ModuleList, blocks in order), or ("", []) when the model
    has none.

    Of all nn.ModuleLists whose members are of one class and each hold a Linear below them, the one
    with the most parameters. Experts inside a block therefore lose to the blocks around them.
    """
    best, best_size = ("", []), 0
    for name, module in model.named_modules():
        blocks = list(module) if isinstance(module, nn.ModuleList) else []
        one_class = len({type(b) for b in blocks}) == 1 and not is_linear(blocks[0])
        if one_class and all(any(is_linear(m) for m in b.modules()) for b in blocks):
            size = sum(p.numel() for p in module.parameters())
            if size > best_size:
                best, best_size = (name, blocks), size
    return best


def find_layers(model: nn.Module, pattern: tuple[int, int], compress: bool) -> list[Layer]:
    """Every Linear of the model in tree order, with the reason for those that cannot be pruned.

    Args:
        pattern: (n, m): n kept of every m; in_features must be a multiple of m.
        compress: the layers are to be replaced, so that a module which reads their weight itself
            rules them out.
    Raises:
        ValueError: the model itself is a Linear (it cannot be replaced in place), or a weight is on
            the meta device.
    """
    check(
        not is_linear(model),
        OP,
        "a model that contains Linear layers",
        f"a bare {type(model).__name__}",
        "Use SparseLinear.from_linear, or wrap it in nn.Sequential.",
    )
    block_name, blocks = find_blocks(model)
    index_of = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    tied = tied_names(model)
    layers = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        check(
            not module.weight.is_meta,
            OP,
            f"weights in memory, {name}",
            "a meta tensor",
            "Load the model first.",
        )
        layer = Layer(name, module, index_of.get(id(module)))
        layer.reason = _why_not(module, parents.get(id(module)), tied.get(name), pattern, compress)
        layers.append(layer)
    return layers


def _why_not(module, parent, tied_with, pattern, compress) -> str | None:
    """Why this Linear cannot be pruned, or None."""
    weight = dense_weight(module)
    out_features, in_features = weight.shape
    if tied_with:
        return f"weight tied to {tied_with}"
    if parametrize.is_parametrized(module):
        return "weight is parametrized"
    if not is_conv1d(module) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has its own forward"
    if compress and isinstance(parent, READS_WEIGHTS):
        return f"{type(parent).__name__} reads the weight itself"
    if weight.dtype not in PRUNABLE_DTYPES:
        return (
            f"dtype {str(weight.dtype).removeprefix('torch.')} is not float32, float16 or bfloat16"
        )
    if weight.numel() == 0:
        return "the weight is empty"
    if in_features % pattern[1]:
        return f"in_features {in_features} is not a multiple of {pattern[1]}"
    return None


def tied_names(model: nn.Module) -> dict[str, str]:
    """Module name of each shared weight -> name of another parameter that is the same object or
    lies in the same memory."""
    places = defaultdict(list)
    seen = set()
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and (id(module), key) not in seen:
                seen.add((id(module), key))
                memory = (
                    parameter.data_ptr()
                    if parameter.numel() and not parameter.is_meta
                    else id(parameter)
                )
                places[(memory, parameter.device, parameter.numel())].append(
                    (module_name, f"{module_name}.{key}")
                )
    tied = {}
    for group in places.values():
        for module_name, own in group:
            others = [name for _, name in group if name != own]
            if others and own.endswith(".weight"):
                tied.setdefault(module_name, others[0])
    return tied


def output_layer_names(model: nn.Module) -> list[str]:
    """Names of the output embedding: what `get_output_embeddings()` returns, under whatever name it
    is registered."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [name for name, module in model.named_modules() if head is not None and module is head]


def is_transformers(model: nn.Module) -> bool:
    """A Transformers model: takes token ids by keyword and has a config. Recognised without
    importing transformers."""
    return hasattr(model, "config") and callable(getattr(model, "get_input_embeddings", None))


def fingerprint(model: nn.Module) -> str:
    """A short text that changes when the model does: names, shapes, dtypes and a checksum of the
    bits of every parameter.

    The checksum is a wrapping sum of the raw words, read once at memory speed: it guards against
    mixing up checkpoints, not against forgery.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        shape, bits = tuple(parameter.shape), _bit_sum(parameter.detach())
        digest.update(f"{name} {shape} {parameter.dtype} {bits}\n".encode())
    return digest.hexdigest()[:32]


def _bit_sum(tensor: torch.Tensor) -> int:
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
    return (
        int(tensor.contiguous().reshape(-1).view(word).sum(dtype=torch.int64))
        if tensor.numel()
        else 0
    )
