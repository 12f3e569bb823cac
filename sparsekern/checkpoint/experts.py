"""Experts in files: how the matrices of a SparseExperts are stored, and found again.

A fused parameter of experts, `mlp.experts.gate_up_proj` [experts, out, in], is in files what
Transformers makes of it, and so are its compressed matrices:

    a tensor for each expert and part, experts.3.w1.weight     layers experts.3.w1, rows of expert 3
    one tensor for all, experts.gate_up_proj                   one layer of experts * out rows
    (its own name in memory, in cases that neither takes)      layers experts.3.gate_up_proj

The third is for a tensor for all of which some matrices are dense and others not, and for weights
of coded element types. Which rows of which expert a tensor holds is not looked up in a table:
Transformers' own conversion is run on tensors that hold their row numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import message
from sparsekern.formats.disk import read_sparse24, stored_bytes, stored_tensors
from sparsekern.formats.forms import join, values_name
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.nn.sparse_experts import SparseExperts, find_experts, linear_of
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.safetensors_io import OP, TensorFiles, TensorInfo, listed, require

_log = logging.getLogger("sparsekern")
# Columns of the tensors of row numbers, and the distance between the numbers of two tensors.
_COLUMNS, _STEP = 4, 2**40


class Conversion(Protocol):
    """What of a names.Conversion is used here."""

    sources: list[tuple[str, str]]
    converter: Any

    def run(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Place:
    """A parameter of experts: module.key [experts, out, in]; [experts, in, out] if transposed."""

    module: str
    key: str
    shape: tuple[int, int, int]
    transposed: bool

    @property
    def name(self) -> str:
        return join(self.module, self.key)

    @property
    def rows(self) -> int:
        return self.shape[2] if self.transposed else self.shape[1]

    @property
    def columns(self) -> int:
        return self.shape[1] if self.transposed else self.shape[2]

    def matrix(self, index: int) -> str:
        """Name of the linear layer of one expert."""
        return join(self.module, f"{index}.{self.key}")


def places(model: nn.Module) -> dict[str, Place]:
    """{name of the fused parameter: Place} of a model, whether its experts are apart or not."""
    found: dict[str, Place] = {}
    for name, (module, recipe) in find_experts(model).items():
        for key, transposed in recipe.matrices:
            shape = cast(Tensor, module._parameters[key]).shape
            place = Place(name, key, cast("tuple[int, int, int]", tuple(shape)), transposed)
            found[place.name] = place
    for name, experts in apart(model).items():
        for key, transposed in experts.recipe.matrices:
            shape = experts._shapes[key]
            place = Place(name, key, cast("tuple[int, int, int]", tuple(shape)), transposed)
            found[place.name] = place
    return found


def apart(model: nn.Module) -> dict[str, SparseExperts]:
    """The SparseExperts of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseExperts)}


# ---- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of something in the files.

    name: of a compressed layer, or of a dense tensor [rows, in].
    index: of a tensor of all experts, which of them; its matrix is [in, rows] if transposed.
    """

    name: str
    start: int
    stop: int
    compressed: bool
    index: int | None = None
    transposed: bool = False


@dataclass
class ExpertNames:
    """What files hold of experts that are to be apart.

    modules: names of the SparseExperts, to be. matrices: {linear layer of the model: its parts}.
    used: names in the files that the parts take, a compressed layer's without its tensors.
    """

    modules: set[str] = field(default_factory=set)
    matrices: dict[str, list[Part]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, place: Place, matrices: Mapping[int, list[Part]]) -> None:
        """Parts for the experts of a place, by index; FormatError where one has parts already."""
        for index, parts in matrices.items():
            name = place.matrix(index)
            names = listed(part.name for part in parts)
            what = f"{OP}: tensors {names}"
            require(name not in self.matrices, what, f"one place for {name}", "two")
            kinds = {part.compressed for part in parts}
            expected = f"all parts of {name} compressed, or all dense"
            require(len(kinds) == 1, what, expected, "some of each")
            rows = sum(part.stop - part.start for part in parts)
            require(rows == place.rows, what, f"{place.rows} rows for {name}", rows)
            self.matrices[name] = parts
            self.used.update(part.name for part in parts)


def stacked_parts(place: Place, layer: str, stored: int) -> dict[int, list[Part]]:
    """One compressed layer, of `stored` rows, that holds those of all experts in turn."""
    rows = place.rows
    expected = f"{place.shape[0]} experts of {rows} rows"
    require(stored == rows * place.shape[0], f"{OP}: layer {layer}", expected, f"{stored} rows")
    return {i: [Part(layer, i * rows, (i + 1) * rows, True)] for i in range(place.shape[0])}


def dense_parts(place: Place, name: str, turned: bool = False) -> dict[int, list[Part]]:
    """A dense tensor of all experts; `turned`: its matrices are the other way round in memory."""
    turned = place.transposed != turned
    return {i: [Part(name, 0, place.rows, False, i, turned)] for i in range(place.shape[0])}


def _turns(model: nn.Module, place: Place, conversion: Conversion, shape: tuple[int, ...]) -> bool:
    """Whether Transformers turns the matrices of a tensor of all experts round when it loads it."""
    if any(getattr(op, "check_dims", False) for op in conversion.converter.operations):
        return shape != place.shape
    made = conversion.run(
        model, lambda _: torch.zeros(shape[0], 2, 3, device="cpu", dtype=torch.float32)
    )[place.name]
    return tuple(made.shape[1:]) == (3, 2)


def own_place(name: str, known: Mapping[str, Place]) -> tuple[Place, int] | None:
    """The place and the expert whose name in memory this is: "...experts.3.down_proj"."""
    found = re.fullmatch(r"(.*)\.(\d{1,9})\.([^.]+)", name)
    place = None if found is None else known.get(f"{found[1]}.{found[3]}")
    if found is None or place is None or int(found[2]) >= place.shape[0]:
        return None
    return place, int(found[2])


def converted_parts(
    model: nn.Module,
    place: Place,
    conversion: Conversion,
    info: Mapping[str, TensorInfo],
    layers: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int]],
) -> dict[int, list[Part]]:
    """The parts of tensors that Transformers converts into the parameter.

    Args:
        layers: {name that a dense weight would have: compressed layer}. sizes: of these.
    """
    names = [name for _, name in conversion.sources]
    what = f"{OP}: tensors {listed(names)}"
    number = {name: i for i, name in enumerate(names)}
    if len(names) == 1 and names[0] not in layers and len(info[names[0]].shape) == 3:
        return dense_parts(place, names[0], _turns(model, place, conversion, info[names[0]].shape))

    def read(name: str) -> Tensor:
        shape = sizes[layers[name]] if name in layers else info[name].shape
        fits = len(shape) == 2 and shape[1] == place.columns
        require(fits, what, f"[rows, {place.columns}] in each", f"{name}: {list(shape)}")
        ids = torch.arange(shape[0], device="cpu") + number[name] * _STEP
        return ids[:, None].expand(-1, _COLUMNS).contiguous()

    try:
        with torch.device("cpu"):
            ids = conversion.run(model, read)[place.name]
    except Exception as error:  # of an operation of Transformers on tensors that do not fit
        remedy = "A tensor is missing or has another shape."
        require(False, what, f"what Transformers makes {place.name} of", repr(error)[:200], remedy)
        raise
    ids = ids.transpose(1, 2) if place.transposed and ids.dim() == 3 else ids
    expected = (place.shape[0], place.rows, _COLUMNS)
    require(tuple(ids.shape) == expected, what, f"{list(expected)} rows", list(ids.shape))
    found: dict[int, list[Part]] = {}
    for index, rows in enumerate(ids[:, :, 0]):
        found[index] = []
        for start, stop in _runs(rows):
            source = names[int(rows[start]) // _STEP]
            first = int(rows[start]) % _STEP
            stored = layers.get(source, source)
            found[index].append(Part(stored, first, first + stop - start, source in layers))
    return found


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of the stretches in which each number is the one before it plus one."""
    ends = (rows[1:] != rows[:-1] + 1).nonzero()[:, 0].add(1).tolist()
    return list(zip([0, *ends], [*ends, len(rows)]))


def check_columns(
    files: TensorFiles,
    layers: Mapping[str, tuple[int, int]],
    names: ExpertNames,
    known: Mapping[str, Place],
) -> None:
    """Shapes of what the parts are taken from; FormatError where one does not fit."""
    for name, parts in names.matrices.items():
        found = own_place(name, known)
        assert found is not None
        place = found[0]
        for part in parts:
            stored = values_name(files, part.name) if part.compressed else part.name
            shape = layers[part.name] if part.compressed else files.info[stored].shape
            if part.index is not None:
                sizes = place.shape[1:]
                sizes = sizes if part.transposed == place.transposed else sizes[::-1]
                fits = tuple(shape) == (place.shape[0], *sizes)
            else:
                fits = len(shape) == 2 and shape[1] == place.columns
            require(
                fits,
                files.where(stored),
                f"a matrix of {place.rows} x {place.columns} for {name}",
                list(shape),
                "The folder belongs to another model.",
            )


class ExpertReader:
    """Reads matrices of experts, holding the layer that the last one came from."""

    def __init__(
        self,
        files: TensorFiles,
        dtype: torch.dtype | None,
        numbers: torch.dtype | None,
        check: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.files, self.dtype, self.check = files, dtype, check
        self.numbers = numbers  # dtype of quantised matrices where none is asked for
        self._held: tuple[str, torch.device, Any] | None = None

    def module(
        self, parts: Iterable[Part], device: torch.device, trained: bool = True
    ) -> nn.Module:
        """The linear layer of these parts."""
        parts = list(parts)
        if not parts[0].compressed:
            pieces = [self._dense(part, device) for part in parts]
            return linear_of(pieces[0] if len(pieces) == 1 else torch.cat(pieces), trained)
        weights = [(self._layer(part.name, device), part.start, part.stop) for part in parts]
        kinds = {(w.spec.storage, w.spec.group, w.dtype) for w, _, _ in weights}
        names = listed(part.name for part in parts)
        require(len(kinds) == 1, f"{OP}: layers {names}", "one element type", len(kinds))
        return SparseLinear.from_sparse24(_rows(weights))

    def _layer(self, name: str, device: torch.device) -> Sparse24:
        if self._held is None or self._held[:2] != (name, device):
            self._held = None
            weight = read_sparse24(self.files, name, device, self.dtype, self.numbers)
            if self.check is not None:
                self.check(values_name(self.files, name), weight.numbers())
            self._held = name, device, weight.rowmajor()
        return cast(Sparse24, self._held[2])

    def _dense(self, part: Part, device: torch.device) -> Tensor:
        if self._held is None or self._held[:2] != (part.name, device):
            self._held = None
            tensor = self.files.read(part.name, device=device)[0]
            if self.check is not None:
                self.check(part.name, tensor)
            self._held = part.name, device, tensor
        tensor = cast(Tensor, self._held[2])
        tensor = tensor if part.index is None else tensor[part.index]
        tensor = (tensor.t() if part.transposed else tensor)[part.start : part.stop]
        return tensor.to(self.dtype or tensor.dtype, copy=True).contiguous()


# ---- writing ------------------------------------------------------------------------------------


@dataclass
class Stored:
    """One thing that is written for experts: a compressed layer, or a dense tensor.

    name: in the files; of a layer without ".compressed". parts: (linear layer, first row, last
    row + 1). stack: of a dense tensor of all experts, None where `parts` are rows of one matrix;
    whether it is transposed.
    """

    name: str
    compressed: bool
    parts: list[tuple[nn.Module, int, int]]
    stack: bool | None = None
    whole: SparseLinear | None = None  # one module, stored as any other

    @property
    def layer(self) -> str:
        """The name as a linear layer's."""
        return self.name if self.compressed else self.name.removesuffix(".weight")

    @property
    def rows(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)

    @property
    def columns(self) -> int:
        return cast(int, self.parts[0][0].in_features)

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the files, on the CPU."""
        if not self.compressed:
            weights = [cast(nn.Linear, m).weight.detach()[a:b] for m, a, b in self.parts]
            if self.stack is None:
                return {self.name: torch.cat(weights).cpu().contiguous()}
            weights = [weight.t() if self.stack else weight for weight in weights]
            return {self.name: torch.stack(weights).cpu().contiguous()}
        tensors = stored_tensors(
            _rows([(cast(SparseLinear, m).weight.rowmajor(), a, b) for m, a, b in self.parts])
        )
        return {join(self.name, part): t.cpu().contiguous() for part, t in tensors.items()}

    @property
    def spec(self) -> WeightSpec:
        """Of a compressed layer: what `tensors` stores."""
        first = cast(SparseLinear, self.parts[0][0]).weight.spec
        return _shaped(first, self.rows)

    @property
    def nbytes(self) -> int:
        if self.compressed:
            return stored_bytes(self.spec)
        itemsize = cast(nn.Linear, self.parts[0][0]).weight.dtype.itemsize
        return self.rows * self.columns * itemsize


def _rows(parts: list[tuple[Sparse24, int, int]]) -> Sparse24:
    """Rows [start, stop) of row-major weights of one element type, below each other."""
    spec = parts[0][0].spec
    tensors = {
        key: torch.cat([w.tensors[key][start:stop] for w, start, stop in parts])
        for key in spec.tensors
    }
    return Sparse24.from_tensors(_shaped(spec, tensors["values"].shape[0]), tensors)


def _shaped(spec: WeightSpec, rows: int) -> WeightSpec:
    """The spec of a row-major weight with as many rows."""
    shape = (rows, spec.shape[1])
    return WeightSpec.of(shape, spec.storage, ROWMAJOR, spec.dtype, spec.scale, spec.group)


def stored_experts(
    model: nn.Module,
    rename: Callable[[str], str],
    split: Callable[[str, Tensor], dict[str, Tensor] | None],
) -> tuple[list[Stored], list[dict[str, Any]]]:
    """(what is written for the SparseExperts of a model, entries for config.json).

    Args:
        rename: name in memory -> in files, of a tensor that no conversion takes.
        split: (name of the fused parameter, tensor) -> what Transformers' conversion for writing
            makes of it, None where there is none.
    Returns:
        The entries say of each parameter that files hold otherwise than Transformers would write it
        dense: tensor (its name then), experts, transposed and layers, the names of what holds them
        in order: one for all, or one for each.
    """
    found: list[Stored] = []
    entries: list[dict[str, Any]] = []
    known = places(model)
    for name, experts in apart(model).items():
        for key, transposed in experts.recipe.matrices:
            place = known[join(name, key)]
            modules = experts.layers(key)
            sparse = [isinstance(m, SparseLinear) for m in modules]
            kinds = {_kind(m) for m in modules}
            # Element types whose tensors have a row for each row of the weight.
            plain = all(
                m.weight.spec.element.plain or m.weight.spec.element.scaled
                for m in modules
                if isinstance(m, SparseLinear)
            )
            pieces = _pieces(place, split)
            if pieces and plain:
                for stored, (index, start, stop) in pieces.items():
                    layer = stored.removesuffix(".weight") if sparse[index] else stored
                    part = (modules[index], start, stop)
                    found.append(Stored(layer, sparse[index], [part]))
                continue
            stored = rename(place.name) if pieces is None else place.name
            entry = {"tensor": stored, "experts": len(modules), "transposed": transposed}
            parts = [(m, 0, place.rows) for m in modules]
            if len(kinds) == 1 and plain and all(sparse):
                layer = stored.removesuffix(".weight")
                found.append(Stored(layer, True, parts))
                entries.append({**entry, "layers": [layer]})
            elif len(kinds) == 1 and not any(sparse):
                found.append(Stored(stored, False, parts, stack=transposed))
            else:
                names = [place.matrix(i) for i in range(len(modules))]
                for own, module, part in zip(names, modules, parts):
                    if isinstance(module, SparseLinear):
                        found.append(Stored(own, True, [part], whole=module))
                    else:
                        found.append(Stored(join(own, "weight"), False, [part]))
                entries.append({**entry, "layers": names})
    return found, entries


def _kind(module: nn.Module) -> Any:
    """Equal for linear layers that can be stored as one tensor."""
    if isinstance(module, SparseLinear):
        spec = module.weight.spec
        return spec.storage, spec.group, spec.dtype
    return cast(nn.Linear, module).weight.dtype


def _pieces(
    place: Place, split: Callable[[str, Tensor], dict[str, Tensor] | None]
) -> dict[str, tuple[int, int, int]] | None:
    """{tensor in the files: (expert, first row, last row + 1)}; None where the parameter is one
    tensor there, {} where it is something that is not rows of single experts."""
    count, rows = place.shape[0], place.rows
    ids = torch.arange(count * rows, device="cpu").reshape(count, rows, 1).expand(-1, -1, _COLUMNS)
    ids = (ids.transpose(1, 2) if place.transposed else ids).contiguous()
    try:
        made = split(place.name, ids)
    except Exception as error:  # an operation that needs the numbers themselves
        _log.warning(
            "sparsekern: %s is stored under its name in memory; Transformers' conversion of it "
            "does not work on row numbers (%s: %s)",
            place.name,
            type(error).__name__,
            error,
        )
        return {}
    if made is None:
        return None
    found: dict[str, tuple[int, int, int]] = {}
    for name, tensor in made.items():
        flat = tensor.dim() == 2 and tensor.shape[1] == _COLUMNS and name.endswith(".weight")
        if not flat or bool((tensor != tensor[:, :1]).any()) or len(_runs(tensor[:, 0])) != 1:
            return {}
        first, last = int(tensor[0, 0]), int(tensor[-1, 0])
        if first // rows != last // rows:
            return {}
        found[name] = first // rows, first % rows, last % rows + 1
    whole = sum(stop - start for _, start, stop in found.values())
    return found if whole == count * rows else {}


def read_entries(
    config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]], info: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The entries of config.json, checked against the files; FormatError."""
    own = config.get("sparsekern", {})
    entries = own.get("experts", []) if isinstance(own, dict) else None
    what = f"{OP}: config.json"
    require(isinstance(entries, list), what, "sparsekern.experts to be a list", str(own)[:80])
    seen: set[str] = set()
    for entry in cast("list[Any]", entries):
        expected = "sparsekern.experts to name compressed layers of equal experts"
        good = isinstance(entry, dict) and isinstance(entry.get("tensor"), str)
        good = good and type(entry.get("experts")) is int and entry["experts"] > 0
        good = good and isinstance(entry.get("transposed"), bool)
        names = entry.get("layers") if good else None
        good = isinstance(names, list) and len(names) in (1, entry["experts"])
        good = good and all(
            isinstance(n, str) and (n in layers or join(n, "weight") in info) and n not in seen
            for n in cast("list[Any]", names)
        )
        good = good and len(set(cast("list[str]", names))) == len(cast("list[str]", names))
        require(good, what, expected, message(OP, "", str(entry)[:80])[-80:])
        seen.update(cast("list[str]", names))
        if len(cast("list[str]", names)) == 1 and entry["experts"] > 1:
            one = cast("list[str]", names)[0]
            rows = layers[one][0] if one in layers else 1
            require(rows % entry["experts"] == 0, what, expected, f"{rows} rows of {one}")
    return cast("list[dict[str, Any]]", entries)


def fused_dense(entry: Mapping[str, Any], dense: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """{name: the dense parameter} of an entry. dense: layer -> its dense weight."""
    weights = [dense(name) for name in entry["layers"]]
    if len(weights) == 1:
        rows, columns = weights[0].shape
        stacked = weights[0].reshape(entry["experts"], rows // entry["experts"], columns)
    else:
        stacked = torch.stack(weights)
    stacked = stacked.transpose(1, 2) if entry["transposed"] else stacked
    return {entry["tensor"]: stacked.contiguous()}
