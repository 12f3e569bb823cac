"""The tensors of a 2:4 layer in a checkpoint, in one of the forms of forms.py: rules over their
headers that loading, export and verify share, reading them and writing them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekern.errors import FormatError, check
from sparsekern.formats import codec, dtypes, packed, scaled
from sparsekern.formats.config_json import scale_group
from sparsekern.formats.forms import (
    LEVELS,
    MARLIN,
    PACK_QUANTIZED,
    PLAIN,
    WORDS,
    Form,
    compressed_layers,
    form_of,
    join,
    layer_shape,
    storage_of,
    stored_sizes,
)
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24, metadata_of_bitmask, of_levels
from sparsekern.utils.safetensors_io import OP, TensorFiles, require

# Tensors that say that levels do not stand for level * scale, column by column.
_FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


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
        rows, columns = stored_sizes(files, layer, form)
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


def _rule_shape_values(files: TensorFiles, layer: str) -> None:
    form = form_of(files, layer)
    if not form.shape:
        return
    stored = list(stored_sizes(files, layer, form))
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
    stored_scale = found[form.scale]
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
        part = form.scale
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
