"""The search of a rotation (rotation.py): Adam on Q and the Rs, from the identity by small turns,
for the mean over the matrices of

    log (s + SOFT s₀) / (s₀ + SOFT s₀),   s = importance that 2:4 drops / output energy, s₀ before

log s alone would be lowered without end by a few matrices: Q and an R together make any one v or o
diagonal, of which nothing is dropped, and all the others pay.

Matrices of one shape are one stack, and so are Gram matrices of one size, so that the number of
launches of a step does not grow with the number of blocks. Models of more than ELEMENTS weights
show a step a random part of their matrices. Products are float32 ones, never TF32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.oneshot.rotation_formulas import Turned, cayley, lost, untold
from sparsekern.oneshot.rotation_stream import Stream
from sparsekern.utils.exact import exact_float32

ELEMENTS = 2**27  # of the weights that one step looks at
WARM = 10  # steps until the rate is the whole one
SOFT = 1.0
LEAST = 1e-9  # a first share below it counts as that: weights of which 2:4 drops nothing


@dataclass
class Found:
    """What `learn` found. basis: Q [width, width] float64, turns: R of each attention [heads, size,
    size], both the identity, the second an empty list, where no step was better than the start.
    lost: the mean share, before and after.   steps: that there was time for.
    """

    basis: Tensor
    turns: list[Tensor]
    lost: tuple[float, float]
    steps: int


@dataclass
class Matrix:
    """weight: [out, in] float32.   gram: of its inputs.   turn: (stack, place in it) of its R.
    energy: of the inputs where nothing changes it: a writer that no R turns."""

    weight: Tensor
    gram: Tensor
    reads: bool
    turn: tuple[int, int] | None
    energy: Tensor | None
    total: Tensor
    first: Tensor  # share at the start


@dataclass
class Group:
    """Matrices of one shape and kind. weight: [B, out, in] of readers, [out, B, in] of writers."""

    weight: Tensor
    total: Tensor
    reads: bool
    turn: int | None  # which stack of Rs, `places` [B] in it
    places: Tensor
    norms: Tensor  # [B] of readers: which of the energies
    energy: Tensor | None  # [B, in] of writers without R
    gram: Tensor | None  # [B, in, in] of writers with R


@dataclass
class Picked:
    """grams: [norms, width, width] that the readers among `groups` see; None without any.
    members: the matrices in the order of the groups.   first: [matrices] their shares at the start.
    """

    grams: Tensor | None
    groups: list[Group]
    members: list[Matrix]
    first: Tensor


class Objective:
    """Importance lost over output energy of each matrix of a stream, given Q and the Rs."""

    def __init__(
        self, stream: Stream, grams: dict[int, Tensor], heads: bool, device: torch.device
    ) -> None:
        self.width, self.device = stream.embedding.weight.shape[1], device
        turned = stream.heads if heads else []
        self.shapes: list[tuple[int, int]] = []  # (heads, size) of each stack of Rs
        self.turns: list[tuple[int, int]] = []  # (stack, place) of each attention
        counts: list[int] = []
        by_layer: dict[int, tuple[int, int]] = {}
        for v, o, count, size in turned:
            if (count, size) not in self.shapes:
                self.shapes.append((count, size))
                counts.append(0)
            stack = self.shapes.index((count, size))
            self.turns.append((stack, counts[stack]))
            by_layer[id(v)] = by_layer[id(o)] = self.turns[-1]
            counts[stack] += 1
        self.sizes = [(n, count, size, size) for n, (count, size) in zip(counts, self.shapes)]

        def matrix(module: nn.Linear, gram: Tensor, reads: bool) -> Matrix:
            weight = module.weight.detach().to(device).float()
            turn = by_layer.get(id(module))
            energy = None if reads or turn is not None else untold(gram)
            total = ((weight @ gram) * weight).sum().clamp_min(torch.finfo(torch.float32).tiny)
            return Matrix(weight, gram, reads, turn, energy, total, torch.ones_like(total))

        self.matrices = [
            matrix(module, grams[id(readers[0])], True)
            for _, readers in stream.norms[:-1]
            for module in readers
        ]
        self.matrices += [matrix(module, grams[id(module)], False) for module in stream.writers]
        start = Turns(self.width, self.sizes, device)
        for part in self.chunks(list(range(len(self.matrices)))):
            picked = self.pick(part)
            with torch.no_grad():
                shares = self(picked, start.q, start.rs).clamp_min(LEAST)
            for member, first in zip(picked.members, shares, strict=True):
                member.first = first

    def chunks(self, order: list[int]) -> Iterator[list[int]]:
        """`order` in parts of ELEMENTS weights, or of one matrix."""
        part, elements = list[int](), 0
        for index in order:
            part.append(index)
            elements += self.matrices[index].weight.numel()
            if elements >= ELEMENTS:
                yield part
                part, elements = [], 0
        if part:
            yield part

    def pick(self, indices: list[int]) -> Picked:
        """These matrices, stacked."""
        kinds: dict[Any, list[Matrix]] = {}
        norms: dict[int, tuple[int, Tensor]] = {}
        for matrix in (self.matrices[index] for index in indices):
            stack = None if matrix.turn is None else matrix.turn[0]
            kinds.setdefault((matrix.reads, matrix.weight.shape, stack), []).append(matrix)
            if matrix.reads:
                norms.setdefault(id(matrix.gram), (len(norms), matrix.gram))
        groups = []
        for (reads, _, stack), members in kinds.items():
            fixed = not reads and stack is None
            places = [m.turn[1] for m in members if m.turn is not None]
            seen = [norms[id(m.gram)][0] for m in members if reads]
            groups.append(
                Group(
                    torch.stack([m.weight for m in members], 0 if reads else 1),
                    torch.stack([m.total for m in members]),
                    reads,
                    stack,
                    torch.tensor(places, device=self.device, dtype=torch.long),
                    torch.tensor(seen, device=self.device, dtype=torch.long),
                    torch.stack([m.energy for m in members if m.energy is not None])
                    if fixed
                    else None,
                    None if reads or fixed else torch.stack([m.gram for m in members]),
                )
            )
        grams = torch.stack([gram for _, gram in norms.values()]) if norms else None
        members = [matrix for kind in kinds.values() for matrix in kind]
        return Picked(grams, groups, members, torch.stack([m.first for m in members]))

    def __call__(self, picked: Picked, q: Tensor, turns: list[Tensor]) -> Tensor:
        """Shares [matrices], in the order of the groups."""
        energies = None
        if picked.grams is not None:
            seen: Tensor = Turned.apply(picked.grams, q)  # type: ignore[no-untyped-call]
            energies = untold(seen)
        shares = []
        for group in picked.groups:
            turn = None if group.turn is None else turns[group.turn][group.places]
            if group.reads:
                assert energies is not None
                shares.append(self._reader(group, q, turn, energies) / group.total)
            else:
                shares.append(self._writer(group, q, turn) / group.total)
        return torch.cat(shares)

    def _reader(self, group: Group, q: Tensor, turn: Tensor | None, energies: Tensor) -> Tensor:
        w = group.weight
        if turn is not None:
            w = (turn @ w.view(*turn.shape[:3], -1)).view_as(w)
        w = (w.reshape(-1, self.width) @ q).view_as(w)
        return lost(w, energies[group.norms].unsqueeze(1))

    def _writer(self, group: Group, q: Tensor, turn: Tensor | None) -> Tensor:
        w, energy = group.weight, group.energy  # [width, B, in]
        if turn is not None:
            assert group.gram is not None
            b, count, size, _ = turn.shape
            repeat = w.shape[2] // (count * size)
            wide = turn[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(b, -1, size, size)
            w = torch.einsum("obcs,bcts->obct", w.view(*w.shape[:2], -1, size), wide)
            w = w.reshape(self.width, b, -1)
            seen = (wide @ group.gram.view(b, -1, size, group.gram.shape[2])).view_as(group.gram)
            seen = wide @ seen.mT.reshape(b, -1, size, group.gram.shape[2])
            energy = untold(seen.view_as(group.gram))
        assert energy is not None
        w = (q.t() @ w.reshape(self.width, -1)).view_as(w)
        return lost(w, energy.unsqueeze(0), stack=1)

    @torch.no_grad()
    def everywhere(self, q: Tensor, turns: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Shares of all matrices, and what they were at the start."""
        shares, firsts = [], []
        for part in self.chunks(list(range(len(self.matrices)))):
            picked = self.pick(part)
            shares.append(self(picked, q, turns))
            firsts.append(picked.first)
        return torch.cat(shares), torch.cat(firsts)


def objective_of(shares: Tensor, first: Tensor) -> Tensor:
    """What the search lowers: 0 at the start."""
    return ((shares / first + SOFT) / (1 + SOFT)).clamp_min(LEAST).log().mean()


class Turns:
    """Q and the stacks of Rs, and their steps: Q C(a) and C(b) R with C Cayley's form of what Adam
    makes of the gradient at a = b = 0, so that no turn is too far for the form."""

    def __init__(self, width: int, sizes: list[tuple[int, int, int, int]], device: Any) -> None:
        eyes = [
            torch.eye(n, device=device, dtype=torch.float32)
            for n in (width, *(size[-1] for size in sizes))
        ]
        shapes = [(width, width), *sizes]
        self.values = [
            eye.expand(shape).clone().requires_grad_()
            for eye, shape in zip(eyes, shapes, strict=True)
        ]
        self.moves = [torch.zeros_like(value) for value in self.values]
        self.adam = torch.optim.Adam(self.moves)

    @property
    def q(self) -> Tensor:
        return self.values[0]

    @property
    def rs(self) -> list[Tensor]:
        return self.values[1:]

    @torch.no_grad()
    def step(self, loss: Tensor, rate: float) -> None:
        grads = torch.autograd.grad(loss, self.values, allow_unused=True)
        for i, (value, move, grad) in enumerate(zip(self.values, self.moves, grads, strict=True)):
            move.zero_()
            if grad is not None:  # C(a) = I - 2 (a - a^T) + ...
                by = value.mT @ grad if i == 0 else grad @ value.mT
                move.grad = 2 * (by.mT - by)
            else:
                move.grad = None
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for i, (value, move) in enumerate(zip(self.values, self.moves, strict=True)):
            x = value @ cayley(move) if i == 0 else cayley(move) @ value
            # Newton's step to the nearest orthogonal matrix: what rounding adds does not add up.
            value.copy_(1.5 * x - 0.5 * (x @ (x.mT @ x)))


class Best:
    """The turns with the lowest objective of those that were shown and that do not raise the mean
    share. No value is read before the end, which would make a GPU wait."""

    def __init__(self, turns: Turns, first: Tensor) -> None:
        self.before = self.after = first.mean()
        self.lowest = torch.zeros_like(self.before)
        self.kept = [value.detach().clone() for value in turns.values]

    @torch.no_grad()
    def show(self, shares: Tensor, first: Tensor, turns: Turns) -> None:
        value, mean = objective_of(shares, first), shares.mean()
        better = (value < self.lowest) & (mean < self.before)
        self.lowest = torch.where(better, value, self.lowest)
        self.after = torch.where(better, mean, self.after)
        self.kept = [
            torch.where(better, new, old) for new, old in zip(turns.values, self.kept, strict=True)
        ]


def rate_of(rate: float, made: int, share: float) -> float:
    """Of step `made` (from 1) at `share` of the search: a linear start, then a cosine to zero."""
    return rate * min(1.0, made / WARM) * 0.5 * (1 + math.cos(math.pi * share))


def learn(
    stream: Stream,
    grams: dict[int, Tensor],
    steps: int,
    rate: float,
    heads: bool,
    device: torch.device,
    seed: int = 0,
    end: float | None = None,
) -> Found:
    """Q, the Rs, what is lost before and after, and the steps that there was time for until `end`
    of time.perf_counter(). What was best of all that the search looked at, the start included."""
    with exact_float32(device):
        objective = Objective(stream, grams, heads, device)
        turns = Turns(objective.width, objective.sizes, device)
        best = Best(turns, torch.stack([matrix.first for matrix in objective.matrices]))
        generator = torch.Generator().manual_seed(seed)
        everything = list(range(len(objective.matrices)))
        parts = len(list(objective.chunks(everything)))
        whole = objective.pick(everything) if parts == 1 else None
        begin, made = time.perf_counter(), 0
        for made in range(1, steps + 1):
            share = (made - 1) / steps
            if end is not None:
                behind = (time.perf_counter() - begin) / max(1e-9, end - begin)
                share = min(1.0, max(share, behind))
            picked = whole
            if picked is None:
                # A look at all matrices costs as much as `parts` / 3 steps.
                if made > 1 and (made - 1) % (2 * parts) == 0:
                    best.show(*objective.everywhere(turns.q, turns.rs), turns)
                order = torch.randperm(len(everything), generator=generator, device="cpu").tolist()
                picked = objective.pick(next(objective.chunks(order)))
            with torch.enable_grad():
                shares = objective(picked, turns.q, turns.rs)
                loss = objective_of(shares, picked.first)
            if whole is not None and made > 1:
                best.show(shares, picked.first, turns)
            turns.step(loss, rate_of(rate, made, share))
            if end is None:
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if time.perf_counter() >= end:
                break
        best.show(*objective.everywhere(turns.q, turns.rs), turns)
        before, after = float(best.before), float(best.after)
        found = list[Tensor]()
        basis = torch.eye(objective.width, dtype=torch.float64, device=device)
        if after < before:
            basis, *stacks = [_orthonormal(value.double()) for value in best.kept]
            found = [stacks[stack][place] for stack, place in objective.turns]
    return Found(basis, found, (before, after), made)


def _orthonormal(q: Tensor) -> Tensor:
    """The nearest orthogonal matrix in float64; what made it leaves an error of its size."""
    u, _, v = torch.linalg.svd(q)
    nearest: Tensor = u @ v
    return nearest
