"""The forms in which a checkpoint holds a 2:4 layer, and which of them a layer of a folder has.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from sparsekern.formats import dtypes
from sparsekern.formats.scaled import SCALE
from sparsekern.utils.safetensors_io import TensorFiles

VALUE_DTYPES = tuple(dtypes.PLAIN)
FLOATING = (*VALUE_DTYPES, torch.float64)  # of dense tensors


def join(module: str, tensor: str) -> str:
    """Tensor name of a module's tensor; the root module has an empty name."""
    return f"{module}.{tensor}" if module else tensor


@dataclass(frozen=True)
class Form:
    """One of the forms above.

    values: name of the tensor with the numbers. shape, scale: of those with the sizes and with the
    scales, or "" where there is none. dtypes: {name: those that it may have} of all its tensors.
    """

    name: str
    values: str
    shape: str
    scale: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return tuple(self.dtypes)


LEVEL_DTYPES = {
    kind.storage: kind.name for kind in dtypes.elements() if kind.scaled and kind.bits == 8
}
_SCALES = (torch.float32, *dtypes.NATIVE)
_MASK = {"bitmask": (torch.uint8,), "shape": (torch.int64,)}
_LEVELS = {"compressed": tuple(LEVEL_DTYPES), **_MASK, SCALE: _SCALES}
_EVERY = {
    "weight_packed": (torch.int32,),
    SCALE: _SCALES,
    "weight_shape": (torch.int64, torch.int32),
}
_WORDS = {**_EVERY, "bitmask": _MASK["bitmask"]}
_MARLIN = {"weight_packed": (torch.int32,), "scale_packed": _SCALES, "meta": (torch.int16,)}
PLAIN = Form("plain", "compressed", "shape", "", {"compressed": VALUE_DTYPES, **_MASK})
LEVELS = Form("levels", "compressed", "shape", SCALE, _LEVELS)
WORDS = Form("words", "weight_packed", "weight_shape", SCALE, _WORDS)
PACK_QUANTIZED = Form("pack-quantized", "weight_packed", "weight_shape", SCALE, _EVERY)
MARLIN = Form("marlin-24", "weight_packed", "", "scale_packed", _MARLIN)
FORMS = (PLAIN, LEVELS, WORDS, PACK_QUANTIZED, MARLIN)
MARKS = ("compressed", "bitmask", "weight_packed")  # of which a compressed layer has one at least
ALL_PARTS = tuple(dict.fromkeys(part for form in FORMS for part in form.parts))


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


def _marlin_bits(files: TensorFiles, layer: str) -> int:
    packed, meta = (files.info[join(layer, part)].shape for part in ("weight_packed", "meta"))
    return 0 if math.prod(meta) == 0 else 4 * math.prod(packed) // math.prod(meta)


def stored_sizes(files: TensorFiles, layer: str, form: Form) -> tuple[int, ...]:
    return tuple(files.read(join(layer, form.shape))[0].flatten().tolist())


def layer_shape(files: TensorFiles, layer: str) -> tuple[int, int]:
    """(out_features, in_features) of a compressed layer, from its headers and its sizes."""
    form = form_of(files, layer)
    if form is MARLIN:
        rows, columns = files.info[join(layer, "meta")].shape
        return columns // 2, 32 * rows
    if form.values == "compressed":
        out_features, half = files.info[join(layer, "compressed")].shape
        return out_features, 2 * half
    out_features, in_features = stored_sizes(files, layer, form)
    return out_features, in_features


def compressed_layers(files: TensorFiles) -> list[str]:
    """Names of the modules that are stored compressed, sorted."""
    parts = (name.rpartition(".") for name in files.info)
    return sorted({module for module, _, part in parts if part in MARKS})
