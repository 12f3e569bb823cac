"""One fit of reconstruction: AdamW on kept weights, an error of hidden states, held-out batches
that decide what is kept. oneshot/reconstruct.py says what is fitted to what."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import deterministic as deterministic_options

from sparsekern.backends.compress import mask24
from sparsekern.formats.dtypes import DEFAULT_16_BIT
from sparsekern.nn.replace import is_conv1d
from sparsekern.oneshot.levels import Levels, Trained, own_rate
from sparsekern.oneshot.portion import add_up
from sparsekern.oneshot.ranks import Ranks
from sparsekern.oneshot.rounds import LR, OP, Fit, Reconstruction
from sparsekern.oneshot.sequential import Walk
from sparsekern.utils.arguments import folded

logger = logging.getLogger("sparsekern")
T = TypeVar("T")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
RESELECT_EVERY = 10  # steps
SAID = 10.0  # seconds between lines of a long fit in the log
LOOK = 0.25  # seconds between looks at the clock, for which a GPU is waited for


def _error(y: Tensor, t: Tensor, counted: Tensor, scale: Tensor | None, mse: bool) -> Tensor:
    """E between y and t [samples, tokens, channels]: the mean over the tokens of each one's own
    relative error, or with mse the relative error of all."""
    t = t.float()
    error = (y.float() - t).square()
    if scale is not None:
        error = error * scale
    size = t.square().sum(-1)
    if mse:
        return (error.sum(-1) * counted).sum() / (size * counted).sum().clamp_min(1e-30)
    relative = error.sum(-1) / size.clamp_min(1e-30)
    return (relative * counted).sum() / counted.sum().clamp_min(1)


class Loss:
    """E of one batch."""

    def __init__(
        self,
        options: Reconstruction,
        weights: list[float],
        given: Callable[[int], list[Tensor]],
        wanted: Callable[[int], list[Tensor]],
        walk: Walk,
    ) -> None:
        self.options, self.weights, self.given, self.wanted = options, weights, given, wanted
        self.walk = walk
        self.scales: list[Tensor | None] = [None] * len(weights)
        self.error = torch.compile(_error) if options.compile else _error

    def __call__(self, index: int) -> Tensor:
        targets = self.wanted(index)
        outputs = self.given(index)
        parts = []
        for j, (weight, y, t) in enumerate(zip(self.weights, outputs, targets)):
            scale = self._scale(j, t) if self.options.loss == "channel" else None
            counted = self._counted(index, t)
            parts.append(weight * self.error(y, t, counted, scale, self.options.loss == "mse"))
        return torch.stack(parts).sum()

    def _counted(self, index: int, t: Tensor) -> Tensor:
        """1 for each token that counts, 0 for padding: [samples, tokens]."""
        if index < len(self.walk.batches):
            for keep in self.walk.batches[index].keep:
                if keep.shape == t.shape[:-1]:
                    return keep.to(t.device, torch.float32)
        return torch.ones(t.shape[:-1], device=t.device, dtype=torch.float32)

    def _scale(self, j: int, t: Tensor) -> Tensor:
        """1 / variance of each channel over the tokens of the first batch seen, each of unit size;
        its mean over channels is 1."""
        if self.scales[j] is None:
            t = t.float()
            unit = t / t.square().mean(-1, keepdim=True).clamp_min(1e-30).sqrt()
            variance = unit.reshape(-1, t.shape[-1]).var(0).clamp_min(1e-6)
            inverse = variance.reciprocal()
            self.scales[j] = inverse / inverse.mean()
        return cast(Tensor, self.scales[j])


class Moving:
    """Weights under masks that move: `latent` holds a value for every weight, the parameters those
    of the two largest of each group."""

    def __init__(self, trained: list[Trained]) -> None:
        self.trained = trained
        self.latent = [nn.Parameter(t.parameter.detach().clone()) for t in trained]

    @torch.no_grad()
    def step(
        self, optimizer: torch.optim.Optimizer, gradients: list[Tensor | None], select: bool
    ) -> None:
        """One step of the optimizer, on the gradients of the parameters."""
        for latent, gradient in zip(self.latent, gradients):
            latent.grad = gradient
        optimizer.step()
        for latent, t in zip(self.latent, self.trained):
            latent.grad = None
            if select:
                scores = latent.detach().abs()
                mask = mask24(scores.t().contiguous()).t() if t.transposed else mask24(scores)
                t.mask.copy_(mask)
            t.parameter.data.copy_(latent.detach() * t.mask)


class Clock:
    """The time of a fit; without `seconds` it never ends."""

    def __init__(self, seconds: float | None, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.begin = self.looked = self.first = time.perf_counter()

    def share(self) -> float:
        """Of the seconds, what is behind: 0 to 1."""
        if not self.seconds:
            return 0.0
        return min(1.0, (time.perf_counter() - self.begin) / self.seconds)

    def over(self, step: int, after: int) -> bool:
        """Whether no step is to follow `step`: time for `after` more steps is kept back."""
        if self.seconds is None:
            return False
        if step > 1 and time.perf_counter() - self.looked < LOOK:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.looked = time.perf_counter()
        if step <= 1:
            self.first = now  # compilation and the like are behind
        each = (now - self.first) / max(1, step - 1)
        return now - self.begin + (after + 1) * each >= self.seconds


def held_out(batches: int, options: Reconstruction) -> int:
    """How many of the last batches are held out."""
    if batches < 2 or options.held_out == 0:
        return 0
    return min(batches - 1, max(1, round(batches * options.held_out)))


def fit(
    trained: list[Trained],
    batches: int,
    loss: Callable[[int], Tensor],
    options: Reconstruction,
    blocks: list[int],
    part: str,
    new_epoch: Callable[[int], None] = lambda epoch: None,
    seconds: float | None = None,
    ranks: Ranks | None = None,
    levels: Levels | None = None,
) -> Fit:
    """AdamW on the kept weights; the weights in the end are the best of the held-out error, those
    before included. `seconds` end it early. ranks: each has a part of every `loss`; they add up.
    levels: what is trained in place of the weights, which are levels · scales throughout; the best
    of it is in place in the end if the fit is kept."""
    start_time = time.perf_counter()
    count = held_out(batches, options)
    train, held = list(range(batches - count)), list(range(batches - count, batches))
    judged = held or train
    parameters = [t.parameter for t in trained]
    device = parameters[0].device
    clock, after = Clock(seconds, device), 2 * len(judged)

    @torch.no_grad()
    def error() -> float:
        found = repeatable(lambda: torch.stack([loss(i) for i in judged]).mean())
        if ranks is not None:
            ranks.add_up(found)
        return float(found)

    def round_to_stored() -> None:
        for t in trained:
            t.parameter.data.copy_(t.parameter.data.to(t.dtype))

    first = [t.parameter.detach().to(t.dtype, copy=True) for t in trained]  # as it came, exact
    best, best_error = first, error()
    before = best_error
    highest = LR if options.lr is None else options.lr
    optimized: Any = parameters
    if levels is not None:
        optimized = levels.parameters(highest)
    elif options.lr is None and options.span == 1:
        optimized = [
            {"params": [t.parameter], "share": own_rate(t.parameter, t.mask)} for t in trained
        ]
    optimizer = torch.optim.AdamW(
        optimized, highest, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    masks = [t.mask for t in trained]
    moving = Moving(trained) if options.reselect else None
    if moving is not None:
        optimizer.param_groups[0]["params"] = moving.latent
    generator = torch.Generator().manual_seed(folded(options.seed * 7919 + blocks[0]))
    total, step, stale, epochs, last = options.epochs * len(train), 0, 0, 0, before
    stopped, said = clock.over(0, after), start_time
    try:
        for epoch in range(0 if stopped else options.epochs):
            new_epoch(epoch)
            losses, epochs = [], epoch + 1
            for number in torch.randperm(len(train), generator=generator, device="cpu").tolist():
                place = max(step, min(total - 1, int(total * clock.share())))
                rate = highest * schedule(place, total, options.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("share", 1.0)
                losses.append(_backward(loss, train[number], parameters))
                if ranks is not None:
                    add_up(ranks, parameters, losses[-1])
                moves = moving is not None and step < options.reselect * total
                # None: of an expert that no token of the batch reached.
                gradients = [p.grad for p in parameters]
                if not moves:
                    there = [(g, m) for g, m in zip(gradients, masks) if g is not None]
                    torch._foreach_mul_([g for g, _ in there], [m for _, m in there])
                if levels is not None:
                    levels.step(optimizer, gradients)
                elif moving is not None:
                    moving.step(optimizer, gradients, moves and step % RESELECT_EVERY == 0)
                else:
                    optimizer.step()
                for p in parameters:
                    p.grad = None
                step += 1
                stopped = step < total and clock.over(step, after)
                if stopped:
                    break
            last = float(torch.stack(losses).mean())
            now = error()
            if time.perf_counter() - said > SAID:
                said = time.perf_counter()
                text = f"{step} of {total} steps, error {before:.4g} -> {now:.4g}"
                logger.info("%s: blocks %d-%d, %s", OP, blocks[0], blocks[-1], text)
            if now < best_error:
                best_error, stale = now, 0
                best = (
                    [p.detach().clone() for p in parameters] if levels is None else levels.state()
                )
            else:
                stale += 1
                if not math.isfinite(now) or (options.patience and stale >= options.patience):
                    break
            if stopped:
                break
        kept = best is not first
        if kept:
            with torch.no_grad():
                if levels is not None:
                    levels.restore(best)
                else:
                    _put_back(parameters, best)
                round_to_stored()
            best_error = error()
            kept = best_error < before
        if not kept:
            best_error = before
            _put_back(parameters, first)
    except BaseException:
        _put_back(parameters, first)
        raise
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start_time
    done = Fit(blocks, before, best_error, epochs, step, kept, took, last, part, stopped)
    logger.info("%s: %s", OP, done)
    return done


def repeatable(function: Callable[[], T]) -> T:
    """function(); where an operation has no deterministic form the other one is taken from then
    on, and it is called again."""
    try:
        return function()
    except RuntimeError as error:
        strict = torch.are_deterministic_algorithms_enabled()
        strict = strict and not torch.is_deterministic_algorithms_warn_only_enabled()
        if not strict or "deterministic" not in str(error):
            raise
        logger.info("%s: not bit for bit repeatable here: %s", OP, error)
        torch.use_deterministic_algorithms(True, warn_only=True)
        return function()


@torch.enable_grad()
def _backward(
    loss: Callable[[int], Tensor], index: int, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """The gradients of one batch, of these parameters alone; returns its error."""

    def run() -> Tensor:
        for p in parameters:
            p.grad = None
        value = loss(index)
        value.backward(inputs=parameters)
        return value.detach()

    return repeatable(run)


@torch.no_grad()
def _put_back(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.copy_(value)


def schedule(step: int, total: int, warmup: float) -> float:
    """Linear from 0, then a cosine to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def kept_weights(
    modules: Sequence[nn.Module], masks: Mapping[nn.Module, Tensor]
) -> list[tuple[nn.Parameter, Tensor, bool]]:
    """(weight as the module stores it, mask in the same form, whether that is transposed)."""
    found = []
    for module in modules:
        mask, turned = masks[module], is_conv1d(module)
        found.append((cast(nn.Parameter, module.weight), mask.t() if turned else mask, turned))
    return found


@contextlib.contextmanager
def training(
    chosen: list[tuple[nn.Parameter, Tensor, bool]],
    options: Reconstruction,
    device: torch.device,
    blocks: Sequence[nn.Module],
    teachers: Sequence[nn.Module] = (),
) -> Iterator[list[Trained]]:
    """The chosen parameters of the blocks in float32 and with gradients, all others without, for
    the duration; products in bfloat16 on a GPU and where the model is stored in 16 bits. With
    compile, blocks and teachers are compiled for that time."""
    every = list(dict.fromkeys(p for block in blocks for p in block.parameters()))
    before = [(p, p.dtype, p.requires_grad) for p in every]
    half = any(p.dtype.itemsize == 2 for p in every)
    calls = [(m, m._compiled_call_impl) for m in (*blocks, *teachers)]
    trained = [
        Trained(p, mask.to(p.device, torch.bool, copy=True), p.dtype, turned)
        for p, mask, turned in chosen
    ]
    try:
        for p in every:
            p.requires_grad_(False)
        for t in trained:
            t.parameter.data = t.parameter.data.float()
            t.parameter.requires_grad_(True)
        if options.compile:
            for module, _ in calls:
                module.compile()
        lower = device.type == "cuda" or half
        products = torch.autocast(device.type, DEFAULT_16_BIT, enabled=lower, cache_enabled=False)
        with _deterministic(device), products:
            yield trained
    finally:
        for module, call in calls:
            module._compiled_call_impl = call
        for p, dtype, flag in before:
            p.grad = None
            p.requires_grad_(False)
            p.data = p.data.to(dtype)
            p.requires_grad_(flag)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bits each time where there are some: attention's backward pass
    adds up in a fixed order."""
    if device.type != "cuda":
        yield
        return
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = deterministic_options
    fills = options.fill_uninitialized_memory
    # torch asks for it before each product; on one stream the products are deterministic anyway.
    workspace = os.environ.get(WORKSPACE)
    try:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        options.fill_uninitialized_memory = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterminis.*")
            yield
    finally:
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        torch.use_deterministic_algorithms(was, warn_only=warned)
        options.fill_uninitialized_memory = fills
