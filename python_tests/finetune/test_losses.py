"""The chunked loss against the formula in float64, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from sparsekern.finetune import losses
from sparsekern.finetune.losses import IGNORED, Target, distillation_loss, square_head

TOKENS, D, TD, V = 37, 8, 12, 29


def case(seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    labels = torch.randint(0, V, (TOKENS,), generator=g)
    labels[::5] = IGNORED
    return randn(TOKENS, D), randn(V, D), randn(TOKENS, TD), randn(V, TD), labels


def reference(hidden, head, teacher_logits, labels, alpha, temperature):
    logits = hidden @ head.t()
    log_p = F.log_softmax(logits / temperature, 1)
    log_q = F.log_softmax(teacher_logits / temperature, 1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    return (1 - alpha) * temperature**2 * kl + alpha * ce, kl, ce


def uncompiled(alpha, temperature):
    return lambda *tensors: losses.one_chunk(*tensors, alpha, temperature)


@pytest.mark.parametrize("alpha,temperature", [(0, 1), (0.3, 1), (0.3, 2.5), (1, 1)])
@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("side", ["hidden", "logits", "fused"])
def test_value_and_gradients(alpha, temperature, chunk, side, device, monkeypatch):
    hidden, head, th, thead, labels = (t.to(device) for t in case())
    h64, w64 = hidden.double().requires_grad_(), head.double().requires_grad_()
    want = reference(h64, w64, th.double() @ thead.double().t(), labels, alpha, temperature)
    want[0].backward()
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    target = Target(logits=th @ thead.t()) if side == "logits" else Target(th, thead)
    options = dict(alpha=alpha, temperature=temperature, chunk=chunk, fused=side == "fused")
    if device.type == "cpu":  # the same function; compiling it takes a minute
        monkeypatch.setattr(losses, "compiled", uncompiled)
    loss, kl, ce = distillation_loss(h, w, target, labels, **options)
    (3 * loss).backward()
    close = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.double(), want[0], **close)
    torch.testing.assert_close(ce.double(), want[2], **close)
    if alpha < 1:
        torch.testing.assert_close(kl.double(), want[1], **close)
    torch.testing.assert_close(h.grad.double(), 3 * h64.grad, **close)
    torch.testing.assert_close(w.grad.double(), 3 * w64.grad, **close)


def test_logits_instead_of_hidden_and_a_frozen_head():
    hidden, head, th, thead, labels = case()
    logits = (hidden @ head.t()).requires_grad_()
    loss, _, _ = distillation_loss(logits, None, Target(th, thead), labels, alpha=0.5, chunk=7)
    loss.backward()
    again = (hidden @ head.t()).double().requires_grad_()
    eye = torch.eye(V, dtype=torch.float64)
    want = reference(again, eye, th.double() @ thead.double().t(), labels, 0.5, 1.0)[0]
    want.backward()
    torch.testing.assert_close(logits.grad.double(), again.grad, rtol=1e-4, atol=1e-6)
    h = hidden.clone().requires_grad_()
    distillation_loss(h, head, Target(th, thead))[0].backward()
    assert h.grad is not None and head.grad is None
    with torch.no_grad():
        assert not distillation_loss(hidden, head, Target(th, thead))[0].requires_grad


def test_top_k_is_kl_with_the_rest_as_one_class():
    hidden, head, th, thead, labels = case()
    log_q = F.log_softmax(th @ thead.t(), 1)
    values, indices = log_q.topk(4, dim=1)
    h64 = hidden.double().requires_grad_()
    log_p = F.log_softmax(h64 @ head.double().t(), 1)
    some_p, q = log_p.gather(1, indices), values.double().exp()
    rest_q, rest_p = 1 - q.sum(1), 1 - some_p.exp().sum(1)
    want = ((q * (q.log() - some_p)).sum(1) + rest_q * (rest_q / rest_p).log()).mean()
    want.backward()
    h = hidden.clone().requires_grad_()
    target = Target(indices=indices.int(), log_probs=values)
    loss, _, _ = distillation_loss(h, head, target, labels, chunk=8)
    loss.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-3, atol=1e-6)
    values, indices = log_q.topk(V, dim=1)  # all of them: the full KL, the rest is nothing
    full = distillation_loss(hidden, head, Target(th, thead))[0]
    target = Target(indices=indices, log_probs=values)
    torch.testing.assert_close(
        distillation_loss(hidden, head, target)[0], full, rtol=1e-3, atol=1e-5
    )


def test_bfloat16_is_near_float32():
    hidden, head, th, thead, labels = case()
    want = distillation_loss(hidden, head, Target(th, thead), labels, alpha=0.5)[0]
    low = [t.bfloat16() for t in (hidden, th)]
    h = low[0].requires_grad_()
    loss, _, _ = distillation_loss(h, head, Target(low[1], thead), labels, alpha=0.5)
    loss.backward()
    assert h.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert abs(float(loss.detach() - want)) < 0.05 * float(want)


@pytest.mark.gpu
def test_memory_stays_below_the_float32_logits_of_all_tokens():
    tokens, d, vocabulary = 16384, 576, 49152
    hidden = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocabulary, d, device="cuda", requires_grad=True)
    theirs = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _, _ = distillation_loss(hidden, head, Target(theirs, head.detach()))
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.75 * tokens * vocabulary * 4 and hidden.grad.isfinite().all()


def test_square_head():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert float(square_head([a], [a])) == 0
    want = ((a - b) ** 2).sum() / (b**2).sum()
    torch.testing.assert_close(square_head([a, b], [b, b]), want / 2)
    for other in ([b], [b, b.t()], [b.t(), b]):
        with pytest.raises(ValueError, match="the teacher's . block outputs .* Pass block=0"):
            square_head([a, b], other)


def test_errors():
    hidden, head, th, thead, labels = case()
    with pytest.raises(ValueError, match="alpha == 1 without a teacher"):
        distillation_loss(hidden, head, Target(), labels)
    with pytest.raises(ValueError, match="labels for the cross-entropy"):
        distillation_loss(hidden, head, Target(th, thead), alpha=0.5)
    with pytest.raises(ValueError, match="T == 1 with top-k"):
        target = Target(indices=labels.unsqueeze(1), log_probs=torch.zeros(TOKENS, 1))
        distillation_loss(hidden, head, target, temperature=2.0)
    with pytest.raises(ValueError, match="target.hidden of 37 tokens"):
        distillation_loss(hidden, head, Target(th[:5], thead))


@pytest.mark.gpu
def test_fused_holds_no_float32_logits():
    """bfloat16 at the size of a real vocabulary: memory beside the inputs, and the values."""
    torch.compiler.reset()  # after as many kinds of chunk as torch compiles, others run uncompiled
    g = torch.Generator("cuda").manual_seed(0)
    vocabulary, d, tokens = 49152, 64, 8192
    hidden = torch.randn(tokens, d, device="cuda", generator=g).bfloat16()
    head = (torch.randn(vocabulary, d, device="cuda", generator=g) / 8).bfloat16()
    other = (head.float() + torch.randn_like(head.float()) / 16).bfloat16()
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=g)
    found = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        distillation_loss(h[:4096], w, Target(hidden[:4096], other), labels[:4096], fused=fused)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, kl, ce = distillation_loss(h, w, Target(hidden, other), labels, fused=fused)
        peak = torch.cuda.max_memory_allocated() - before
        loss.backward()
        found.append([loss.detach(), ce, h.grad.float(), w.grad.float()])
        if fused:  # three chunks of logits in bfloat16, less than those of all tokens in float32
            assert peak < tokens * vocabulary * 4 * 0.85, peak
    for one, two in zip(*found):
        assert float((one - two).norm() / two.norm()) < 0.02
