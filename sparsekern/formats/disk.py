"""What a checkpoint holds of a 2:4 layer, as rules over tensors and config.json: one list that
loading, export and verify share.

A pruned linear layer P of shape [out_features, in_features] is a few tensors in place of P.weight,
in one of these forms:

    plain           P.compressed    [out, in/2]        fp32 | fp16 | bf16: the two kept values of
                                                       each group of 4, ascending columns
                    P.bitmask       [out, ceil(in/8)]  uint8: bit b of byte j = column 8j+b is kept;
                                                       two bits in each nibble, padding bits 0
                    P.shape         [2, 1]             int64: [[out], [in]]
    levels          the same with fp8 e4m3 or int8 levels in P.compressed, and
                    P.weight_scale  [out, 1] or [1]    float32, or 16 bits from other writers
    words           P.weight_packed [out, ceil(in/16)] int32: the kept int4 levels, 8 a word
                    P.bitmask                          as above
                    P.weight_scale  [out, groups]
                    P.weight_shape  [2]                int64
    pack-quantized  P.weight_packed [out, ceil(in/8)]  int32: the int4 levels of all columns,
                    P.weight_scale, P.weight_shape     of which two of four are not 0; read only
    marlin-24       P.weight_packed, P.scale_packed,   the same or 8 bits, as Sparse-Marlin reads
                    P.meta                             them; read only

P.bias and everything else is stored as usual. 16-bit weights take 0.5 + 0.0625 = 0.5625 of their
dense bytes. Source: compressed-tensors 0.14.0, the last release with these: "levels" is its
float-quantized and int-quantized with sparse-24-bitmask. It has no packed int4 beside a bitmask:
"words" is its packing of the kept levels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check
from sparsekern.formats import codec, dtypes, packed, scaled
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24, metadata_of_bitmask, of_levels
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, TensorFiles, read_json, require

FORMAT = "sparse-24-bitmask"
FORMAT_VERSION = "0.14.0"  # release of compressed-tensors whose byte layout this is
PARTS = ("compressed", "bitmask", "shape")
# quant_method of our folders: registered with Transformers and vLLM, which have none of this name.
METHOD = "sparsekern"
METHODS = (METHOD, "compressed-tensors")
# Transformers skips a quant_method that it does not know and would compute with random weights.
# It does open the weights under the name that config.json gives, so this name is the message that
# a program without this package ends with.
UNREADABLE_WITHOUT_US = (
    "sparsekern: the weights are 2:4-compressed (pip install sparsekern, then import sparsekern "
    "before from_pretrained, or use sparsekern.from_pretrained)"
)
VALUE_DTYPES = tuple(dtypes.PLAIN)
# Keys of config.json that are about the files and not about the model in memory.
FILE_KEYS = ("quantization_config", "compression_config", "sparsekern", "transformers_weights")


def join(module: str, tensor: str) -> str:
    """Tensor name of a module's tensor; the root module has an empty name."""
    return f"{module}.{tensor}" if module else tensor


@dataclass(frozen=True)
class Form:
    """One of the forms above.

    parts: names of its tensors. values: the one with the numbers. shape: the one with the sizes, or
    "" where they follow from the others. dtypes: {part: those that it may have}.
    """

    name: str
    parts: tuple[str, ...]
    values: str
    shape: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]


_SCALES = (torch.float32, *dtypes.NATIVE)
_BITS, _SIZES = (torch.uint8,), (torch.int64,)
LEVEL_DTYPES = {
    kind.storage: kind.name for kind in dtypes.elements() if kind.scaled and kind.bits == 8
}
PLAIN = Form(
    "plain",
    PARTS,
    "compressed",
    "shape",
    {"compressed": VALUE_DTYPES, "bitmask": _BITS, "shape": _SIZES},
)
LEVELS = Form(
    "levels",
    (*PARTS, SCALE),
    "compressed",
    "shape",
    {"compressed": tuple(LEVEL_DTYPES), "bitmask": _BITS, "shape": _SIZES, SCALE: _SCALES},
)
_WORDS = {"weight_packed": (torch.int32,), SCALE: _SCALES, "weight_shape": (*_SIZES, torch.int32)}
WORDS = Form(
    "words",
    ("weight_packed", "bitmask", SCALE, "weight_shape"),
    "weight_packed",
    "weight_shape",
    {**_WORDS, "bitmask": _BITS},
)
PACK_QUANTIZED = Form("pack-quantized", tuple(_WORDS), "weight_packed", "weight_shape", _WORDS)
MARLIN = Form(
    "marlin-24",
    ("weight_packed", "scale_packed", "meta"),
    "weight_packed",
    "",
    {"weight_packed": (torch.int32,), "scale_packed": _SCALES, "meta": (torch.int16,)},
)
FORMS = (PLAIN, LEVELS, WORDS, PACK_QUANTIZED, MARLIN)
ALL_PARTS = tuple(dict.fromkeys(part for form in FORMS for part in form.parts))
# Tensors that say that levels do not stand for level * scale, column by column.
_FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


def form_of(files: TensorFiles, layer: str) -> Form:
    """The form in which a compressed layer is stored, by which of its tensors there are."""

    def has(part: str) -> bool:
        return join(layer, part) in files.info

    if has("weight_packed"):
        if has("meta") or has("scale_packed"):
            return MARLIN
        return WORDS if has("bitmask") else PACK_QUANTIZED
    if has("compressed"):
        dtype = files.info[join(layer, "compressed")].dtype
        return LEVELS if dtype in LEVEL_DTYPES or has(SCALE) else PLAIN
    return LEVELS if has(SCALE) and has("bitmask") else PLAIN


def parts_of(files: TensorFiles, layers: Iterable[str]) -> dict[str, str]:
    """{name of a tensor of a compressed layer: the layer}."""
    return {join(layer, part): layer for layer in layers for part in form_of(files, layer).parts}


def values_name(files: TensorFiles, layer: str) -> str:
    """Name of the tensor that holds a compressed layer's numbers, for messages too."""
    return join(layer, form_of(files, layer).values)


def storage_of(files: TensorFiles, layer: str) -> str | None:
    """Name of the quantised element type of a layer; None for plain values."""
    form = form_of(files, layer)
    if form is LEVELS:
        return LEVEL_DTYPES[files.info[join(layer, "compressed")].dtype]
    if form is MARLIN:
        return "int8" if _marlin_bits(files, layer) == 8 else "int4"
    return None if form is PLAIN else "int4"


def _rule_tensors(files: TensorFiles, layer: str) -> None:
    for part in form_of(files, layer).parts:
        require(
            join(layer, part) in files.info,
            files.where(join(layer, part)),
            "a tensor of a compressed layer",
            "none in the folder",
            "8-bit and 4-bit values are levels, which need their scales."
            if part == SCALE
            else "A shard is damaged or of another checkpoint.",
        )
    require(
        join(layer, "weight") not in files.info,
        files.where(join(layer, "weight")),
        "no dense weight beside the compressed one",
        "both",
    )
    for part in _FOREIGN:
        require(
            join(layer, part) not in files.info,
            files.where(join(layer, part)),
            "a symmetric quantisation in the order of the columns",
            f"a tensor {part}",
            "Zero points, reordered columns and scales of scales are not read.",
        )


def _rule_dtypes(files: TensorFiles, layer: str) -> None:
    form = form_of(files, layer)
    for part in form.parts:
        dtype, allowed = files.info[join(layer, part)].dtype, form.dtypes[part]
        require(
            dtype in allowed,
            files.where(join(layer, part)),
            f"dtype {' | '.join(map(str, allowed))}",
            dtype,
        )


def _rule_shapes(files: TensorFiles, layer: str) -> None:
    form = form_of(files, layer)
    shapes = {part: files.info[join(layer, part)].shape for part in form.parts}
    if form is MARLIN:
        _marlin_shapes(files, layer)
        return
    if form.values == "compressed":
        values = shapes["compressed"]
        require(
            len(values) == 2 and values[1] % 2 == 0,
            files.where(join(layer, "compressed")),
            "[out_features, in_features/2] with in_features a multiple of 4",
            list(values),
            "One-dimensional values belong to the unstructured sparse-bitmask format.",
        )
        sizes: tuple[int, ...] = (2, 1)
        rows, columns = values[0], 2 * values[1]
    else:
        sizes, (rows, columns) = (2,), (0, 0)
    where = files.where(join(layer, form.shape))
    require(shapes[form.shape] == sizes, where, list(sizes), list(shapes[form.shape]))
    if form.values != "compressed":
        rows, columns = _stored_sizes(files, layer, form)
        fits = rows >= 0 and columns >= 0 and columns % 4 == 0
        require(fits, where, "(out_features, in_features), a multiple of 4", [rows, columns])
        every = columns if form is PACK_QUANTIZED else columns // 2
        expected: tuple[int, ...] = (rows, -(-every // 8))
        where = files.where(join(layer, "weight_packed"))
        require(shapes["weight_packed"] == expected, where, list(expected), shapes["weight_packed"])
    if "bitmask" in shapes:
        expected = (rows, (columns + 7) // 8)
        require(
            shapes["bitmask"] == expected,
            files.where(join(layer, "bitmask")),
            f"{list(expected)} to match {join(layer, form.values)}",
            list(shapes["bitmask"]),
        )
    if SCALE in shapes:
        _scale_shape(files, layer, form, rows, columns)


def _scale_shape(files: TensorFiles, layer: str, form: Form, rows: int, columns: int) -> None:
    shape, where = files.info[join(layer, SCALE)].shape, files.where(join(layer, SCALE))
    if form is LEVELS:
        fits = shape in ((rows, 1), (rows,), (1,), (1, 1), ())
        require(fits, where, f"[{rows}, 1], one scale for each output channel", list(shape))
        return
    fits = len(shape) == 2 and shape[0] == rows
    require(fits, where, f"[{rows}, groups]", list(shape))
    scale_group(files, layer, columns, shape[1])


def scale_group(files: TensorFiles, layer: str, columns: int, count: int) -> int:
    """Columns of an int4 layer that share a scale, of which a row has `count`: config.json says it
    (group_size), because the count does not: rows of 192 have two scales by groups of 128 and of
    96. Where it says nothing, 128 or the power of two that fits.

    Raises:
        FormatError: the two do not fit together; no multiple of 4.
    """
    part = "scale_packed" if form_of(files, layer) is MARLIN else SCALE
    where = f"{files.where(join(layer, part))} of groups of columns"
    sizes = _stated_groups(files.config, layer)
    if not sizes:
        try:
            return scaled.group_of(columns, count)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
    found = {min(size, columns) for size in (each or columns for each in sizes)}
    found = {size for size in found if scaled.groups(columns, size) == count}
    stated = " or ".join("one a row" if size is None else f"group_size {size}" for size in sizes)
    expected = f"as many scales for rows of {columns} columns as {CONFIG_FILE} says ({stated})"
    remedy = "config.json is of another checkpoint, or says too little of which layer is in groups."
    require(len(found) == 1, where, expected, f"{count} a row", remedy)
    (group,) = found
    expected, remedy = "groups of a multiple of 4 columns", "Quantise the model by others."
    require(group % 4 == 0 or count == 1, where, expected, group, remedy)
    return group


def _stated_groups(config: Mapping[str, Any], layer: str) -> list[int | None]:
    """The group sizes of int4 weights in config.json, without repeats, None for one scale a row: of
    the config_groups that name this layer, where any does, else of all."""
    entry = config.get("quantization_config", config.get("compression_config"))
    groups = entry.get("config_groups") if isinstance(entry, dict) else None
    found = [
        (group.get("targets") or (), group["weights"])
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        if group["weights"].get("num_bits") == 4
    ]
    own = [weights for targets, weights in found if any(_names(t, layer) for t in targets)]
    sizes: list[int | None] = []
    for weights in own or [weights for _, weights in found]:
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        size = None if size == -1 else size
        good = size is None or (type(size) is int and size > 0)
        require(good, f"{OP}: {CONFIG_FILE}", "group_size > 0, a whole number", repr(size))
        sizes += [] if size in sizes else [size]
    return sizes


def _names(target: Any, layer: str) -> bool:
    """Whether a target of compressed-tensors names this layer, and not a class."""
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == layer
    try:
        return re.match(target[3:], layer) is not None
    except re.error:
        return False


def _stored_sizes(files: TensorFiles, layer: str, form: Form) -> tuple[int, ...]:
    return tuple(files.read(join(layer, form.shape))[0].flatten().tolist())


def _rule_shape_values(files: TensorFiles, layer: str) -> None:
    form = form_of(files, layer)
    if not form.shape:
        return
    stored = list(_stored_sizes(files, layer, form))
    expected = list(layer_shape(files, layer))
    require(
        stored == expected,
        files.where(join(layer, form.shape)),
        f"{expected} to match {join(layer, form.values)}",
        stored,
    )


# (name, rule(files, layer) that raises FormatError). They read headers and 16 bytes, nothing that
# grows with the layer.
HEADER_RULES: tuple[tuple[str, Callable[[TensorFiles, str], None]], ...] = (
    ("tensors", _rule_tensors),
    ("dtypes", _rule_dtypes),
    ("shapes", _rule_shapes),
    ("shape", _rule_shape_values),
)


def _marlin_bits(files: TensorFiles, layer: str) -> int:
    packed, meta = (files.info[join(layer, part)].shape for part in ("weight_packed", "meta"))
    return 0 if math.prod(meta) == 0 else 4 * math.prod(packed) // math.prod(meta)


def _marlin_shapes(files: TensorFiles, layer: str) -> None:
    shapes = {part: files.info[join(layer, part)].shape for part in MARLIN.parts}
    meta = shapes["meta"]
    fits = len(meta) == 2 and meta[0] > 0 and meta[1] > 0 and meta[1] % 128 == 0
    where = files.where(join(layer, "meta"))
    require(fits, where, "[in_features/32, 2 * out_features], of 64 rows each", list(meta))
    rows, columns = meta[1] // 2, 32 * meta[0]
    words: dict[tuple[int, ...], int] = {(meta[0], rows * bits // 2): bits for bits in (4, 8)}
    where = files.where(join(layer, "weight_packed"))
    packed = shapes["weight_packed"]
    require(packed in words, where, f"one of {[list(shape) for shape in words]}", list(packed))
    scales, where = shapes["scale_packed"], files.where(join(layer, "scale_packed"))
    counts = (1,) if words[packed] == 8 else (1, -(-columns // 128))
    fits = len(scales) == 2 and scales[0] in counts and scales[1] == rows
    remedy = "Groups of another size than 128 are not known of marlin-24."
    remedy = "Scales of groups of 8-bit weights are not read." if words[packed] == 8 else remedy
    require(fits, where, f"[groups, {rows}] with groups in {counts}", list(scales), remedy)


def layer_shape(files: TensorFiles, layer: str) -> tuple[int, int]:
    """(out_features, in_features) of a compressed layer, from its headers and its sizes."""
    form = form_of(files, layer)
    if form is MARLIN:
        rows, columns = files.info[join(layer, "meta")].shape
        return columns // 2, 32 * rows
    if form.values == "compressed":
        out_features, half = files.info[join(layer, "compressed")].shape
        return out_features, 2 * half
    out_features, in_features = _stored_sizes(files, layer, form)
    return out_features, in_features


def compressed_layers(files: TensorFiles) -> list[str]:
    """Names of the modules that are stored compressed, sorted."""
    parts = (name.rpartition(".") for name in files.info)
    marks = ("compressed", "bitmask", "weight_packed")
    return sorted({module for module, _, part in parts if part in marks})


def check_headers(files: TensorFiles) -> dict[str, tuple[int, int]]:
    """Every header rule on every compressed layer; returns {layer: (out_features, in_features)}
    or raises FormatError.
    """
    layers = {}
    for layer in compressed_layers(files):
        for _, rule in HEADER_RULES:
            rule(files, layer)
        layers[layer] = layer_shape(files, layer)
    return layers


def read_sparse24(
    files: TensorFiles,
    layer: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    numbers: torch.dtype | None = None,
) -> Sparse24:
    """One compressed layer as Sparse24 on `device`; its header rules hold. Exactly two bits per
    nibble, and scales that are finite and above 0, are checked here.

    Args:
        dtype: of the numbers; None for that of the file.
        numbers: where dtype is None, that of quantised layers, whose file has none: None for that
            of 16-bit scales, which other writers give the dtype of the model, else float32.
    Notes:
        Kept values of -0.0, which other writers may leave, come back as +0.0.
    """
    form = form_of(files, layer)
    if form is not PLAIN:
        return _read_quantized(files, layer, form, device, dtype or numbers)
    values, bitmask = files.read(join(layer, "compressed"), join(layer, "bitmask"), device=device)
    bits = values.view(torch.int16 if values.itemsize == 2 else torch.int32)
    bits.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)
    try:
        w24 = Sparse24.from_bitmask(values, bitmask, layer_shape(files, layer))
    except ValueError as error:  # FormatError is one
        raise FormatError(f"{files.where(join(layer, 'bitmask'))}: {error}") from error
    return w24 if dtype is None else w24.to(dtype)


def _read_quantized(
    files: TensorFiles,
    layer: str,
    form: Form,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Sparse24:
    out_features, in_features = shape = layer_shape(files, layer)
    tensors = files.read(*(join(layer, part) for part in form.parts), device=device)
    found = dict(zip(form.parts, tensors))
    stored_scale = found["scale_packed" if form is MARLIN else SCALE]
    if dtype is None:
        dtype = stored_scale.dtype
    part = form.values
    try:
        if form is MARLIN:
            levels, metadata, scale = packed.marlin24(*tensors)
        else:
            scale = stored_scale.float()
            if form is PACK_QUANTIZED:
                every = packed.unpack_words(found["weight_packed"], in_features)
                levels, metadata = packed.from_dense_levels(OP, every)
            else:
                part = "bitmask"
                metadata = metadata_of_bitmask(found["bitmask"], shape)
                if form is WORDS:
                    levels = packed.unpack_words(found["weight_packed"], in_features // 2)
                else:
                    levels = found["compressed"].float() + 0.0  # of other writers: -0.0
        if form is LEVELS:  # one scale of the whole weight stands for one a row
            scale = scale.reshape(-1, 1).expand(out_features, 1).contiguous()
        part = "scale_packed" if form is MARLIN else SCALE
        scaled.check_scales(OP, scale, part)
        storage = storage_of(files, layer)
        group = 0
        if storage == "int4":
            group = scale_group(files, layer, in_features, scale.shape[1])
        spec = WeightSpec.of(shape, str(storage), ROWMAJOR, dtype, None, group)
        return of_levels(spec, levels, scale, metadata)
    except ValueError as error:  # FormatError is one
        raise FormatError(f"{files.where(join(layer, part))}: {error}") from error


def stored_tensors(w24: Sparse24) -> dict[str, Tensor]:
    """The tensors that a checkpoint has of a weight, by part: form "plain", "levels" or "words"."""
    w24 = w24.rowmajor()
    spec, sizes = w24.spec, torch.tensor(list(w24.shape), device="cpu")
    if spec.element.plain or spec.element.bits == 8:
        tensors = {"compressed": w24.values, "bitmask": w24.bitmask(), "shape": sizes[:, None]}
        return tensors if spec.element.plain else {**tensors, SCALE: w24.tensors[SCALE]}
    levels = dtypes.scaled_codec(spec.storage).unpack(w24.values)
    return {
        "weight_packed": packed.pack_words(levels),
        "bitmask": w24.bitmask(),
        SCALE: w24.tensors[SCALE],
        "weight_shape": sizes,
    }


def dense_levels(w24: Sparse24) -> dict[str, Tensor]:
    """A quantised weight with all its columns, as compressed-tensors stores dense layers: weight
    [out, in] of fp8 or int8 and weight_scale [out, 1]; or weight_packed (words of all columns),
    weight_scale and weight_shape of int4."""
    w24 = w24.rowmajor()
    kind = w24.spec.element
    levels = dtypes.scaled_codec(kind.name).unpack(w24.values)
    dense = codec.decompress_dense(levels, w24.metadata, w24.in_features)
    scale = {SCALE: w24.tensors[SCALE]}
    if kind.bits == 8:
        return {"weight": dense.to(kind.storage), **scale}
    words = {"weight_packed": packed.pack_words(dense)}
    return {**words, **scale, "weight_shape": torch.tensor(list(w24.shape), device="cpu")}


def stored_bytes(spec: WeightSpec) -> int:
    """Bytes of `stored_tensors` of such a weight."""
    out_features, in_features = spec.shape
    bits = out_features * -(-in_features // 8) + 16
    if spec.element.bits == 4:
        values = 4 * out_features * -(-in_features // 16)
    else:
        values = out_features * in_features // 2 * spec.element.bits // 8
    groups = scaled.groups(in_features, spec.group) if spec.element.scaled else 0
    return values + bits + 4 * out_features * groups


def require_storable(where: str, spec: WeightSpec) -> None:
    """ValueError for a coded element type that has no form here."""
    kind = spec.element
    require_known = kind.plain or kind.scaled
    expected = f"a weight stored as {dtypes.names()} or {', '.join(dtypes.QUANTIZED)}"
    check(require_known, where, expected, kind.name, "Save its state_dict with torch.save.")


# ---- config.json ---------------------------------------------------------------------------------


def compression_config(
    linears: Mapping[str, str],
    sparse: Collection[str],
    sparsity: float,
    quantized: Mapping[str, WeightSpec] | None = None,
) -> dict[str, Any]:
    """The quantization_config entry: our method, with compressed-tensors' sparsity_config in it,
    and its config_groups where layers are quantised.

    Args:
        linears: {module name: class name} of every Linear-like module of the model, compressed or
            not.
        sparse: names of the compressed ones. sparsity: share of all weights that is pruned, 0..1.
        quantized: {name: spec} of the quantised ones.
    """
    return {
        "quant_method": METHOD,
        "version": FORMAT_VERSION,
        "transform_config": {},
        **(quantization_groups(linears, quantized) if quantized else {}),
        "sparsity_config": {
            "format": FORMAT,
            "sparsity_structure": "2:4",
            "global_sparsity": round(sparsity, 6),
            "targets": sorted({kind for name, kind in linears.items() if name in sparse}),
            "ignore": sorted(name for name in linears if name not in sparse),
            "registry_requires_subclass": False,
        },
    }


def quantization_groups(
    linears: Mapping[str, str], quantized: Mapping[str, WeightSpec]
) -> dict[str, Any]:
    """What compressed-tensors says of quantised layers: config_groups, format, ignore, ...

    8-bit layers have the scheme of its float-quantized and int-quantized: inputs of the same type,
    quantised token by token as they come.
    """
    kinds: dict[tuple[str, int | None], list[str]] = {}
    for name, spec in quantized.items():
        shared = spec.group < spec.shape[1]
        group = spec.group if spec.scale == "group" and shared else None
        kinds.setdefault((spec.storage, group), []).append(name)
    groups: dict[str, Any] = {}
    for (storage, group), names in sorted(kinds.items(), key=str):
        only = len(kinds) == 1
        kind = dtypes.element(storage)
        number = "float" if kind.storage.is_floating_point else "int"
        strategy = "channel" if group is None else "group"
        weights = _arguments(kind.bits, number, strategy, group, dynamic=False)
        tokens = _arguments(kind.bits, number, "token", None, dynamic=True)
        groups[f"group_{len(groups)}"] = {
            "format": _FORMATS[storage],
            "targets": sorted({linears[n] for n in names} if only else names),
            "weights": weights,
            "input_activations": tokens if kind.bits == 8 else None,
            "output_activations": None,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(name for name in linears if name not in quantized),
    }


_FORMATS = {
    dtypes.element("fp8").name: "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
}


def _arguments(
    bits: int, number: str, strategy: str, group: int | None, *, dynamic: bool
) -> dict[str, Any]:
    """QuantizationArgs of compressed-tensors."""
    return {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }


def numbers_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of the numbers of quantised layers, as config.json has it: what save_pretrained
    noted, else the model's; None where it says nothing usable."""
    own = config.get("sparsekern")
    noted = own.get("dtype") if isinstance(own, dict) else None
    name = noted or config.get("dtype") or config.get("torch_dtype")
    found = [d for d, kind in dtypes.PLAIN.items() if isinstance(name, str) and kind.name == name]
    return found[0] if found else None


def sparsity_entry(config: Any) -> Mapping[str, Any] | None:
    """The entry of a quantization_config that describes 2:4 weights; None for other formats."""
    if not isinstance(config, dict):
        return None
    entry = config.get("sparsity_config") or {}
    known = isinstance(entry, dict) and entry.get("format") == FORMAT
    return entry if known else None


def read_compression_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, sparsity_config): config.json of a folder and its sparsity entry, {} where it has
    none.

    Raises:
        FormatError: the config announces a compression that this package does not read.
    """
    config = read_json(folder / CONFIG_FILE)
    where = f"{OP}: {CONFIG_FILE}"
    entry = config.get("quantization_config", config.get("compression_config")) or {}
    require(isinstance(entry, dict), where, "an object 'quantization_config'", type(entry).__name__)
    method = entry.get("quant_method", METHOD)
    require(
        method in METHODS,
        where,
        f"quant_method {' or '.join(METHODS)}",
        repr(method),
        "Other quantization formats are not read.",
    )
    _check_groups(where, entry)
    sparsity = entry.get("sparsity_config") or {}
    require(
        isinstance(sparsity, dict) and sparsity.get("format", FORMAT) in (FORMAT, "dense"),
        where,
        f"sparsity_config of format {FORMAT}",
        str(sparsity)[:80],
    )
    ignored = sparsity.get("ignore") or []
    require(
        isinstance(ignored, list) and all(isinstance(name, str) for name in ignored),
        where,
        "sparsity_config.ignore to list names",
        str(ignored)[:80],
    )
    return config, sparsity


def _check_groups(where: str, entry: Mapping[str, Any]) -> None:
    """The config_groups are schemes that the forms of this file have."""
    groups = entry.get("config_groups") or {}
    require(isinstance(groups, dict), where, "an object 'config_groups'", type(groups).__name__)
    known = (*_FORMATS.values(), MARLIN.name)
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        require(
            isinstance(weights, dict), where, f"weights in config_groups.{name}", str(group)[:80]
        )
        assert isinstance(weights, dict)
        written = group.get("format") or entry.get("format")
        require(
            written in known,
            where,
            f"a format in {', '.join(known)}",
            f"{written!r} in config_groups.{name}",
            "Other formats of quantized weights are not read.",
        )
        scheme = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
        per_row = scheme[:2] in (("float", 8), ("int", 8)) and scheme[2] in ("channel", "tensor")
        per_group = scheme[:2] == ("int", 4) and scheme[2] in ("channel", "group")
        require(
            (per_row or per_group) and weights.get("symmetric", True) is True,
            where,
            "8-bit weights with a scale for each output channel, or int4 with groups, symmetric",
            f"{weights.get('num_bits')}-bit {weights.get('type')} by {weights.get('strategy')}, "
            f"symmetric {weights.get('symmetric')}, in config_groups.{name}",
            "Weights quantized otherwise are not supported.",
        )
