"""Where every tensor of a model comes from: the headers of a folder against the module tree.

Nothing is read but names, shapes and dtypes, and the contents of tensors that the model ties and
the files store twice. checkpoint/reader.py reads what a Plan says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsekern.checkpoint.experts import check_columns
from sparsekern.checkpoint.names import Conversion, Names, match_names
from sparsekern.checkpoint.skeleton import linear_shape, own_tensors
from sparsekern.formats.forms import (
    FLOATING,
    LEVEL_DTYPES,
    PLAIN,
    form_of,
    join,
    parts_of,
    values_name,
)
from sparsekern.nn.sparse_experts import fuse_experts, unfuse_experts
from sparsekern.utils.safetensors_io import OP, TensorFiles, listed, require

LOAD_OP = "sparsekern.from_pretrained"
# Buffers that old files hold and that models now compute, as Transformers' own loader has it.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass
class Plan:
    """Where every tensor of a model comes from.

    names: the files' names in the model. sources: {id(tensor on the tree): (name in the model,
    name in the files or the Conversion that makes it)}. untied: names that the model ties and the
    files do not. computed: names that Transformers computes when a file lacks them.  unexpected:
    names in the files that the model has no place for.
    """

    names: Names
    sources: dict[int, tuple[str, str | Conversion]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def plan(
    model: nn.Module,
    files: TensorFiles,
    layers: Mapping[str, tuple[int, int]],
    key_mapping: Mapping[str, str] | None = None,
    *,
    whole: bool = False,
    cut: bool = False,
) -> Plan:
    """Where every tensor of a module tree comes from; layers = check_headers(files).

    Args:
        whole: the model was built for the folder, as Transformers builds it: tensors without a
            place in it are listed in the Plan, and ties that the files do not have are undone.
            Otherwise both are errors.
        cut: by the config of a caller, who may want fewer blocks: compressed layers without a
            place are listed, too. Otherwise they are an error.
    Raises:
        FormatError: it lists what is missing, unexpected or misshapen.
    """
    parts = list(parts_of(files, layers))
    names = match_names(model, files.info, layers, parts, key_mapping)
    check_columns(files, layers, names.experts, names.known)
    made = unfuse_experts(model, names.experts.modules) if names.experts.modules else {}
    try:
        return _plan(model, files, layers, names, whole, cut)
    except BaseException:
        for old, new in made.values():
            fuse_experts(model, new, old)
        raise


def _plan(
    model: nn.Module,
    files: TensorFiles,
    layers: Mapping[str, tuple[int, int]],
    names: Names,
    whole: bool,
    cut: bool,
) -> Plan:
    """`plan`, once the experts that have compressed matrices are apart."""
    found = Plan(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = [*names.layers, *names.experts.matrices]
    replaced = {id(modules[name]) for name in inside if name in modules}
    for name, layer in names.layers.items():
        if cut and name not in modules:
            found.unexpected.append(layer)
        else:
            _check_layer(files, layer, name, modules.get(name), layers[layer])

    owners: dict[int, tuple[Tensor, list[str]]] = {}
    wanted: set[str] = set()
    ignored: set[str] = set()
    missing: list[str] = []
    layer_of: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in replaced:
            ignored.update(join(name, key) for key in module._non_persistent_buffers_set)
            own = [(key, tensor) for key, tensor, _ in own_tensors(module)]
        else:
            bias = getattr(module, "bias", None)
            own = [] if bias is None else [("bias", bias)]
            if name in names.layers:
                layer_of[join(name, "bias")] = names.layers[name]
        for key, tensor in own:
            owners.setdefault(id(tensor), (tensor, []))[1].append(join(name, key))
            wanted.add(join(name, key))

    optional = _patterns(model, "_keys_to_ignore_on_load_missing")
    for tensor, tied in owners.values():
        present = [name for name in tied if _source(names, name) is not None]
        for name in present or tied[:1]:
            if present:
                _check_dense(files, names, name, tensor, layer_of.get(name))
            elif any(pattern.search(name) for pattern in optional):
                found.computed += tied
            else:
                missing.append(name)
        if present:
            source = _source(names, present[0])
            assert source is not None
            found.sources[id(tensor)] = (present[0], source)
            found.untied += _untied(files, names, present, allowed=whole)

    extra = [*names.unexpected]
    extra += [stored for name, stored in names.plain.items() if name not in wanted]
    known = [*_patterns(model, "_keys_to_ignore_on_load_unexpected")]
    known += [re.compile(pattern) for pattern in COMPUTED] if whole else []
    extra = [n for n in extra if n not in ignored and not any(p.search(n) for p in known)]
    if whole:
        found.unexpected, extra = found.unexpected + extra, []
    problems = [
        f"{len(entries)} {kind} ({listed(entries)})"
        for kind, entries in (("missing", missing), ("unexpected", extra + found.unexpected))
        if entries and (missing or extra)
    ]
    require(
        not problems,
        f"{OP}: {files.folder}",
        "the tensors of the model",
        ", ".join(problems),
        "The folder belongs to another model or is incomplete.",
    )
    return found


def _patterns(model: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    patterns: Iterable[str] = getattr(model, attribute, None) or ()
    return [re.compile(pattern) for pattern in patterns]


def _source(names: Names, name: str) -> str | Conversion | None:
    return names.plain.get(name) or names.converted.get(name)


def _check_layer(
    files: TensorFiles, layer: str, name: str, module: nn.Module | None, shape: tuple[int, int]
) -> None:
    """A compressed layer against the module that it is for."""
    expected = None if module is None else linear_shape(module)
    where = files.where(values_name(files, layer))
    require(
        expected is not None,
        where,
        f"a linear layer named '{name}' in the model",
        "none" if module is None else type(module).__name__,
        "The folder belongs to another model.",
    )
    assert expected is not None
    require(
        expected == shape,
        where,
        f"a layer of shape {list(expected)} as in the model",
        list(shape),
        "The folder belongs to another model.",
    )


def _check_dense(
    files: TensorFiles, names: Names, name: str, tensor: Tensor, layer: str | None
) -> None:
    """What the files have for one dense tensor against the tensor it is for. The bias of a
    compressed layer `layer` has the dtype of its values, which is what SparseLinear computes in.
    """
    if name in names.plain:
        stored = names.plain[name]
        where, shape, dtype = (
            files.where(stored),
            files.info[stored].shape,
            files.info[stored].dtype,
        )
    else:
        made = names.converted[name].targets[name]
        where = files.where(names.converted[name].sources[0][1])
        shape, dtype = tuple(made.shape), made.dtype
    require(
        shape == tuple(tensor.shape),
        where,
        f"shape {list(tensor.shape)} as in the model",
        list(shape),
        "The folder belongs to another model.",
    )
    allowed = FLOATING if tensor.dtype in FLOATING else (tensor.dtype,)
    remedy = ""
    if dtype in LEVEL_DTYPES:
        remedy = "Quantised dense weights are not read: export without --keep-quantized."
    require(dtype in allowed, where, f"dtype {' | '.join(map(str, allowed))}", dtype, remedy)
    if layer is not None and form_of(files, layer) is PLAIN:
        expected = files.info[join(layer, "compressed")].dtype
        require(dtype == expected, where, f"dtype {expected} as {layer}.compressed", dtype)


def _untied(files: TensorFiles, names: Names, tied: Collection[str], *, allowed: bool) -> list[str]:
    """Names that the model ties may each be in the files, but then with the same contents; the
    ones with other contents are returned, or an error where that is not `allowed`.
    """
    stored = [names.plain[name] for name in tied if name in names.plain]
    if len(stored) < 2:
        return []
    first = files.read(stored[0])[0]
    other = {name for name in stored[1:] if not torch.equal(first, files.read(name)[0])}
    require(
        allowed or not other,
        files.where(stored[0]),
        f"the contents of {listed(stored[1:])}, which the model ties to it",
        "different contents",
        "Set tie_word_embeddings to false in config.json if the model does not tie them.",
    )
    return [name for name in tied if names.plain.get(name) in other]


def untie(model: nn.Module, found: Plan) -> None:
    """Give names that the files do not tie a parameter of their own, as Transformers does."""
    for name in found.untied:
        module, _, key = name.rpartition(".")
        parent = model.get_submodule(module)
        old = parent._parameters[key]
        assert old is not None
        own = nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad)
        parent._parameters[key] = own
        found.sources[id(own)] = (name, _source(found.names, name) or name)
    if found.untied:
        if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        warnings.warn(
            f"{LOAD_OP}: config.json ties {listed(found.untied)} to other weights, and the files "
            "hold different ones: they are loaded untied.",
            stacklevel=4,
        )
