"""The search of a rotation: stacks give what one matrix after the other gives; never worse than the
start; the same for a seed."""

import copy

import pytest
import torch
from torch import nn

from python_tests.clock import Clock
from python_tests.oneshot.test_rotation import build, ids
from sparsekern.oneshot import rotation, rotation_formulas, rotation_search
from sparsekern.oneshot.rotation_formulas import cayley, inverse, untold
from sparsekern.oneshot.rotation_search import SOFT, Objective, learn, objective_of
from sparsekern.oneshot.rotation_stream import Stream

CPU = torch.device("cpu")


def told_plainly(h):
    return 0.5 / torch.linalg.inv(h + torch.diag(h.diagonal())).diagonal()


def lost_plainly(w, energy):
    scores = (w.square() * energy).view(w.shape[0], -1, 4)
    return scores.topk(2, dim=2, largest=False).values.sum()


def plain(stream, grams, q, turns):
    """The share of each matrix, one after the other, in float64."""
    shares = []
    r = {}
    for (v, o, _, _), turn in zip(stream.heads, turns, strict=False):
        r[id(v)] = r[id(o)] = turn
    for _, readers in stream.norms[:-1]:
        for module in readers:
            w, h = module.weight.double(), grams[id(readers[0])].double()
            total = ((w @ h) * w).sum()
            if id(module) in r:
                w = torch.block_diag(*r[id(module)]) @ w
            shares.append(lost_plainly(w @ q, told_plainly(q.t() @ h @ q)) / total)
    for module in stream.writers:
        w, h = module.weight.double(), grams[id(module)].double()
        total = ((w @ h) * w).sum()
        if id(module) in r:
            turn = r[id(module)]
            repeat = w.shape[1] // (turn.shape[0] * turn.shape[1])
            wide = torch.block_diag(*[t for t in turn for _ in range(repeat)])
            w, h = w @ wide.t(), wide @ h @ wide.t()
        shares.append(lost_plainly(q.t() @ w, told_plainly(h)) / total)
    return torch.stack(shares)


def made_up(blocks, width=16, seed=0):
    """A stream of `blocks` of (heads, key-value heads, values per head, width of the MLP)."""
    torch.manual_seed(seed)

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False).requires_grad_(False)

    def gram(size):
        x = torch.randn(3 * size, size) @ torch.randn(size, size) * torch.rand(size)
        return x.t() @ x / len(x)

    stream, grams = Stream(nn.Embedding(8, width)), {}
    for count, kv, size, inner in blocks:
        q, k, v = (linear(width, n * size) for n in (count, kv, kv))
        o, gate, up, down = (
            linear(count * size, width),
            linear(width, inner),
            linear(width, inner),
            linear(inner, width),
        )
        stream.norms += [(None, [q, k, v]), (None, [gate, up])]
        stream.writers += [o, down]
        stream.heads.append((v, o, kv, size))
        for module in (q, gate, o, down):
            grams[id(module)] = gram(module.in_features)
    stream.norms.append((None, [linear(width, 8)]))
    return stream, grams


BLOCKS = {
    "multi-head": [(4, 4, 4, 32)] * 3,
    "grouped": [(4, 2, 4, 32)] * 3,
    "one key-value head": [(4, 1, 4, 32)] * 2,
    "unequal MLPs": [(4, 2, 4, 32), (4, 2, 4, 24), (4, 2, 4, 32)],
    "unequal heads": [(4, 2, 4, 16), (2, 2, 8, 32), (3, 1, 4, 20), (4, 2, 4, 16)],
}


def parameters(stream, heads, dtype):
    """A skew parameter of Q and of each attention's Rs, away from the identity."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 16)] + [(count, size, size) for _, _, count, size in stream.heads if heads]
    made = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("leaf", [4, 64])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_stacks_give_what_one_after_the_other_gives(monkeypatch, name, heads, leaf):
    monkeypatch.setattr(rotation_formulas, "LEAF", leaf)
    stream, grams = made_up(BLOCKS[name])
    a, *b = parameters(stream, heads, torch.float64)
    eyes = [torch.eye(size).expand(count, -1, -1).double() for _, _, count, size in stream.heads]
    first = plain(stream, grams, torch.eye(16).double(), eyes if heads else [])
    expected = plain(stream, grams, cayley(a), [cayley(x) for x in b])
    value = ((expected + SOFT * first) / (first + SOFT * first)).log().mean()
    value.backward()

    objective = Objective(stream, grams, heads, CPU)
    a32, *b32 = parameters(stream, heads, torch.float32)
    stacks = [torch.empty(size) for size in objective.sizes]
    for (stack, place), x in zip(objective.turns, b32, strict=True):
        stacks[stack][place] = x.detach()
    stacks = [stack.requires_grad_() for stack in stacks]
    turns = [cayley(x) for x in stacks]
    count = len(objective.matrices)
    for i in range(count):
        one = objective(objective.pick([i]), cayley(a32), turns)
        torch.testing.assert_close(one.double()[0], expected[i], rtol=1e-4, atol=0)
    picked = objective.pick(list(range(count)))
    whole = objective_of(objective(picked, cayley(a32), turns), picked.first)
    whole.backward()
    torch.testing.assert_close(whole.double(), value, rtol=0, atol=1e-4)
    torch.testing.assert_close(a32.grad.double(), a.grad, rtol=0, atol=1e-3 * float(a.grad.norm()))
    for (stack, place), x in zip(objective.turns, b, strict=True):
        found = stacks[stack].grad[place].double()
        torch.testing.assert_close(found, x.grad, rtol=0, atol=1e-3 * float(x.grad.norm()))


def test_the_inverse_by_halves(monkeypatch):
    monkeypatch.setattr(rotation_formulas, "LEAF", 5)
    x = torch.randn(3, 90, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = x.mT @ x
    torch.testing.assert_close(inverse(m), torch.linalg.inv(m))


def test_the_gradient_of_untold(monkeypatch):
    monkeypatch.setattr(rotation_formulas, "LEAF", 3)
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: untold(x.mT @ x), x)


def test_a_weight_that_is_2_to_4_has_no_infinite_share():
    stream, grams = made_up(BLOCKS["grouped"])
    stream.writers[1].weight.view(-1, 4)[:, 1:3] = 0.0
    stream.norms[1][1][0].weight.zero_()
    found = learn(stream, grams, 3, 0.02, True, CPU)
    assert found.basis.isfinite().all() and 0 < found.lost[1] <= found.lost[0] < 1


@pytest.mark.parametrize("elements", [2**27, 2000])
def test_never_worse_than_the_start(monkeypatch, elements):
    """Steps that all go uphill: the start comes back, and the report says so."""
    monkeypatch.setattr(rotation_search, "ELEMENTS", elements)
    monkeypatch.setattr(rotation_search, "rate_of", lambda rate, made, share: -0.02)
    stream, grams = made_up(BLOCKS["unequal heads"])
    found = learn(stream, grams, 3, 1.0, True, CPU)
    assert found.lost[1] == found.lost[0] and found.turns == [] and found.steps == 3
    assert torch.equal(found.basis, torch.eye(16, dtype=torch.float64))

    model, folded = build(num_key_value_heads=2), build(num_key_value_heads=2)
    rotation.rotate(folded, ids(), steps=0)
    monkeypatch.setattr(rotation, "learn", lambda *args: found_for(found, 32))
    batches = rotation.make_batches(ids(), model, None, CPU)
    result = rotation.rotate_on(model, batches, CPU, steps=3)
    assert not result.report.rotated and "gains folded, nothing rotated" in str(result.report)
    assert all(
        torch.equal(value, folded.state_dict()[name]) for name, value in model.state_dict().items()
    )
    again = copy.deepcopy(build(num_key_value_heads=2))
    known = rotation.rotate_on(again, batches, CPU, steps=3, known=result.tensors()).report
    assert not known.rotated and known.lost_after == result.report.lost_after


def found_for(found, width):
    return rotation_search.Found(torch.eye(width).double(), found.turns, found.lost, found.steps)


def test_the_best_of_a_search_comes_back(monkeypatch):
    """Ten good steps, then ones that ruin it."""
    stream, grams = made_up(BLOCKS["grouped"])
    good = learn(stream, grams, 10, 0.02, True, CPU)
    assert good.lost[1] < 0.97 * good.lost[0]
    honest = rotation_search.rate_of
    monkeypatch.setattr(
        rotation_search,
        "rate_of",
        lambda rate, made, share: honest(rate, made, 2 * share) if made <= 10 else 30.0,
    )
    both = learn(stream, grams, 20, 0.02, True, CPU)
    assert both.steps == 20 and both.lost[1] <= good.lost[1] * (1 + 1e-6)
    q, turns = both.basis, both.turns
    value = plain(stream, grams, q, turns).mean()
    assert abs(float(value) - both.lost[1]) < 1e-4 * both.lost[1]


@pytest.mark.parametrize("elements", [2**27, 2000])
def test_the_same_for_a_seed(monkeypatch, elements):
    monkeypatch.setattr(rotation_search, "ELEMENTS", elements)
    stream, grams = made_up(BLOCKS["unequal heads"])
    one, two, other = (learn(stream, grams, 12, 0.02, True, CPU, seed) for seed in (5, 5, 6))
    assert torch.equal(one.basis, two.basis) and one.lost == two.lost
    assert all(torch.equal(x, y) for x, y in zip(one.turns, two.turns, strict=True))
    assert torch.equal(one.basis, other.basis) == (elements == 2**27)
    assert one.lost[1] < one.lost[0]


def test_parts_of_a_model_are_bounded(monkeypatch):
    monkeypatch.setattr(rotation_search, "ELEMENTS", 600)
    stream, grams = made_up(BLOCKS["unequal heads"])
    objective = Objective(stream, grams, True, CPU)
    parts = list(objective.chunks(list(range(len(objective.matrices)))))
    assert sum(parts, []) == list(range(len(objective.matrices))) and len(parts) > 4
    sizes = [[objective.matrices[i].weight.numel() for i in part] for part in parts]
    assert all(sum(part) - part[-1] < 600 for part in sizes)
    q, turns = torch.eye(16), [cayley(torch.zeros(size)) for size in objective.sizes]
    shares, first = objective.everywhere(q, turns)
    expected = plain(stream, grams, q.double(), []).mean()
    assert torch.equal(shares, first) and abs(float(shares.mean()) - float(expected)) < 1e-5


def test_a_search_that_time_ends_is_not_worse(monkeypatch):
    for each in (0.01, 0.1, 1.0):
        monkeypatch.setattr(rotation_search, "time", Clock(each))
        stream, grams = made_up(BLOCKS["grouped"])
        found = learn(stream, grams, 1000, 0.05, True, CPU, 0, 1.0)
        assert 1 <= found.steps < 100 and found.lost[1] <= found.lost[0]
