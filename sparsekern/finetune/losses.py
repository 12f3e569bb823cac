"""Distillation losses that never hold the float32 logits of all tokens.

    student hidden [tokens, d] ─┐  chunk of tokens: logits, softmax, loss, ∂logits, ∂hidden, ∂head
    teacher's side             ─┘  then the next chunk; only ∂hidden and ∂head are kept

With student logits z, teacher probabilities q (at temperature T) and p = softmax(z / T):

    loss = (1 − α) · T² · KL(q ‖ p) + α · CE(z, label),  mean over the tokens that count
    ∂loss/∂z = (1 − α) · T · (p − q) + α · (softmax(z) − onehot)

Gradients are computed in the forward pass, where the logits of the chunk are there anyway, and
scaled in the backward pass. The memory of one chunk is about 5 · chunk · vocabulary · 4 bytes
(1 GB for 1024 tokens and 49,152 entries), whatever the batch.

Liger-Kernel has fused losses of this kind (fused linear JSD and cross-entropy). They do not fit:
Triton and a GPU only, so CPU runs and CPU tests would need this code beside them; no top-k teacher;
and cross-entropy and KL in one pass over the logits are two calls there, with twice the matmuls.

Source: Hinton et al. 2015 (arXiv:1503.02531); Hsu et al. 2024, "Liger Kernel" (arXiv:2410.10989)
for gradients in the forward pass; Kurtic et al. 2023, "SquareHead" (arXiv:2310.06927).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import check

OP = "sparsekern.finetune.distillation_loss"
IGNORED = -100
CHUNK = 1024
FUSED_LOGITS = 1 << 28  # entries of a chunk's logits, three times in their own dtype


@dataclass
class Target:
    """What the student is compared with: exactly one of the three, rows as the student's tokens.

    hidden, head: the teacher's last hidden states [tokens, d'] and output weight [vocabulary, d'];
        softcap as below.
    logits: the teacher's logits [tokens, vocabulary].
    indices, log_probs: its k most probable entries [tokens, k] at temperature 1 and their natural
        log-probabilities; what they leave of 1 is one further class, "the rest".
    Neither: no teacher, cross-entropy alone.
    """

    hidden: Tensor | None = None
    head: Tensor | None = None
    logits: Tensor | None = None
    indices: Tensor | None = None
    log_probs: Tensor | None = None

    def rows(self, tokens: Tensor) -> Target:
        """The target of a selection of tokens (a bool mask or indices)."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[tokens]

        return Target(
            some(self.hidden),
            self.head,
            some(self.logits),
            some(self.indices),
            some(self.log_probs),
        )


def distillation_loss(
    hidden: Tensor,
    head: Tensor | None,
    target: Target,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 − α)·T²·KL(teacher ‖ student) + α·CE, chunk by chunk; see the module for the formulas.

    Args:
        hidden: [tokens, d] the student's last hidden states; or its logits [tokens, vocabulary]
            when head is None.
        head: [vocabulary, d] output weight, trained or not.
        target: the teacher's side. With top-k targets temperature must be 1.
        labels: int64 [tokens], the next tokens; IGNORED ones do not count for CE. Needed for α > 0,
            and for a target without a teacher.
        alpha: share of the cross-entropy, 0 to 1. temperature: T > 0.
        chunk: tokens at a time; None: CHUNK, or fused as many as FUSED_LOGITS entries hold.
        fused: everything between a chunk's logits and their gradient by torch.compile, in a few
            passes and without float32 in memory (not with top-k targets, which ignore it).
    Returns:
        (loss with gradient, mean KL, mean CE), float32 scalars; the last two are for the log. CE is
        nan without labels. The mean of the KL is over all tokens, that of CE over its own.
    Raises:
        ValueError: sizes or numbers that do not fit.
    Notes:
        Matmuls run in the dtype of `hidden` (autocast is off inside), sums and softmax in float32.
    """
    check(0 <= alpha <= 1, OP, "0 <= alpha <= 1", alpha)
    check(temperature > 0, OP, "temperature > 0", temperature)
    check(hidden.dim() == 2 and hidden.shape[0] > 0, OP, "hidden [tokens, d]", list(hidden.shape))
    if chunk is None:
        vocabulary = hidden.shape[1] if head is None else head.shape[0]
        chunk = max(256, 1 << (FUSED_LOGITS // vocabulary).bit_length() - 1) if fused else CHUNK
    check(chunk >= 1, OP, "chunk >= 1 tokens", chunk)
    teacher = target.hidden is not None or target.logits is not None or target.indices is not None
    check(teacher or alpha == 1, OP, "alpha == 1 without a teacher", alpha, "Pass a teacher.")
    check(labels is not None or alpha == 0, OP, "labels for the cross-entropy", None)
    remedy = "Use temperature=1, or a live teacher."
    check(target.indices is None or temperature == 1, OP, "T == 1 with top-k", temperature, remedy)
    tokens = hidden.shape[0]
    for name in ("hidden", "logits", "indices", "log_probs"):
        side = getattr(target, name)
        rows = tokens if side is None else side.shape[0]
        check(rows == tokens, OP, f"target.{name} of {tokens} tokens", rows)
    settings = (alpha, temperature, chunk, fused and target.indices is None)
    loss, kl, ce = _Chunked.apply(hidden, head, target, labels, settings)  # type: ignore[no-untyped-call]
    return loss, kl, ce


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor | None,
        target: Target,
        labels: Tensor | None,
        settings: tuple[float, float, int, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha, temperature, chunk, fused = settings
        tokens, device = hidden.shape[0], hidden.device
        want_hidden = ctx.needs_input_grad[0]
        want_head = head is not None and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = None
        if want_head and head is not None:
            grad_head = torch.zeros_like(head, dtype=torch.float32)
        kl_sum = torch.zeros((), dtype=torch.float32, device=device)
        ce_sum = torch.zeros_like(kl_sum)
        counted = tokens if labels is None else (labels != IGNORED).sum().clamp(min=1)
        weight = None if head is None else head.to(hidden.dtype)
        teacher_head = None
        if target.hidden is not None and target.head is not None:
            teacher_head = target.head.to(target.hidden.dtype)
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, tokens, chunk):
                part = slice(begin, begin + chunk)
                x = hidden[part]
                raw = x if weight is None else x @ weight.t()
                if fused:
                    theirs = _logits(target, part, teacher_head) if alpha < 1 else None
                    label = None if labels is None else labels[part]
                    share = torch.as_tensor(tokens / counted, device=device)
                    kl, ce, low = compiled(alpha, temperature)(raw, theirs, label, share)
                    kl_sum += kl
                    ce_sum += ce
                    if grad_hidden is not None:
                        grad_hidden[part] = low if weight is None else low @ weight
                    if grad_head is not None:
                        grad_head += (low.t() @ x).float()
                    del raw, theirs, low  # or the next chunk's logits come beside them
                    continue
                log_p = torch.log_softmax(raw, 1, dtype=torch.float32)
                grad: Tensor | None = None
                if labels is not None:
                    label = labels[part].unsqueeze(1)
                    counts = label != IGNORED
                    safe = label.clamp(min=0)
                    ce_sum -= (log_p.gather(1, safe) * counts).sum()
                    if alpha:
                        grad = log_p.exp()
                        grad.scatter_add_(1, safe, -torch.ones_like(safe, dtype=grad.dtype))
                        grad *= counts * (alpha * tokens / counted)
                if alpha < 1:
                    kl, slope = _kl(raw, log_p, target, part, teacher_head, temperature)
                    kl_sum += kl
                    if alpha:
                        slope *= 1 - alpha
                    grad = slope if grad is None else grad.add_(slope)
                assert grad is not None
                low = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = low if weight is None else low @ weight
                if grad_head is not None:
                    grad_head += (low.t() @ x).float()
        kl_mean = kl_sum / tokens
        ce_mean = ce_sum / counted
        loss = (1 - alpha) * kl_mean * temperature**2
        if alpha:
            loss = loss + alpha * ce_mean
        if labels is None:
            ce_mean = torch.full_like(ce_mean, float("nan"))
        ctx.grads = (grad_hidden, grad_head, None if head is None else head.dtype)
        ctx.tokens = tokens  # divided by in backward: float16 could not hold the quotient
        ctx.mark_non_differentiable(kl_mean, ce_mean)
        return loss, kl_mean, ce_mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, head_dtype = ctx.grads
        scale = grads[0] / ctx.tokens
        x = None if grad_hidden is None else (grad_hidden * scale).to(grad_hidden.dtype)
        w = None if grad_head is None else (grad_head * scale).to(head_dtype)
        return x, w, None, None, None


def _kl(
    raw: Tensor,
    log_p: Tensor,
    target: Target,
    part: slice,
    teacher_head: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sum of KL(q ‖ p) over the chunk's tokens, and T² · its gradient for the logits `raw`, whose
    log_softmax is log_p (overwritten). Few passes over [chunk, vocabulary]: they are what it costs.
    """
    if target.indices is not None and target.log_probs is not None:
        return _kl_top(log_p, target.indices[part].long(), target.log_probs[part].float())
    theirs = _logits(target, part, teacher_head)
    if temperature == 1:
        log_q = torch.log_softmax(theirs, 1, dtype=torch.float32)
    else:
        log_q = torch.log_softmax(theirs.float() / temperature, 1)
        log_p = torch.log_softmax(raw.float() / temperature, 1)
    q = log_q.exp()
    difference = log_q.sub_(log_p)
    kl = torch.bmm(q.unsqueeze(1), difference.unsqueeze(2)).sum()
    slope = log_p.exp_().sub_(q)
    return kl, slope if temperature == 1 else slope.mul_(temperature)


def _logits(target: Target, part: slice, teacher_head: Tensor | None) -> Tensor:
    """The teacher's logits of a chunk."""
    if target.logits is not None:
        return target.logits[part]
    assert target.hidden is not None and teacher_head is not None
    return target.hidden[part] @ teacher_head.t()


def one_chunk(
    raw: Tensor,
    theirs: Tensor | None,
    label: Tensor | None,
    share: Tensor,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ KL, Σ CE, tokens · ∂loss/∂raw in raw's dtype) of a chunk, free of in-place work.

    Args:
        raw, theirs: logits of student and teacher [tokens, vocabulary]; theirs None for alpha 1.
        label: int64 [tokens] or None.      share: tokens / tokens that count for CE.
    """
    z = raw.float()
    log_p = torch.log_softmax(z, 1)
    zero = torch.zeros((), dtype=torch.float32, device=raw.device)
    kl, ce, slope = zero, zero, torch.zeros_like(z)
    if label is not None:
        index = label.clamp(min=0).unsqueeze(1)
        counts = (label != IGNORED).unsqueeze(1)
        ce = -(log_p.gather(1, index) * counts).sum()
        if alpha:
            columns = torch.arange(raw.shape[1], device=raw.device)
            onehot = (columns == index).float()
            slope = (log_p.exp() - onehot) * (counts * (share * alpha))
    if theirs is not None:
        log_q = torch.log_softmax(theirs.float() / temperature, 1)
        log_pt = log_p if temperature == 1 else torch.log_softmax(z / temperature, 1)
        q = log_q.exp()
        kl = (q * (log_q - log_pt)).sum(1).sum()  # rows first: one pass with the softmax
        slope = slope + (log_pt.exp() - q) * (temperature * (1 - alpha))
    return kl, ce, slope.to(raw.dtype)


@functools.cache
def compiled(alpha: float, temperature: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`one_chunk` of these numbers by torch.compile."""

    def chunk(
        raw: Tensor, theirs: Tensor | None, label: Tensor | None, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return one_chunk(raw, theirs, label, share, alpha, temperature)

    function: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compile(chunk, dynamic=False)
    return function


def _kl_top(log_p_all: Tensor, indices: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL over k entries and the rest: Σ_k q·log(q/p) + q_r·log(q_r/p_r) with q_r = 1 − Σ_k q.

    Its gradient for the logits is p − t with t = q at the k entries and q_r · p / p_r elsewhere.
    """
    tiny = 1e-7
    log_p = log_p_all.gather(1, indices)
    q, p_all = log_q.exp(), log_p_all.exp()
    rest_q = (1 - q.sum(1, keepdim=True)).clamp(min=0)
    rest_p = (1 - log_p.exp().sum(1, keepdim=True)).clamp(min=tiny)
    rest = torch.where(rest_q > 0, rest_q * (rest_q.clamp(min=tiny).log() - rest_p.log()), 0)
    kl = (q * (log_q - log_p)).sum() + rest.sum()
    slope = p_all * (1 - rest_q / rest_p)
    slope.scatter_(1, indices, log_p.exp() - q)
    return kl, slope


def square_head(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over blocks of ‖h_s − h_t‖² / ‖h_t‖²: matching of block outputs (SquareHead).

    Args:
        student, teacher: block outputs of the same tokens, same shapes, any float dtype.
    """
    shapes, wanted = ([list(h.shape) for h in states] for states in (student, teacher))
    fits = student and shapes == wanted
    expected = f"the teacher's {len(wanted)} block outputs {wanted[:1]}"
    remedy = "Pass block=0, or a teacher of the same blocks."
    got = f"{len(shapes)} of the model {shapes[:1]}"
    check(fits, "sparsekern.finetune.square_head", expected, got, remedy)
    total = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher):
        t = theirs.detach().float()
        total = total + (ours.float() - t).square().sum() / t.square().sum().clamp(min=1e-12)
    return total / len(student)
