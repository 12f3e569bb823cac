"""The pruned model that a run starts from, kept in its folder: the same command goes on from it.

    FOLDER/start.safetensors    every parameter and buffer of the pruned model under its name, tied
                                ones once; as metadata what was asked for, the PruneReport, sha256

Pruning takes minutes and is not repeated to go on with training. The file appears by rename, so
one that exists is complete. It belongs to one model, calibration, method and options: another call
is refused with every difference, as the checkpoint beside it is of that start.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot.report import PruneReport
from sparsekern.utils.files import open_regular, renamed

OP = "sparsekern finetune"
FILE = "start.safetensors"
Start = tuple[nn.Module, PruneReport | None]


def once(
    folder: str | os.PathLike[str],
    dense: nn.Module,
    asked: dict[str, Any],
    make: Callable[[], Start],
    *,
    weights: bool = True,
    write: bool = True,
) -> tuple[nn.Module, PruneReport | None, bool]:
    """make(), or what an earlier call of it left in the folder.

    Args:
        folder: created when missing.
        dense: the model that was pruned; the result is a copy of it with the kept weights.
        asked: everything that the start depends on, JSON-able; has to equal the stored one.
        make: gives (model, its report or None).
        weights: False keeps `asked` alone, for a start that is on disk already.
        write: False leaves nothing behind: a process whose files another one writes.
    Returns:
        (model in the dtypes that were stored, report, whether it was read).
    Raises:
        ValueError: the folder has the start of another call.   FormatError: a damaged file.
    """
    path = Path(folder) / FILE
    stated = json.dumps(asked, sort_keys=True)
    there = os.path.lexists(path)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [there]  # the first process' view: all read, or all make it together
        torch.distributed.broadcast_object_list(shared, 0)
        there = shared[0]
    if there:
        tensors, metadata = _read(path)
        _compare(path, asked, json.loads(metadata["asked"]))
        if weights:
            text = metadata["report"]
            report = PruneReport.from_json(text) if text else None
            return _with(copy.deepcopy(dense), tensors, json.loads(metadata["tied"])), report, True
    model, report = make()
    if write and not there:
        tensors, tied = _tensors(model) if weights else ({}, {})
        text = "" if report is None else report.to_json()
        metadata = {"asked": stated, "report": text, "tied": json.dumps(tied, sort_keys=True)}
        _write(path, tensors, metadata)
    return model, report, False


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> tensor on the host, name -> the name that has its tensor)."""
    found: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    for name, tensor in itertools.chain[tuple[str, Tensor]](parameters, buffers):
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        found[name] = tensor.detach().cpu().contiguous()
    return found, tied


def _with(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> nn.Module:
    """The model with these tensors in place of its own, tied as they are."""
    placed: dict[str, Tensor] = {}
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    got = f"others, {sorted(own ^ (tensors.keys() | tied.keys()))[:3]} among them"
    remedy = "Delete the folder."
    check(
        own == tensors.keys() | tied.keys(), OP, "a start of this model", got, remedy, FormatError
    )
    for name in [*tensors, *tied]:
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        old = getattr(module, key)
        fits = tuple(old.shape) == tuple(tensors[tied.get(name, name)].shape)
        check(fits, OP, f"a start of this model, {name} {list(old.shape)}", "another shape", remedy)
        if name in tied:
            new = placed[tied[name]]
        elif isinstance(old, nn.Parameter):
            new = nn.Parameter(tensors[name].to(old.device), requires_grad=old.requires_grad)
        else:
            new = tensors[name].to(old.device)
        placed[name] = new
        setattr(module, key, new)
    _say_untied(model)
    return model


def _say_untied(model: nn.Module) -> None:
    """The configuration of a model whose head has become one of its own."""
    get = getattr(model, "get_output_embeddings", lambda: None)
    head, embedding = get(), getattr(model, "get_input_embeddings", lambda: None)()
    config: Any = getattr(model, "config", None)
    apart = getattr(head, "weight", None) is not getattr(embedding, "weight", None)
    if head is not None and apart and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _compare(path: Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    here = json.loads(json.dumps(here))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    got = "; ".join(f"{key}: {here.get(key)!r} here, {there.get(key)!r} there" for key in keys)
    remedy = "Give the same arguments, or another --work."
    check(not keys, OP, f"the start that {path.parent} was begun with", got, remedy)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    sha = fingerprint.of_tensors(sorted(tensors.items()), *_texts(metadata))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with renamed(OP, partial, path, "Make room there, and begin again."):
        save_file(tensors, partial, metadata={**metadata, "sha256": sha})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file as it was written."""
    from safetensors import SafetensorError, safe_open

    remedy = "Delete the folder to begin again."
    try:
        open_regular(path).close()  # no pipe, which would make the next line wait
        with safe_open(path, "pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sha = fingerprint.of_tensors(sorted(tensors.items()), *_texts(metadata))
        whole = metadata["sha256"] == sha
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        check(False, OP, f"a start in {path}", got, remedy, FormatError)
        raise
    check(whole, OP, f"{path} as written", "other content", remedy, FormatError)
    return tensors, metadata


def _texts(metadata: dict[str, str]) -> list[str]:
    return [metadata[name] for name in ("asked", "report", "tied")]
