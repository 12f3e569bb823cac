"""Rotations that fold away: an orthogonal change of basis of the residual stream, and one of each
head between v and o, chosen so that less is lost at 2:4.

A pre-norm decoder with RMSNorm computes the same function in every orthonormal basis of its
residual stream, once the gains of the norms stand in the layers behind them:

    x (embedding, and what o and down add)  ──►  x Q
    q, k, v, gate, up, head:  W diag(g)     ──►  W diag(g) Q         readers: columns
    o, down:                  W, b          ──►  Qᵀ W, Qᵀ b          writers: rows
    v, o of a head:           W_v, W_o      ──►  R W_v, W_o Rᵀ       nothing else sees v

RMSNorm without gain commutes with Q, so the logits stay the same up to rounding, and nothing is
computed at run time. Q and R are learnt, starting from the identity, by Adam on their Cayley form
(I − A)(I + A)⁻¹, A skew: the mean over all matrices of

    log Σ importance that 2:4 drops,   importance of w_ij = w_ij² / 2[(H + diag H)⁻¹]_jj,   H = XᵀX

on calibration activations X. 1 / 2[(H + diag H)⁻¹]_jj is what the others do not tell of input j
when each is there with probability 1/2: the normal equations then have H/4 + diag(H)/4 in the mean.
It is H_jj where inputs do not correlate. H_jj itself counts what the kept weights will make up for,
and 1/[H⁻¹]_jj leaves out what only the dropped ones could. The first positions of a sequence and
tokens of outlying norm, whose directions would decide everything, are left out of XᵀX.

Source: Ashkboos et al. 2024, "SliceGPT" and "QuaRot" (arXiv:2401.15024, 2404.00456), for the
invariance; "DenoiseRotator" (arXiv:2505.23049) for concentrating importance before pruning.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.oneshot.calibration import Batch, make_batches
from sparsekern.oneshot.discovery import find_blocks, input_embedding
from sparsekern.utils.arguments import SEEDS, checked

OP = "sparsekern.rotate"
logger = logging.getLogger("sparsekern")
STEPS, RATE = 200, 0.02
SKIPPED_POSITIONS = 4  # of a sequence: attention sinks
OUTLIER = 3.0  # times the median norm: such tokens are left out, too
ELEMENTS = 2**27  # of the weights that one step looks at


@dataclass
class Stream:
    """The residual stream of a model: what reads and writes it.

    norms: (RMSNorm, the Linears that read its output), the final one with the head included.
    writers: Linears whose output is added to the stream.   embedding: makes its first value.
    heads: (v, o, number of key-value heads, values per head) of each attention.
    """

    embedding: nn.Embedding
    norms: list[tuple[Any, list[nn.Linear]]] = field(default_factory=list)
    writers: list[nn.Linear] = field(default_factory=list)
    heads: list[tuple[nn.Linear, nn.Linear, int, int]] = field(default_factory=list)


@dataclass
class RotationReport:
    """What `rotate` did.

    lost_before, lost_after: importance that 2:4 drops over the layer's output energy tr(W H Wᵀ),
        in the mean of all readers and writers: an estimate of their relative errors.
    untied_bytes: of the head that no longer shares the embedding; 0 where it never did.
    logits_distance: largest difference of a logit before and after, over the largest logit.
    """

    steps: int
    seconds: float
    lost_before: float
    lost_after: float
    untied_bytes: int
    logits_distance: float

    def __str__(self) -> str:
        text = f"rotated in {self.seconds:.1f} s, {self.steps} steps: "
        text += f"lost importance {self.lost_before:.4f} -> {self.lost_after:.4f}, "
        text += f"logits within {self.logits_distance:.1e}"
        return f"{text}, head untied (+{self.untied_bytes} bytes)" if self.untied_bytes else text


@checked(OP, steps=(0, 10**6), seconds=(0, 10**9), rate=(0, 1), seed=SEEDS)
@torch.no_grad()
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
        steps, rate: of Adam; 0 steps fold the gains alone.
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
            another form, ...), or its head is tied and untie is False. Nothing is changed then.
        RuntimeError: the logits differ by more than rounding. The model is as it was before.
    """
    target = _target(model, device)
    batches = make_batches(calibration, model, None, target)
    knobs: dict[str, Any] = {"steps": steps, "rate": rate, "heads": heads, "untie": untie}
    knobs["seconds"] = seconds
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
        made = {"basis": self.basis, "lost": torch.tensor(lost, dtype=torch.float64)}
        return made | {f"turns.{i}": turn for i, turn in enumerate(self.turns)}


@torch.no_grad()
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
    tied = _tied_head(model, stream)
    check(
        untie or tied is None,
        OP,
        "a head with a weight of its own",
        "one tied to the embedding",
        f"Pass untie=True; it costs {stream.embedding.weight.nbytes} bytes.",
    )
    before = _logits(model, probe, home)
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    tie_flag = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    undo = functools.partial(_restore, model, kept, tied is not None, tie_flag)
    width = stream.embedding.weight.shape[1]
    basis, turns, lost = torch.eye(width, dtype=torch.float64), list[Tensor](), (0.0, 0.0)
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
            basis, turns, lost, made = found
        if steps:
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
    report = RotationReport(made, took, *lost, untied, distance)
    logger.info("%s", report)
    return Rotated(report, basis.cpu(), [turn.cpu() for turn in turns], undo)


def _target(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    home = next(model.parameters()).device
    return torch.device("cuda") if torch.cuda.is_available() else home


# ------------------------------------------------------------------------------------- the stream


def find_stream(model: nn.Module, probe: Batch, home: torch.device) -> Stream:
    """What reads and writes the residual stream, seen in one short forward call.

    Raises:
        ValueError: there is no such stream, with what stands in the way.
    """
    name = type(model).__name__
    embedding = input_embedding(model)
    remedy = "Prune it without rotation."
    check(
        isinstance(embedding, nn.Embedding), OP, f"{name} with an nn.Embedding", embedding, remedy
    )
    assert isinstance(embedding, nn.Embedding)
    _, blocks = find_blocks(model)
    check(blocks, OP, f"{name} with decoder blocks", "none", remedy)
    width = embedding.weight.shape[1]
    made: dict[int, nn.Module] = {}  # address of a tensor's memory -> the norm that made it
    held: list[Tensor] = []  # so that no memory is used twice
    readers: dict[int, list[nn.Linear]] = {}
    norms: dict[int, nn.Module] = {}
    order: list[nn.Linear] = []

    def after_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        made[_memory(output)] = module
        held.append(output)
        norms.setdefault(id(module), module)

    def before_linear(module: nn.Linear, args: tuple[Any, ...]) -> None:
        norm = made.get(_memory(args[0])) if args else None
        if norm is not None:
            readers.setdefault(id(norm), []).append(module)
        else:
            order.append(module)

    handles = []
    for module in model.modules():
        if _is_rms_norm(module, width):
            handles.append(module.register_forward_hook(after_norm))
        elif type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(before_linear))
    try:
        probe.run(model, home)
    finally:
        for handle in handles:
            handle.remove()
    stream = Stream(embedding)
    found = [m for m in norms.values() if id(m) in readers]
    lonely = [m for m in norms.values() if id(m) not in readers]
    check(
        found and not lonely,
        OP,
        f"every norm of {name} to be read by linear layers alone",
        f"{type(lonely[0]).__name__} that is not" if lonely else "no RMSNorm",
        remedy,
    )
    stream.norms = [(norm, readers[id(norm)]) for norm in found]
    inside = {id(m) for block in blocks for m in block.modules()}
    stream.writers = [m for m in order if id(m) in inside and m.out_features == width]
    others = [m for m in order if id(m) in inside and m.out_features != width]
    check(
        len(stream.writers) == 2 * len(blocks) and not others,
        OP,
        f"two layers in each block of {name} that add to the stream",
        f"{len(stream.writers)} in {len(blocks)} blocks, and {len(others)} other layers",
        remedy,
    )
    stream.heads = _find_heads(model, blocks)
    return stream


def _memory(tensor: Tensor) -> int:
    """The same for a tensor and a slice of it, such as the last positions that a head reads."""
    return tensor.untyped_storage().data_ptr()


def _is_rms_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "RMSNorm" in type(module).__name__
        and isinstance(weight, Tensor)
        and weight.shape == (width,)
        and getattr(module, "bias", None) is None
    )


def _find_heads(
    model: nn.Module, blocks: list[nn.Module]
) -> list[tuple[nn.Linear, nn.Linear, int, int]]:
    """v and o of each attention that has them as layers of their own, else nothing."""
    config = getattr(model, "config", None)
    count = getattr(config, "num_attention_heads", None)
    kv = getattr(config, "num_key_value_heads", None) or count
    heads = []
    for block in blocks:
        for module in block.modules():
            v, o = getattr(module, "v_proj", None), getattr(module, "o_proj", None)
            if type(v) is nn.Linear and type(o) is nn.Linear and kv and count:
                size = v.out_features // kv
                if size * kv == v.out_features and size * count == o.in_features:
                    heads.append((v, o, kv, size))
    return heads if len(heads) == len(blocks) else []


def _tied_head(model: nn.Module, stream: Stream) -> nn.Linear | None:
    for _, readers in stream.norms:
        for module in readers:
            if module.weight is stream.embedding.weight:
                return module
    return None


# ------------------------------------------------------------------------------- changing a model


def _untie(model: nn.Module, stream: Stream) -> int:
    head = _tied_head(model, stream)
    assert head is not None
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):
        config.tie_word_embeddings = False
    return head.weight.nbytes


def _restore(
    model: nn.Module, kept: dict[str, Tensor], was_tied: bool, tie_flag: bool | None
) -> None:
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
    output = probe.run(model, home)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


# ------------------------------------------------------------------------------------- the search


@contextlib.contextmanager
def _hooked(pairs: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect_grams(
    model: nn.Module, stream: Stream, batches: list[Batch], device: torch.device
) -> dict[int, Tensor]:
    """XᵀX / tokens of the inputs of the first reader of each norm, of o and of down, by id of the
    module, in float32 on `device`; outlying tokens left out."""
    grams: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    watched = [readers[0] for _, readers in stream.norms] + stream.writers

    def hook(module: nn.Linear, args: tuple[Any, ...]) -> None:
        x = args[0][..., SKIPPED_POSITIONS:, :].reshape(-1, module.in_features)
        x = x.to(device).float()
        norms = x.norm(dim=1)
        x = x[norms <= OUTLIER * norms.median()]
        grams[id(module)] = grams.get(id(module), 0) + x.t() @ x
        counts[id(module)] = counts.get(id(module), 0) + len(x)

    home = next(model.parameters()).device
    model.to(device)
    try:
        with _hooked((module, hook) for module in watched):
            for batch in batches:
                batch.run(model, device)
    finally:
        model.to(home)
    return {key: gram / max(1, counts[key]) for key, gram in grams.items()}


def untold(h: Tensor) -> Tensor:
    """1 / 2[(H + diag H)⁻¹]_jj of a Gram matrix [in, in]: what of each input a random half of the
    others does not tell; H_jj without correlation, 0 of an input that is always zero. What is added
    is at least the rounding of H, beside which H of few tokens or of rotated inputs is singular."""
    diagonal = h.diagonal()
    dead = diagonal == 0
    rounding = torch.finfo(h.dtype)
    mean = diagonal.mean().clamp_min(rounding.tiny)
    own = (diagonal + dead * mean).clamp_min(8 * len(h) * rounding.eps * mean.detach())
    lower = torch.linalg.cholesky(h + torch.diag(own))
    energy: Tensor = 0.5 / torch.cholesky_inverse(lower).diagonal()
    return energy * ~dead


def lost(w: Tensor, energy: Tensor) -> Tensor:
    """Σ w_ij² energy_j of what 2:4 drops when it keeps the two largest of each group."""
    importance = w * w * energy
    a, b, c, d = importance.view(w.shape[0], -1, 4).unbind(2)
    low, other = torch.minimum(a, b), torch.minimum(c, d)
    high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    # The smallest, and the smallest of the rest: much faster than topk of four.
    dropped = torch.minimum(low, other) + torch.minimum(torch.maximum(low, other), high)
    total: Tensor = dropped.sum()
    return total


def cayley(a: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ with A = a − aᵀ: orthogonal, the identity for a = 0. Batched."""
    skew = a - a.transpose(-1, -2)
    eye = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype).expand_as(a)
    q: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return q


def learn(
    stream: Stream,
    grams: dict[int, Tensor],
    steps: int,
    rate: float,
    heads: bool,
    device: torch.device,
    seed: int = 0,
    end: float | None = None,
) -> tuple[Tensor, list[Tensor], tuple[float, float], int]:
    """Q [width, width], R of each attention [heads, size, size], what is lost before and after,
    and the steps that there was time for until `end` of time.perf_counter()."""
    width = stream.embedding.weight.shape[1]
    inside = [(readers, grams[id(readers[0])]) for _, readers in stream.norms[:-1]]
    energies = {id(m): untold(grams[id(m)]) for m in stream.writers}
    weights = {
        id(m): m.weight.detach().to(device).float()
        for m in [*(m for readers, _ in inside for m in readers), *stream.writers]
    }
    with torch.enable_grad():
        a = torch.zeros(width, width, device=device, requires_grad=True)
        turned = stream.heads if heads else []
        b = [
            torch.zeros(count, size, size, device=device, requires_grad=True)
            for _, _, count, size in turned
        ]
        optimizer = torch.optim.Adam([a, *b], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        matrices: list[tuple[nn.Linear, Tensor | None]] = [
            (m, gram) for readers, gram in inside for m in readers
        ]
        matrices += [(m, None) for m in stream.writers]
        generator = torch.Generator().manual_seed(seed)
        totals = {
            id(m): (
                (weights[id(m)] @ (grams[id(m)] if gram is None else gram)) * weights[id(m)]
            ).sum()
            for m, gram in matrices
        }

        def losses(chosen: list[tuple[nn.Linear, Tensor | None]]) -> list[Tensor]:
            q = cayley(a)
            r = {id(v): cayley(x) for (v, _, _, _), x in zip(turned, b, strict=True)}
            by_o = {id(o): (id(v), c, s) for v, o, c, s in turned}
            energy_of: dict[int, Tensor] = {}
            result = []
            for module, gram in chosen:
                w = weights[id(module)]
                if gram is not None:
                    if id(module) in r:
                        turn = r[id(module)]
                        w = torch.bmm(turn, w.view(turn.shape[0], turn.shape[1], -1)).reshape_as(w)
                    if id(gram) not in energy_of:
                        energy_of[id(gram)] = untold(q.t() @ gram @ q)
                    result.append(lost(w @ q, energy_of[id(gram)]) / totals[id(module)])
                    continue
                energy = energies[id(module)]
                if id(module) in by_o:
                    key, count, size = by_o[id(module)]
                    turn = r[key]
                    group = w.shape[1] // (count * size)
                    w = torch.einsum("ocgs,cts->ocgt", w.view(-1, count, group, size), turn)
                    w = w.reshape(w.shape[0], -1)
                    wide = torch.block_diag(*turn.repeat_interleave(group, 0))
                    energy = untold(wide @ grams[id(module)] @ wide.t())
                result.append(lost(q.t() @ w, energy) / totals[id(module)])
            return result

        def mean_share() -> float:
            with torch.no_grad():
                return float(torch.stack(losses(matrices)).mean())

        before = mean_share()
        begin, made = time.perf_counter(), 0
        for made in range(1, steps + 1):
            if end is not None:
                behind = (time.perf_counter() - begin) / max(1e-9, end - begin)
                share = min(1.0, max((made - 1) / steps, behind))
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
            order = torch.randperm(len(matrices), generator=generator).tolist()
            chosen, elements = [], 0
            for index in order:
                chosen.append(matrices[index])
                elements += weights[id(matrices[index][0])].numel()
                if elements >= ELEMENTS:
                    break
            loss = torch.stack([share.log() for share in losses(chosen)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if end is None:
                schedule.step()
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if time.perf_counter() >= end:
                break
        after = mean_share()
        with torch.no_grad():
            q = _orthonormal(cayley(a.double()))
            r = [_orthonormal(cayley(x.double())) for x in b]
    return q.detach(), [x.detach() for x in r], (before, after), made


def _orthonormal(q: Tensor) -> Tensor:
    """The nearest orthogonal matrix in float64; Cayley's solve leaves an error of its size."""
    u, _, v = torch.linalg.svd(q)
    nearest: Tensor = u @ v
    return nearest
