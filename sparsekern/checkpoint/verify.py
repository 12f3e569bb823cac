"""verify_checkpoint: every rule of the format on every layer of a folder, reported, not raised."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsekern.checkpoint.arguments import folder_path
from sparsekern.checkpoint.names import disk_names
from sparsekern.checkpoint.plan import plan
from sparsekern.checkpoint.reader import require_finite
from sparsekern.checkpoint.skeleton import build_skeleton, linear_shape
from sparsekern.errors import FormatError
from sparsekern.formats import dtypes, sparse24
from sparsekern.formats.config_json import numbers_dtype, read_compression_config
from sparsekern.formats.disk import HEADER_RULES, check_headers, read_sparse24
from sparsekern.formats.forms import (
    ALL_PARTS,
    PLAIN,
    compressed_layers,
    form_of,
    join,
    layer_shape,
    parts_of,
    storage_of,
    values_name,
)
from sparsekern.utils.arguments import usable_device
from sparsekern.utils.safetensors_io import (
    CONFIG_FILE,
    OP,
    TensorFiles,
    check_sums,
    listed,
    read_json,
    require,
)

VERIFY_OP = "sparsekern.verify_checkpoint"


@dataclass
class LayerResult:
    """One compressed layer: `problems` maps each broken rule to its message; `negative_zeros` is
    a note, no problem.
    """

    name: str
    file: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    zero_values: int = 0  # kept slots that hold zero: groups with fewer than two non-zeros
    negative_zeros: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass
class CheckpointReport:
    """Result of verify_checkpoint.

    Attributes:
        directory: the folder. layers: a LayerResult for each compressed layer. dense: names of
            two-dimensional weights that are stored dense. problems: {rule: message} of the folder
            as a whole. nbytes / dense_nbytes: bytes of the compressed layers' weights in the
            files, and what they would take dense in the same types. sums: whether the folder has a
        SHA256SUMS; without one, a changed number that breaks no rule cannot be seen.
    """

    directory: str
    layers: list[LayerResult] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    dense_nbytes: int = 0
    sums: bool = False

    @property
    def ok(self) -> bool:
        """True when no rule is broken, in the folder or in any layer."""
        return not self.problems and all(layer.ok for layer in self.layers)

    def table(self) -> str:
        """The report as text: one line per layer, the broken rules below it, a summary."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'shape':>14}  {'dtype':<8}  {'zeros kept':>10}  result"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape)) or "?"
            result = "ok" if layer.ok else f"FAILED ({', '.join(layer.problems)})"
            note = f", {layer.negative_zeros} negative zeros" if layer.negative_zeros else ""
            lines.append(
                f"{layer.name:<{width}}  {shape:>14}  {layer.dtype:<8}  "
                f"{layer.zero_values:>10}  {result}{note}"
            )
            lines += [f"    {rule}: {text}" for rule, text in layer.problems.items()]
        lines += [f"folder: {rule}: {text}" for rule, text in self.problems.items()]
        size = (
            f", {self.nbytes} bytes = {self.nbytes / self.dense_nbytes:.4f} x dense in these types"
            if self.dense_nbytes
            else ""
        )
        lines.append(
            f"{'ok' if self.ok else 'FAILED'}: {len(self.layers)} compressed layers{size}, "
            f"{len(self.dense)} dense two-dimensional weights, "
            + ("sha256 checked" if self.sums else "no sha256 in the folder")
        )
        return "\n".join(lines)


def verify_checkpoint(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> CheckpointReport:
    """Check a model folder against every rule of sparse-24-bitmask; reads one layer at a time.

    Folder rules: files (headers, index), sha256 (every file is as SHA256SUMS has it), finite (no
    NaN or Inf in a dense tensor), config (the entry that announces the format), ignore (it
    lists the dense linear layers, no others), tree (the tensors are those of the model that
    config.json describes; needs transformers). Layer rules: tensors, dtypes, shapes, shape (what
    the shape tensor says), bitmask (two bits in every nibble, padding zero), finite (no NaN, Inf),
    scale (of quantised layers: finite and above 0).

    Returns:
        CheckpointReport. Damage is reported, not raised.
    """
    folder = folder_path(VERIFY_OP, "the model", directory)
    device = usable_device(VERIFY_OP, device, "device")
    report = CheckpointReport(str(folder))
    changed: Mapping[str, str] = {}
    try:
        found = check_sums(folder)
        report.sums, changed = found is not None, found or {}
    except FormatError as error:
        changed = {"SHA256SUMS": str(error)}
    try:
        files = TensorFiles(folder)
    except FormatError as error:
        report.problems["files"] = str(error)
        return report
    config: Mapping[str, Any] = {}
    sparsity: Mapping[str, Any] = {}
    names = compressed_layers(files)
    try:
        config, sparsity = read_compression_config(folder)
        entry = config.get("quantization_config") or {}
        if not sparsity and entry.get("config_groups"):  # pack-quantized, marlin-24
            sparsity = {"format": entry.get("format"), "ignore": entry.get("ignore") or ()}
        require(
            not names or sparsity.get("format"),
            f"{OP}: {CONFIG_FILE}",
            "quantization_config.sparsity_config for compressed layers",
            "none",
            "Other readers would not recognise them.",
        )
        wrong = sorted(
            set(names) & {name for name in sparsity.get("ignore") or () if isinstance(name, str)}
        )
        if wrong:
            report.problems["ignore"] = (
                f"{CONFIG_FILE} lists compressed layers as dense: {', '.join(wrong[:12])}"
            )
    except FormatError as error:
        report.problems["config"] = str(error)
    for name in names:
        layer = _verify_layer(files, name, device, numbers_dtype(config))
        report.layers.append(layer)
        if layer.shape:
            parts = form_of(files, name).parts
            report.nbytes += sum(files.info[join(name, part)].nbytes for part in parts)
            storage = storage_of(files, name)
            kind = files.info[values_name(files, name)].dtype if storage is None else storage
            report.dense_nbytes += math.prod(layer.shape) * dtypes.element(kind).bits // 8
    if not report.problems and all(layer.ok for layer in report.layers):
        _verify_tree(report, files, sparsity)
    _verify_finite(report, files, device)
    if changed:
        report.problems["sha256"] = "; ".join(f"{n}: {why}" for n, why in changed.items())
    report.dense = [
        name
        for name, info in files.info.items()
        if name.endswith("weight") and len(info.shape) == 2
    ]
    return report


def _verify_tree(report: CheckpointReport, files: TensorFiles, sparsity: Mapping[str, Any]) -> None:
    """Rules that compare the folder with the model that its config describes."""
    config = read_json(files.folder / CONFIG_FILE)
    if "model_type" not in config or importlib.util.find_spec("transformers") is None:
        return
    try:
        with torch.device("cpu"):  # whatever torch's default device is
            model = build_skeleton(files.folder, files.info)
        layers = check_headers(files)
        found = plan(model, files, layers, whole=True)
    except FormatError as error:
        report.problems["tree"] = str(error)
        return
    if found.unexpected:
        report.problems["tree"] = (
            f"{OP}: {len(found.unexpected)} tensors have no place in {type(model).__name__}: "
            f"{listed(found.unexpected)}"
        )
    ignored = sparsity.get("ignore") or ()
    names = disk_names(model, {}, ())
    linears = [n for n, module in model.named_modules() if linear_shape(module) is not None]
    stored = {names.module(name) for name in linears} | set(linears)
    forgotten = sorted(
        name
        for name in stored
        if report.layers and join(name, "weight") in files.info and name not in ignored
    )
    # Of patterns nothing is asked, nor where the targets are single layers and no class of them.
    targets = sparsity.get("targets")
    single = isinstance(targets, list) and targets and all(t in layers for t in map(str, targets))
    if forgotten and not single and not any(str(n).startswith("re:") for n in ignored):
        report.problems["ignore"] = (
            f"{CONFIG_FILE} says nothing of these layers being dense: {listed(forgotten)}"
        )


def _verify_finite(report: CheckpointReport, files: TensorFiles, device: torch.device) -> None:
    """Dense tensors; those of compressed layers are checked with their layer."""
    bad = []
    compressed = parts_of(files, compressed_layers(files))
    for name in files.info:
        if name not in compressed:
            try:
                require_finite(files, name, files.read(name, device=device)[0])
            except FormatError as error:
                bad.append(str(error))
    if bad:
        report.problems["finite"] = " ".join(bad[:4]) + (
            f" (and {len(bad) - 4} more)" if bad[4:] else ""
        )


def _verify_layer(
    files: TensorFiles, name: str, device: torch.device, numbers: torch.dtype | None
) -> LayerResult:
    first = next(join(name, part) for part in ALL_PARTS if join(name, part) in files.info)
    layer = LayerResult(name, files.file_of[first])
    for rule, rule_check in HEADER_RULES:
        try:
            rule_check(files, name)
        except FormatError as error:
            layer.problems[rule] = str(error)
            return layer  # later rules presume the earlier ones
    layer.shape = layer_shape(files, name)
    form = form_of(files, name)
    if form is not PLAIN:
        layer.dtype = str(storage_of(files, name))
        try:
            w24 = read_sparse24(files, name, device, None, numbers)
            layer.zero_values = int((w24.numbers(torch.float32) == 0).sum())
            sparse24.verify(w24)
        except FormatError as error:
            text = str(error)
            rule = "scale" if "_scale" in text or "scale_" in text else "bitmask"
            layer.problems["finite" if "finite values" in text else rule] = text
        return layer
    layer.dtype = str(files.info[join(name, "compressed")].dtype).removeprefix("torch.")
    values = files.read(join(name, "compressed"), device=device)[0]
    zero = values == 0
    layer.zero_values = int(zero.sum())
    layer.negative_zeros = int((zero & torch.signbit(values)).sum())
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row, slot = (~finite).nonzero()[0].tolist()
        layer.problems["finite"] = (
            f"{files.where(join(name, 'compressed'))}: expected finite values, got "
            f"{int((~finite).sum())} NaN or Inf, first at row {row}, columns {4 * (slot // 2)}.."
            f"{4 * (slot // 2) + 3}."
        )
    try:
        read_sparse24(files, name, device)
    except FormatError as error:
        layer.problems["bitmask"] = str(error)
    return layer
