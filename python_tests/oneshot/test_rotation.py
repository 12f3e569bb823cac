"""rotate: the same function in another basis, less importance lost; refusals change nothing."""

import copy

import pytest
import torch
import transformers as T

import sparsekern as sk
from python_tests.clock import Clock
from sparsekern.oneshot import rotation, rotation_formulas, rotation_search
from sparsekern.oneshot.rotation import rotate

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=96,
)


def build(family="llama", **changes):
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    if family == "qwen2":  # q, k and v with a bias
        model = T.Qwen2ForCausalLM(T.Qwen2Config(**sizes))
    elif family == "mistral":
        model = T.MistralForCausalLM(T.MistralConfig(**sizes))
    else:
        model = T.LlamaForCausalLM(T.LlamaConfig(**sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.3, 2.0)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def ids(rows=4, tokens=32, vocabulary=96):
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_stay_and_less_is_lost(family, kv, tied):
    model = build(family, num_key_value_heads=kv, tie_word_embeddings=tied)
    x = ids(2, 16)
    with torch.no_grad():
        before = model(x).logits
    report = rotate(model, ids(), steps=40, rate=0.02, untie=tied)
    with torch.no_grad():
        after = model(x).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    assert report.lost_after < 0.9 * report.lost_before
    assert bool(report.untied_bytes) == tied
    assert model.config.tie_word_embeddings is False
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert all(torch.equal(p, torch.ones_like(p)) for p in norms)


def test_what_the_search_predicts_is_what_the_model_has():
    """lost_after, recomputed from the rotated model's own weights and activations."""
    model = build(num_key_value_heads=2)
    report = rotate(model, ids(), steps=30)
    batches = rotation.make_batches(ids(), model, None, torch.device("cpu"))
    stream = rotation.find_stream(model, batches[0].probe(), torch.device("cpu"))
    grams = rotation.collect_grams(model, stream, batches, torch.device("cpu"))
    pairs = [(m, grams[id(readers[0])]) for _, readers in stream.norms[:-1] for m in readers]
    pairs += [(m, grams[id(m)]) for m in stream.writers]
    shares = []
    for module, gram in pairs:
        w = module.weight.detach()
        energy = 0.5 / torch.linalg.inv(gram.double() + gram.double().diagonal().diag()).diagonal()
        scores = w.double().square() * energy
        dropped = scores[~sk.prune.nm_mask(scores)].sum()
        shares.append(dropped.detach() / ((w @ gram) * w).sum())
    assert abs(float(torch.stack(shares).mean().detach()) - report.lost_after) < 2e-3


@pytest.mark.parametrize("change", [sk.rotate, sk.permute])
def test_inference_mode_and_autocast_around_it(change):
    """The model can be trained afterwards; what autocast rounds says nothing of the weights."""
    few = {sk.rotate: "steps", sk.permute: "rounds"}[change]
    for around in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        model = build()
        with around:
            report = change(model, ids(), **{few: 3})
        assert report.logits_distance < 1e-4 and report.lost_after < report.lost_before
        model(ids(), labels=ids()).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.inference_mode():
        model = build()
    with pytest.raises(ValueError, match="embed_tokens.weight, got inference tensors. Build or"):
        change(model, ids())


@pytest.mark.parametrize("change", [sk.rotate, sk.permute])
def test_a_pruned_model_is_told_the_order(change):
    model = build()
    sk.prune_model(model, "magnitude", progress=False)
    with pytest.raises(ValueError, match="compressed: the .*tation comes before prune_model"):
        change(model, ids())
    sk.decompress_model(model)
    assert change(model, ids()).lost_after < 1e-6  # zeros are not moved out of their groups
    assert sk.compress_model(model).share > 0.8


@pytest.mark.parametrize("change", [sk.rotate, sk.permute])
def test_torchs_defaults_change_nothing(change):
    first, other, few = build(), build(), {sk.rotate: "steps", sk.permute: "rounds"}
    calibration = ids()
    change(first, calibration, **{few[change]: 3})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            change(other, calibration, **{few[change]: 3})
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first(ids()).logits, other(ids()).logits)


def test_zero_steps_fold_the_gains_alone():
    model = build()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    scale = model.model.layers[0].post_attention_layernorm.weight.detach().clone()
    rotate(model, ids(), steps=0)
    assert torch.allclose(model.model.layers[0].mlp.up_proj.weight, before * scale)


def test_a_tied_head_is_untied_only_when_asked():
    model = build(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"untie=True; it costs 12288 bytes"):
        rotate(model, ids())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_other_architectures_are_refused_and_stay_as_they_are(family):
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: T.GPT2LMHeadModel(
            T.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
        ),
        "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SIZES, head_dim=8)),
        "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**SIZES)),
    }[family]().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="without rotation|untie"):
        rotate(model, ids())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_changes_is_put_back(monkeypatch):
    model = build(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(rotation_search, "_orthonormal", lambda q: 2 * q)
    with pytest.raises(RuntimeError, match="cannot be rotated"):
        rotate(model, ids(), steps=2, untie=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_cayley_is_orthogonal():
    a = torch.randn(3, 8, 8, dtype=torch.float64)
    q = rotation_formulas.cayley(a)
    assert torch.allclose(q @ q.transpose(1, 2), torch.eye(8, dtype=torch.float64).expand(3, 8, 8))
    assert torch.equal(rotation_formulas.cayley(torch.zeros(4, 4)), torch.eye(4))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_untold_of_a_singular_matrix(seed, rank):
    """H of few tokens, in the basis of its eigenvectors, which leaves H_jj alone: rounding is all
    that most channels have, some of it negative."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, 64, generator=generator) * torch.logspace(-7, 3, 64)
    basis = torch.linalg.svd(x)[2]  # the last ones see nothing of x
    h = basis @ (x.t() @ x) @ basis.t()
    found = rotation_formulas.untold(h)
    assert bool(found.isfinite().all()) and bool((found >= 0).all())
    large = h.diagonal() > 1e-3 * h.diagonal().mean()
    torch.testing.assert_close(found[large], h.diagonal()[large], rtol=1e-5, atol=0)


def test_seconds_end_the_search(monkeypatch):
    clock = Clock(0.005)
    monkeypatch.setattr(rotation, "time", clock)
    monkeypatch.setattr(rotation_search, "time", clock)
    model = build(num_key_value_heads=2)
    report = rotate(model, ids(), steps=1_000_000, seconds=0.5)
    assert 0 < report.steps < 1_000_000 and report.lost_after < report.lost_before
    assert 0.4 < report.seconds < 0.6 and report.logits_distance < 1e-3
    with pytest.raises(ValueError, match="seconds > 0 or None, got 0"):
        rotate(build(), ids(), seconds=0)


def test_untold_is_the_variance_that_half_of_the_others_leave():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    h = x.t() @ x / 400
    apart = torch.diag(h.diagonal())
    torch.testing.assert_close(rotation_formulas.untold(apart), h.diagonal(), rtol=1e-5, atol=0)
    told = rotation_formulas.untold(torch.ones(8, 8, dtype=torch.float64))
    assert torch.allclose(told, torch.full((8,), 0.5 * 9 / 8, dtype=torch.float64), rtol=1e-4)
    h[3], h[:, 3] = 0.0, 0.0
    energy = rotation_formulas.untold(h)
    assert energy[3] == 0 and energy.isfinite().all()
    assert (energy <= h.diagonal() * (1 + 1e-5)).all()
    # As the share of a column that the normal equations of random halves leave.
    half = h / 4 + torch.diag(h.diagonal()) / 4
    keep = torch.arange(12) != 3
    half = half[keep][:, keep]
    direct = 2 / torch.linalg.inv(half).diagonal()
    torch.testing.assert_close(energy[keep], direct, rtol=1e-4, atol=1e-8)


def test_untie_among_the_keywords_of_a_rotation():
    """rotate={"untie": True} is untie=True, not overruled by its default."""
    options = dict(method="magnitude", calibration=ids(), progress=False)
    with pytest.raises(ValueError, match="untie"):
        sk.prune_model(build(tie_word_embeddings=True), rotate={"steps": 1}, **options)
    wanted = {"rotate": {"steps": 1, "untie": True}}
    report = sk.prune_model(build(tie_word_embeddings=True), **wanted, **options)
    assert report.rotation["untied_bytes"] > 0
