"""Tiny models of many architectures of Transformers, pruned; and the table of what was pruned in
docs/architectures.md, which `python -m python_tests.oneshot.architectures` rewrites."""

from __future__ import annotations

import copy
import logging
import re
import sys
import warnings
from pathlib import Path

import torch

import sparsekern as sk
from python_tests.checkpoint.architectures import MODELS, PAIR, PLAIN, SPEECH, TEXT, VISION

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- begin: architectures -->", "<!-- end: architectures -->"
IMAGE_TOKEN, VISION_START = 90, 91
# (pattern, text): what of a reason belongs to one model.
GENERAL = (
    (r"weight tied to .*", "weight tied to the input embedding"),
    (r" in one parameter \[.*\]", " in one 3-D parameter"),
    (r"in_features \d+ is", "in_features is"),
    (r"a 3-D parameter of (\w+) in one 3-D parameter", r"3-D parameter of \1"),
)
CROSSED = PAIR | {"max_position_embeddings": 64, "decoder_start_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4}
MOE = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STAGES = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}


def _causal(stem, **more):
    return (f"{stem}ForCausalLM", f"{stem}Config", TEXT | more)


def _masked(stem, **more):
    return (f"{stem}ForMaskedLM", f"{stem}Config", PLAIN | more)


# name: (model class, config class, arguments of the config), by kind
KINDS = {
    "decoder": {
        "llama": _causal("Llama"),
        "mistral": _causal("Mistral"),
        "qwen2": _causal("Qwen2"),
        "qwen3": _causal("Qwen3", head_dim=16),
        "gemma": _causal("Gemma", head_dim=16),
        "gemma2": MODELS["gemma2"],
        "gemma3-text": _causal("Gemma3", head_dim=16)[:1]
        + ("Gemma3TextConfig", TEXT | {"head_dim": 16}),
        "phi": _causal("Phi"),
        "phi3": _causal("Phi3", pad_token_id=0),
        "olmo2": _causal("Olmo2"),
        "cohere": _causal("Cohere"),
        "granite": _causal("Granite"),
        "starcoder2": _causal("Starcoder2"),
        "stablelm": ("StableLmForCausalLM", "StableLmConfig", TEXT),
        "smollm3": _causal("SmolLM3", pad_token_id=0),
        "glm4": _causal("Glm4", head_dim=16, pad_token_id=0),
        "gpt-neox": MODELS["gpt-neox"],
        "falcon": MODELS["falcon"],
        "bloom": MODELS["bloom"],
        "gpt2": MODELS["gpt2"],
        "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
        "gpt-j": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
        "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT | {"rotary_dim": 4}),
        "gpt-neo": (
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 99,
                "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 64,
            },
        ),
        "opt": (
            "OPTForCausalLM",
            "OPTConfig",
            {
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 99,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 64,
            },
        ),
        "mpt": (
            "MptForCausalLM",
            "MptConfig",
            {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99, "max_seq_len": 64},
        ),
    },
    "mixture of experts": {
        "mixtral": MODELS["mixtral"],
        "qwen2-moe": (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            MOE | {"shared_expert_intermediate_size": 32},
        ),
        "qwen3-moe": MODELS["qwen3-moe"],
        "gpt-oss": MODELS["gpt-oss"],
        "phimoe": MODELS["phimoe"],
        "deepseek-v2": (
            "DeepseekV2ForCausalLM",
            "DeepseekV2Config",
            {k: v for k, v in MODELS["deepseek-v3"][2].items() if k not in ("topk_group", "n_group")}
            | {"topk_method": "greedy"},
        ),
        "deepseek-v3": MODELS["deepseek-v3"],
        "llama4": (
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            TEXT
            | {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 16}
            | {"interleave_moe_layer_step": 1},
        ),
        "jetmoe": (
            "JetMoeForCausalLM",
            "JetMoeConfig",
            TEXT | {"num_local_experts": 4, "num_key_value_heads": 2, "kv_channels": 16},
        ),
        "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", MOE),
        "granite-moe": (
            "GraniteMoeForCausalLM",
            "GraniteMoeConfig",
            TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
    },
    "encoder": {
        "bert": MODELS["bert"],
        "roberta": _masked("Roberta"),
        "electra": _masked("Electra", embedding_size=32),
        "albert": _masked("Albert", embedding_size=16),
        "mpnet": _masked("MPNet"),
        "deberta": _masked("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "deberta-v2": MODELS["deberta-v2"],
        "modernbert": _masked("ModernBert", pad_token_id=0),
        "esm": _masked("Esm", pad_token_id=1, mask_token_id=2),
        "distilbert": (
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
        ),
    },
    "encoder-decoder": {
        "t5": MODELS["t5"],
        "mt5": ("MT5ForConditionalGeneration", "MT5Config", MODELS["t5"][2]),
        "switch": (
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            MODELS["t5"][2]
            | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        ),
        "bart": MODELS["bart"],
        "mbart": ("MBartForConditionalGeneration", "MBartConfig", CROSSED),
        "marian": MODELS["marian"],
        "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", CROSSED),
        "m2m-100": ("M2M100ForConditionalGeneration", "M2M100Config", CROSSED),
    },
    "vision": {
        "vit": MODELS["vit"],
        "deit": ("DeiTForImageClassification", "DeiTConfig", VISION),
        "beit": ("BeitForImageClassification", "BeitConfig", VISION),
        "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VISION),
        "vit-mae": ("ViTMAEModel", "ViTMAEConfig", VISION | {"mask_ratio": 0.0}),
        "swin": ("SwinForImageClassification", "SwinConfig", STAGES),
        "segformer": (
            "SegformerForImageClassification",
            "SegformerConfig",
            {
                "num_encoder_blocks": 2,
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [16, 32],
                "patch_sizes": [3, 3],
                "strides": [2, 2],
                "num_attention_heads": [2, 2],
                "mlp_ratios": [2, 2],
                "decoder_hidden_size": 16,
            },
        ),
    },
    "speech": {
        "whisper": MODELS["whisper"],
        "wav2vec2": MODELS["wav2vec2"],
        "hubert": MODELS["hubert"],
        "wavlm": ("WavLMForCTC", "WavLMConfig", SPEECH),
        "data2vec-audio": (
            "Data2VecAudioForCTC",
            "Data2VecAudioConfig",
            SPEECH | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
        ),
        "audio-spectrogram": (
            "ASTForAudioClassification",
            "ASTConfig",
            {k: v for k, v in VISION.items() if k != "image_size"}
            | {"num_mel_bins": 16, "max_length": 24, "time_stride": 4, "frequency_stride": 4},
        ),
    },
    "multi-modal": {
        "clip": MODELS["clip"],
        "siglip": (
            "SiglipModel",
            "SiglipConfig",
            {"text_config": PLAIN | {"max_position_embeddings": 64}, "vision_config": VISION},
        ),
        "blip": (
            "BlipForConditionalGeneration",
            "BlipConfig",
            {
                "text_config": PLAIN | {"encoder_hidden_size": 32, "max_position_embeddings": 64},
                "vision_config": VISION,
                "projection_dim": 32,
            },
        ),
        "llava": (
            *MODELS["llava"][:2],
            MODELS["llava"][2] | {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN},
        ),
        "paligemma": (
            *MODELS["paligemma"][:2],
            MODELS["paligemma"][2]
            | {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN},
        ),
        "gemma3": (
            *MODELS["gemma3"][:2],
            MODELS["gemma3"][2] | {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN},
        ),
        "qwen2-vl": (
            *MODELS["qwen2-vl"][:2],
            MODELS["qwen2-vl"][2]
            | {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": VISION_START},
        ),
    },
    "state space, recurrent, hybrid": {
        "mamba": MODELS["mamba"],
        "falcon-mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", STATE),
        "mamba2": (
            "Mamba2ForCausalLM",
            "Mamba2Config",
            STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        ),
        "jamba": MODELS["jamba"],
        "bamba": (
            "BambaForCausalLM",
            "BambaConfig",
            TEXT
            | {
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_d_state": 4,
                "mamba_n_groups": 1,
                "mamba_chunk_size": 8,
                "attn_layer_indices": [1],
            },
        ),
        "qwen3-next": MODELS["qwen3-next"],
        "recurrent-gemma": (
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            TEXT | {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
        ),
        "rwkv": (
            "RwkvForCausalLM",
            "RwkvConfig",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "context_length": 64},
        ),
    },
}
ALL = {name: parts for kind in KINDS.values() for name, parts in kind.items()}


def build(transformers, name):
    """The model, in eval mode, with the same weights at every call."""
    cls, config, arguments = ALL[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, config)(**copy.deepcopy(arguments))
        return getattr(transformers, cls)(made).eval()


def inputs(name, seed=0):
    """Arguments of one forward call that reaches every layer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 24), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if name in KINDS["vision"]:
        return {"pixel_values": pixels}
    if name == "whisper":
        features = torch.randn(2, 16, 64, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    if name == "audio-spectrogram":
        return {"input_values": torch.randn(2, 24, 16, generator=generator)}
    if name in KINDS["speech"]:
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if name in KINDS["encoder-decoder"]:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    if name in ("clip", "siglip", "blip"):
        return {"input_ids": ids, "pixel_values": pixels}
    if name in KINDS["multi-modal"]:
        count = 16 if name in ("llava", "paligemma") else 4
        ids[:, 1] = VISION_START
        ids[:, 2 : 2 + count] = IMAGE_TOKEN
        made = {"input_ids": ids, "pixel_values": pixels}
        types = (ids == IMAGE_TOKEN).long()
        if name == "qwen2-vl":
            made["pixel_values"] = torch.randn(32, 96, generator=generator)
            made["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
            made["mm_token_type_ids"] = types
        return made
    return {"input_ids": ids}


@torch.no_grad()
def outputs(model, name):
    """The floating-point tensors among what the model returns: logits, embeddings, states."""
    torch.manual_seed(0)  # ViT-MAE draws noise
    returned = model(**inputs(name, seed=9))
    return [v for v in returned.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]


def prune(model, name, **options):
    """Wanda on two calls, on the CPU; the report."""
    batches = [inputs(name, seed) for seed in (1, 2)]
    torch.manual_seed(0)
    options = {"skip": (), "device": "cpu", "progress": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a share stays dense is in the report
        return sk.prune_model(model, "wanda", batches, **options)


def row(name, report):
    """The line of the table for one report. Reasons that differ only in the names of modules and
    in shapes are one."""
    shares = {}
    for layer in report.layers:
        if not layer.is_24:
            reason = layer.reason
            for pattern, text in GENERAL:
                reason = re.sub(pattern, text, reason)
            shares[reason] = shares.get(reason, 0) + layer.elements
    total = sum(layer.elements for layer in report.layers)
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    why = "; ".join(f"{_percent(size / total)} {reason}" for reason, size in ranked)
    return f"| {name} | {report.model} | {_percent(report.share)} | {why or '-'} |"


def _percent(share):
    if share in (0, 1) or 0.01 <= share <= 0.99:
        return f"{share:.0%}"
    return "under 1%" if share < 0.01 else "over 99%"


def row_in_page(name):
    """The committed line of the table, None if there is none."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"| {name} |")), None)


def version_line(transformers):
    """Which Transformers the table is of."""
    return f"Transformers {transformers.__version__}, method wanda, {len(ALL)} architectures."


def table(transformers):
    """The text between the markers."""
    lines = [version_line(transformers), ""]
    for kind, members in KINDS.items():
        lines += [f"### {kind.capitalize()}", ""]
        lines += ["| architecture | class | 2:4 | dense, and why |", "|---|---|---|---|"]
        for name in members:
            lines.append(row(name, prune(build(transformers, name), name)))
        lines.append("")
    return "\n".join(lines)


def main():
    """Rewrite the page."""
    import transformers

    logging.disable(logging.WARNING)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, f"{PAGE}: expected {BEGIN} and {END}"
    text = f"{before}{BEGIN}\n{table(transformers)}{END}{after}"
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
