"""What pruning did to each layer: a table for people, JSON for programs, a plot for papers."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field

SCHEMA = 1


@dataclass
class LayerReport:
    """One Linear layer.

    Attributes:
        name: full module name.
        shape: (out_features, in_features).
        dtype: of the weight, e.g. "bfloat16".
        block: index of its decoder block, None outside the blocks.
        method: "magnitude", "wanda", "sparsegpt", "mask" (mask passed in, weights kept) or the name
            of the score function.
        relative_error: ‖(W − W')X‖²_F / ‖WX‖²_F over the calibration inputs X; None without
            calibration.
        damp: damping that SparseGPT used, as a share of the mean of the Hessian's diagonal; None
            for other methods.
        note: what was out of the ordinary (more damping, float64), or None.
        seconds: time spent on this layer's mask and weights; layers pruned together share it by
            rows.
        skipped: the layer stays dense.      reason: why, None if pruned.
        bytes_dense, bytes_sparse: of the weight before and after; bytes_sparse is bytes_dense where
            nothing is compressed.
    """

    name: str
    shape: tuple[int, int]
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


@dataclass
class PruneReport:
    """The whole run.

    Attributes:
        model: class name.      method, options: as called.      device: where blocks ran.
        calibration: {"samples", "tokens", "sha256"}, None without calibration.
        layers: one LayerReport per Linear, in the order of the model.
        seconds: wall time of the call.
        phases: the same by phase: layer times (keep_dense), capture, hessian, prune, forward.
        resumed: stages that were loaded instead of computed.
    """

    model: str
    method: str
    options: dict = field(default_factory=dict)
    device: str = "cpu"
    calibration: dict | None = None
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    resumed: int = 0

    @property
    def pruned(self) -> list[LayerReport]:
        """Layers that were pruned."""
        return [layer for layer in self.layers if not layer.skipped]

    @property
    def skipped(self) -> list[LayerReport]:
        """Layers that stayed dense; `.reason` says why."""
        return [layer for layer in self.layers if layer.skipped]

    def __getitem__(self, name: str) -> LayerReport:
        """The report of the layer of that name; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def summary(self) -> str:
        """One line: layers, mean and worst error, bytes, seconds."""
        errors = [e for e in (layer.relative_error for layer in self.pruned) if e is not None]
        counts = f"{len(self.pruned)} layers pruned ({self.method}), {len(self.skipped)} left dense"
        text = f"{self.model}: {counts}"
        if errors:
            text += f", relative error mean {sum(errors) / len(errors):.4g} worst {max(errors):.4g}"
        dense, sparse = (
            sum(getattr(layer, key) for layer in self.pruned)
            for key in ("bytes_dense", "bytes_sparse")
        )
        if sparse != dense:
            text += f", pruned weights {_size(dense)} -> {_size(sparse)}"
        return f"{text}, {self.seconds:.1f} s"

    def table(self) -> str:
        """One row per layer, then the summary."""
        head = ("layer", "shape", "method", "rel. error", "damp", "seconds", "note")
        rows = [head]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            if layer.skipped:
                rows.append((layer.name, shape, "dense", "", "", "", f"skipped: {layer.reason}"))
                continue
            damp = "" if layer.damp is None else f"{layer.damp:g}"
            error = "" if layer.relative_error is None else f"{layer.relative_error:.5f}"
            note = layer.note or ""
            rows.append(
                (layer.name, shape, layer.method, error, damp, f"{layer.seconds:.3f}", note)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        right = {3, 4, 5}
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
        return json.dumps({"schema": SCHEMA, **_finite(asdict(self))}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PruneReport:
        """Inverse of `to_json`.

        Raises:
            ValueError: not a report, or one of another schema.
        """
        from sparsekern.errors import check

        data = json.loads(text)
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        check(
            schema == SCHEMA,
            "sparsekern.PruneReport",
            f"schema {SCHEMA}",
            schema,
            "Pass the output of to_json().",
        )
        layers = [
            LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in data.pop("layers")
        ]
        return cls(**data, layers=layers)

    def save(self, path) -> None:
        """Write the JSON to `path` atomically: a reader sees the old file or the new one, never
        half of it."""
        write_atomic(path, self.to_json().encode())

    def plot(self, path) -> None:
        """Draw the relative error of every pruned layer over the blocks, one line per kind of
        layer, into an image file.

        Raises:
            ImportError: matplotlib is missing.      ValueError: no layer has a relative error.
        """
        from sparsekern.errors import check

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
            kinds,
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


def write_atomic(path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename; flushed to
    disk before the rename."""
    path = os.path.abspath(os.fspath(path))
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _kind(layer: LayerReport) -> str:
    """The name below the block: "model.layers.3.mlp.up_proj" -> "mlp.up_proj"."""
    if layer.block is None:
        return layer.name
    return layer.name.partition(f".{layer.block}.")[2] or layer.name


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
