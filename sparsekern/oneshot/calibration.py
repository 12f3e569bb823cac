"""Calibration data: whatever the caller has becomes batches, each one forward call of the model."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, get_args

import numpy
import torch
from torch import Tensor, nn

from sparsekern.errors import check, message
from sparsekern.oneshot.discovery import input_embedding, is_transformers, positions
from sparsekern.oneshot.fingerprint import bits_of

OP = "sparsekern.oneshot.make_batches"
# Tokens per forward when batch_size is not given: large enough to fill an accelerator, small enough
# for a CPU's caches.
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}
PROBE_TOKENS = 16
IDS_REMEDY = "Pass token ids [samples, tokens]."
# Texts are cut into windows of this many tokens, or of the model's positions where those are fewer.
TEXT_WINDOW = 2048
# Keywords whose tensors hold one column per token (or sample of sound) of the encoder's (or only)
# input, and per token of the decoder's.
TOKEN_KEYS = ("input_ids", "input_values", "attention_mask", "token_type_ids", "position_ids")
DECODER_KEYS = ("decoder_input_ids", "decoder_attention_mask")
# What the code of a model raises where a call does not fit it.
REFUSALS = (
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    NotImplementedError,
)


@dataclass
class Batch:
    """One forward call of the model: model(*args, **kwargs).

    keep: bool [samples, tokens] each, False at padding that is part of the call; such positions
        stay out of every statistic.      op: who asked for it, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    tokens: int
    keep: tuple[Tensor, ...] = ()
    op: str = OP

    def run(self, model: nn.Module, device: torch.device) -> Any:
        """Call the model.

        Raises:
            ValueError, RuntimeError: what the model's own code says of a call that it cannot take.
        """
        try:
            return model(*move(self.args, device), **move(self.kwargs, device))
        except REFUSALS as error:
            # Out of memory and the like are of other classes; our own hooks name themselves.
            if type(error) not in REFUSALS or str(error).startswith("sparsekern"):
                raise
            got = f"{_shapes((*self.args, self.kwargs))}: {type(error).__name__}: {error}"
            expected = f"calibration that {type(model).__name__}.forward takes"
            remedy = "Pass its inputs by name, as batches in dicts."
            if "require grad" in str(error):
                remedy = "Decorate its forward with torch.enable_grad(): nothing else asks for any."
            text = message(self.op, expected, got.rstrip("."), remedy)
            kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
            raise kind(text) from error

    def probe(self) -> Batch:
        """A short version of a batch of token ids: one sample, at most PROBE_TOKENS tokens. Other
        batches as they are."""
        ids = self.kwargs.get("input_ids")
        if ids is None or set(self.kwargs) - {"input_ids", "use_cache"}:
            return self
        kwargs = {**self.kwargs, "input_ids": ids[:1, :PROBE_TOKENS]}
        return Batch((), kwargs, 1, PROBE_TOKENS, op=self.op)


def make_batches(
    calibration: Any,
    model: nn.Module,
    batch_size: int | None,
    device: torch.device,
    tokenizer: Callable[..., Any] | None = None,
    op: str = OP,
) -> list[Batch]:
    """Turn whatever the caller has into batches.

    Args:
        calibration: for a Transformers model token ids, int64 [samples, tokens], or an iterable of
            such, of 1-D tensors or lists (equal lengths are batched together), of (ids, target)
            pairs, of (ids, attention mask of 0 and 1) pairs, of texts, or of keyword dicts (a
            tokenizer's output, rows of a dataset, a DataLoader's batches), also as the first of a
            pair; one text, one dict, or one dict of columns (texts, or samples of unequal lengths).
            For models of images or sound a float tensor [samples, ...]. For a plain module a tensor
            (split along dim 0), or an iterable of tensors, tuples or dicts, each one batch. Arrays
            of numpy count as tensors; of a dataset that has items and a length all are taken.
        batch_size: samples per forward; None: as many as TOKENS_PER_BATCH holds, at least one.
        device: where the forwards run, for the default batch size.
        tokenizer: for texts.
        op: who asks, for messages.
    Notes:
        Positions where an attention mask is 0 are cut off each sample where the call allows it
        (padding left or right, token inputs only); elsewhere they are kept out by Batch.keep.
        An encoder-decoder gets token ids that come without inputs or labels of the decoder as both
        inputs.
    Warns:
        UserWarning: names in a dict that the forward swallows without naming them.
    Raises:
        ValueError: no samples, ids outside the vocabulary, more tokens than the model has
            positions, batch_size < 1, texts without a tokenizer.
        TypeError: ids that are not integers.
    """
    remedy = "Leave it out for the default."
    fits = batch_size is None or (type(batch_size) is int and 1 <= batch_size < 2**63)
    check(fits, op, "batch_size from 1 to 2**63 - 1", batch_size, remedy)
    items = _listed(calibration, op)
    check(len(items) > 0, op, "calibration with at least one sample", "none", IDS_REMEDY)
    empty = any(isinstance(item, Tensor) and item.is_meta for item in items)
    check(not empty, op, "tensors with data as calibration", "a meta tensor", IDS_REMEDY)
    if is_transformers(model):
        with torch.device("cpu"):  # whatever torch's default device is
            return _Transformers(model, batch_size, device, tokenizer, op).batches(items)
    texts = any(isinstance(item, str) for item in items)
    expected, remedy = "tensors, tuples or dicts as calibration of a plain module", "Pass tensors."
    check(not texts, op, expected, "text", remedy)
    if isinstance(_array(calibration), Tensor):
        items = list(_split(items[0], batch_size, device, op))
    return [_plain_batch(item, model, op) for item in items]


def _array(value: Any) -> Any:
    """An array of numpy as a tensor, of float64 as torch's default; as a list where it holds lists
    or texts. Anything else as it is."""
    if not isinstance(value, (numpy.ndarray, numpy.generic)):
        return value
    try:
        made = torch.as_tensor(value)
    except TypeError:
        return value.tolist()
    return made.to(torch.get_default_dtype()) if made.dtype == torch.float64 else made


def _listed(data: Any, op: str) -> list[Any]:
    """The items of whatever the caller has."""
    data = os.fspath(data) if isinstance(data, os.PathLike) else _array(data)
    if isinstance(data, (Tensor, str, bytes, Mapping)):
        return [data]
    if isinstance(data, Iterable):
        return [_array(item) for item in data]
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    expected, got = "calibration as a tensor, an iterable or a dataset", type(data).__name__
    check(indexed, op, expected, got, IDS_REMEDY, TypeError)
    return [_array(data[i]) for i in range(len(data))]


def _shapes(value: Any) -> str:
    """What a call is made of, for messages: "input_ids [2, 8] int64, labels: list"."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shapes(part)}" for key, part in value.items())
    if isinstance(value, tuple):
        return ", ".join(filter(None, map(_shapes, value)))
    return repr(value) if value is None or isinstance(value, (int, float)) else type(value).__name__


def _budget(device: torch.device) -> int:
    return TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "cuda"]


def _split(data: Tensor, batch_size: int | None, device: torch.device, op: str) -> Iterable[Tensor]:
    """A tensor [samples, ...] in batches."""
    full = data.dim() > 0 and len(data) > 0
    remedy = "Pass at least one sample."
    check(full, op, "calibration [samples, ...]", tuple(data.shape), remedy)
    per_sample = max(1, data[0].numel() // (data.shape[-1] if data.dim() > 2 else 1))
    size = batch_size or max(1, _budget(device) // (per_sample if data.dim() > 2 else 1))
    return torch.split(data, size)


def _plain_batch(item: Any, model: nn.Module, op: str) -> Batch:
    kwargs = {key: _array(v) for key, v in item.items()} if isinstance(item, Mapping) else {}
    args: tuple[Any, ...] = ()
    if kwargs and _takes_whole(model, kwargs):
        return _as_batch((kwargs,), {}, item, op)
    if not kwargs:
        args = tuple(map(_array, item)) if isinstance(item, (tuple, list)) else (item,)
        args = args[: _positional(model)]
    return _as_batch(args, kwargs, item, op)


def _positional(model: nn.Module) -> int | None:
    """How many positional arguments the forward takes: a loader's (input, target) pairs are cut to
    that. None where any number fits or nothing is known."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _masks(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """The attention masks [samples, tokens] of a call; what is below 0 is added to scores."""
    keys = ("attention_mask", "decoder_attention_mask")
    found = {key: named[key] for key in keys if isinstance(named.get(key), Tensor)}
    return {k: mask for k, mask in found.items() if mask.dim() == 2 and bool((mask >= 0).all())}


def _takes_whole(model: nn.Module, item: Mapping[str, Any]) -> bool:
    """Whether the forward takes a dict as its one argument, and none of the names in it."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    usual = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p for p in usual if p.default is p.empty] if swallows else usual
    return len(needed) == 1 and not item.keys() & parameters.keys()


def _tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    nested = isinstance(value, (Mapping, tuple, list))
    return [tensor for part in parts for tensor in _tensors_in(part)] if nested else []


def _as_batch(args: tuple[Any, ...], kwargs: dict[str, Any], item: Any, op: str) -> Batch:
    tensors = _tensors_in((*args, kwargs))
    got, remedy = (
        _shapes(item) or f"an empty {type(item).__name__}",
        "Pass tensors, tuples or dicts.",
    )
    check(bool(tensors), op, "a tensor in every calibration batch", got, remedy, TypeError)
    named = args[0] if args and isinstance(args[0], Mapping) else kwargs
    ids = named.get("input_ids")
    first = ids if isinstance(ids, Tensor) else tensors[0]
    one = first.dim() <= int(first.is_floating_point())  # sample, without a dimension for more
    samples = 1 if one else first.shape[0]
    tokens = first.numel()
    if first.is_floating_point():
        tokens = tokens // max(1, first.shape[-1] if first.dim() else 1)
    masks = (mask for mask in _masks(named).values() if len(mask) == samples)
    keep = tuple(mask != 0 for mask in masks)
    if all(bool(mask.all()) for mask in keep):
        return Batch(args, kwargs, samples, tokens, op=op)
    return Batch(args, kwargs, samples, int(keep[0].sum()), keep, op)


class _Transformers:
    """Batches for a Transformers model."""

    def __init__(
        self,
        model: nn.Module,
        batch_size: int | None,
        device: torch.device,
        tokenizer: Callable[..., Any] | None,
        op: str,
    ) -> None:
        self.model, self.batch_size, self.device, self.op = model, batch_size, device, op
        self.tokenizer = tokenizer
        config: Any = model.config
        self.positions = positions(model)
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        rest = [p.annotation for p in parameters.values() if p.kind is p.VAR_KEYWORD]
        self.open_ended = bool(rest)
        # Unpack[TransformersKwargs] says what the rest may be.
        named = [vars(kind).get("__annotations__") for a in rest for kind in get_args(a)]
        self.known: set[str] | None = {*parameters, *(named[0] or () if named else ())}
        self.known |= {"labels", "return_dict"}
        if not parameters or (rest and not named):
            self.known = None  # anything
        self.swallowed: set[str] = set()
        self.extra = {"use_cache": False} if "use_cache" in parameters else {}
        self.main = getattr(model, "main_input_name", "input_ids")
        self.takes_ids = self.main == "input_ids" or not parameters or "input_ids" in parameters
        self.doubled = (
            bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in parameters
        )

    def batches(self, items: list[Any]) -> list[Batch]:
        """All items in order; rows of token ids that follow each other are batched together."""
        rows: list[Tensor] = []
        found: list[Batch] = []

        def flush() -> None:
            found.extend(self._stack(rows))
            rows.clear()

        # A list of plain numbers is one sample, and ids with their mask are one batch.
        if all(type(item) is int for item in items) or (len(items) == 2 and self._is_mask(*items)):
            items = [items]
        for item in (part for whole in items for part in self._unfolded(whole)):
            if isinstance(item, str):
                rows.extend(self._tokenized(item))
            elif isinstance(item, Mapping):
                mapping = self._tensors(item)
                row = self._single_row(mapping)
                if row is not None:
                    rows.append(row)
                else:
                    flush()
                    found.extend(self._from_mapping(mapping))
            elif isinstance(item, (tuple, list)) and item and isinstance(item[0], Tensor):
                ids = item[0]
                if len(item) > 1 and self._is_mask(ids, item[1]):
                    flush()
                    mapping = {"input_ids": ids, "attention_mask": item[1]}
                    found.extend(self._from_mapping(mapping))
                elif self._is_main(ids):
                    flush()
                    found.extend(self._from_mapping({self.main: ids}))
                else:
                    rows.extend(self._rows(ids))
            elif isinstance(item, Tensor) and self._is_main(item):
                flush()
                whole = len(items) == 1
                parts = _split(item, self.batch_size, self.device, self.op) if whole else [item]
                found.extend(b for part in parts for b in self._from_mapping({self.main: part}))
            else:
                rows.extend(self._rows(item))
        flush()
        check(bool(found), self.op, "calibration with at least one token", "none", IDS_REMEDY)
        if self.swallowed:
            expected = f"inputs that {type(self.model).__name__}.forward names in every dict"
            got = f"{', '.join(sorted(self.swallowed))}, which it may ignore"
            text = message(self.op, expected, got, "Leave them out, or correct the name.")
            warnings.warn(text, stacklevel=6)
        return found

    def _is_main(self, item: Tensor) -> bool:
        """Whether this is what a model of images or sound looks at."""
        return item.is_floating_point() and self.main != "input_ids"

    @classmethod
    def _unfolded(cls, item: Any) -> list[Any]:
        """The samples of a batch that is none yet: a list of texts or dicts, a dict of columns with
        texts or with samples of unequal lengths; the dict of a (dict, target) pair and the text of
        a row. Else the item."""
        if isinstance(item, tuple) and item and isinstance(item[0], Mapping):
            item = item[0]
        if isinstance(item, Mapping):
            key = "input_ids" if "input_ids" in item else "text"
            column = item.get(key)
            if key == "text" and isinstance(column, str):
                return [column]
            if isinstance(column, (list, tuple)):
                sizes = {len(row) for row in column if isinstance(row, Sized)}
                if key == "text" or len(sizes) > 1:
                    count = len(column)
                    split = {k for k, v in item.items() if isinstance(v, Sized) and len(v) == count}
                    rows = range(count)
                    item = [{k: v[i] if k in split else v for k, v in item.items()} for i in rows]
        if isinstance(item, list) and all(isinstance(part, (str, Mapping)) for part in item):
            return [part for one in item for part in cls._unfolded(one)]
        return [item]

    # ------------------------------------------------------------------------------------ token ids

    def _rows(self, item: Any) -> list[Tensor]:
        """Samples [tokens] of one tensor or list of ids."""
        try:
            ids = item if isinstance(item, Tensor) else torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):
            expected, got = (
                "token ids, texts, dicts or pairs of tensors as calibration",
                _shapes(item),
            )
            check(False, self.op, expected, got, IDS_REMEDY, TypeError)
        expected = f"floating-point {self.main} as calibration of {type(self.model).__name__}"
        remedy = "Pass what its processor makes."
        check(self.takes_ids, self.op, expected, _shapes(ids), remedy, TypeError)
        self._check_ids(ids, "calibration")
        return list(ids.to(torch.int64).reshape(-1, ids.shape[-1]).unbind())

    def _check_ids(self, ids: Tensor, name: str) -> None:
        usable = not ids.is_meta and ids.layout == torch.strided
        got = "a meta tensor" if ids.is_meta else str(ids.layout)
        remedy = "Pass a dense tensor."
        check(usable, self.op, f"token ids with data as {name}", got, remedy, TypeError)
        expected, remedy = f"token ids [samples, tokens] as {name}", "Leave empty samples out."
        check(ids.numel() > 0, self.op, expected, tuple(ids.shape), remedy)
        integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        got, remedy = _shapes(ids), "Tokenise texts, and pass other inputs by name, in dicts."
        check(integer, self.op, f"integer token ids as {name}", got, remedy, TypeError)
        remedy = f"Reshape the {name}."
        check(ids.dim() in (1, 2), self.op, expected, tuple(ids.shape), remedy)
        wide = ids.to(torch.int64)
        low, high = int(wide.min()), int(wide.max())
        embedding = input_embedding(self.model)
        size = getattr(getattr(embedding, "weight", None), "shape", None)
        if size is not None:
            expected = f"token ids within the vocabulary, 0..{size[0] - 1}"
            expected += "" if name == "calibration" else f", in {name}"
            remedy = "Use the model's own tokenizer."
            check(low >= 0 and high < size[0], self.op, expected, f"{low}..{high}", remedy)
        if self.positions is not None:
            expected = (
                f"at most {self.positions} tokens per sample in {name}, the model's positions"
            )
            remedy = "Cut the samples into shorter windows."
            check(ids.shape[-1] <= self.positions, self.op, expected, ids.shape[-1], remedy)

    def _tokenized(self, text: str) -> list[Tensor]:
        """Windows of one text."""
        source = text == "builtin" or text.startswith("hf:") or os.path.isfile(text)
        expected = (
            "calibration as text itself" if source else "tokenizer= with texts as calibration"
        )
        remedy = (
            "Read the source first: sparsekern.eval.texts.read_rows."
            if source
            else "Pass the model's tokenizer, or token ids."
        )
        got = repr(text) if source else "none"
        check(self.tokenizer is not None and not source, self.op, expected, got, remedy)
        assert self.tokenizer is not None
        made = self.tokenizer(text)
        ids = made.get("input_ids") if isinstance(made, Mapping) else getattr(made, "ids", made)
        try:
            row = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            expected, remedy = "token ids of a text from tokenizer", "Pass the model's tokenizer."
            check(False, self.op, expected, _shapes(made), remedy, TypeError)
        if not len(row):
            return []
        window = min(TEXT_WINDOW, self.positions or TEXT_WINDOW)
        parts = list(torch.split(row, window))
        if len(parts) > 1 and len(parts[-1]) < window // 2:
            parts.pop()  # a short rest would be a batch of its own
        for part in parts:
            self._check_ids(part, "calibration")
        return parts

    def _stack(self, rows: Sequence[Tensor]) -> list[Batch]:
        """Samples of equal lengths that follow each other, in batches."""
        rows = list(rows)
        batches: list[Batch] = []
        while rows:
            length = len(rows[0])
            size = self.batch_size or max(1, _budget(self.device) // length)
            others = (i for i, row in enumerate(rows[:size]) if len(row) != length)
            count = next(others, min(size, len(rows)))
            ids = torch.stack(rows[:count])
            kwargs: dict[str, Any] = {"input_ids": ids, **self.extra}
            if self.doubled:
                kwargs["decoder_input_ids"] = ids
            batches.append(Batch((), kwargs, count, ids.numel(), op=self.op))
            rows = rows[count:]
        return batches

    # ---------------------------------------------------------------------------------------- dicts

    @staticmethod
    def _is_mask(ids: Any, other: Any) -> bool:
        """Whether the second of a pair is an attention mask, not a target: 0 and 1 only, 1 at
        places where the ids are neither."""
        tensors = isinstance(ids, Tensor) and isinstance(other, Tensor)
        if not tensors or other.shape != ids.shape:
            return False
        if ids.is_floating_point() or other.is_floating_point():
            return False
        return bool(((other == 0) | (other == 1)).all()) and not bool((ids <= 1).all())

    def _tensors(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """A dict with lists of numbers and arrays as tensors, without texts."""
        made: dict[str, Any] = {}
        for key, value in item.items():
            if value is None or isinstance(value, str):
                continue
            arrays = (
                isinstance(value, (list, tuple)) and value and isinstance(value[0], numpy.ndarray)
            )
            # What the forward makes of anything else is its own matter.
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                value = numpy.stack(value) if arrays else value
            value = _array(value)
            if isinstance(value, (list, tuple)):
                if value and all(isinstance(part, Tensor) for part in value):
                    equal = all(part.shape == value[0].shape for part in value)
                    expected = f"{key} as one tensor"
                    got = f"a list of {len(value)} of them, the first {_shapes(value[0])}"
                    # A list of rows and what a loader makes of lists (columns) look alike.
                    remedy = "Stack them, or give the DataLoader a collate_fn that does."
                    stacks = equal and value[0].dim() > 1
                    check(stacks, self.op, expected, got, remedy, TypeError)
                    value = torch.stack(tuple(value))
                with contextlib.suppress(TypeError, ValueError, RuntimeError):
                    value = torch.as_tensor(value)
            made[str(key)] = value
        expected, got = "a tensor in every calibration dict", _shapes(item) or "an empty one"
        remedy = "Name token ids input_ids, and texts, with tokenizer=, text."
        full = any(isinstance(value, Tensor) for value in made.values())
        check(full, self.op, expected, got, remedy, TypeError)
        for key, mask_key in (
            ("input_ids", "attention_mask"),
            ("decoder_input_ids", "decoder_attention_mask"),
        ):
            ids, mask = made.get(key), made.get(mask_key)
            if not isinstance(ids, Tensor):
                continue
            self._check_ids(ids, key)
            made[key] = ids.to(torch.int64)
            if isinstance(mask, Tensor) and mask.dim() == ids.dim():
                expected = f"{mask_key} of shape {list(ids.shape)} as {key}"
                remedy = f"Pass one number for each of {key}."
                check(mask.shape == ids.shape, self.op, expected, list(mask.shape), remedy)
        self._check_range(made, "position_ids", self.positions)
        types = getattr(self.model.config, "type_vocab_size", None)
        self._check_range(made, "token_type_ids", types if isinstance(types, int) else None)
        unknown = set() if self.known is None else set(made) - self.known
        expected = f"inputs of {type(self.model).__name__}.forward in every dict"
        refused = unknown and not self.open_ended
        check(not refused, self.op, expected, ", ".join(sorted(unknown)), "Leave them out.")
        self.swallowed |= unknown
        return made

    def _check_range(self, item: dict[str, Any], key: str, count: int | None) -> None:
        """Numbers that look up a table of `count` rows."""
        value = item.get(key)
        if count is None or not isinstance(value, Tensor) or value.is_floating_point():
            return
        low, high = int(value.min()), int(value.max())
        expected, remedy = f"{key} in 0..{count - 1}", "Leave it out for the model's own."
        check(low >= 0 and high < count, self.op, expected, f"{low}..{high}", remedy)

    def _single_row(self, item: dict[str, Any]) -> Tensor | None:
        """The ids of a sample that has nothing else to say: a row of a dataset."""
        ids, mask = item.get("input_ids"), item.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 1:
            return None
        targets = set() if self.doubled else {"labels"}
        if set(item) - {"input_ids", "attention_mask"} - targets:
            return None
        kept = slice(None) if mask is None else _span(mask)
        return None if kept is None else ids[kept].to(torch.int64)

    def _from_mapping(self, item: dict[str, Any]) -> list[Batch]:
        """The batches of one dict: itself, or its samples without their padding."""
        ids = item.get("input_ids")
        main = item.get(self.main) if ids is None else ids
        if (
            isinstance(main, Tensor) and main.dim() == 1
        ):  # one sample; plain numbers are its targets
            item = {
                key: value[None] if isinstance(value, Tensor) else value
                for key, value in item.items()
                if type(value) not in (int, float)
            }
        decoder = {"decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "labels"}
        if self.doubled and not decoder & set(item):
            expected = f"decoder_input_ids or labels beside {self.main} as calibration"
            fits = isinstance(ids, Tensor) or self.main not in item
            check(fits, self.op, expected, _shapes(item), "Pass both by name, in dicts.")
            if isinstance(ids, Tensor):
                item["decoder_input_ids"] = item["input_ids"]
                if "attention_mask" in item:
                    item["decoder_attention_mask"] = item["attention_mask"]
        kwargs = {**item, **self.extra}
        masks = _masks(kwargs)
        if all(bool((mask != 0).all()) for mask in masks.values()):
            return [_as_batch((), kwargs, item, self.op)]
        for key, mask in masks.items():
            expected, got = (
                f"{key} with a token that counts in every sample",
                "a sample of padding only",
            )
            remedy = "Leave that sample out."
            check(bool((mask != 0).any(dim=1).all()), self.op, expected, got, remedy)
        cut = self._without_padding(item, masks)
        if cut is not None:
            return cut
        return [_as_batch((), kwargs, item, self.op)]

    def _without_padding(
        self, item: dict[str, Any], masks: dict[str, Tensor]
    ) -> list[Batch] | None:
        """Samples cut to the tokens that count, equal lengths together; None where the call holds
        more than token inputs, or a mask has holes."""
        families = {"attention_mask": TOKEN_KEYS, "decoder_attention_mask": DECODER_KEYS}
        known = {key for family in families.values() for key in family}
        ids = next((item[key] for key in ("input_ids", "input_values") if key in item), None)
        if not isinstance(ids, Tensor) or set(item) - known - {"labels"}:
            return None
        decoder = item.get("decoder_input_ids")
        shapes = {
            "attention_mask": ids.shape,
            "decoder_attention_mask": getattr(decoder, "shape", None),
        }
        for mask_key, family in families.items():
            for key in family:
                if key in item and getattr(item[key], "shape", None) != shapes[mask_key]:
                    return None
        samples: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}
        for row in range(ids.shape[0]):
            cut: dict[str, Tensor] = {}
            for mask_key, family in families.items():
                kept = _span(masks[mask_key][row]) if mask_key in masks else slice(None)
                if kept is None:
                    return None
                for key in family:
                    if key in item and not key.endswith("attention_mask"):
                        cut[key] = item[key][row][kept]
            lengths = tuple(len(value) for value in cut.values())
            samples.setdefault(lengths, []).append(cut)
        batches = []
        for group in samples.values():
            stacked = {key: torch.stack([cut[key] for cut in group]) for key in group[0]}
            batches.append(_as_batch((), {**stacked, **self.extra}, item, self.op))
        return batches


def _span(mask: Tensor) -> slice | None:
    """The one run of non-zeros of a 1-D mask as a slice; None where there are several or none."""
    places = (mask != 0).nonzero().reshape(-1)
    if not len(places):
        return None
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else None


def digest(batches: Iterable[Batch]) -> str:
    """sha256 over all tensors of the calibration, row by row, so that it does not depend on the
    batch size, and over the names and plain values beside them."""
    sha, rest = hashlib.sha256(), set()

    def take(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            host = value.cpu()
            for row in host if host.dim() > 1 else [host]:
                sha.update(f"{row.dtype}{tuple(row.shape)}".encode())
                sha.update(bits_of(row).numpy().data)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                take(f"{name}.{key}", part)
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                take(f"{name}.{i}", part)
        rest.add(f"{name} {value if isinstance(value, (int, float, str)) else type(value)}")

    for batch in batches:
        take("call", (batch.args, batch.kwargs, batch.keep))
    sha.update(repr(sorted(rest)).encode())
    return sha.hexdigest()


def move(value: Any, device: torch.device) -> Any:
    """`value` with every tensor inside tuples, lists and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if type(value) in (tuple, list):
        return type(value)(move(v, device) for v in value)
    return {k: move(v, device) for k, v in value.items()} if type(value) is dict else value
