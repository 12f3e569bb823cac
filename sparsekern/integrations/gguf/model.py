"""Read a GGUF file into a Transformers model and tokenizer.

GGUF is llama.cpp's container: metadata, vocabulary and (usually quantised) tensors in one file. It
is also the only form in which a small instruction-tuned model can be had from a package index
alone, which is what the demo needs.

Libraries do what they do right: Transformers' GGUF tables say what the metadata mean
(`load_gguf_checkpoint`), which tensor is which parameter (`get_gguf_hf_weights_map`), and what
llama.cpp changed in it, such as the row order of q_proj and k_proj (`TENSOR_PROCESSORS`); the
`gguf` package dequantises. By hand is

  * the reading of the file (header.py): both readers trust every count and offset, and spend
    seconds on the vocabulary
  * the refusals: Transformers skips tensors and metadata that it does not know, and fills
    parameters that the file lacks with random numbers; here each is an error that names it
  * byte-level BPE vocabularies (tokenizer.py, with the reason)

Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import inspect
import logging
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsekern.errors import FormatError, message
from sparsekern.integrations.gguf.header import ALIGNMENT, OP, Header, TensorEntry, read_header
from sparsekern.integrations.gguf.tokenizer import build_tokenizer

REMEDY = "Use the model's safetensors checkpoint instead."
LONG = 1024  # elements of an array that no config reads
SPARE_BYTES = 2**26  # that buffers may take beside the size of the file
# Ends of keys "<architecture>.<end>" that Transformers' tables leave out or ignore: what the config
# must be for them to change nothing.
IMPLIED: dict[str, Callable[[Any], object]] = {
    "vocab_size": lambda config: config.vocab_size,
    "attention.key_length": lambda config: _head_dim(config),
    "attention.value_length": lambda config: _head_dim(config),
    "rope.dimension_count": lambda config: _head_dim(config),
    "rope.scaling.type": lambda config: "none",
    "attention.causal": lambda config: True,
    "attention.sliding_window": lambda config: config.sliding_window,
    "attn_logit_softcapping": lambda config: config.attn_logit_softcapping,
    "final_logit_softcapping": lambda config: config.final_logit_softcapping,
}


def load_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Read a GGUF file of an architecture that Transformers reads (Llama, Qwen2, Gemma 3, ...).

    Nothing of the file is executed, and nothing is fetched.

    Args:
        path: the .gguf file.
        dtype: floating-point dtype of the weights; each is dequantised in float32 and rounded once.
    Returns:
        (model, tokenizer): a Transformers causal language model on the CPU in eval mode, and its
        PreTrainedTokenizerFast.
    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: `gguf` or `transformers` is not installed.
        FormatError: not a GGUF file, damaged, or an architecture, vocabulary, tensor or metadata
            key that is not covered.
    """
    for package in ("gguf", "transformers"):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{OP}: the package {package!r} is not installed. "
                "Run: pip install 'sparsekern[hf]'."
            ) from error
    header = read_header(path)
    config = model_config(header)
    model = _fill(_empty_model(config, header), header, dtype)
    tokenizer = build_tokenizer(header)
    model.config.dtype = dtype
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), tokenizer


# ---- the config ----------------------------------------------------------------------------------


def model_config(header: Header) -> Any:
    """The Transformers config that the metadata describe, by Transformers' own tables.

    Raises:
        FormatError: an architecture that Transformers does not read, a key of the model that has no
            effect there, or sizes that are not those of the tensors.
    """
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import (
        GGUF_SUPPORTED_ARCHITECTURES,
        load_gguf_checkpoint,
    )

    architecture = header.need("general.architecture", str)
    not_models = {"general", "tokenizer"}
    if architecture not in set(GGUF_SUPPORTED_ARCHITECTURES) - not_models:
        what = "general.architecture that Transformers reads"
        raise FormatError(message(OP, what, repr(architecture), REMEDY))
    _check_sizes(header, architecture)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        short = Path(folder, "config.gguf")
        short.write_bytes(_without_vocabulary(header))
        try:
            options = dict(load_gguf_checkpoint(str(short))["config"])
            options.pop("_model_name_or_path", None)
            options.setdefault("vocab_size", len(header.need("tokenizer.ggml.tokens", list)))
            options = {key: value for key, value in options.items() if value is not None}
            config = AutoConfig.for_model(**options)
        except FormatError:
            raise
        except Exception as error:  # whatever the tables make of nonsense becomes one error
            got = f"{type(error).__name__}: {error}"
            what = f"a config of {architecture!r} that Transformers can build"
            raise FormatError(message(OP, what, got, f"File: {header.path}.")) from error
    _check_implied(header, architecture, config)
    return config


def _check_sizes(header: Header, architecture: str) -> None:
    """Sizes of the right type, positive, and no more than the tensors can fill."""
    largest = max((max(entry.shape) for entry in header.tensors), default=0)
    blocks = {name.split(".")[1] for name in (e.name for e in header.tensors) if _in_block(name)}
    for end in ("embedding_length", "attention.head_count", "block_count", "context_length"):
        key = f"{architecture}.{end}"
        if architecture == "mamba" and end == "attention.head_count":
            continue
        value = header.need(key, int)
        header.require(0 < value < 2**31, f"positive sizes, {key} below 2^31", value)
    count = header.need(f"{architecture}.block_count", int)
    header.require(
        len(blocks) == count,
        f"the tensors that the metadata announces, {architecture}.block_count == {len(blocks)}",
        count,
    )
    for end in ("embedding_length", "feed_forward_length", "vocab_size"):
        value = header.values.get(f"{architecture}.{end}", 1)
        if isinstance(value, int):
            fits = 0 < value <= 2 * largest
            header.require(fits, f"{architecture}.{end} to be a size of a tensor", value)
    heads = header.get(f"{architecture}.attention.head_count", int, 1) or 1
    shared = header.values.get(f"{architecture}.attention.head_count_kv", heads)
    for value in np.atleast_1d(shared).tolist():
        good = isinstance(value, int) and 0 <= value <= heads and (not value or heads % value == 0)
        header.require(good, f"head_count ({heads}) a multiple of head_count_kv", value)


def _in_block(name: str) -> bool:
    return name.startswith("blk.") and name.split(".")[1].isdigit()


def _check_implied(header: Header, architecture: str, config: Any) -> None:
    """FormatError for a key of the model that the config does not follow."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    tables: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    mapped = tables.get(architecture, {})
    for key, value in header.values.items():
        if not key.startswith(f"{architecture}."):
            continue
        end = key.removeprefix(f"{architecture}.")
        if mapped.get(end) is not None:
            continue
        if end not in IMPLIED:
            got = f"{key} = {value!r}, which Transformers does not read"
            raise FormatError(message(OP, "metadata of a plain model", got, REMEDY))
        wanted = IMPLIED[end](config)
        if value != wanted:
            raise FormatError(message(OP, f"{key} == {wanted!r}", repr(value), REMEDY))


def _head_dim(config: Any) -> int:
    own: int | None = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _without_vocabulary(header: Header) -> bytes:
    """A small GGUF file with the same metadata but long arrays, and tensors of the same names."""
    kept = [
        bytes(header.data[start:end])
        for key, (start, end) in header.spans.items()
        if key != "general.alignment" and _length(header.values[key]) <= LONG
    ]
    infos = []
    for entry in header.tensors:
        name = entry.name.encode()
        # One dimension, of 8 numbers, in float32 (type 0), at offset 0: all share the same bytes.
        infos.append(struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 8, 0, 0))
    head = struct.pack("<4sIQQ", b"GGUF", header.version, len(infos), len(kept))
    text = b"".join([head, *kept, *infos])
    return text + bytes(-len(text) % ALIGNMENT + 32)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, np.ndarray)) else 1


class _quiet:
    """Transformers' notes on keys that it does not read are errors here, or known."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self.logger.setLevel(self.level)


# ---- the weights ---------------------------------------------------------------------------------


def _empty_model(config: Any, header: Header) -> Any:
    """The model on the meta device, refused when its buffers are larger than the file explains."""
    from transformers import AutoModelForCausalLM

    config.tie_word_embeddings = all(entry.name != "output.weight" for entry in header.tensors)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a constructor refuses the sizes, or there is no such class
        got = f"{type(error).__name__}: {error}"
        what = f"a causal language model of type {config.model_type!r}"
        raise FormatError(message(OP, what, got, f"File: {header.path}.")) from error
    needed = sum(buffer.nbytes for buffer in model.buffers())
    limit = len(header.data) + SPARE_BYTES
    header.require(needed <= limit, f"buffers of at most {limit} bytes", needed)
    return model


def _fill(model: Any, header: Header, dtype: torch.dtype) -> Any:
    """The model with the file's weights, each rounded once to dtype, and real buffers."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    from sparsekern.checkpoint.skeleton import skeleton_of

    architecture = header.need("general.architecture", str)
    options = model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=options)
    with _quiet():  # the whole tree has the names of most models; its parts cost a second each
        more: dict[str, Any] = {"processor": processor}
        if "processor" not in inspect.signature(get_gguf_hf_weights_map).parameters:
            more = {}  # Transformers 4
        names = get_gguf_hf_weights_map(_Trunk(model), **more)
        if any(entry.name not in names for entry in header.tensors):
            names = get_gguf_hf_weights_map(model, **more)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: dict[str, torch.Tensor] = {}
    for entry in header.tensors:
        if entry.name not in names:
            got = f"{entry.name!r} in {header.path}"
            raise FormatError(message(OP, f"the tensors of a plain {architecture}", got, REMEDY))
        name = names[entry.name]
        # A shape of one dimension more or less is the processor's business.
        if len(entry.shape) == len(expected.get(name, ())):
            header.require(
                _may_become(entry.shape, expected[name]),
                f"the tensors that the metadata announces, {name}: expected {expected[name]}",
                entry.shape,
            )
        weights = _dequantised(header, entry)
        result = processor.process(
            weights=weights,
            name=entry.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": state},
        )
        if result.name is not None:
            state[name] = torch.from_numpy(np.array(result.weights)).to(dtype)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = [
        f"{name}: expected {expected.get(name, 'no such tensor')}, got {found.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    header.require(
        not differing,
        "the tensors that the metadata announces",
        f"{len(differing)} that differ, first {differing[0] if differing else ''}",
    )
    filled = skeleton_of(model)
    filled.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False, assign=True)
    filled.tie_weights()
    return filled


class _Trunk:
    """A model as `get_gguf_hf_weights_map` sees it, without its submodules."""

    def __init__(self, model: Any):
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> tuple[()]:
        return ()


def _may_become(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """True when a stored matrix can become the parameter: as it is, or transposed."""
    return stored == wanted or stored == wanted[::-1]


def _dequantised(header: Header, entry: TensorEntry) -> np.ndarray:
    """One tensor in float32, checked to be finite."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    raw = header.bytes_of(entry)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        if entry.type in plain:
            weights = raw.view(plain[entry.type]).reshape(entry.shape).astype(np.float32)
        else:
            data = raw.reshape(quant_shape_to_byte_shape(entry.shape, entry.type))
            with np.errstate(all="ignore"):  # what is not finite is refused below
                weights = dequantize(data, entry.type)
    except Exception as error:  # a type that the gguf package cannot dequantise
        got = f"{entry.name} of type {entry.type.name} ({error})"
        what = "a tensor that the gguf package can dequantise"
        raise FormatError(message(OP, what, got, f"File: {header.path}.")) from error
    finite = bool(np.isfinite(weights).all())
    header.require(finite, f"{entry.name} of finite numbers", "others")
    return weights
