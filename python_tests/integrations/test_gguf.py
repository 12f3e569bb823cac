"""sparsekern.integrations.gguf.model: weights, rope order, tokenizer, and a clear refusal of everything it does
not cover."""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")

from python_tests.integrations import gguf_cases as cases
from sparsekern import FormatError
from sparsekern.integrations.gguf.model import load_gguf, unpermute_rope_rows

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


def test_rope_order_matters(model):
    """The same weights in the file's row order give other logits: the permutation is not a
    no-op.
    """
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    stored = torch.from_numpy(cases.permute(weight.numpy(), 4))
    assert not torch.equal(stored, weight)
    assert torch.equal(unpermute_rope_rows(stored, 4), weight)


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


BAD_METADATA = [
    ({"general.architecture": "gemma"}, "'llama', got 'gemma'"),
    ({"llama.rope.scaling.type": "yarn"}, "unscaled rope .*got 'yarn'"),
    ({"llama.rope.dimension_count": 8}, "got 8 of 16"),
    ({"llama.attention.head_count": 0}, "positive sizes"),
    ({"llama.attention.head_count_kv": 3}, "64, 4, 3"),
    ({"llama.embedding_length": None}, "'llama.embedding_length', got none"),
    ({"llama.block_count": "two"}, "'?llama.block_count'? of type .*got str"),
    ({"llama.block_count": 1}, "9 that differ, first model.layers.1"),
    ({"llama.block_count": 3}, "first model.layers.2.*got none"),
    ({"llama.feed_forward_length": 128}, r"down_proj.weight: expected \(64, 128\), got \(64, 96\)"),
    ({"tokenizer.ggml.model": "llama"}, "'gpt2' .*got 'llama'"),
    ({"tokenizer.ggml.pre": "qwen2"}, "got 'qwen2'"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "2 types"),
    ({"tokenizer.ggml.merges": ["a b c"]}, "two parts per merge"),
    ({"tokenizer.ggml.merges": ["zz yy"]}, "tokenizers refuse"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id below"),
]


@pytest.mark.parametrize("change, text", BAD_METADATA)
def test_bad_metadata(write, change, text):
    with pytest.raises(FormatError, match=text):
        load_gguf(write(change))


def test_bad_tensors(write):
    with pytest.raises(FormatError, match="got 'blk.0.attn_q.bias'"):
        load_gguf(write(tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)}))
    with pytest.raises(FormatError, match="got 'rope_freqs.weight'"):
        load_gguf(write(tensors={"rope_freqs.weight": np.ones(8, np.float32)}))
    with pytest.raises(FormatError, match=r"model.norm.weight: expected \(64,\), got none"):
        load_gguf(write(tensors={"output_norm.weight": None}))
    with pytest.raises(FormatError, match=r"blk.0.attn_k.weight with 32 rows, got \[64, 64\]"):
        load_gguf(write(tensors={"blk.0.attn_k.weight": np.zeros((64, 64), np.float32)}))


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
