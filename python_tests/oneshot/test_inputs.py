"""Whatever a caller has as calibration: padding, tokenizer output, pairs, texts, images."""

import copy
import warnings
from collections import UserDict
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.oneshot.driver_models import build, is_24, run_prune, tokens, transformers
from python_tests.oneshot.test_resume import assert_same_state
from sparsekern.oneshot.calibration import Batch, digest, make_batches

CPU = torch.device("cpu")


def padded(rows, length, left):
    """(ids, mask) of rows of unequal lengths."""
    ids, mask = torch.full((len(rows), length), 5), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask.long()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_padding_stays_out_of_every_statistic(family, left):
    """A padded batch prunes the model as its samples do alone, bit for bit."""
    rows = [tokens(1, n, seed=n)[0] for n in (5, 12, 9, 12)]
    ids, mask = padded(rows, 16, left)
    model, other, ignored = build(family), build(family), build(family)
    report = run_prune(model, "wanda", {"input_ids": ids, "attention_mask": mask})
    assert report.calibration["tokens"] == 38
    order = [rows[0][None], torch.stack([rows[1], rows[3]]), rows[2][None]]
    run_prune(other, "wanda", [{"input_ids": part} for part in order])
    assert_same_state(model, other)
    run_prune(ignored, "wanda", ids)
    name = next(n for n, m in model.named_modules() if isinstance(m, sk.SparseLinear))
    same = model.get_submodule(name).weight.mask() == ignored.get_submodule(name).weight.mask()
    assert not same.all()


def test_masks_with_holes_are_kept_out_by_the_hooks():
    ids = tokens(3, 10)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 3], mask[1, 7:], mask[2, :2] = 0, 0, 0
    model, seen = build(), []
    batches = make_batches([{"input_ids": ids, "attention_mask": mask}], model, None, CPU)
    assert len(batches) == 1 and torch.equal(batches[0].keep[0], mask.bool())
    (group, *_) = sk.calibrate(model, {"input_ids": ids, "attention_mask": mask})
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids, attention_mask=mask)
    handle.remove()
    x = seen[0][mask.bool()].double()
    matrix = group.hessian.matrix.double()
    expected = x.T @ x
    torch.testing.assert_close(
        matrix / matrix.trace(), expected / expected.trace(), rtol=1e-4, atol=1e-7
    )


def test_every_form_of_token_ids_is_the_same_calibration():
    ids = tokens(4, 12)
    whole = torch.ones_like(ids)
    target = ids.clone()
    target[:, :-1] = -100
    forms = {
        "tokenizer output": UserDict(input_ids=ids, attention_mask=whole),
        "lists": UserDict(input_ids=ids.tolist(), attention_mask=whole.tolist()),
        "one dict": {"input_ids": ids},
        "pairs": [(row[None], t[None]) for row, t in zip(ids, target)],
        "dataset rows": [
            {"input_ids": r.tolist(), "attention_mask": [1] * 12, "text": "x"} for r in ids
        ],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4),
        "loader of pairs": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(ids, whole), batch_size=4
        ),
        "arrays": [row.numpy() for row in ids],
        "lists of ids": ids.tolist(),
    }
    expected = build()
    run_prune(expected, "wanda", ids)
    for name, form in forms.items():
        model = build()
        report = run_prune(model, "wanda", form)
        assert report.calibration["tokens"] == 48, name
        assert_same_state(model, expected)


class Items(torch.utils.data.Dataset):
    """A dataset that has items and a length, and no iterator."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        assert index < len(self.items)
        return self.items[index]


def test_datasets_arrays_columns_and_pairs():
    ids = tokens(4, 12)
    whole = torch.ones_like(ids)
    forms = {
        "items": Items(ids),
        "rows of a dataset": Items([{"input_ids": row.tolist()} for row in ids]),
        "(ids, mask) of a dataset": Items(list(zip(ids, whole))),
        "array": ids.numpy().astype("int32"),
        "array of objects": numpy.array(ids.tolist(), dtype=object),
        "arrays in a dict": {"input_ids": list(ids.numpy())},
        "(dict, target)": [({"input_ids": ids}, torch.zeros(4))],
        "lists of dicts": [[{"input_ids": row.tolist()} for row in ids]],
        "ids and their mask": (ids, whole),
    }
    expected = build()
    run_prune(expected, "wanda", ids)
    for name, form in forms.items():
        model = build()
        report = run_prune(model, "wanda", form)
        assert report.calibration["tokens"] == 48, name
        assert_same_state(model, expected)


def test_numbers_beside_one_sample_are_its_targets():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    config = transformers.BertConfig(intermediate_size=64, **sizes)
    for kind, targets in (
        ("BertForSequenceClassification", {"labels": 1}),
        ("BertForQuestionAnswering", {"start_positions": 2, "end_positions": 5}),
    ):

        def model(kind=kind):
            torch.manual_seed(0)
            return getattr(transformers, kind)(config).eval()

        one, other = model(), model()
        beside = {"token_type_ids": [0] * 12, "attention_mask": [1] * 12}
        rows = [{"input_ids": row.tolist(), **beside} for row in tokens(4, 12)]
        run_prune(one, "wanda", rows)
        run_prune(other, "wanda", [{**row, **targets} for row in rows])
        assert_same_state(one, other)


def test_rows_of_a_plain_dataset_are_one_sample_each():
    x = torch.randn(6, 16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    for rows in (list(x), [x]):
        report = sk.prune_model(
            copy.deepcopy(model), "wanda", rows, skip=(), compress=False, progress=False
        )
        assert report.calibration["samples"] == report.calibration["tokens"] == 6


def test_samples_of_unequal_lengths_in_one_dict():
    """A tokenizer's output without padding."""
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9)]
    one, other = build(), build()
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    assert run_prune(one, "wanda", columns).calibration["tokens"] == 14
    run_prune(other, "wanda", rows)
    assert_same_state(one, other)


def test_a_name_that_a_forward_swallows_is_a_warning():
    data = {"input_ids": tokens(), "atention_mask": torch.ones(6, 20), "num_items_in_batch": 6}
    with pytest.warns(UserWarning, match="forward names in every dict, got atention_mask, which"):
        run_prune(build(), "wanda", data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Transformers' decorators read is read
        run_prune(build(), "wanda", {"input_ids": tokens(), "return_dict": True})


def tokenizer(text):
    return {"input_ids": [3 + ord(c) % 60 for c in text], "attention_mask": [1] * len(text)}


def test_texts():
    model, other = build(), build()
    texts = ["some words and more", "again, other words here: " * 8]
    report = run_prune(model, "wanda", texts, tokenizer=tokenizer)
    assert report.calibration["samples"] == 4, "the second text is three windows of 64 tokens"
    ids = [torch.tensor(tokenizer(t)["input_ids"]) for t in texts]
    run_prune(other, "wanda", [ids[0], *ids[1].split(64)[:3]])
    assert_same_state(model, other)
    for form in ({"text": texts}, [{"text": text} for text in texts], [texts]):
        again = build()
        run_prune(again, "wanda", form, tokenizer=tokenizer)
        assert_same_state(again, model)
    with pytest.raises(ValueError, match="tokenizer= with texts .*Pass the model's tokenizer"):
        run_prune(build(), "wanda", texts)
    for made in ("words", {"ids": [3, 4]}, [None]):
        with pytest.raises(TypeError, match="token ids of a text from tokenizer, got .*Pass the"):
            run_prune(build(), "wanda", texts, tokenizer=lambda text, made=made: made)
    with pytest.raises(ValueError, match="text itself, got 'hf:c4'. Read the source first"):
        run_prune(build(), "wanda", "hf:c4")
    for file in (__file__, Path(__file__)):  # whose name is no text
        with pytest.raises(ValueError, match="text itself, got .*test_inputs.py'. Read the source"):
            run_prune(build(), "wanda", file, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "data, text",
    [
        ({"input_ids": torch.full((2, 8), 64)}, r"0\.\.63, in input_ids, got 64\.\.64"),
        (
            tokens(1, 65),
            "at most 64 tokens per sample in calibration, the model's positions, got 65",
        ),
        ({"input_ids": tokens(1, 70)}, "at most 64 tokens per sample in input_ids"),
        (
            {"input_ids": tokens(2, 8), "attention_mask": torch.tensor([[1] * 8, [0] * 8])},
            "padding only",
        ),
        (torch.full((2, 8), 64, dtype=torch.uint16), r"0\.\.63, got 64\.\.64"),
        (
            torch.ones(2, 8, dtype=torch.int64, device="meta"),
            "with data as calibration, got a meta",
        ),
        (tokens().to_sparse(), "with data as calibration, got torch.sparse_coo"),
        (
            {"input_ids": tokens(2, 8), "attention_mask": torch.ones(3, 8)},
            r"attention_mask of shape \[2, 8\] as input_ids, got \[3, 8\]",
        ),
        (
            {"input_ids": tokens(2, 8), "position_ids": torch.full((2, 8), 64)},
            r"position_ids in 0\.\.63, got 64\.\.64",
        ),
        (7, "calibration as a tensor, an iterable or a dataset, got int"),
        ([object()], "token ids, texts, dicts or pairs .* got object"),
        (b"some text", "token ids, texts, dicts .* got bytes. Pass token ids"),
        ([{"content": "words"}], "a tensor in every calibration dict, got content str. Name"),
        (
            {"input_ids": list(tokens(2, 8))},
            r"as one tensor, got a list of 2 .* \[8\] int64. Stack",
        ),
        (
            {"input_ids": tokens(2, 8), "labels": tokens(2, 5)},
            r"calibration that LlamaForCausalLM.forward takes, got input_ids \[2, 8\] int64, "
            r"labels \[2, 5\] int64, .*: ValueError: Expected input batch_size .*by name",
        ),
        ({"inputs_ids": tokens(2, 8)}, "forward takes, got inputs_ids .* exactly one of input_ids"),
    ],
)
def test_what_does_not_fit_is_named(data, text):
    with pytest.raises((ValueError, TypeError), match=text):
        run_prune(build(), "wanda", data)


def test_pixels_as_a_tensor():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
    model = transformers.ViTForImageClassification(config).eval()
    report = run_prune(model, "sparsegpt", torch.randn(6, 3, 16, 16))
    assert len(report.pruned) >= 12 and report.calibration["samples"] == 6


def sound():
    """A random Wav2Vec2 of two layers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    convolutions = dict(conv_dim=(16, 16), conv_stride=(2, 2), conv_kernel=(3, 3))
    positions = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    config = transformers.Wav2Vec2Config(vocab_size=32, **sizes, **convolutions, **positions)
    return transformers.Wav2Vec2ForCTC(config).eval()


def test_padding_of_sound_stays_out():
    """The mask has one number for each sample of sound, not for each frame that layers see."""
    clips = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (100, 200)]
    waves, mask = torch.zeros(2, 200), torch.zeros(2, 200, dtype=torch.long)
    for i, clip in enumerate(clips):
        waves[i, : len(clip)], mask[i, : len(clip)] = clip, 1
    one, other, arrays = sound(), sound(), sound()
    run_prune(one, "wanda", {"input_values": waves, "attention_mask": mask})
    run_prune(other, "wanda", clips)
    run_prune(arrays, "wanda", [clip.numpy() for clip in clips])
    assert_same_state(one, other)
    assert_same_state(arrays, other)
    with pytest.raises(TypeError, match="floating-point input_values .* got .* int64. Pass what"):
        run_prune(sound(), "wanda", tokens())


def test_an_encoder_decoder_gets_the_ids_of_a_dict_as_both_inputs():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0
    )

    def model():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).eval()

    ids, expected = tokens(4, 12), model()
    run_prune(expected, "wanda", ids)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 12} for row in ids]
    for form in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": ids > 0}, rows):
        other = model()
        run_prune(other, "wanda", form)
        assert_same_state(other, expected)


def test_sound_alone_is_not_enough_for_an_encoder_decoder():
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=64, num_mel_bins=8)
    sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config = transformers.WhisperConfig(
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=20, **sizes, **ends
    )
    model, sound = (
        transformers.WhisperForConditionalGeneration(config).eval(),
        torch.randn(2, 8, 40),
    )
    text = r"decoder_input_ids or labels beside input_features .* got input_features \[2, 8, 40\]"
    for form in (sound, {"input_features": sound}, [(sound, tokens(2, 6))]):
        with pytest.raises(ValueError, match=text):
            run_prune(model, "wanda", form)
    with pytest.raises(TypeError, match="floating-point input_features .*got .* int64. Pass what"):
        run_prune(model, "wanda", tokens(2, 6))
    report = run_prune(model, "wanda", {"input_features": sound, "labels": tokens(2, 6)})
    assert len(report.pruned) == 16


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x)


def test_pairs_of_a_loader_are_cut_to_what_a_plain_forward_takes():
    data = torch.utils.data.TensorDataset(torch.randn(8, 16), torch.zeros(8))
    model = TwoInputs()
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    report = sk.prune_model(model, "wanda", loader, progress=False, device="cpu")
    assert len(report.pruned) == 1 and is_24(model.linear.weight.to_dense())
    for form in (data[:][0].numpy(), data[:][0].double().numpy(), {"x": data[:][0].numpy()}, data):
        report = run_prune(TwoInputs(), "wanda", form)
        assert len(report.pruned) == 1 and report.calibration["tokens"] == 8


class Pooled(nn.Module):
    """A sentence encoder: the mean over the tokens that count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask):
        x = self.down(torch.relu(self.up(self.embedding(input_ids))))
        return (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


class Features(Pooled):
    """The same, of a dict as its one argument."""

    def forward(self, features):
        return super().forward(features["input_ids"], features["attention_mask"])


class Open(Features):
    def forward(self, features, **kwargs):
        return super().forward(features)


@pytest.mark.parametrize("kind", [Pooled, Features, Open])
def test_padding_of_plain_modules_stays_out(kind):
    rows = [tokens(1, n, seed=n)[0] for n in (5, 12, 9, 12)]
    ids, mask = padded(rows, 16, False)
    model, other = kind(), kind()
    report = run_prune(model, "wanda", [{"input_ids": ids, "attention_mask": mask}])
    assert report.calibration["tokens"] == 38 and report.calibration["samples"] == 4
    whole = [{"input_ids": row[None], "attention_mask": torch.ones(1, len(row))} for row in rows]
    assert run_prune(other, "wanda", whole).calibration["tokens"] == 38
    assert_same_state(model, other)
    added = torch.zeros(4, 16).masked_fill(mask == 0, float("-inf"))
    (batch,) = make_batches([{"input_ids": ids, "attention_mask": added}], model, None, CPU)
    assert not batch.keep, "a mask that is added to scores is none of 0 and 1"


def test_tensors_inside_of_lists_and_dicts_are_a_batch():
    class Stacking(TwoInputs):
        def forward(self, xs):
            return self.linear(torch.stack(list(xs.values()) if isinstance(xs, dict) else xs))

    for form in ([([torch.randn(16)] * 3,)], [{"a": torch.randn(16)}], [({"a": torch.randn(16)},)]):
        assert len(run_prune(Stacking(), "wanda", form).pruned) == 1
    with pytest.raises(RuntimeError, match=r'Module \[Module\] is missing the required "forward"'):
        model = nn.Module()
        model.linear = nn.Linear(16, 16)
        run_prune(model, "wanda", torch.randn(2, 16))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32])
def test_ids_of_any_integer_dtype(dtype):
    one, other = build(), build()
    run_prune(one, "wanda", tokens().to(dtype))
    run_prune(other, "wanda", tokens())
    assert_same_state(one, other)


def test_inputs_that_a_forward_does_not_take_are_named():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        type_vocab_size=2,
    )
    model = transformers.BertModel(config).eval()
    data = {"input_ids": tokens(2, 8), "token_type_ids": torch.full((2, 8), 2)}
    with pytest.raises(ValueError, match=r"token_type_ids in 0\.\.1, got 2\.\.2"):
        run_prune(model, "wanda", data)


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        raise NotImplementedError


def test_what_stands_beside_the_tensors_is_in_the_digest():
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    calls = [(x, 2.0), (x, 3.0), {"x": x}, {"y": x}, (x, (y, x)), (x, (x, y)), (x, None)]
    made = [digest(make_batches([call], Anything(), None, CPU)) for call in calls]
    assert len(set(made)) == len(made)
    column = torch.randn(1, 4).t()  # contiguous, with a stride of 4 in its dimension of one
    assert column.is_contiguous() and digest([Batch((column,), {}, 4, 4)])
    rows = build()
    one, other = (digest(make_batches(tokens(), rows, size, CPU)) for size in (1, 4))
    assert one == other
