"""The teacher of a distillation: live on the device, live but kept on the host, or a cache on disk.

A model is split into its body (ids -> last hidden states) and its head (the output weight) where
logits = hidden · headᵀ holds, which is checked on a few tokens; then the loss makes logits chunk by
chunk (losses.py). Models whose logits are more than that (soft-capping, scaling) give logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check
from sparsekern.finetune.data import Corpus
from sparsekern.finetune.losses import Target
from sparsekern.oneshot.discovery import find_blocks
from sparsekern.oneshot.fingerprint import of_model as fingerprint
from sparsekern.utils.files import write_atomic

OP = "sparsekern.finetune.teacher"
ROWS_PER_SHARD = 512


class Split(nn.Module):
    """A causal language model as body and head.

    Attributes:
        plain: logits = hidden · headᵀ; False: `forward` gives logits and head is None.
        head: [vocabulary, d], the model's own Parameter, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.body = _body(model)
        self.plain = self.body is not None and self._agrees()
        if not self.plain:
            self.body = None

    @property
    def head(self) -> Tensor | None:
        """The model's output weight, or None where logits are no plain product."""
        if not self.plain:
            return None
        weight: Tensor = self.model.get_output_embeddings().weight  # type: ignore[operator]
        return weight

    def forward(self, ids: Tensor, blocks: bool = False) -> tuple[Tensor, list[Tensor]]:
        """ids [batch, tokens] -> (hidden or logits [batch, tokens, d or vocabulary], the outputs of
        the blocks when `blocks`)."""
        options: dict[str, Any] = {"use_cache": False} if hasattr(self.model, "config") else {}
        if blocks:
            options["output_hidden_states"] = True
        if self.body is not None:
            output = self.body(input_ids=ids, **options)
            result = output.last_hidden_state
        else:
            output = self.model(ids, **options)
            result = getattr(output, "logits", output)
        states = list(output.hidden_states[1:]) if blocks else []
        return result, states

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether body and head give the model's logits, on eight tokens."""
        assert self.body is not None
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        if output is None or getattr(output, "bias", None) is not None:
            return False
        if not isinstance(output, nn.Linear):
            return False
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            ids = torch.arange(8, device=output.weight.device).unsqueeze(0) % output.weight.shape[0]
            hidden = self.body(input_ids=ids, use_cache=False)
            if not hasattr(hidden, "last_hidden_state"):  # peft's: a whole model
                return False
            hidden = hidden.last_hidden_state
            logits = self.model(input_ids=ids, use_cache=False).logits.float()
            ours = (hidden.to(output.weight.dtype) @ output.weight.t()).float()
            scale = float(logits.abs().max())
            return bool((ours - logits).abs().max() <= 0.02 * scale + 1e-6)
        finally:
            for module, flag in flags:
                module.training = flag


def compiled(split: Split, whole: bool = False) -> Any:
    """The split, called as it is, by torch.compile: decoder blocks one by one, whose code is the
    same, so that one of them is compiled; the whole where a model has no blocks, or with `whole`.
    Shapes are taken as fixed. The model itself stays as it is."""
    _, blocks = ("", []) if whole else find_blocks(split.model)
    if not blocks:
        return torch.compile(split, dynamic=False)
    calls = [(block, torch.compile(block._call_impl, dynamic=False)) for block in blocks]

    def call(ids: Tensor, blocks: bool = False) -> tuple[Tensor, list[Tensor]]:
        before = [block._compiled_call_impl for block, _ in calls]
        try:
            for block, function in calls:
                block._compiled_call_impl = function
            result: tuple[Tensor, list[Tensor]] = split(ids, blocks)
            return result
        finally:
            for (block, _), earlier in zip(calls, before):
                block._compiled_call_impl = earlier

    return call


def _body(model: nn.Module) -> nn.Module | None:
    """The part of a Transformers causal model below its output embedding, or None."""
    output = getattr(model, "get_output_embeddings", None)
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if not callable(output) or output() is None or not isinstance(body, nn.Module):
        return None
    # OPT and its kin: the decoder is one level deeper, but the base model gives the same states.
    return body if body is not model else None


class LiveTeacher:
    """A dense model asked in every step.

    Args:
        model: frozen here; its device is kept when offload is False.
        device: where it runs.
        offload: keep the weights in host memory between the steps: they travel to the device once
            per optimizer step, for all its micro-batches together.
        autocast: dtype of its matmuls, or None.
        compile: torch.compile its blocks, or, with `blocks` (their outputs are asked for), its
            body.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        offload: bool = False,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        blocks: bool = False,
    ) -> None:
        self.split = Split(model.eval().requires_grad_(False).to("cpu" if offload else device))
        self._body: Any = compiled(self.split, blocks) if compile else self.split
        self.device, self.offload, self.autocast = device, offload, autocast

    @contextmanager
    def _present(self) -> Iterator[None]:
        if self.offload:
            self.split.model.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                self.split.model.to("cpu")

    @torch.no_grad()
    def targets(
        self, micro_batches: Sequence[Tensor], rows: Sequence[Tensor], blocks: bool = False
    ) -> list[tuple[Target, list[Tensor]]]:
        """What the teacher says about each micro-batch.

        Args:
            micro_batches: ids [batch, tokens] on the device.      rows: their numbers; not used.
            blocks: the outputs of the blocks, too.
        Returns:
            (Target of the tokens in order, block outputs) for each.
        """
        found: list[tuple[Target, list[Tensor]]] = []
        kind = self.device.type
        with self._present():
            head = self.split.head
            if head is not None:
                head = head.detach()
                if self.offload:
                    head = head.to(self.device, copy=True)
                if self.autocast is not None:
                    head = head.to(self.autocast)
            for ids in micro_batches:
                on = self.autocast is not None
                with torch.autocast(kind, self.autocast or torch.bfloat16, enabled=on):
                    result, states = self._body(ids, blocks)
                flat = result.flatten(0, 1)
                if self.autocast is not None and head is not None:
                    flat = flat.to(self.autocast)
                target = Target(logits=flat) if head is None else Target(hidden=flat, head=head)
                found.append((target, states))
        return found


class CachedTeacher:
    """The k most probable tokens of every position, from a folder that `build_cache` wrote."""

    def __init__(self, folder: str | Path, corpus: Corpus, device: torch.device) -> None:
        self.folder, self.device = Path(folder), device
        op, file = f"{OP}.CachedTeacher", self.folder / "manifest.json"
        remedy = "Pass the teacher as a model, or call sparsekern.finetune.build_cache."
        got = f"no {file}"
        check(file.is_file(), op, "teacher: a folder of build_cache", got, remedy, FormatError)
        self.manifest = file.read_text()
        try:
            manifest = json.loads(self.manifest)
        except ValueError as error:
            remedy = "Build the cache again."
            check(False, op, f"JSON in {file}", str(error), remedy, FormatError)
        wanted = corpus.describe()["sha256"]
        got = manifest.get("rows_sha256")
        check(
            got == wanted,
            op,
            f"a cache of rows {wanted}",
            got,
            "Build it for these rows.",
            FormatError,
        )
        self.k = int(manifest["k"])

    def targets(
        self, micro_batches: Sequence[Tensor], rows: Sequence[Tensor], blocks: bool = False
    ) -> list[tuple[Target, list[Tensor]]]:
        """As LiveTeacher.targets, by the numbers of the rows."""
        remedy = "Use a live teacher."
        check(not blocks, OP, "block outputs", "a top-k cache, which has none", remedy)
        found: list[tuple[Target, list[Tensor]]] = []
        for numbers in rows:
            pairs = [self._row(int(number)) for number in numbers]
            indices = torch.cat([pair[0] for pair in pairs]).to(self.device)
            log_probs = torch.cat([pair[1] for pair in pairs]).to(self.device)
            found.append((Target(indices=indices, log_probs=log_probs), []))
        return found

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        from safetensors import safe_open

        shard, place = divmod(number, ROWS_PER_SHARD)
        # Slices are read from the file's map: memory holds what the batch needs, no shard whole.
        with safe_open(self.folder / _shard_name(shard), framework="pt") as file:
            indices: Tensor = file.get_slice("indices")[place]
            log_probs: Tensor = file.get_slice("log_probs")[place]
        return indices, log_probs


def cache_bytes(corpus: Corpus, k: int) -> int:
    """Bytes of a top-k cache: int32 and float16 for each of k entries of each token."""
    return corpus.tokens * k * 6


@torch.no_grad()
def build_cache(
    teacher: nn.Module,
    corpus: Corpus,
    folder: str | Path,
    *,
    k: int = 64,
    max_bytes: int = 32 << 30,
    batch: int = 8,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> Path:
    """Write the teacher's k largest log-probabilities of every position of every row.

    A folder that holds them already is left as it is; shards that an interrupted run has finished
    are kept. Afterwards the teacher is not needed: distill(teacher=folder).

    Args:
        teacher: the dense model.      corpus: the rows that will be trained on.
        folder: of this cache alone.      k: entries per token.
        max_bytes: refuse a cache larger than this (cache_bytes says how large it will be).
        batch: rows per forward.      device: where to run; None: where the teacher is.
        autocast: dtype of the matmuls, or None.      progress: show a progress bar.
    Returns:
        The folder.
    Raises:
        ValueError: larger than max_bytes, or k out of range.
        FormatError: the folder holds a cache of something else.
    """
    from safetensors.torch import save
    from tqdm import tqdm

    op = f"{OP}.build_cache"
    size = cache_bytes(corpus, k)
    remedy = "Lower k, give less text, or raise max_bytes."
    check(size <= max_bytes, op, f"at most {max_bytes} bytes", size, remedy)
    place = Path(folder)
    run_on = torch.device(device) if device is not None else next(teacher.parameters()).device
    manifest = {
        "teacher": fingerprint(teacher),
        "rows_sha256": corpus.describe()["sha256"],
        "k": k,
        "autocast": str(autocast),
    }
    place.mkdir(parents=True, exist_ok=True)
    stated = place / "manifest.partial.json"
    for file in (stated, place / "manifest.json"):
        if file.exists():
            found = json.loads(file.read_text())
            remedy = "Choose another folder."
            check(
                found == manifest,
                op,
                f"a cache of this run in {place}",
                "another",
                remedy,
                FormatError,
            )
    if (place / "manifest.json").exists():
        return place
    write_atomic(stated, json.dumps(manifest, indent=1).encode())
    live = LiveTeacher(teacher, run_on, autocast=autocast)
    count = corpus.rows.shape[0]
    with tqdm(total=count, desc="teacher cache", unit="row", disable=not progress) as bar:
        for number, rows in enumerate(corpus.rows.split(ROWS_PER_SHARD)):
            file = place / _shard_name(number)
            if not file.exists():
                shard = _top_k(live, rows, k, batch, op)
                write_atomic(file, save(shard))
            bar.update(rows.shape[0])
    write_atomic(place / "manifest.json", json.dumps(manifest, indent=1).encode())
    stated.unlink()
    return place


def _top_k(live: LiveTeacher, rows: Tensor, k: int, batch: int, op: str) -> dict[str, Tensor]:
    from sparsekern.finetune.losses import CHUNK

    indices, log_probs = [], []
    for part in rows.split(batch):
        ids = part.to(live.device, torch.int64)
        ((target, _),) = live.targets([ids], [part])
        for begin in range(0, ids.numel(), CHUNK):
            piece = slice(begin, begin + CHUNK)
            if target.logits is not None:
                logits = target.logits[piece].float()
            else:
                assert target.hidden is not None and target.head is not None
                hidden = target.hidden[piece]
                logits = (hidden @ target.head.to(hidden.dtype).t()).float()
            check(1 <= k <= logits.shape[1], op, f"1 <= k <= {logits.shape[1]}", k)
            best = torch.log_softmax(logits, 1).topk(k, dim=1)
            indices.append(best.indices.to(torch.int32).cpu())
            log_probs.append(best.values.to(torch.float16).cpu())
    shape = (rows.shape[0], rows.shape[1], k)
    return {
        "indices": torch.cat(indices).view(shape),
        "log_probs": torch.cat(log_probs).view(shape),
    }


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
