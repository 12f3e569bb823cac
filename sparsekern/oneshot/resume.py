"""Finished stages on disk, so that an interrupted `prune_model` continues where it stopped.

    DIR/manifest.json              what was asked: calibration hash, method, options, fingerprint
    DIR/layer_times.json           what was measured for keep_dense
    DIR/block-00003.safetensors    the pruned layers of one stage; their LayerReports as metadata

A compressed layer is stored as NAME.compressed and NAME.bitmask (the tensors of a checkpoint), a
masked dense one as NAME.weight. Both kinds of file appear by rename, so a file that exists is
complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict

import torch

from sparsekern.errors import FormatError, check
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.report import LayerReport, write_atomic

OP = "sparsekern.prune_model(resume=)"
SCHEMA = 1


class ResumeDir:
    """The folder of one run.

    Args:
        path: created when missing.
        manifest: JSON-able description of the run; has to equal the stored one.
    Raises:
        ValueError: the folder belongs to another run; the message names every difference.
        FormatError: the manifest cannot be read.
    """

    def __init__(self, path, manifest: dict):
        self.path = os.fspath(path)
        os.makedirs(self.path, exist_ok=True)
        manifest = json.loads(json.dumps({"schema": SCHEMA, **manifest}))
        file = os.path.join(self.path, "manifest.json")
        if os.path.exists(file):
            stored = self._read_json(file)
            keys = [k for k in {**stored, **manifest} if stored.get(k) != manifest.get(k)]
            differences = "; ".join(
                f"{k}: {manifest.get(k)!r} here, {stored.get(k)!r} there" for k in keys
            )
            remedy = "Call it with the same model and arguments, or give another directory."
            check(not keys, OP, f"the run that {self.path} was started with", differences, remedy)
        else:
            write_atomic(file, json.dumps(manifest, indent=1).encode())

    def remember(self, name: str, make: Callable[[], dict]) -> dict:
        """What an earlier run stored under this name, or make(), which is then stored.

        Raises:
            FormatError: the stored file cannot be read.
        """
        file = os.path.join(self.path, f"{name}.json")
        if os.path.exists(file):
            return self._read_json(file)
        made = make()
        write_atomic(file, json.dumps(made, indent=1).encode())
        return made

    def _read_json(self, file: str) -> dict:
        try:
            with open(file, encoding="utf-8") as stream:
                stored = json.load(stream)
        except ValueError as error:
            stored = error
        check(
            isinstance(stored, dict),
            OP,
            f"{file} to hold JSON",
            stored,
            "Delete the directory.",
            FormatError,
        )
        return stored

    def _file(self, key: str) -> str:
        return os.path.join(self.path, f"{key}.safetensors")

    def has(self, key: str) -> bool:
        """Whether the stage was finished."""
        return os.path.exists(self._file(key))

    def save(
        self, key: str, results: dict[str, Sparse24 | torch.Tensor], reports: list[LayerReport]
    ) -> None:
        """Store the pruned layers of a stage: name -> Sparse24, or the masked dense weight
        [out_features, in_features]."""
        from safetensors.torch import save

        tensors = {}
        for name, weight in results.items():
            if isinstance(weight, Sparse24):
                tensors[f"{name}.compressed"] = weight.rowmajor().values.cpu().contiguous()
                tensors[f"{name}.bitmask"] = weight.bitmask().cpu().contiguous()
            else:
                tensors[f"{name}.weight"] = weight.cpu().contiguous()
        metadata = {"reports": json.dumps([asdict(r) for r in reports])}
        write_atomic(self._file(key), save(tensors, metadata=metadata))

    def load(
        self, key: str, layers: list[Layer], device: torch.device
    ) -> tuple[dict, list[LayerReport]]:
        """Read a stage back: (name -> Sparse24 or dense weight, on `device`; reports).

        Raises:
            FormatError: the file is damaged or does not fit the layers.
        """
        from safetensors import SafetensorError, safe_open

        shapes = {layer.name: layer.shape for layer in layers}
        results: dict[str, Sparse24 | torch.Tensor] = {}
        try:
            with safe_open(self._file(key), "pt", device=str(device)) as file:
                rows = json.loads(file.metadata()["reports"])
                reports = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows]
                keys = set(file.keys())
                for name in (r.name for r in reports if not r.skipped):
                    if f"{name}.weight" in keys:
                        results[name] = file.get_tensor(f"{name}.weight")
                    else:
                        pair = (
                            file.get_tensor(f"{name}.{part}") for part in ("compressed", "bitmask")
                        )
                        results[name] = Sparse24.from_bitmask(*pair, shapes[name])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            problem = f"{OP}: {self._file(key)} is damaged ({error})."
            raise FormatError(f"{problem} Delete it to prune these layers again.") from error
        fits = all(tuple(results[name].shape) == shapes[name] for name in results)
        check(
            fits,
            OP,
            f"{self._file(key)} to fit the model",
            "other shapes",
            "Delete the file.",
            FormatError,
        )
        return results, reports
