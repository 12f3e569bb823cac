"""The tokenizer inside a GGUF file: byte-level BPE vocabularies as in GPT-2, as a Transformers
tokenizer.

GGUF stores tokens, their types and the merges as lists, and names the regular expression that
splits text before the merges apply (tokenizer.ggml.pre) instead of storing it; `PRE_TOKENIZERS`
holds the names that are covered.

Source: the GGUF specification (ggml, docs/gguf.md); llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from sparsekern.errors import FormatError, check

# tokenizer.ggml.pre -> are digits split off one by one before the GPT-2 pattern?
PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}
TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def build_tokenizer(meta):
    """PreTrainedTokenizerFast from GGUF vocabulary, merges, special tokens and chat template.

    Byte-level BPE as in GPT-2; the pre-tokenizer "smollm" splits digits off one by one first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    op = "sparsekern.load_gguf"
    kind = meta.need("tokenizer.ggml.model", str)
    check(
        kind == "gpt2",
        op,
        "tokenizer.ggml.model == 'gpt2' (byte-level BPE)",
        repr(kind),
        "Use the model's safetensors checkpoint and tokenizer.json instead.",
        exc=FormatError,
    )
    pre = meta.get("tokenizer.ggml.pre", str, "gpt-2")
    check(
        pre in PRE_TOKENIZERS,
        op,
        f"tokenizer.ggml.pre in {sorted(PRE_TOKENIZERS)}",
        repr(pre),
        "Use the model's safetensors checkpoint and tokenizer.json instead.",
        exc=FormatError,
    )
    tokens = meta.need("tokenizer.ggml.tokens", list)
    types = meta.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in meta.need("tokenizer.ggml.merges", list)]
    check(
        len(types) == len(tokens) and all(len(merge) == 2 for merge in merges),
        op,
        "one type per token and two parts per merge",
        f"{len(tokens)} tokens, {len(types)} types",
        f"File: {meta.path}.",
        exc=FormatError,
    )

    try:
        tokenizer = Tokenizer(
            models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        )
    except (
        Exception
    ) as error:  # the Rust side reports a merge whose parts are not in the vocabulary
        raise FormatError(
            f"{op}: expected a BPE vocabulary, got one that tokenizers refuses ({error}). "
            f"File: {meta.path}."
        ) from error
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=meta.get("tokenizer.ggml.add_space_prefix", bool, False)
    )
    digits = [pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[pre] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # Special tokens keep their ids, because they are in the vocabulary already.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types)
            if type_ == TOKEN_CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, type_ in zip(tokens, types)
            if type_ == TOKEN_USER_DEFINED
        ]
    )

    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id", int)
        if index is not None:
            check(
                0 <= index < len(tokens),
                op,
                f"{key}_token_id below {len(tokens)}",
                index,
                f"File: {meta.path}.",
                exc=FormatError,
            )
            special[f"{role}_token"] = tokens[index]
    if meta.get("tokenizer.ggml.add_bos_token", bool, False) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=meta.get("tokenizer.chat_template", str),
        model_max_length=meta.need("llama.context_length", int),
        **special,
    )
