"""perplexity: the published protocol, against its definition written out in float64."""

import math

import pytest
import torch
from torch import nn

from python_tests.oneshot.driver_models import VOCABULARY, build, tokens, transformers
from sparsekern.eval.perplexity import perplexity
from sparsekern.oneshot.discovery import positions

WINDOW = 12


def by_definition(model, ids, window):
    """exp(mean over windows of (1 / (window − 1)) Σ −log p(next token)), in float64."""
    means = []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        with torch.no_grad():
            logits = model(part[None]).logits[0].double()
        logs = logits.log_softmax(-1)
        means.append(-sum(float(logs[i, part[i + 1]]) for i in range(window - 1)) / (window - 1))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("length", [WINDOW, 5 * WINDOW, 5 * WINDOW + 7])
def test_protocol(family, length):
    model = build(family)
    ids = tokens(1, length)[0]
    expected = by_definition(model, ids, WINDOW)
    for batch_size in (1, 3, 8):
        assert perplexity(model, ids, WINDOW, batch_size) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids[None], window=WINDOW) == pytest.approx(expected, rel=1e-5)
    for form in (ids.tolist(), ids.numpy(), {"input_ids": [ids.tolist()]}):
        assert perplexity(model, form, WINDOW) == pytest.approx(expected, rel=1e-5)


def test_the_remainder_is_dropped_and_windows_do_not_overlap():
    model = build("llama")
    ids = tokens(1, 3 * WINDOW)[0]
    longer = torch.cat([ids, tokens(1, WINDOW - 1, seed=7)[0]])
    assert perplexity(model, longer, WINDOW) == perplexity(model, ids, WINDOW)
    swapped = torch.cat([ids[WINDOW : 2 * WINDOW], ids[:WINDOW], ids[2 * WINDOW :]])
    assert perplexity(model, swapped, WINDOW) == pytest.approx(
        perplexity(model, ids, WINDOW), rel=1e-9
    )


class Fixed(nn.Module):
    """Logits that do not depend on the input, in a given dtype, without `.logits`."""

    def __init__(self, logits):
        super().__init__()
        self.logits_of_all = nn.Parameter(logits)

    def forward(self, ids):
        return self.logits_of_all.expand(*ids.shape, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_logits_give_the_size_of_the_vocabulary(dtype):
    """float32 cross-entropy even for bfloat16 logits; 2000 tokens go through more than one
    chunk."""
    model = Fixed(torch.zeros(50, dtype=dtype))
    assert perplexity(model, torch.arange(4000) % 50, window=2000) == pytest.approx(50.0, rel=1e-6)


def test_impossible_and_undefined_tokens():
    logits = torch.zeros(8)
    logits[3] = -math.inf
    assert perplexity(Fixed(logits), torch.tensor([1, 2, 3, 4]), window=4) == math.inf
    assert math.isnan(
        perplexity(Fixed(torch.full((8,), math.nan)), torch.tensor([1, 2, 3, 4]), window=4)
    )
    assert (
        perplexity(Fixed(torch.tensor([0.0, 5000.0])), torch.tensor([0, 0, 0, 0]), window=4)
        == math.inf
    )


def test_flags_are_restored():
    model = build("llama").train()
    model.model.layers[0].eval()
    perplexity(model, tokens(1, WINDOW)[0], WINDOW)
    assert model.training and not model.model.layers[0].training and torch.is_grad_enabled()
    with pytest.raises(ValueError, match="Linear to take token ids alone, got RuntimeError"):
        perplexity(nn.Linear(3, 3), tokens(1, WINDOW)[0], WINDOW)


@pytest.mark.parametrize(
    "ids, options, error, text",
    [
        (torch.arange(11), {}, ValueError, "at least one window of 12 tokens, got 11 tokens"),
        (torch.zeros(0, dtype=torch.long), {}, ValueError, "got 0 tokens"),
        (torch.zeros(2, 24, dtype=torch.long), {}, ValueError, r"got \[2, 24\]"),
        (torch.zeros(24), {}, TypeError, "integer token_ids, got torch.float32"),
        (torch.full((24,), VOCABULARY), {}, ValueError, r"0\.\.63, got 64\.\.64"),
        (torch.full((24,), -100), {}, ValueError, r"got -100\.\.-100"),
        (torch.arange(24), {"window": 1}, ValueError, "window from 2 to .*, got 1"),
        (torch.arange(24), {"batch_size": 0}, ValueError, "batch_size from 1 to .*, got 0"),
    ],
)
def test_input_that_does_not_fit(ids, options, error, text):
    with pytest.raises(error, match=text):
        perplexity(build("llama"), ids, **{"window": WINDOW, **options})


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_text(left):
    model, ids = build("llama"), tokens(1, 30)
    none = torch.zeros(1, 9, dtype=torch.long)
    parts = [(none, none), (ids, torch.ones_like(ids))]
    padded, mask = (torch.cat(part, 1) for part in zip(*(parts if left else parts[::-1])))
    expected = perplexity(model, ids, WINDOW)
    assert perplexity(model, {"input_ids": padded, "attention_mask": mask}, WINDOW) == expected
    with pytest.raises(ValueError, match=r"attention_mask of the shape of token_ids, got \[30\]"):
        perplexity(model, {"input_ids": ids, "attention_mask": [1] * 30}, WINDOW)


def test_windows_longer_than_the_positions():
    """A warning where the model goes on beyond them, an error where it cannot."""
    ids = tokens(1, 70)[0]
    with pytest.warns(
        UserWarning, match="window of at most 64 tokens, the positions of Llama.* 65"
    ):
        perplexity(build("llama"), ids, window=65)
    text = (
        "GPT2LMHeadModel to take token ids alone, got IndexError.* and window <= 64, its positions"
    )
    with pytest.raises(ValueError, match=text), pytest.warns(UserWarning, match="got 65"):
        perplexity(build("gpt2"), ids, window=65)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Data2VecText"])
def test_positions_that_begin_after_the_id_of_padding(kind):
    """Two of them are no tokens'."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(vocab_size=VOCABULARY, max_position_embeddings=14, pad_token_id=1)
    config = getattr(transformers, f"{kind}Config")(**sizes, is_decoder=True)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    assert positions(model) == WINDOW
    ids = tokens(1, 26)[0].clamp(min=2)
    assert 1 < perplexity(model, ids, window=WINDOW) < math.inf
    text, warned = "window <= 12, its positions", "at most 12 tokens"
    with pytest.raises(ValueError, match=text), pytest.warns(UserWarning, match=warned):
        perplexity(model, ids, window=WINDOW + 1)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration"])
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_model_that_reads_later_tokens(kind, spread):
    """Its logits hold the very token that they are to predict: refused where that shows, and else
    a warning. spread: of random weights; what 0.02 leaves of it could be rounding of inputs."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0)
    if kind.startswith("Bert"):
        sizes |= dict(initializer_range=spread)
        sizes |= dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        config = transformers.BertConfig(intermediate_size=64, **sizes)
    else:
        config = transformers.BartConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=64,
            init_std=spread,
            **sizes,
        )
    model = getattr(transformers, kind)(config)
    text = f"{kind} to be causal: logits that .* a difference of"
    with (
        pytest.raises(ValueError, match=text)
        if spread == 1
        else pytest.warns(UserWarning, match=text)
    ):
        perplexity(model, tokens(1, 24)[0], WINDOW)
    assert model.training, "flags are put back"


def test_a_model_that_needs_more_than_ids_is_refused():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config)
    text = "T5ForConditionalGeneration to take token ids alone, got ValueError: .* causal language"
    with pytest.raises(ValueError, match=text):
        perplexity(model, tokens(1, 24)[0], WINDOW)
