"""The tokenizer inside a GGUF file, as a Transformers tokenizer.

Sentencepiece vocabularies (tokenizer.ggml.model "llama": Llama 2, Gemma, Phi-3) are built by
Transformers. Byte-level BPE ("gpt2") is built here, because what Transformers makes of it is wrong:

  * GGUF names the regular expression that splits text before the merges apply (tokenizer.ggml.pre)
    instead of storing it. Transformers 5.24 does not know "smollm", which splits digits off one by
    one, and uses GPT-2's: 9 of 304,838 tokens of WikiText-2 differ. Before 5.24 the architecture
    alone decides.
  * Transformers 4.56 puts a BOS before text that has none, and takes the wrong EOS.

Source: the GGUF specification (ggml, docs/gguf.md); llama.cpp, src/llama-vocab.cpp; the
tokenizer.json of the models.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.errors import FormatError, message
from sparsekern.integrations.gguf.header import OP, Header

REMEDY = "Use the model's safetensors checkpoint and tokenizer.json instead."
TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"


@dataclass(frozen=True)
class Split:
    """How text is cut before the merges apply.

    pattern: a regular expression of the pieces; None for that of GPT-2.
    digits: are digits split off one by one first?   nfc: is text normalised first?
    whole: are pieces that are tokens kept, whatever the merges?
    bos: is a BOS put before each text where the file does not say?
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_LLAMA3 = Split(rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}", whole=True, bos=True)
_QWEN2 = Split(rf"{_WORDS}|\p{{N}}{_REST}", nfc=True)
PRE_TOKENIZERS = {
    "gpt-2": Split(),
    "smollm": Split(digits=True),
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def build_tokenizer(header: Header) -> Any:
    """PreTrainedTokenizerFast from vocabulary, merges, special tokens and chat template.

    Raises:
        FormatError: a kind of vocabulary or a pre-tokenizer that is not covered, or a damaged one.
    """
    kind = header.need("tokenizer.ggml.model", str)
    tokens = header.need("tokenizer.ggml.tokens", list)
    types = header.numbers("tokenizer.ggml.token_type") or [1] * len(tokens)
    header.require(
        len(types) == len(tokens) and len(set(tokens)) == len(tokens),
        "one type per token, and each token once",
        f"{len(tokens)} tokens, {len(set(tokens))} different, {len(types)} types",
    )
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.get(f"tokenizer.ggml.{key}_token_id", int)
        if index is not None:
            below = 0 <= index < len(tokens)
            header.require(below, f"{key}_token_id below {len(tokens)}", index)
            special[f"{role}_token"] = tokens[index]
    architecture = header.need("general.architecture", str)
    options = dict(
        clean_up_tokenization_spaces=False,
        chat_template=header.get("tokenizer.chat_template", str),
        model_max_length=header.need(f"{architecture}.context_length", int),
    )
    if kind == "gpt2":
        return _byte_level(header, tokens, types, special, options)
    if kind == "llama":
        return _sentencepiece(header, tokens, special, options)
    what = "tokenizer.ggml.model 'gpt2' (byte-level BPE) or 'llama' (sentencepiece)"
    raise FormatError(message(OP, what, repr(kind), REMEDY))


def _byte_level(
    header: Header, tokens: list[str], types: list[int], special: dict[str, str], options: Any
) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    pre = header.get("tokenizer.ggml.pre", str, "gpt-2") or "gpt-2"
    if pre not in PRE_TOKENIZERS:
        what = f"tokenizer.ggml.pre in {sorted(PRE_TOKENIZERS)}"
        raise FormatError(message(OP, what, repr(pre), REMEDY))
    split = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in header.need("tokenizer.ggml.merges", list)]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    header.require(wrong is None, "two parts per merge", wrong)
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole))
    except Exception as error:  # a merge whose parts are not in the vocabulary
        what = "a BPE vocabulary"
        got = f"one that tokenizers refuse ({error})"
        raise FormatError(message(OP, what, got, f"File: {header.path}.")) from error
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    prefix = bool(header.get("tokenizer.ggml.add_space_prefix", bool, False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not split.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    # Special tokens keep their ids, because they are in the vocabulary already.
    for add, type_ in (
        (tokenizer.add_special_tokens, TOKEN_CONTROL),
        (tokenizer.add_tokens, TOKEN_USER_DEFINED),
    ):
        chosen = [token for token, t in zip(tokens, types) if t == type_]
        is_special = type_ == TOKEN_CONTROL
        add([AddedToken(token, special=is_special, normalized=False) for token in chosen])
    if header.get("tokenizer.ggml.add_bos_token", bool, split.bos) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options, **special)


def _sentencepiece(
    header: Header, tokens: list[str], special: dict[str, str], options: dict[str, Any]
) -> Any:
    """Transformers' own, read from a folder where nothing but this file lies."""
    from transformers import AutoTokenizer

    scores = header.values.get("tokenizer.ggml.scores", ())
    header.require(len(scores) == len(tokens), f"{len(tokens)} scores of tokens", len(scores))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.gguf").symlink_to(header.path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever it makes of a damaged vocabulary becomes one error
            got = f"{type(error).__name__}: {error}"
            what = "a sentencepiece vocabulary that Transformers reads"
            raise FormatError(message(OP, what, got, f"File: {header.path}.")) from error
    for name, value in (*options.items(), *special.items()):
        if value is not None:
            setattr(tokenizer, name, value)
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.name_or_path = ""
    return tokenizer
