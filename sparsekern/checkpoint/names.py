"""Names of tensors on disk and in memory, as the installed Transformers maps them.

What a model is called in files is often not what it is called in memory: prefixes come and go with
the head, old checkpoints have old names, experts are stored one by one and computed as one
parameter. Transformers keeps that knowledge with its models, and this file asks it: from release 5
on through its WeightRenaming and WeightConverter objects (`get_model_conversion_mapping`), before
that through `_checkpoint_conversion_mapping` of the class. A compressed layer goes by the name that
its dense weight would have. Modules that are not Transformers' have one name for both.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.checkpoint.experts import (
    ExpertNames,
    Part,
    Place,
    apart,
    converted_parts,
    dense_parts,
    own_place,
    places,
    stacked_parts,
)
from sparsekern.checkpoint.skeleton import own_tensors
from sparsekern.errors import FormatError, message
from sparsekern.formats.forms import join
from sparsekern.utils.safetensors_io import OP, TensorInfo, listed, require

SAVE_OP = "sparsekern.save_pretrained"
OLD_NAMES = {  # of Transformers before release 5, in `_fix_state_dict_key_on_load`
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
    r"weight_g$": "parametrizations.weight.original0",
    r"weight_v$": "parametrizations.weight.original1",
}


@dataclass
class Conversion:
    """Tensors of the files that become tensors of the model together, by one WeightConverter.

    converter: Transformers' object, not filled. first: the name that it is asked to convert to.
    sources: (pattern, name in the files), in the order that the converter expects.
    targets: {name in the model: meta tensor}, once `measure` has run.
    """

    converter: Any
    first: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    targets: dict[str, Tensor] = field(default_factory=dict)

    def run(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """{name in the model: tensor}; `read` gives one tensor of the files by name."""
        filled = deepcopy(self.converter)
        for pattern, name in self.sources:
            filled.add_tensor(self.first, name, pattern, read(name))
        made = filled.convert(self.first, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def measure(self, model: nn.Module, info: Mapping[str, TensorInfo]) -> None:
        """Find `targets` by converting tensors without data; FormatError when that fails."""
        try:
            self.targets = self.run(
                model,
                lambda name: torch.empty(info[name].shape, dtype=info[name].dtype, device="meta"),
            )
        except Exception as error:  # of an operation of Transformers on shapes that do not fit
            raise FormatError(
                message(
                    f"{OP}: tensors {listed(name for _, name in self.sources)}",
                    f"what Transformers makes {self.first} of",
                    f"{type(error).__name__}: {error}",
                    "A tensor is missing or has another shape.",
                )
            ) from error


@dataclass
class Names:
    """The files' names against the model's.

    layers: {module of the model: its compressed layer in the files}. plain: {tensor of the model:
    tensor of the files}. converted: {tensor of the model: Conversion}. unexpected: names in the
    files that the model has no place for.  used: Transformers' mappings that matched something.
    experts: matrices of experts of which the files hold some compressed; `known`: their places.
    """

    layers: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    converted: dict[str, Conversion] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    used: list[Any] | None = None
    experts: ExpertNames = field(default_factory=ExpertNames)
    known: dict[str, Place] = field(default_factory=dict)


def tree_names(model: nn.Module) -> set[str]:
    """Names of all parameters and persistent buffers; a SparseLinear counts as having a weight."""
    from sparsekern.nn.sparse_linear import SparseLinear

    names: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        names.update(join(name, key) for key, _, _ in own_tensors(module))
        if isinstance(module, SparseLinear):
            names.add(join(name, "weight"))
    return names


def match_names(
    model: nn.Module,
    info: Mapping[str, TensorInfo],
    layers: Mapping[str, tuple[int, int]],
    parts: Iterable[str],
    key_mapping: Mapping[str, str] | None = None,
) -> Names:
    """Names of a folder's tensors in a model.

    Args:
        model: the tree, with or without weights.
        info: headers of the files. layers: the compressed layers among them, by their names there.
        parts: names of the tensors that make up these layers.
        key_mapping: {regular expression: replacement} applied to the files' names first, as
            from_pretrained of Transformers takes it.
    Raises:
        FormatError: two names in the files for one in the model, or a conversion that does not fit.
    """
    found = Names(known=places(model) if layers or apart(model) else {})
    tree = tree_names(model) | set(found.known)
    rename = _renamer(model, tree, key_mapping)
    conversions: dict[tuple[str, int], Conversion] = {}
    dense = {name: None for name in info if name not in set(parts)}
    compressed = {join(layer, "weight"): layer for layer in layers}
    for name in sorted([*dense, *compressed], key=_natural):
        target, converter, pattern = rename(name)
        if name in compressed:
            layer = compressed[name]
            if converter is not None and target in found.known:
                group = conversions.setdefault(
                    (target, id(converter)), Conversion(converter, target)
                )
                group.sources.append((pattern, name))
                continue
            if target not in found.known and target not in tree:
                # A converter that turns the one tensor of all experts does not concern its layer,
                # whose rows are those of the experts in turn.
                bare, turned, _ = rename(layer)
                single = turned is None or len(turned.source_patterns) == 1
                target = bare if single and bare in found.known else target
            if target in found.known:
                place = found.known[target]
                found.experts.add(place, stacked_parts(place, layer, layers[layer][0]))
                found.experts.modules.add(place.module)
                continue
            own = own_place(target.removesuffix(".weight"), found.known)
            if own is not None and target not in tree:
                found.experts.add(own[0], {own[1]: [Part(layer, 0, layers[layer][0], True)]})
                found.experts.modules.add(own[0].module)
                continue
            require(
                converter is None or target not in tree,
                f"{OP}: layer {layer}",
                "a linear layer of the model",
                "one that Transformers stores in another form than it computes with",
                "Store this layer under its name in memory.",
            )
            # Where the model has no such weight, the caller finds no module and says so.
            own_name = layer if converter is not None else target.removesuffix("weight")
            module = own_name.removesuffix(".")
            _check_once(found.layers, module, layer)
            found.layers[module] = layer
        elif converter is not None:
            key = (target, id(converter))
            group = conversions.setdefault(key, Conversion(converter, target))
            group.sources.append((pattern, name))
        elif target in tree:
            _check_once(found.plain, target, name)
            found.plain[target] = name
        else:
            found.unexpected.append(name)
    _assign_experts(model, found, conversions, info, compressed, layers)
    for group in conversions.values():
        if group.first not in tree:
            found.unexpected += [name for _, name in group.sources]
            continue
        group.measure(model, info)
        for target in group.targets:
            require(
                target in tree and target not in found.plain and target not in found.converted,
                f"{OP}: tensors {listed(name for _, name in group.sources)}",
                "one place in the model",
                f"{target}, which it lacks or which is stored, too",
            )
            found.converted[target] = group
    found.used = rename.used() if isinstance(rename, _Transforms) else None
    return found


def _assign_experts(
    model: nn.Module,
    found: Names,
    conversions: dict[tuple[str, int], Conversion],
    info: Mapping[str, TensorInfo],
    compressed: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int]],
) -> None:
    """Take what belongs to experts that are, or have to be, apart out of the plain names and the
    conversions."""
    experts = found.experts
    experts.modules |= set(apart(model))
    for group in conversions.values():
        if any(name in compressed for _, name in group.sources):
            experts.modules.add(found.known[group.first].module)
    for key, group in list(conversions.items()):
        place = found.known.get(group.first)
        if place is not None and place.module in experts.modules:
            experts.add(place, converted_parts(model, place, group, info, compressed, sizes))
            del conversions[key]
    for target, name in list(found.plain.items()):
        place = found.known.get(target)
        if place is not None and place.module in experts.modules:
            experts.add(place, dense_parts(place, name))
            del found.plain[target]
    for pairs in (list(found.plain.items()), [(name, name) for name in found.unexpected]):
        for target, name in pairs:
            own = own_place(target.removesuffix(".weight"), found.known)
            if own is None or own[0].module not in experts.modules:
                continue
            experts.add(own[0], {own[1]: [Part(name, 0, info[name].shape[0], False)]})
            found.plain.pop(target, None)
            found.unexpected = [other for other in found.unexpected if other != name]
    for target, layer in list(found.layers.items()):
        own = own_place(target, found.known)
        if own is not None and own[0].module in experts.modules:
            experts.add(own[0], {own[1]: [Part(layer, 0, sizes[layer][0], True)]})
            del found.layers[target]


def _check_once(found: Mapping[str, str], target: str, name: str) -> None:
    require(
        target not in found,
        f"{OP}: tensor {name!r}",
        f"one tensor for {target} of the model",
        f"{found.get(target)!r}, too",
        "Files of two checkpoints are mixed.",
    )


def _natural(name: str) -> list[tuple[int, int | str, int]]:
    """Sort key that counts: experts.2 comes before experts.10, which decides how they stack."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :][:18]
        counts = digits and not text
        key.append((0, int(digits), 0) if counts else (1, text, int(digits or -1)))
    return key


Renamed = tuple[str, Any, str]


class _Transforms:
    """Names through Transformers' WeightRenaming and WeightConverter objects (release 5)."""

    def __init__(
        self, model: nn.Module, tree: set[str], key_mapping: Mapping[str, str] | None
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        mapping = dict(key_mapping) if key_mapping else None
        self.transforms = get_model_conversion_mapping(model, mapping)  # type: ignore[arg-type]
        self.renamings, self.converters = _split(self.transforms)
        self.prefix, self.tree = getattr(model, "base_model_prefix", ""), tree
        self.matched: dict[int, Any] = {}

    def __call__(self, name: str) -> Renamed:
        renamed = name
        for renaming in self.renamings:
            renamed, pattern = renaming.rename_source_key(renamed)
            if pattern is not None:
                self.matched[id(renaming)] = renaming
        renamed, converter, pattern = _convert_name(renamed, self.converters)
        renamed = _with_prefix(renamed, self.prefix, self.tree)
        if renamed not in self.tree and name not in self.tree:
            plain = _with_prefix(name, self.prefix, self.tree)
            if plain in self.tree:
                return plain, None, ""
        elif renamed not in self.tree:
            return name, None, ""  # stored under its name in memory
        if converter is not None:
            self.matched[id(converter)] = converter
        return renamed, converter, pattern

    def used(self) -> list[Any]:
        """The transforms that matched, in their order; Transformers reverts these when saving."""
        return [entry for entry in self.transforms if id(entry) in self.matched]


def _renamer(
    model: nn.Module, tree: set[str], key_mapping: Mapping[str, str] | None
) -> Callable[[str], Renamed]:
    if not hasattr(type(model), "config_class") or not hasattr(model, "base_model_prefix"):
        return lambda name: (name, None, "")
    if _has_transforms():
        return _Transforms(model, tree, key_mapping)
    patterns = dict(key_mapping or getattr(model, "_checkpoint_conversion_mapping", None) or {})

    def rename(name: str) -> Renamed:
        renamed = name
        for pattern, replacement in OLD_NAMES.items():
            renamed = re.sub(pattern, replacement, renamed)
        for pattern, replacement in patterns.items():
            renamed, count = re.subn(pattern, replacement, renamed)
            if count:
                break
        for candidate in (renamed, name):
            candidate = _with_prefix(candidate, getattr(model, "base_model_prefix", ""), tree)
            if candidate in tree:
                return candidate, None, ""
        return renamed, None, ""

    return rename


def _has_transforms() -> bool:
    """Whether the installed Transformers maps names by WeightRenaming and WeightConverter."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:
        return False
    needed = ("WeightRenaming", "WeightConverter")
    return hasattr(conversion_mapping, "get_model_conversion_mapping") and all(
        hasattr(getattr(core_model_loading, name, None), "rename_source_key") for name in needed
    )


def _split(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """(renamings, converters) of a mapping."""
    from transformers.core_model_loading import WeightConverter

    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    return [entry for entry in transforms if entry not in converters], converters


def _convert_name(name: str, converters: Iterable[Any]) -> Renamed:
    """Name after the first converter that takes it, that converter, and the pattern it matched."""
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return renamed, converter, pattern
    return name, None, ""


def _with_prefix(name: str, prefix: str, tree: set[str]) -> str:
    """Add or drop the base model's prefix where only that leads to a tensor of the model."""
    if not prefix:
        return name
    shorter = name.removeprefix(f"{prefix}.")
    if shorter != name and shorter in tree:
        return shorter
    return f"{prefix}.{name}" if f"{prefix}.{name}" in tree else name


# ---- writing -------------------------------------------------------------------------------------


@dataclass
class DiskNames:
    """What a model's tensors are called in files.

    layers: {module of the model: name in the files} for the compressed ones. plain: {name in the
    files: name in the model}. groups: conversions that make one or more tensors of the files out of
    tensors of the model, with `sources` and `targets` in that sense. split: what a conversion
    makes of one tensor of the model, None where it has none.
    """

    layers: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    groups: list[Conversion] = field(default_factory=list)
    rename: Callable[[str], str] = lambda name: name
    split: Callable[[str, Tensor], dict[str, Tensor] | None] = lambda name, tensor: None

    def module(self, name: str) -> str:
        """Name in the files of a module of the model."""
        if name in self.layers:
            return self.layers[name]
        return self.rename(join(name, "weight")).removesuffix("weight").removesuffix(".")


def disk_names(model: nn.Module, dense: Mapping[str, Tensor], layers: Iterable[str]) -> DiskNames:
    """The names that Transformers' own save_pretrained would write.

    Args:
        dense: {name in the model: tensor} of what is stored as it is. layers: modules that are
            stored compressed; one whose weight Transformers would store in another form keeps its
            name in memory, which loaders accept as well.
    """
    renamings, converters = _reverse_transforms(model)

    def rename(name: str) -> str:
        for renaming in renamings:
            name = renaming(name)
        return name

    def split(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        renamed, converter, pattern = _convert_name(name, converters)
        if converter is None:
            return None
        one = Conversion(converter, renamed, [(pattern, name)])
        return {rename(key): made for key, made in one.run(model, lambda _: tensor).items()}

    found = DiskNames(rename=rename, split=split)
    partial: set[tuple[str, int]] = set()  # groups that a compressed layer belongs to
    for layer in layers:
        key = join(layer, "weight")
        renamed, converter, _ = _convert_name(key, converters)
        if converter is not None:
            partial.add((renamed, id(converter)))
        stored = rename(key) if converter is None else key
        stored = stored if stored.endswith("weight") else key
        found.layers[layer] = stored.removesuffix("weight").removesuffix(".")
    groups: dict[tuple[str, int], Conversion] = {}
    for name in sorted(dense, key=_natural):
        renamed, converter, pattern = _convert_name(name, converters)
        if converter is None:
            found.plain[rename(name)] = name
            continue
        group = groups.setdefault((renamed, id(converter)), Conversion(converter, renamed))
        group.sources.append((pattern, name))
    for pair, group in groups.items():
        own = {name: name for _, name in group.sources}
        if pair in partial:  # the rest of such a group keeps its name in memory
            found.plain.update(own)
            continue
        try:
            made = group.run(model, lambda name: dense[name].detach().to("meta"))
        except Exception as error:  # of an operation of Transformers
            warnings.warn(
                f"{SAVE_OP}: Transformers cannot make its names on disk of {listed(own)} "
                f"({type(error).__name__}: {error}). They are stored under their names in memory, "
                "which sparsekern.from_pretrained reads.",
                stacklevel=4,
            )
            found.plain.update(own)
            continue
        group.targets = {rename(name): tensor for name, tensor in made.items()}
        found.groups.append(group)
    count = len(found.plain) + sum(len(group.targets) for group in found.groups)
    distinct = {*found.plain, *(name for group in found.groups for name in group.targets)}
    if len(distinct) != count or len(set(found.layers.values())) != len(found.layers):
        # Not invertible here: the names in memory are unique, and loaders accept them.
        return DiskNames({layer: layer for layer in layers}, {name: name for name in dense})
    return found


def _reverse_transforms(model: nn.Module) -> tuple[list[Callable[[str], str]], list[Any]]:
    """(renamings as functions, converters) from the model's names to the files'."""
    if not hasattr(type(model), "config_class") or not hasattr(model, "base_model_prefix"):
        return [], []
    if not _has_transforms():
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}

        def old(name: str) -> str:
            for target, source in patterns.items():
                plain = re.sub(r"\(.*\)", "", target.lstrip("^"))
                name, count = re.subn(source, plain, name)
                if count:
                    break
            return name

        return [old], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        # A prefix that loading would drop was not there in a model that was never loaded.
        transforms = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
            if type(entry).__name__ != "PrefixChange"
        ]
    reverse = [entry.reverse_transform() for entry in reversed(transforms)]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]

    def function(entry: Any) -> Callable[[str], str]:
        return lambda name: str(entry.rename_source_key(name)[0])

    return [function(entry) for entry in renamings], _split(reverse)[1]
