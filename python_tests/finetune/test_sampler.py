"""The sampler against forwards of the model, its time limit, and attention without a mask."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from python_tests.clock import Clock
from sparsekern.finetune import attention, data, sampler
from sparsekern.finetune.sampler import Sampler

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)


def llama(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(device, dtype).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=300)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_step_gives_the_logits_of_a_forward(make):
    model = make()
    assert sampler.why_not(model, torch.tensor([[3], [4]]), 200, None) == ""
    runner = Sampler(model, 3, 140)
    ids = torch.randint(97, (3, 140))
    runner.ids.copy_(ids)
    runner.given.fill_(True)
    logits = []
    with runner._running():
        for place in range(139):
            runner.length = runner._rounded(place + 1)
            logits.append(runner.step())
    with torch.no_grad():
        want = model(input_ids=ids).logits[:, :139]
    torch.testing.assert_close(torch.stack(logits, 1), want, rtol=1e-3, atol=1e-4)
    assert torch.equal(runner.ids, ids)
    assert model.config._attn_implementation == "sdpa"


def test_prompts_of_any_length_begin_the_rows(device):
    model = llama(device)
    prompts = torch.tensor([[5, 6, 7], [8, -1, -1]])
    made = data.generate(
        model, 40 * 30, window=30, batch=16, prompts=prompts, cache=False, progress=False
    )
    assert made.rows.shape == (40, 30)
    assert torch.equal(made.rows[::2, :3], prompts[:1].expand(20, -1).int())
    assert (made.rows[1::2, 0] == 8).all() and made.rows[1::2, 1].unique().numel() > 1
    details = made.sources[0].details
    assert details["how"] == ("cuda graphs" if device.type == "cuda" else "eager")
    assert abs(details["nll"] - details["entropy"]) < 0.2 and details["prompted"] == 1
    for bad in ([[-1, 3]], [[3, -1, 4]]):
        with pytest.raises(ValueError, match="-1"):
            data.generate(model, 60, window=30, prompts=torch.tensor(bad), cache=False)


def test_seconds_are_honoured_and_nothing_is_lost(tmp_path, monkeypatch):
    clock = Clock(0.01)
    monkeypatch.setattr(data, "time", clock)
    monkeypatch.setattr(sampler, "time", clock)
    model = llama()
    options = dict(window=24, batch=64, seconds=1.0, cache=tmp_path, progress=False)
    data.generate(model, 24, window=24, batch=64, cache=False, progress=False)
    made = data.generate(model, 1 << 30, **options)
    assert made.rows.shape[1] == 24 and made.rows.shape[0] > 0
    assert made.sources[0].tokens == made.tokens
    assert 0.9 < made.sources[0].details["sampling_seconds"] < 1.3
    again = data.generate(model, 1 << 30, **options)
    assert torch.equal(again.rows, made.rows)  # of the cache
    for name in ("how", "entropy", "nll"):
        assert again.sources[0].details.get(name) == made.sources[0].details.get(name)


def test_rows_that_are_not_whole_are_joined():
    parts = [torch.ones(2, 40), torch.zeros(4, 30)]
    rows, whole = data._whole_rows([part.int() for part in parts], 40, "op")
    assert whole == 2 and rows.shape == (5, 40) and int(rows.sum()) == 80


def test_text_that_is_not_the_models_is_refused():
    with pytest.raises(ValueError, match="report"):
        data._own_text(sharp(), torch.randint(97, (32, 60)), 1.0, None, 1)


def sharp():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def test_models_with_sliding_windows_take_the_other_way():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    assert "slide" in sampler.why_not(model, torch.tensor([[3]]), 30, None)
    assert "slide" in attention.why_not_causal(model, 30)
    made = data.generate(model, 90, window=30, batch=3, start=1, cache=False, progress=False)
    assert "slide" in made.sources[0].details["how"] and made.rows.shape == (3, 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_a_mask_is_the_models_own(device, dtype):
    model = llama(device, dtype)
    assert attention.why_not_causal(model, 50) == ""
    ids = torch.randint(97, (2, 50), device=device)
    want = model(input_ids=ids).logits
    with attention.use(model, attention.CAUSAL, attention.causal):
        ours = model(input_ids=ids).logits
    far = float((ours.float() - want.float()).norm() / want.float().norm())
    assert far < (1e-5 if dtype == torch.float32 else 0.02)
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    assert "not sdpa" in attention.why_not_causal(model, 50)


@pytest.mark.gpu
def test_graphs_sample_what_steps_sample(monkeypatch):
    """The same seed with and without CUDA graphs, over three lengths of attention."""
    model = llama("cuda")
    prompts = torch.full((32, 1), 5)
    with_graphs = Sampler(model, 32, 300, seed=1)
    rows = with_graphs.fill(prompts)
    assert with_graphs.how == "cuda graphs" and len(with_graphs.graphs) == 3
    again = with_graphs.fill(prompts)
    assert not torch.equal(rows, again)  # the generator goes on
    assert rows[:, 1:].unique().numel() > 50
