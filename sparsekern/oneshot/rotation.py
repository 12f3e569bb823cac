"""Rotations that fold away: an orthogonal change of basis of the residual stream, and one of each
head between v and o, chosen so that less is lost at 2:4.

A pre-norm decoder with RMSNorm computes the same function in every orthonormal basis of its
residual stream, once the gains of the norms stand in the layers behind them:

    x (embedding, and what o and down add)  ──►  x Q
    q, k, v, gate, up, head:  W diag(g)     ──►  W diag(g) Q         readers: columns
    o, down:                  W, b          ──►  Qᵀ W, Qᵀ b          writers: rows
    v, o of a head:           W_v, W_o      ──►  R W_v, W_o Rᵀ       nothing else sees v

RMSNorm without gain commutes with Q, so the logits stay the same up to rounding, and nothing is
computed at run time. Q and R are learnt, starting from the identity, by steps of Adam in their
Cayley form (I − A)(I + A)⁻¹, A skew: the mean over all matrices of (rotation_search.py)

    log (s + s₀),   s = Σ importance that 2:4 drops, s₀ before,
    importance of w_ij = w_ij² / 2[(H + diag H)⁻¹]_jj,   H = XᵀX

on calibration activations X. 1 / 2[(H + diag H)⁻¹]_jj is what the others do not tell of input j
when each is there with probability 1/2: the normal equations then have H/4 + diag(H)/4 in the mean.
It is H_jj where inputs do not correlate. H_jj itself counts what the kept weights will make up for,
and 1/[H⁻¹]_jj leaves out what only the dropped ones could. The first positions of a sequence and
tokens of outlying norm, whose directions would decide everything, are left out of XᵀX.

Source: Ashkboos et al. 2024, "SliceGPT" and "QuaRot" (arXiv:2401.15024, 2404.00456), for the
invariance; "DenoiseRotator" (arXiv:2505.23049) for concentrating importance before pruning.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.nn.tied import check_untied
from sparsekern.nn.wrappers import taken_off, whole
from sparsekern.oneshot.calibration import Batch, make_batches
from sparsekern.oneshot.devices import check_changeable, quiet, working_device
from sparsekern.oneshot.rotation_search import learn
from sparsekern.oneshot.rotation_stream import OP, Stream, collect_grams, find_stream, tied_head
from sparsekern.utils.arguments import SEEDS, checked

logger = logging.getLogger("sparsekern")
STEPS, RATE = 200, 0.02


@dataclass
class RotationReport:
    """What `rotate` did.

    lost_before, lost_after: importance that 2:4 drops over the layer's output energy tr(W H Wᵀ),
        in the mean of all readers and writers: an estimate of their relative errors. The second is
        never above the first.
    untied_bytes: of the head that no longer shares the embedding; 0 where it never did.
    logits_distance: largest difference of a logit before and after, over the largest logit.
    rotated: False where no step was better than the start: the gains are folded, and that is all.
    """

    steps: int
    seconds: float
    lost_before: float
    lost_after: float
    untied_bytes: int
    logits_distance: float
    rotated: bool = True

    def __str__(self) -> str:
        done = "rotated" if self.rotated else "gains folded, nothing rotated"
        text = f"{done} in {self.seconds:.1f} s, {self.steps} steps: "
        text += f"lost importance {self.lost_before:.4f} -> {self.lost_after:.4f}, "
        text += f"logits within {self.logits_distance:.1e}"
        return f"{text}, head untied (+{self.untied_bytes} bytes)" if self.untied_bytes else text


@checked(OP)
@quiet
def rotate(
    model: nn.Module,
    calibration: object,
    *,
    steps: int = STEPS,
    seconds: float | None = None,
    rate: float = RATE,
    heads: bool = True,
    untie: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> RotationReport:
    """Change the basis of a dense model's residual stream so that 2:4 loses less, in place.

    Run it before prune_model. Weights change, the function does not, up to rounding.

    Args:
        model: a Transformers decoder with pre-norm RMSNorm blocks (Llama, Mistral, Qwen, Phi-3,
            SmolLM, ...).
        calibration: token ids [samples, tokens], or whatever prune_model takes.
        steps, rate: of Adam, the rate rising over the first 10 steps and falling to zero; 0 steps
            fold the gains alone. The best that the search has seen is kept: never worse than the
            start by lost_after, and nothing is rotated where no step was better.
        seconds: time for all of it; the search ends with the step that it is in when they are over,
            its rate fallen by then. How far it comes depends on the machine.
        heads: also learn one rotation per key-value head between v and o.
        untie: allow a head of its own where it shares the embedding's weight: the gain of the last
            norm stands in the one and not in the other. Costs the bytes of an embedding.
        device: where the search runs; None: CUDA if there is one, else where the model is.
        seed: of which matrices a step looks at, in models where that is not all of them.
    Returns:
        RotationReport.
    Raises:
        ValueError: the model has no such stream (LayerNorm, norms on what a layer adds, a gain of
            another form, ...), its head is tied and untie is False, or another weight is shared.
            Nothing is changed then.
        RuntimeError: the logits differ by more than rounding. The model is as it was before.
    """
    model = whole(OP, model)
    check_changeable(OP, model)
    target = working_device(OP, model, device)
    batches = make_batches(calibration, model, None, target, op=OP)
    knobs: dict[str, Any] = {"steps": steps, "rate": rate, "heads": heads, "untie": untie}
    knobs["seconds"] = seconds
    with taken_off(model):
        return rotate_on(model, batches, target, seed=seed, **knobs).report


@dataclass
class Rotated:
    """What `rotate_on` did: its report, Q and the Rs, and how to take it back."""

    report: RotationReport
    basis: Tensor
    turns: list[Tensor]
    undo: Callable[[], None]

    def tensors(self) -> dict[str, Tensor]:
        """What was learnt, as `rotate_on(known=)` takes it."""
        lost = [self.report.lost_before, self.report.lost_after]
        made = {"basis": self.basis, "lost": torch.tensor(lost, dtype=torch.float64, device="cpu")}
        return made | {f"turns.{i}": turn for i, turn in enumerate(self.turns)}


@checked(OP, steps=(0, 10**6), seconds=(0, 10**9), rate=(0, 1), seed=SEEDS)
@quiet
def rotate_on(
    model: nn.Module,
    batches: list[Batch],
    target: torch.device,
    *,
    steps: int = STEPS,
    seconds: float | None = None,
    rate: float = RATE,
    heads: bool = True,
    untie: bool = False,
    seed: int = 0,
    known: dict[str, Tensor] | None = None,
) -> Rotated:
    """`rotate` on batches. known: tensors of an earlier search ("basis", "turns.0", ..., "lost"),
    which is then not made again."""
    start = time.perf_counter()
    check(seconds is None or seconds > 0, OP, "seconds > 0 or None", seconds)
    home = next(model.parameters()).device
    probe = batches[0].probe()
    stream = find_stream(model, probe, home)
    tied = tied_head(model, stream)
    check(
        untie or tied is None,
        OP,
        "a head with a weight of its own",
        "one tied to the embedding",
        f"Pass untie=True; it costs {stream.embedding.weight.nbytes} bytes.",
    )
    turned = [*stream.writers, *(m for _, readers in stream.norms for m in readers)]
    own = [module for module in turned if module is not tied]
    check_untied(OP, model, own, "Prune it without rotation.")
    before = _logits(model, probe, home)
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    tie_flag = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    undo = functools.partial(_restore, model, kept, tied is not None, tie_flag)
    width = stream.embedding.weight.shape[1]
    basis, turns, lost = (
        torch.eye(width, dtype=torch.float64, device="cpu"),
        list[Tensor](),
        (0.0, 0.0),
    )
    made = steps
    try:
        untied = _untie(model, stream) if tied is not None else 0
        _fold_gains(stream)
        if known is not None:
            basis, lost = known["basis"], (float(known["lost"][0]), float(known["lost"][1]))
            turns = [known[f"turns.{i}"] for i in range(len(known) - 2)]
        elif steps:
            grams = collect_grams(model, stream, batches, target)
            end = None if seconds is None else start + seconds
            found = learn(stream, grams, steps, rate, heads, target, seed, end)
            basis, turns, lost, made = found.basis, found.turns, found.lost, found.steps
        rotated = not torch.equal(basis, torch.eye(width, dtype=basis.dtype, device=basis.device))
        if rotated:
            _apply(stream, basis, turns)
        after = _logits(model, probe, home)
        distance = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
        bound = max(1e-3, 20 * torch.finfo(before.dtype).eps)
        if not distance <= bound:
            raise RuntimeError(
                f"{OP}: expected the logits of {type(model).__name__} to stay within {bound:g}, "
                f"got a distance of {distance:.3g}. This architecture cannot be rotated."
            )
    except BaseException:
        undo()
        raise
    took = time.perf_counter() - start
    report = RotationReport(made, took, *lost, untied, distance, rotated)
    logger.info("%s", report)
    return Rotated(report, basis.cpu(), [turn.cpu() for turn in turns], undo)


# ------------------------------------------------------------------------------- changing a model


def _untie(model: nn.Module, stream: Stream) -> int:
    head = tied_head(model, stream)
    assert head is not None
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):
        config.tie_word_embeddings = False
    return head.weight.nbytes


def _restore(
    model: nn.Module, kept: dict[str, Tensor], was_tied: bool, tie_flag: bool | None
) -> None:
    with taken_off(model):
        own = dict(model.named_parameters())
    for name, value in kept.items():
        own[name].copy_(value)
    if was_tied:
        tied: Any = model
        tied.config.tie_word_embeddings = tie_flag
        tied.tie_weights()


def gain(norm: Any) -> Tensor:
    """What an RMSNorm multiplies by: its output for inputs of unit size, so that a gain of the form
    1 + w is seen as what it is."""
    ones = torch.ones_like(norm.weight)
    output: Tensor = norm(ones.view(1, 1, -1))
    return output.view(-1).double()


def _fold_gains(stream: Stream) -> None:
    for norm, readers in stream.norms:
        scale = gain(norm)
        for module in readers:
            module.weight.copy_((module.weight.double() * scale).to(module.weight.dtype))
        # The value of w at which the norm multiplies by one: 1, or 0 where it uses 1 + w.
        norm.weight.fill_(1.0)
        if float((gain(norm) - 1).abs().max()) > 0.01:
            norm.weight.fill_(0.0)
        ones = float((gain(norm) - 1).abs().max()) < 0.01
        check(ones, OP, "a norm whose gain is w or 1 + w", type(norm).__name__)


def _apply(stream: Stream, basis: Tensor, turns: list[Tensor]) -> None:
    """Write Q into every reader, writer and the embedding, and R into v and o, in float64."""

    def write(parameter: Tensor, value: Tensor) -> None:
        parameter.copy_(value.to(parameter.dtype))

    def on(parameter: Tensor, matrix: Tensor) -> Tensor:
        return matrix.to(parameter.device)

    basis = basis.double()
    for (v, o, count, size), turn in zip(stream.heads, turns, strict=False):
        r = on(v.weight, turn).double()  # [count, size, size]
        w = v.weight.double().view(count, size, -1)
        write(v.weight, torch.bmm(r, w).view_as(v.weight))
        if v.bias is not None:
            write(v.bias, torch.bmm(r, v.bias.double().view(count, size, 1)).view_as(v.bias))
        group = o.in_features // (count * size)
        w = o.weight.double().view(-1, count, group, size)
        write(o.weight, torch.einsum("ocgs,cts->ocgt", w, r).reshape_as(o.weight))
    write(
        stream.embedding.weight,
        stream.embedding.weight.double() @ on(stream.embedding.weight, basis),
    )
    for _, readers in stream.norms:
        for module in readers:
            write(module.weight, module.weight.double() @ on(module.weight, basis))
    for module in stream.writers:
        q = on(module.weight, basis)
        write(module.weight, q.t() @ module.weight.double())
        if module.bias is not None:
            write(module.bias, q.t() @ module.bias.double())


def _logits(model: nn.Module, probe: Batch, home: torch.device) -> Tensor:
    with torch.autocast(home.type, enabled=False):  # whose rounding says nothing of the weights'
        output = probe.run(model, home)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits
