"""Perplexity by the WikiText protocol of the SparseGPT and Wanda papers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check, message
from sparsekern.oneshot.calibration import PROBE_TOKENS, REFUSALS
from sparsekern.oneshot.devices import check_data
from sparsekern.oneshot.discovery import input_embedding, positions
from sparsekern.utils.arguments import checked, shown

OP = "sparsekern.perplexity"
# Logits converted to float32 at once: tokens x vocabulary stays near 256 MB for a vocabulary of 50
# 000.
TOKENS_PER_CHUNK = 1024
# Of the largest logit: what a later token may change in earlier ones.
READS_AHEAD = 0.03
NOT_CAUSAL = "The perplexity of a model that reads its targets says nothing; use another measure."
EVERY_TOKEN = "The model has to score every token it is given."


@checked("sparsekern.perplexity", window=(2, 2**62), batch_size=(1, 2**62))
def perplexity(
    model: nn.Module,
    token_ids: Any,
    window: int = 2048,
    batch_size: int = 1,
    *,
    progress: bool = False,
) -> float:
    """exp(mean over windows of the mean cross-entropy of the window's window − 1 next tokens).

    The text is tokenised once (rows joined by two newlines in the papers) and cut into windows that
    do not overlap; the remainder is dropped. Cross-entropy is computed from float32 logits and
    summed in float64.

    Args:
        model: a Transformers causal language model, or any module that maps ids [batch, window] to
            logits [batch, window, vocabulary] (or to an object with such `.logits`).
        token_ids: int64 [tokens] or [1, tokens], as a tensor, an array or a list; or a dict that
            has them as input_ids, of which those count where its attention_mask, if any, is not 0.
        window: tokens per window, at least 2. Numbers of different windows cannot be compared.
        batch_size: windows per forward. It changes the result by rounding only.
        progress: show a progress bar.
    Returns:
        float; inf when a token has probability zero, nan when the logits hold NaN.
    Raises:
        ValueError: fewer tokens than one window; ids outside the vocabulary; window < 2; batch_size
            < 1; a model that does not take ids alone, or windows of this length, or whose logits
            depend on later tokens (by more than 3 % of the largest).
        TypeError: ids that are not integers.
    Warns:
        UserWarning: a window longer than the model's positions; logits that depend on later tokens
            by more than rounding.
    Notes:
        The model runs in eval mode without cache; its flags are restored. Print window, tokenizer
        and dtype with the number.
    Source: Frantar and Alistarh 2023, evaluation code of "SparseGPT" (arXiv:2301.00774).
    """
    check_data(OP, model)
    windows = windows_of(OP, "token_ids", model, token_ids, window)
    own = (p.device for p in model.parameters() if not p.is_meta)
    device = next(own, torch.device("cpu"))
    kwargs = {"use_cache": False} if hasattr(model, "config") else {}
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with torch.no_grad():  # FSDP2 gathers weights in place, which inference_mode refuses
            check_model(OP, model, windows[:1].to(device), kwargs)
            for ids in _bar(torch.split(windows, int(batch_size)), progress):
                ids = ids.to(device)
                logits = logits_of(OP, model, ids, kwargs)
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                fits = isinstance(logits, Tensor) and got[:-1] == tuple(ids.shape)
                expected = f"logits of shape [{ids.shape[0]}, {ids.shape[1]}, vocabulary]"
                check(fits, OP, expected, got, EVERY_TOKEN)
                expected, most = "a logit for every token of the text", int(ids.max())
                got = f"{logits.shape[-1]} logits for token {most}"
                check(most < logits.shape[-1], OP, expected, got, "Use the model's own tokenizer.")
                total += _sum_of_window_means(logits, ids)
    finally:
        for module, flag in flags:
            module.training = flag
    mean = float(total) / len(windows)
    return math.exp(mean) if mean < 709.0 else mean if math.isnan(mean) else math.inf


def check_model(
    op: str, model: nn.Module, ids: Tensor, kwargs: dict[str, Any], causal: bool = True
) -> None:
    """Try ids [1, tokens] out: PROBE_TOKENS of them, or more than the model's positions.

    Raises:
        ValueError: the forward refuses them; with causal, logits that change with a later token: a
            masked language model reads the very token that it is to predict.
    """
    short, kind = ids[:, :PROBE_TOKENS], type(model).__name__
    if is_beyond(model, ids.shape[1]):
        logits_of(op, model, ids, kwargs)
    other = short.clone()
    others = ids[ids != short[0, -1]]
    other[0, -1] = others[0] if len(others) else 0
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a short text
        first, second = (logits_of(op, model, x, kwargs) for x in (short, other))
    fits = isinstance(first, Tensor) and first.shape[:-1] == short.shape
    expected = f"logits of shape [{short.shape[0]}, {short.shape[1]}, vocabulary]"
    shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
    check(fits, op, expected, shape, EVERY_TOKEN)
    if not causal:
        return
    before = first[:, :-1].float()
    moved = float((second[:, :-1].float() - before).abs().max())
    # Of a causal model these rows are equal up to the rounding of products in another grouping; up
    # to more where inputs of layers are quantised with one scale for all tokens.
    share = moved / max(float(before.abs().max()), torch.finfo(torch.float32).tiny)
    expected = f"{kind} to be causal: logits that do not depend on later tokens"
    got = f"a difference of {share:.2g} of the largest logit"
    check(not share > READS_AHEAD, op, expected, got, NOT_CAUSAL)
    if share > 64 * torch.finfo(first.dtype).eps:
        warnings.warn(message(op, expected, got, NOT_CAUSAL), stacklevel=3)


def is_beyond(model: nn.Module, tokens: int) -> bool:
    """Whether a row of so many tokens has more than the model has positions."""
    return tokens > (positions(model) or tokens)


def logits_of(op: str, model: nn.Module, ids: Tensor, kwargs: dict[str, Any]) -> Any:
    """What the model makes of ids [samples, tokens].   ValueError: its own code refuses them."""
    try:
        output = model(ids, **kwargs)
    except REFUSALS as error:
        if type(error) not in REFUSALS or str(error).startswith("sparsekern"):
            raise
        expected = f"{type(model).__name__} to take token ids alone"
        got, remedy = f"{type(error).__name__}: {error}".rstrip("."), "Pass a causal language model"
        longer = is_beyond(model, ids.shape[1])
        remedy += f", and window <= {positions(model)}, its positions." if longer else "."
        raise ValueError(message(op, expected, got, remedy)) from error
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return getattr(output, "logits", first)


def windows_of(op: str, name: str, model: nn.Module, text: Any, window: int) -> Tensor:
    """The ids of a text, the argument `name` of op, as int64 [windows, window], checked."""
    ids = as_ids(op, name, text)
    one_text = ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1)
    remedy = "Join the texts first."
    check(one_text, op, f"{name} [tokens] or [1, tokens]", list(ids.shape), remedy)
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    integer = integer or not ids.numel()
    check(integer, op, f"integer {name}", ids.dtype, "Tokenise the text first.", TypeError)
    mask = text.get("attention_mask") if isinstance(text, Mapping) else None
    if mask is not None:
        mask = as_ids(op, "attention_mask", mask)
        expected, remedy = f"attention_mask of the shape of {name}", "Pass one number for each."
        check(mask.shape == ids.shape, op, expected, list(mask.shape), remedy)
        ids = ids[mask.to(ids.device) != 0]
    ids = ids.reshape(-1).to(torch.int64)
    most = positions(model)
    if most is not None and window > most:
        expected = f"window of at most {most} tokens, the positions of {type(model).__name__}"
        remedy = "Tokens beyond them are seldom predicted as well: pass a smaller one."
        warnings.warn(message(op, expected, str(window), remedy), stacklevel=4)
    remedy = "Pass a longer text or a smaller window."
    check(
        ids.numel() >= window,
        op,
        f"{name} of at least one window of {window} tokens",
        f"{ids.numel()} tokens",
        remedy,
    )
    weight = getattr(input_embedding(model), "weight", None)
    if isinstance(weight, Tensor):
        size = weight.shape[0]
        low, high = int(ids.min()), int(ids.max())
        inside = low >= 0 and high < size
        check(
            inside,
            op,
            f"{name}: token ids in 0..{size - 1}",
            f"{low}..{high}",
            "Use the model's own tokenizer.",
        )
    return ids[: ids.numel() // window * window].view(-1, int(window))


def as_ids(op: str, name: str, token_ids: Any) -> Tensor:
    """The ids of one text as a tensor: of an array, of a list, or of a dict with input_ids."""
    remedy = "Pass the input_ids of the model's tokenizer."
    if isinstance(token_ids, Mapping):
        token_ids = token_ids.get("input_ids")
    try:
        with torch.device("cpu"):  # whatever torch's default device is
            ids = token_ids if isinstance(token_ids, Tensor) else torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError):
        expected = f"{name}: token ids, a tensor or a list of whole numbers"
        check(False, op, expected, shown(token_ids), remedy, TypeError)
    usable = not ids.is_meta and ids.layout == torch.strided
    got = "a meta tensor" if ids.is_meta else str(ids.layout)
    check(usable, op, f"{name} with data", got, remedy, TypeError)
    return ids


def _sum_of_window_means(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Σ over the batch of the mean cross-entropy over window − 1 targets, float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, targets in zip(logits, ids):
        for start in range(0, len(targets) - 1, TOKENS_PER_CHUNK):
            end = min(start + TOKENS_PER_CHUNK, len(targets) - 1)
            chunk = row[start:end].float()
            losses = nn.functional.cross_entropy(
                chunk, targets[start + 1 : end + 1].to(row.device), reduction="none"
            )
            total += losses.sum(dtype=torch.float64)
    return total / (ids.shape[1] - 1)


def _bar(batches: Sequence[Tensor], progress: bool) -> Iterable[Tensor]:
    from tqdm import tqdm

    bar: Iterable[Tensor] = tqdm(batches, desc="perplexity", unit="window", disable=not progress)
    return bar
