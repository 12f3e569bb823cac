"""Adapters on 2:4 weights: the algebra alone, then inside peft."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

import sparsekern as sk
from python_tests.oneshot.driver_models import build, run_prune, tokens
from sparsekern.finetune import lora


def weight(out=24, inner=40, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    w = torch.randn(out, inner, dtype=dtype)
    return sk.compress(w, sk.prune.magnitude_mask(w))


@pytest.mark.parametrize("rows", [5, 1024])
def test_masked_product_and_its_gradients(rows, monkeypatch, device):
    monkeypatch.setattr(lora, "ROWS", rows)
    w24 = weight().to(device)
    mask = w24.mask()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 40, device=device, requires_grad=True)
    a = torch.randn(4, 40, device=device, requires_grad=True)
    b = torch.randn(24, 4, device=device, requires_grad=True)
    twins = [t.detach().double().requires_grad_() for t in (x, a, b)]
    y = lora.masked_product(x, a, b, w24.bitmask(), 0.5)
    want = F.linear(twins[0], (twins[2] @ twins[1]) * mask * 0.5)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    out = torch.randn_like(y)
    y.backward(out)
    want.backward(out.double())
    for ours, theirs in zip((x, a, b), twins):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_metadata_and_counts_the_loss(dtype, monkeypatch):
    monkeypatch.setattr(lora, "ROWS", 7)
    w24 = weight(dtype=dtype)
    a, b = torch.randn(3, 40), torch.randn(24, 3)
    merged = lora.merge(w24, a, b, 2.0)
    delta, mask = 2.0 * b @ a, w24.mask()
    want = (w24.to_dense().float() + delta * mask).to(dtype)
    assert torch.equal(merged.weight.metadata, w24.metadata)
    torch.testing.assert_close(merged.weight.to_dense(), want)
    loss = ((delta * ~mask) ** 2).sum() / (delta**2).sum()
    assert merged.loss == pytest.approx(float(loss), rel=1e-4)
    assert lora.merge(w24, a, torch.zeros(24, 3)).loss == 0
    with pytest.raises(ValueError, match="finite merged weights"):
        lora.merge(w24, a * float("inf"), b)
    with pytest.raises(ValueError, match="b \\[24, 3\\]"):
        lora.merge(w24, a, b[:5])


# ------------------------------------------------------------------ inside peft


def adapted(masked_product, seed=0, **options):
    """(PeftModel on SparseLinear layers, the same on dense layers with zeros)."""
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    from sparsekern.integrations.peft import accept

    sparse = build("llama")
    dense = copy.deepcopy(sparse)
    run_prune(sparse, "magnitude")
    run_prune(dense, "magnitude", compress=False)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    torch.manual_seed(seed)
    ours = peft.get_peft_model(sparse, accept(peft.LoraConfig(**options), masked_product))
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(dense, peft.LoraConfig(**options))
    return ours, theirs


def steps(model, count=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    ids = tokens(4, 12)
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_are_not_merged_into(dtype):
    w24 = sk.quantize(weight(16, 128), dtype)
    with pytest.raises(TypeError, match=f"plain numbers, got {dtype}. Keep the adapter unmerged"):
        lora.merge(w24, torch.randn(4, 128), torch.randn(16, 4))
    plain = lora.merge(sk.dequantize(w24), torch.zeros(4, 128), torch.zeros(16, 4)).weight
    assert torch.equal(plain.to_dense(), w24.to_dense())


def test_plain_lora_trains_as_on_the_dense_weight_with_zeros():
    ours, theirs = adapted(False)
    from sparsekern.integrations.peft import SparseLora, weight_bytes

    layers = [m for m in ours.modules() if isinstance(m, SparseLora)]
    assert len(layers) == 4
    assert all(isinstance(m.get_base_layer(), sk.SparseLinear) for m in layers)
    assert weight_bytes(ours) < weight_bytes(theirs)
    steps(ours), steps(theirs)
    want = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    got = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    assert set(got) == set(want)
    for name, parameter in want.items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-3, atol=1e-4)
    ids = tokens(2, 10)
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        torch.testing.assert_close(logits, theirs(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_masked_product_merges_without_a_loss_and_unmerges_exactly(capsys):
    from python_tests.oneshot.driver_models import is_24

    ours, _ = adapted(True)
    from sparsekern.integrations.peft import SparseLora, merge, unmerge

    steps(ours)
    ids = tokens(2, 10)
    layer = next(m for m in ours.modules() if isinstance(m, SparseLora))
    before = layer.get_base_layer().weight.to_dense().clone()
    with torch.no_grad():
        want = ours(input_ids=ids).logits
        assert merge(ours) == 0
        assert "masks kept" in capsys.readouterr().out
        merged = layer.get_base_layer().weight.to_dense()
        assert is_24(merged) and not torch.equal(merged, before)
        torch.testing.assert_close(ours(input_ids=ids).logits, want, rtol=1e-3, atol=1e-3)
        unmerge(ours)
        assert torch.equal(layer.get_base_layer().weight.to_dense(), before)
        torch.testing.assert_close(ours(input_ids=ids).logits, want)
        plain = ours.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, want, rtol=1e-3, atol=1e-3)
    assert isinstance(plain.model.layers[0].self_attn.q_proj, sk.SparseLinear)


def test_plain_merge_says_what_it_loses(capsys):
    ours, _ = adapted(False)
    from sparsekern.integrations.peft import merge

    steps(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it prints what peft's own calls warn of
        assert 0.2 < merge(ours) < 0.9
    assert "the masks took" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_merge_by_peft_warns_of_what_it_loses(call):
    ours, _ = adapted(False)
    steps(ours)
    with pytest.warns(UserWarning, match="expected adapters inside the masks, .* merge\\(model\\)"):
        getattr(ours, call)()
    masked, _ = adapted(True)
    steps(masked)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        getattr(masked, call)()


def test_saved_adapters_load_again(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")

    ours, _ = adapted(False)
    from sparsekern.integrations.peft import accept

    steps(ours)
    ids = tokens(2, 10)
    with torch.no_grad():
        want = ours(input_ids=ids).logits
    ours.save_pretrained(tmp_path)
    base = build("llama")
    run_prune(base, "magnitude")
    config = accept(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, want)


def test_what_needs_the_dense_weight_is_refused():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    from sparsekern.integrations.peft import accept, merge

    with pytest.raises(ValueError, match="use_dora"):
        accept(peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="pissa"):
        accept(peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="a model for target_modules='all-linear', got None"):
        accept(peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="accept\\(config\\)"):
        merge(build("llama"))
    for name in ("use_bdlora", "alora_invocation_tokens", "monteclora_config"):
        config = peft.LoraConfig(target_modules=["q_proj"])
        setattr(config, name, [1])
        with pytest.raises(ValueError, match=f"without {name}, got .1.. Leave it out"):
            accept(config)
    for other in (None, peft.LoraConfig, peft.IA3Config(target_modules=["q_proj"])):
        with pytest.raises(TypeError, match="config: a peft.LoraConfig, got .*decompress_model"):
            accept(other)


def test_all_linear_is_every_layer_but_the_head():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    from sparsekern.integrations.peft import accept

    def names(model):
        config = peft.LoraConfig(target_modules="all-linear")
        adapted = peft.get_peft_model(model, accept(config, model=model))
        return {
            name for name, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")
        }

    dense, pruned = build("llama"), build("llama")
    want = {name for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    sk.prune_model(pruned, "magnitude", progress=False, skip=["lm_head", "re:.*down_proj"])
    assert names(pruned) == want - {"lm_head"}
    assert names(dense) == want - {"lm_head"}  # as peft's own


def test_a_second_adapter_is_checked_as_the_first():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    ours, _ = adapted(False)
    for options, text in (
        ({"use_dora": True}, "without use_dora"),
        ({"init_lora_weights": "pissa"}, "base weight, got 'p"),
    ):
        with pytest.raises(ValueError, match=text):
            ours.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], **options))


def test_merge_takes_names_that_exist_and_all_layers_or_none():
    ours, _ = adapted(False, lora_bias=True)
    from sparsekern.integrations.peft import SparseLora, merge

    with pytest.raises(ValueError, match=r"adapter_names in \['default'\], got \['nope'\]"):
        merge(ours, ["nope"])
    with pytest.raises(TypeError, match="adapter_names: a list or None, got 'default'"):
        merge(ours, "default")
    with pytest.raises(ValueError, match="lora_bias=False in adapter 'default', got True"):
        merge(ours)
    assert not any(m.merged for m in ours.modules() if isinstance(m, SparseLora))


@pytest.mark.parametrize("masked_product", [False, True])
def test_the_bias_of_an_adapter_counts(masked_product):
    ours, theirs = adapted(masked_product, lora_bias=True)
    ids = tokens(2, 10)
    for model in (ours, theirs):
        biases = [p for name, p in model.named_parameters() if "lora_B" in name and "bias" in name]
        with torch.no_grad():
            for i, bias in enumerate(biases):
                bias.fill_(0.1 + i)
        model(input_ids=ids, labels=ids).loss.backward()
        assert biases and all(bias.grad.any() for bias in biases)
    with torch.no_grad():
        got, want = (model(input_ids=ids).logits for model in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_adapters_by_row_while_gradients_are_on():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    ours, _ = adapted(False)
    from sparsekern.integrations.peft import accept

    second = accept(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ours.add_adapter("second", second)
    ours.eval()
    ids = tokens(2, 10)
    rows = ours(input_ids=ids, adapter_names=["second", "__base__"]).logits
    with torch.no_grad():
        ours.set_adapter("second")
        torch.testing.assert_close(rows[0], ours(input_ids=ids).logits[0], rtol=1e-3, atol=1e-3)


def test_adapters_of_a_model_that_was_pruned_afterwards():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    from sparsekern.integrations.peft import merge, unmerge

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).eval()
    run_prune(model, "magnitude")
    ids = tokens(2, 10)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert 0 < merge(model, quiet=True) < 1
        assert not torch.equal(model(input_ids=ids).logits, want)
        unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, want)
    with pytest.warns(UserWarning, match="adapters inside the masks"):
        plain = model.merge_and_unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, sk.SparseLinear)

    model = peft.get_peft_model(build("llama"), config).eval()
    run_prune(model, "magnitude")
    with torch.no_grad(), pytest.warns(UserWarning, match="adapters inside the masks"):
        want = model(input_ids=ids).logits
        model.merge_adapter()  # peft's own call, and none of ours before it
        assert not torch.equal(model(input_ids=ids).logits, want)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids).logits, want)
