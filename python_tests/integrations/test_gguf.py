"""sparsekern.integrations.gguf.model: weights, rope order, tokenizer, architectures, and a clear
refusal of everything it does not cover."""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")

from python_tests.integrations import gguf_cases as cases
from sparsekern import FormatError
from sparsekern.integrations.gguf.model import load_gguf

IDS = torch.arange(3, 67).reshape(2, 32)


@pytest.fixture(scope="module")
def model():
    return cases.tiny_llama()


@pytest.fixture
def write(model, tmp_path):
    """write(meta changes, tensor changes) -> path; a value of None removes the entry."""

    def write(meta=None, tensors=None, quantise=False):
        merged = (
            {**cases.metadata(), **(meta or {})},
            {**cases.gguf_tensors(model), **(tensors or {})},
        )
        meta, tensors = ({k: v for k, v in part.items() if v is not None} for part in merged)
        return cases.write_gguf(tmp_path / "model.gguf", tensors, meta, quantise)

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_float32_file_gives_the_logits_of_the_original_bit_for_bit(tied, tmp_path):
    original = cases.tiny_llama(tied)
    path = cases.write_gguf(tmp_path / "m.gguf", cases.gguf_tensors(original), cases.metadata())
    loaded, _ = load_gguf(path, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, original(IDS).logits)
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.generation_config.eos_token_id == 2


def test_rope_order_matters(model, write):
    """The rows in the file have another order than the model's: undoing it is not a no-op."""
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    assert not torch.equal(torch.from_numpy(cases.permute(weight.numpy(), 4)), weight)
    loaded, _ = load_gguf(write(), dtype=torch.float32)
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, weight)


def dequantise_q4_1(raw):
    """Q4_1 by hand: blocks of 32 as (scale, minimum) in float16 and 16 bytes, low nibbles first."""
    blocks = raw.reshape(-1, 20)
    scale, low = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return nibbles * scale + low


def test_q4_1_and_q8_0_tensors(write, model):
    import gguf

    loaded, _ = load_gguf(write(quantise=True), dtype=torch.float32)
    array = cases.gguf_tensors(model)["blk.1.ffn_down.weight"]
    raw = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_1)
    expected = torch.from_numpy(dequantise_q4_1(raw).reshape(array.shape))
    got = loaded.model.layers[1].mlp.down_proj.weight
    assert torch.equal(got, expected) and not torch.equal(got, torch.from_numpy(array))
    step = np.abs(array).max() / 127  # Q8_0 rounds to 1/127 of the largest of each block
    assert torch.allclose(
        loaded.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=step
    )
    q = loaded.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(q, model.model.layers[0].self_attn.q_proj.weight, atol=0.05)


def test_weights_are_rounded_once_to_dtype(write):
    path = write(quantise=True)
    exact, rounded = (load_gguf(path, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    for (name, a), (_, b) in zip(exact.named_parameters(), rounded.named_parameters()):
        assert b.dtype == torch.bfloat16 and torch.equal(a.to(torch.bfloat16), b), name
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tokenizer(write):
    _, tokenizer = load_gguf(write())
    text = "the  and 1212 naïve 数\n\n  x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = cases.vocabulary()
    assert (
        ids[0] == tokens.index("the") and tokens.index("12") not in ids
    )  # digits stay single under "smollm"
    assert tokenizer("x the")["input_ids"] == [tokens.index("x"), tokens.index("Ġthe")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(1) == 2  # special tokens are one id each
    assert tokenizer.decode([1, ids[0]], skip_special_tokens=True) == "the"


def test_pre_tokenizer_and_bos_follow_the_metadata(write):
    meta = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}
    _, tokenizer = load_gguf(write(meta))
    assert tokenizer("12")["input_ids"] == [1, cases.vocabulary().index("12")]


def test_the_folder_it_saves_gives_the_same_tokenizer(write, tmp_path):
    from transformers import AutoTokenizer

    _, tokenizer = load_gguf(write())
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "the and 12 <|im_end|> é"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "phi3"])
def test_other_architectures_give_the_logits_of_the_original(architecture, tmp_path):
    original, meta, tensors = cases.other_model(architecture)
    path = cases.write_gguf(tmp_path / "m.gguf", tensors, meta)
    loaded, tokenizer = load_gguf(path, dtype=torch.float32)
    assert type(loaded) is type(original)
    ids = IDS % original.config.vocab_size
    with torch.inference_mode():
        wanted, got = original(ids).logits, loaded(ids).logits
    # Gemma's norms lose the last bits when one is added and taken off again.
    close = dict(rtol=0, atol=1e-4 * wanted.abs().max().item() * (architecture == "gemma3"))
    torch.testing.assert_close(got, wanted, **close)
    assert tokenizer.decode(tokenizer("the and", add_special_tokens=False)["input_ids"]) in (
        "the and",
        " the and",  # sentencepiece puts a space before the text
    )


def best_pieces(text, tokens, scores):
    """Sentencepiece BPE by hand: the neighbours of the best score merge, until none is a token."""
    parts, score = list(text.replace(" ", "▁")), dict(zip(tokens, scores))
    while True:
        pairs = [(score.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        best, at = max(pairs, default=(-np.inf, 0))
        if best == -np.inf:
            return parts
        parts[-at : 2 - at] = ["".join(parts[-at : 2 - at])]


def test_sentencepiece_vocabulary(tmp_path):
    _, meta, tensors = cases.other_model("gemma3")
    _, tokenizer = load_gguf(cases.write_gguf(tmp_path / "m.gguf", tensors, meta))
    tokens, scores, _ = cases.piece_vocabulary()
    text = "the cat and the singer in a band"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and tokenizer.bos_token_id == 1  # llama.cpp: BOS unless the file says no
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == best_pieces(text, tokens, scores)
    assert tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"][1:]) == ["<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("llama-bpe", "1234", ["123", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("gpt-2", "1234", ["1234"]),
        ("llama-bpe", "I'LL  go!\n x", ["I", "'LL", "Ġ", "Ġgo", "!Ċ", "Ġx"]),
        ("gpt-2", "I'LL  go!\n x", ["I", "'", "LL", "Ġ", "Ġgo", "!", "Ċ", "Ġx"]),
    ],
)
def test_pre_tokenizers_split_as_the_models_do(write, pre, text, pieces):
    _, tokenizer = load_gguf(write({"tokenizer.ggml.pre": pre}))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces


BAD_METADATA = [
    ({"general.architecture": "grok"}, "that Transformers reads, got 'grok'"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type == 'none', got 'yarn'"),
    ({"llama.expert_count": 8}, "llama.expert_count = 8, which Transformers does not read"),
    ({"llama.attention.key_length": 32}, "key_length == 16, got 32"),
    ({"llama.rope.dimension_count": 8}, r"q_proj.*expected \(32, 64\), got \(64, 64\)"),
    ({"llama.attention.head_count": 0}, "positive sizes"),
    ({"llama.attention.head_count_kv": 3}, r"head_count \(4\) a multiple of head_count_kv, got 3"),
    ({"llama.embedding_length": None}, "'llama.embedding_length', got none"),
    ({"llama.embedding_length": 2**30}, "embedding_length to be a size of a tensor"),
    ({"llama.feed_forward_length": 2**30}, "feed_forward_length to be a size of a tensor"),
    ({"llama.context_length": 2**31}, "context_length below"),
    ({"llama.block_count": "two"}, "llama.block_count of type int, got str"),
    ({"llama.block_count": 1}, "block_count == 2, got 1"),
    ({"llama.block_count": 2**20}, "block_count == 2, got 1048576"),
    ({"llama.feed_forward_length": 128}, r"expected \(\d+, \d+\), got \(\d+, \d+\)"),
    ({"llama.rope.freq_base": 0.0}, "freq_base > 0"),
    ({"llama.rope.freq_base": -5.0}, "freq_base > 0"),
    ({"llama.rope.freq_base": float("nan")}, "freq_base to be finite"),
    ({"llama.rope.freq_base": float("inf")}, "freq_base to be finite"),
    ({"llama.attention.layer_norm_rms_epsilon": -1e-6}, "epsilon > 0"),
    ({"split.count": 3, "split.no": 0}, "a GGUF file in one part, got one of 3.*llama-gguf-split"),
    ({"tokenizer.ggml.model": "bert"}, "'gpt2' .*got 'bert'"),
    ({"tokenizer.ggml.model": "llama"}, "scores of tokens"),
    ({"tokenizer.ggml.pre": "tekken"}, "got 'tekken'"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "2 types"),
    ({"tokenizer.ggml.merges": ["a b c"]}, "two parts per merge"),
    ({"tokenizer.ggml.merges": ["zz yy"]}, "tokenizers refuse"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id below"),
]


@pytest.mark.parametrize("change, text", BAD_METADATA)
def test_bad_metadata(write, change, text):
    with pytest.raises(FormatError, match=text):
        load_gguf(write(change))


def test_a_pointer_of_git_lfs(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.gguf").write_text(text)
    with pytest.raises(FormatError, match="a pointer of Git LFS.*Run 'git lfs pull'"):
        load_gguf(tmp_path / "a.gguf")


def test_bad_tensors(write):
    with pytest.raises(FormatError, match="got 'blk.0.attn_q.bias'"):
        load_gguf(write(tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)}))
    with pytest.raises(FormatError, match="got 'rope_freqs.weight'"):
        load_gguf(write(tensors={"rope_freqs.weight": np.ones(8, np.float32)}))
    with pytest.raises(FormatError, match=r"model.norm.weight: expected \(64,\), got none"):
        load_gguf(write(tensors={"output_norm.weight": None}))
    with pytest.raises(FormatError, match=r"k_proj.weight: expected \(32, 64\), got \(64, 64\)"):
        load_gguf(write(tensors={"blk.0.attn_k.weight": np.zeros((64, 64), np.float32)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["output_norm.weight", "token_embd.weight", "blk.1.ffn_up.weight"])
def test_numbers_that_are_not_finite(write, model, name, bad):
    array = cases.gguf_tensors(model)[name].copy()
    array.flat[-1] = bad
    with pytest.raises(FormatError, match=f"{name} of finite numbers"):
        load_gguf(write(tensors={name: array}))


def test_damaged_files(write, tmp_path):
    whole = write().read_bytes()
    for length in (0, 3, 20, 500, len(whole) // 2, len(whole) - 64):
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="damaged.gguf"):
            load_gguf(damaged)
    (tmp_path / "text.gguf").write_text("not a model\n" * 100)
    with pytest.raises(FormatError, match="complete GGUF file"):
        load_gguf(tmp_path / "text.gguf")
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_gguf(tmp_path / "absent.gguf")


def test_no_code_of_a_folder_runs(tmp_path, monkeypatch):
    """A folder whose tokenizer names code of its own is refused, whatever stdin would say."""
    import json

    from sparsekern.integrations.loading import load_tokenizer

    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text("{}")
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(Exception):  # noqa: B017
        load_tokenizer(tmp_path)
    assert not mark.exists()
