"""Finished stages on disk, so that an interrupted `prune_model` continues where it stopped.

    DIR/manifest.json              what was asked: calibration hash, method, options, fingerprints
    DIR/layer_times.json           what was measured for keep_dense
    DIR/block-00003.safetensors    the pruned layers of one stage; their LayerReports as metadata
    DIR/rotation.safetensors       what was learnt before the walk (prune_model(rotate=))
    DIR/permutation.safetensors    the orders found before it (prune_model(permute=))
    DIR/lock                       held while a process works in the folder

A compressed layer is stored as NAME.compressed and NAME.bitmask (the tensors of a checkpoint), with
NAME.weight_scale and NAME.spec (the text of its WeightSpec) where it is quantised, a masked dense
one as NAME.weight. Files appear by rename, so a file that exists is complete; each
carries a sha256 of its content together with the manifest, so that a flipped bit, or a file of
another run, is noticed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check, message
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24, metadata_of_bitmask
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot.calibration import Batch, digest
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.report import LayerReport
from sparsekern.utils.files import open_lock, open_regular, read_regular, write_atomic

OP = "sparsekern.prune_model(resume=)"
SCHEMA = 2
ROTATION, PERMUTATION = "rotation.safetensors", "permutation.safetensors"
MAX_JSON_BYTES = 2**26


class ResumeDir:
    """The folder of one run, locked until `close`.

    Args:
        path: created when missing.
        manifest: JSON-able description of the run; has to equal the stored one.
    Raises:
        ValueError: the folder belongs to another run (the message names every difference), holds
            stages without a manifest, or is in use by another process.
        FormatError: the manifest cannot be read.
        OSError: the folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
        self.path = os.fspath(path)
        os.makedirs(self.path, exist_ok=True)
        self._lock: IO[bytes] | None = open_lock(os.path.join(self.path, "lock"))
        try:
            self._claim(json.loads(json.dumps({"schema": SCHEMA, **manifest})))
        except BaseException:
            self.close()
            raise

    @classmethod
    def opened(cls, path: str | os.PathLike[str]) -> ResumeDir:
        """The folder of a run as it is, to read from it.

        Raises:
            FormatError: there is no manifest, or it cannot be read.   ValueError: in use.
        """
        made = cls.__new__(cls)
        made.path = os.fspath(path)
        file = os.path.join(made.path, "manifest.json")
        check(os.path.isfile(file), OP, f"{file}", "none", "Prune with resume= first.", FormatError)
        made._lock = open_lock(os.path.join(made.path, "lock"))
        try:
            made._claim(made._read_json(file))
        except BaseException:
            made.close()
            raise
        return made

    def _claim(self, manifest: dict[str, Any]) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            got, remedy = "another process at work in it", "Wait for it, or give another directory."
            raise ValueError(message(OP, f"{self.path} to be free", got, remedy)) from None
        file = os.path.join(self.path, "manifest.json")
        if os.path.lexists(file):
            stored = self._read_json(file)
            keys = [k for k in {**stored, **manifest} if stored.get(k) != manifest.get(k)]
            differences = "; ".join(
                f"{k}: {manifest.get(k)!r} here, {stored.get(k)!r} there" for k in keys
            )
            remedy = "Call it with the same model and arguments, or give another directory."
            check(not keys, OP, f"the run that {self.path} was started with", differences, remedy)
        else:
            stages = {name for name in os.listdir(self.path) if name.endswith(".safetensors")}
            stages -= {ROTATION, PERMUTATION}
            expected = f"manifest.json beside the stages in {self.path}"
            remedy = "Give a new or an empty directory."
            check(not stages, OP, expected, "none", remedy)
            write_atomic(file, json.dumps(manifest, indent=1).encode())
        text = json.dumps(manifest, sort_keys=True)
        self._manifest = hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remember(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What an earlier run stored under this name, or make(), which is then stored.

        Raises:
            FormatError: the stored file cannot be read, or is damaged.
        """
        file = os.path.join(self.path, f"{name}.json")
        if os.path.lexists(file):
            stored = self._read_json(file)
            sha = stored.pop("sha256", None)
            remedy = "Delete it to measure again."
            check(
                sha == self._of_json(stored),
                OP,
                f"{file} as written",
                "other content",
                remedy,
                FormatError,
            )
            return stored
        made = make()
        stored = {**made, "sha256": self._of_json(json.loads(json.dumps(made)))}
        write_atomic(file, json.dumps(stored, indent=1).encode())
        return made

    def _of_json(self, content: dict[str, Any]) -> str:
        return fingerprint.of_tensors((), self._manifest, json.dumps(content, sort_keys=True))

    def _read_json(self, file: str) -> dict[str, Any]:
        stored: Any
        try:
            stored = json.loads(read_regular(file, MAX_JSON_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            stored = error
        expected, remedy = f"{file} to hold JSON", "Delete the directory."
        check(isinstance(stored, dict), OP, expected, stored, remedy, FormatError)
        return dict(stored)

    def _file(self, key: str) -> str:
        return os.path.join(self.path, f"{key}.safetensors")

    def has(self, key: str) -> bool:
        """Whether the stage was finished."""
        return os.path.lexists(self._file(key))

    def save(
        self, key: str, results: dict[str, Sparse24 | Tensor], reports: list[LayerReport]
    ) -> None:
        """Store the pruned layers of a stage: name -> Sparse24, or the masked dense weight
        [out_features, in_features]."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, weight in results.items():
            if isinstance(weight, Sparse24):
                weight = weight.rowmajor()
                tensors[f"{name}.compressed"] = weight.values.cpu().contiguous()
                tensors[f"{name}.bitmask"] = weight.bitmask().cpu().contiguous()
                if not weight.spec.element.plain:
                    text = torch.tensor(
                        list(weight.spec.text.encode()), dtype=torch.uint8, device="cpu"
                    )
                    tensors[f"{name}.spec"] = text
                    for part in weight.spec.element.tensors:
                        tensors[f"{name}.{part}"] = weight.tensors[part].cpu().contiguous()
            else:
                tensors[f"{name}.weight"] = weight.cpu().contiguous()
        rows = json.dumps([asdict(r) for r in reports])
        metadata = {"reports": rows, "sha256": self._sha(key, tensors, rows)}
        write_atomic(self._file(key), save(tensors, metadata=metadata))

    def _sha(self, key: str, tensors: dict[str, Tensor], rows: str) -> str:
        return fingerprint.of_tensors(sorted(tensors.items()), self._manifest, key, rows)

    def load(
        self, key: str, layers: list[Layer], device: torch.device
    ) -> tuple[dict[str, Sparse24 | Tensor], list[LayerReport]]:
        """Read a stage back: (name -> Sparse24 or dense weight, on `device`; reports).

        Raises:
            FormatError: the file is damaged, of another run, or does not fit the layers.
        """
        shapes = {layer.name: layer.shape for layer in layers}
        return self._load(key, shapes, device)

    def tensors_of(self, key: str) -> dict[str, Sparse24 | Tensor]:
        """The weights of a stage, on the host."""
        return self._load(key, None, torch.device("cpu"))[0]

    def _load(
        self, key: str, shapes: dict[str, tuple[int, ...]] | None, device: torch.device
    ) -> tuple[dict[str, Sparse24 | Tensor], list[LayerReport]]:
        """`load`; without shapes those of the reports."""
        from safetensors import SafetensorError, safe_open

        results: dict[str, Sparse24 | Tensor] = {}
        try:
            open_regular(self._file(key)).close()  # no pipe, which would make the next line wait
            with safe_open(self._file(key), "pt", device="cpu") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["sha256"] != self._sha(key, tensors, metadata["reports"]):
                raise ValueError("its sha256 is that of other content, or of another run")
            rows = json.loads(metadata["reports"])
            reports = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows]
            shapes = {r.name: r.shape for r in reports} if shapes is None else shapes
            for name in (r.name for r in reports if not r.skipped):
                if f"{name}.weight" in tensors:
                    results[name] = tensors[f"{name}.weight"].to(device)
                else:
                    parts = (tensors[f"{name}.{part}"] for part in ("compressed", "bitmask"))
                    values, bitmask = (part.to(device) for part in parts)
                    if f"{name}.spec" not in tensors:
                        results[name] = Sparse24.from_bitmask(values, bitmask, shapes[name])
                        continue
                    spec = WeightSpec.parse(bytes(tensors[f"{name}.spec"].tolist()).decode())
                    named = {
                        part: tensors[f"{name}.{part}"].to(device) for part in spec.element.tensors
                    }
                    metadata = metadata_of_bitmask(bitmask, shapes[name])
                    results[name] = Sparse24.from_tensors(
                        spec, {"values": values, "metadata": metadata, **named}
                    )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            problem = f"{OP}: {self._file(key)} is damaged ({error})."
            raise FormatError(f"{problem} Delete it to prune these layers again.") from error
        fits = all(tuple(results[name].shape) == shapes[name] for name in results)
        expected = f"{self._file(key)} to fit the model"
        check(fits, OP, expected, "other shapes", "Delete the file.", FormatError)
        return results, reports


# ---- what is searched for before the walk --------------------------------------------------------


class Found(Protocol):
    """What such a step returns."""

    def tensors(self) -> dict[str, Tensor]:
        """What it found, as its `known=` takes it."""
        ...


Step = TypeVar("Step", bound=Found)


def once(
    name: str,
    step: Callable[..., Step],
    model: nn.Module,
    batches: list[Batch],
    device: torch.device,
    path: str | os.PathLike[str],
    options: dict[str, Any],
) -> Step:
    """step(model, batches, device, **options), with the tensors that it found in the file `name` of
    the folder, for step(known=) of the next call.

    Raises:
        FormatError: the folder holds what was found for another model, calibration or options; the
            stored file cannot be read, or is damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    file = os.path.join(os.fspath(path), name)
    asked = json.dumps([fingerprint.of_model(model), digest(batches), sorted(options.items())])
    if not os.path.lexists(file):
        made = step(model, batches, device, **options)
        tensors = made.tensors()
        sha = fingerprint.of_tensors(sorted(tensors.items()), asked)
        os.makedirs(os.fspath(path), exist_ok=True)
        write_atomic(file, save(tensors, metadata={"sha256": sha, "asked": asked}))
        return made
    try:
        open_regular(file).close()  # no pipe, which would make the next line wait
        with safe_open(file, "pt", device="cpu") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        was, sha = metadata["asked"], metadata["sha256"]
        whole = sha == fingerprint.of_tensors(sorted(tensors.items()), was)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        text = f"{OP}: {file} is damaged ({error}). Delete the directory."
        raise FormatError(text) from error
    check(whole, OP, f"{file} as written", "other content", "Delete the directory.", FormatError)
    remedy = "Call it with the same model and arguments, or give another directory."
    expected = f"the {name.partition('.')[0]} that {path} was started with"
    check(was == asked, OP, expected, "another", remedy, FormatError)
    return step(model, batches, device, known=tensors, **options)
