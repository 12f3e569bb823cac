"""What pruning did to each layer: a table for people, JSON for programs, a plot for papers."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any

from sparsekern.errors import check, message
from sparsekern.formats.layouts import WeightSpec
from sparsekern.prune.pattern import TWO_OF_FOUR, Pattern
from sparsekern.utils.arguments import checked
from sparsekern.utils.files import write_atomic

if TYPE_CHECKING:
    from sparsekern.prune import Hessian

SCHEMA = 1
# Below this share of the weights that were to be pruned the run is partial: a warning, and exit
# code 3 of the command line.
PARTIAL = 0.5
_RIGHT = ("pruning", "adds", "rel. error", "damp", "seconds")  # columns of numbers


@dataclass
class LayerReport:
    """One weight that is used in a matrix product: of a linear layer, or one that stays dense.

    Attributes:
        name: full module name.
        shape: (out_features, in_features); of experts in one parameter and of convolutions as
            stored.
        dtype: of the weight, e.g. "bfloat16".
        block: index of its decoder block, None outside the blocks.
        method: "magnitude", "wanda", "sparsegpt", "mask" (mask passed in, weights kept) or the name
            of the score function.
        relative_error: ‖(W − W')X‖²_F / ‖WX‖²_F over the calibration inputs X, of the weight as it
            is left; None without calibration.
        quantized: element type, group and method of the quantiser, as "int4 g128 gptq", or None.
        quantize_error: the part of relative_error that quantisation added to that of pruning.
        damp: damping that SparseGPT used, as a share of the mean of the Hessian's diagonal; None
            for other methods.
        note: what was out of the ordinary (more damping, float64), or None.
        seconds: time spent on this layer's mask and weights; layers pruned together share it by
            rows.
        skipped: the layer stays dense.      reason: why, None if pruned.
        bytes_dense, bytes_sparse: of the weight before and after; bytes_sparse is bytes_dense where
            nothing is compressed.
        is_24: the weight is 2:4 now, pruned by this run or before it.
        pattern: the pattern that the run gave the weight, where it is another: "4:8 in pairs".
        asked: the layer was to be pruned; False where a rule of the caller leaves it dense.
        tokens: that an expert saw in the calibration; None for other layers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int | None = None
    method: str | None = None
    relative_error: float | None = None
    damp: float | None = None
    note: str | None = None
    seconds: float = 0.0
    skipped: bool = False
    reason: str | None = None
    bytes_dense: int = 0
    bytes_sparse: int = 0
    is_24: bool = False
    asked: bool = True
    tokens: int | None = None
    quantized: str | None = None
    quantize_error: float | None = None
    pattern: str | None = None

    @property
    def sparse(self) -> bool:
        """Whether the weight is 2:4 now, or of the pattern that the run was asked for."""
        return self.is_24 or self.pattern is not None

    @property
    def elements(self) -> int:
        """Number of weights, counted dense."""
        return math.prod(self.shape)

    @property
    def few_tokens(self) -> bool:
        """Whether an expert saw fewer tokens than it has in_features; oneshot/experts.py says what
        it is pruned on."""
        return self.tokens is not None and self.tokens < self.shape[1]


@dataclass
class PruneReport:
    """The whole run.

    Attributes:
        model: class name.      method, options: as called.      device: where blocks ran.
        calibration: {"samples", "tokens", "sha256"}, None without calibration.
        layers: one LayerReport per weight of a matrix product, in the order of the model.
        seconds: wall time of the call.
        phases: the same by phase: layer times (keep_dense), capture, hessian, prune, forward.
        parts: seconds of parts of a phase, as "prune: refine" or "permute: search".
        resumed: stages that were loaded instead of computed.
        preset: its name, None without.
        rotation: the RotationReport's fields, or {"skipped": why}; None where none was asked for.
        permutation: the PermutationReport's fields; None where none was asked for.
        reconstruction: one dict per fit (reconstruct.Fit): blocks, held-out error before and after,
            epochs, steps, kept, seconds, part.
        estimate: what the run was expected to take: "seconds" and what that is "from", bytes of
            "hidden_states" and "hessians".
        parameters: {"dense": of the whole model, pruned numbers included, "stored": those that are
            kept}; {} in reports of earlier versions.
        hessians: layer name -> Hessian, with keep_hessians; not in the JSON.
    """

    model: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    calibration: dict[str, Any] | None = None
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    preset: str | None = None
    rotation: dict[str, Any] | None = None
    permutation: dict[str, Any] | None = None
    reconstruction: list[dict[str, Any]] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    hessians: dict[str, Hessian] | None = field(default=None, compare=False, repr=False)

    @property
    def pruned(self) -> list[LayerReport]:
        """Layers that were pruned."""
        return [layer for layer in self.layers if not layer.skipped]

    @property
    def skipped(self) -> list[LayerReport]:
        """Layers that stayed dense; `.reason` says why."""
        return [layer for layer in self.layers if layer.skipped]

    @property
    def few_tokens(self) -> list[LayerReport]:
        """Matrices of experts that saw fewer tokens in the calibration than they have
        in_features."""
        return [layer for layer in self.pruned if layer.few_tokens]

    @property
    def pattern(self) -> Pattern:
        """The pattern that was asked for."""
        return Pattern.of(self.options.get("pattern", TWO_OF_FOUR))

    @property
    def share(self) -> float:
        """Of the weights of all rows, the share that is 2:4 now, or of the pattern that was asked
        for; 0 without rows."""
        return _share(self.layers)

    @property
    def partial(self) -> bool:
        """Whether less was pruned than was asked for: nothing, or under half of the weights that no
        rule of the caller leaves dense. Weights that were 2:4 before count as asked and done; those
        that should be quantised and are not, do not."""
        asked = [layer for layer in self.layers if layer.asked]
        few = bool(asked) and _share(asked) < PARTIAL
        return not self.pruned or few or bool(self.unquantized)

    @property
    def unquantized(self) -> list[LayerReport]:
        """With quantize=, the layers that are 2:4, and that no rule leaves out, but hold other
        numbers than asked for: those that were 2:4, or quantised, before."""
        wanted, group = self.options.get("quantize"), self.options.get("quantize_group") or 0
        if wanted is None:
            return []
        rows = [row for row in self.layers if row.asked and row.is_24]
        levels = [WeightSpec.of(row.shape, wanted, group=group).levels for row in rows]
        return [r for r, text in zip(rows, levels) if not f"{r.quantized} ".startswith(f"{text} ")]

    @property
    def shortfall(self) -> tuple[str, str]:
        """(what was asked for, what was done instead) of a report that is `partial`."""
        if self.unquantized:
            wanted = f"{self.options['quantize']} in all layers that are {self.pattern}"
            return wanted, f"{len(self.unquantized)} that keep the numbers that they had"
        already = sum(row.is_24 for row in self.skipped)
        if already and not self.pruned:
            return "layers to prune", f"none: {already} were {self.pattern} already"
        return f"at least half of the weights to be {self.pattern}", f"{self.share:.1%} of all"

    def why_dense(self) -> list[tuple[str, int, float]]:
        """[(reason, layers, share of all weights)] of what is not sparse, largest share first;
        reasons that differ only in the numbers count as one."""
        total = sum(layer.elements for layer in self.layers)
        found: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            if not layer.sparse:
                reason = f"pruned, but not to {self.pattern} ({self.method})"
                reason = _short(layer.reason or reason)
                count, size = found.get(reason, (0, 0))
                found[reason] = count + 1, size + layer.elements
        rows = [(reason, n, size / max(1, total)) for reason, (n, size) in found.items()]
        return sorted(rows, key=lambda row: -row[2])

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __contains__(self, name: object) -> bool:
        return any(layer.name == name for layer in self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The report of the layer of that name; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def summary(self) -> str:
        """One line: layers, mean and worst error, bytes, share of the weights, seconds."""
        errors = [e for e in (layer.relative_error for layer in self.pruned) if e is not None]
        counts = f"{len(self.pruned)} layers pruned ({self.method}), {len(self.skipped)} left dense"
        text = f"{self.model}: {counts}"
        if errors:
            text += f", relative error mean {sum(errors) / len(errors):.4g} worst {max(errors):.4g}"
        kinds = sorted({row.quantized for row in self.pruned if row.quantized is not None})
        if kinds:
            text += f", quantised ({', '.join(kinds)})"
            added = [e for e in (row.quantize_error for row in self.pruned) if e is not None]
            text += f" which adds {sum(added) / len(added):.4g} in the mean" if added else ""
        dense, sparse = (
            sum(getattr(layer, key) for layer in self.pruned)
            for key in ("bytes_dense", "bytes_sparse")
        )
        if sparse != dense:
            text += f", pruned weights {_size(dense)} -> {_size(sparse)}"
        if self.few_tokens:
            text += f", {len(self.few_tokens)} matrices of experts saw few tokens"
        text += f", {self.share:.1%} of the linear weights are {self.pattern}"
        if self.preset:
            text += f", preset {self.preset}"
            rule = self.options.get("preset_rule")
            text += f" ({rule})" if rule else ""
        if self.parameters and self.parameters["stored"] != self.parameters["dense"]:
            text += (
                f", {self.parameters['stored']:,} of {self.parameters['dense']:,} parameters kept"
            )
        return f"{text}, {self.seconds:.1f} s"

    def table(self) -> str:
        """One row per layer, then the summary."""
        head = ["layer", "shape", "method", "rel. error", "damp", "seconds", "note"]
        with_levels = any(layer.quantized for layer in self.layers)
        if with_levels:  # the columns of what each step adds
            head[3:4] = ["pruning", "quantised", "adds", "rel. error"]
        rows = [tuple(head)]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            if layer.skipped:
                none = [""] * (len(head) - 4)
                rows.append((layer.name, shape, "dense", *none, f"skipped: {layer.reason}"))
                continue
            damp = "" if layer.damp is None else f"{layer.damp:g}"
            error, added = layer.relative_error, layer.quantize_error
            errors = ["" if error is None else f"{error:.5f}"]
            if with_levels:
                before = error if error is None or added is None else error - added
                steps = ("" if value is None else f"{value:.5f}" for value in (before, added))
                errors[:0] = [next(steps), layer.quantized or "", next(steps)]
            note, seconds = layer.note or "", f"{layer.seconds:.3f}"
            rows.append((layer.name, shape, layer.method or "", *errors, damp, seconds, note))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        right = {i for i, name in enumerate(head) if name in _RIGHT}
        lines = []
        for row in rows:
            cells = (
                c.rjust(w) if i in right else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths))
            )
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, "", self.summary()])

    __str__ = summary

    def to_json(self) -> str:
        """The report as JSON. An infinite or undefined error is written as null, which every JSON
        reader accepts."""
        return json.dumps({"schema": SCHEMA, **_finite(self._plain())}, indent=1, allow_nan=False)

    def _plain(self) -> dict[str, Any]:
        """The fields as plain values, without the Hessians."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "hessians"}
        return {**kept, "layers": [asdict(layer) for layer in self.layers]}

    def to_dataframe(self) -> Any:
        """One row per layer as a pandas.DataFrame. Raises ImportError without pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            text = "sparsekern.PruneReport.to_dataframe: pandas is missing. pip install pandas."
            raise ImportError(text) from error
        return pandas.DataFrame([asdict(layer) for layer in self.layers])

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        head = ("layer", "shape", "result", "rel. error", str(self.pattern), "note")
        rows = []
        for layer in self.layers:
            error = "" if layer.relative_error is None else f"{layer.relative_error:.5f}"
            result = "dense" if layer.skipped and not layer.sparse else layer.method or "2:4"
            result += f", {layer.quantized}" if layer.quantized else ""
            shape = "x".join(map(str, layer.shape))
            note = layer.reason or layer.note or ""
            rows.append((layer.name, shape, result, error, "yes" if layer.sparse else "", note))
        lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
        for row in rows:
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
        return f"<p>{escape(self.summary())}</p><table>{''.join(lines)}</table>"

    @classmethod
    @checked("sparsekern.PruneReport.from_json")
    def from_json(cls, text: str) -> PruneReport:
        """Inverse of `to_json`.

        Raises:
            ValueError: not a report, or one of another schema.      TypeError: no text.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            remedy = "Pass the output of to_json()."
            got = str(error)
            raise ValueError(message("sparsekern.PruneReport", "JSON text", got, remedy)) from error
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        check(
            schema == SCHEMA,
            "sparsekern.PruneReport",
            f"schema {SCHEMA}",
            schema,
            "Pass the output of to_json().",
        )
        try:
            layers = [
                LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in data.pop("layers")
            ]
            return cls(**data, layers=layers)
        except (KeyError, TypeError, AttributeError) as error:
            got, remedy = f"{type(error).__name__}: {error}", "Pass the output of to_json()."
            expected = "the fields of a report"
            raise ValueError(message("sparsekern.PruneReport", expected, got, remedy)) from error

    @checked("sparsekern.PruneReport.save")
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path` atomically: a reader sees the old file or the new one, never
        half of it."""
        write_atomic(path, self.to_json().encode())

    @checked("sparsekern.PruneReport.plot")
    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the relative error of every pruned layer over the blocks, one line per kind of
        layer, into an image file.

        Raises:
            ImportError: matplotlib is missing.      ValueError: no layer has a relative error.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "sparsekern.PruneReport.plot: matplotlib is missing. pip install matplotlib."
            ) from error
        kinds: dict[str, list[tuple[int, float]]] = {}
        for position, layer in enumerate(self.pruned):
            if layer.relative_error is not None and math.isfinite(layer.relative_error):
                where = layer.block if layer.block is not None else position
                kinds.setdefault(_kind(layer), []).append((where, layer.relative_error))
        check(
            bool(kinds),
            "sparsekern.PruneReport.plot",
            "relative errors",
            "none",
            "Prune with calibration data.",
        )
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, points in sorted(kinds.items()):
            axes.plot(*zip(*sorted(points)), marker=".", linewidth=1, label=kind)
        axes.set(
            xlabel="block", ylabel="‖(W − W')X‖² / ‖WX‖²", title=f"{self.model}, {self.method}"
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(os.fspath(path))


def _kind(layer: LayerReport) -> str:
    """The name below the block: "model.layers.3.mlp.up_proj" -> "mlp.up_proj"."""
    if layer.block is None:
        return layer.name
    return layer.name.partition(f".{layer.block}.")[2] or layer.name


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"


def _share(layers: list[LayerReport]) -> float:
    total = sum(layer.elements for layer in layers)
    return sum(layer.elements for layer in layers if layer.sparse) / total if total else 0.0


def _short(reason: str) -> str:
    """A reason without its numbers in brackets: layers of one kind share it."""
    return re.sub(r" \(.*\)$", "", reason)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
