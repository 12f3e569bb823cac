"""Tiny models of many architectures of Transformers, and what they take as input."""

import torch

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
PLAIN = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
VISION = {key: value for key, value in PLAIN.items() if key != "vocab_size"}
VISION |= {"image_size": 16, "patch_size": 4}
SPEECH = PLAIN | {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}

# name: (model class, config class, arguments of the config)
MODELS = {
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 12}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TEXT
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "moe_intermediate_size": 32,
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        TEXT
        | {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        TEXT
        | {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        TEXT | {"num_experts": 12, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", TEXT | {"num_local_experts": 4}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99},
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", TEXT | {"head_dim": 16}),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", PLAIN),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        PLAIN | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 99,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", PAIR),
    "marian": ("MarianMTModel", "MarianConfig", PAIR | {"max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        PAIR
        | {
            "max_source_positions": 32,
            "max_target_positions": 32,
            "num_mel_bins": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH),
    "hubert": ("HubertModel", "HubertConfig", SPEECH),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "vit-base": ("ViTModel", "ViTConfig", VISION),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": PLAIN, "vision_config": VISION}),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": TEXT | {"rope_scaling": MROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "num_heads": 2,
                "hidden_size": 32,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": TEXT | {"head_dim": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": TEXT | {"model_type": "gemma", "head_dim": 16},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "projection_dim": 32,
        },
    ),
}


def build(transformers, name, dtype=torch.float32):
    """The model, its parameters in dtype, its buffers as Transformers makes them."""
    cls, config, arguments = MODELS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**arguments)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def inputs(name, dtype=torch.float32):
    """Arguments of one forward call."""
    ids = torch.arange(3, 27).view(2, 12)
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).to(dtype)
    if name.startswith("vit"):
        return {"pixel_values": pixels}
    if name == "clip":
        return {"pixel_values": pixels, "input_ids": ids}
    if name in ("wav2vec2", "hubert"):
        return {"input_values": torch.linspace(-1, 1, 800).view(2, 400).to(dtype)}
    if name == "whisper":
        features = torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 64).to(dtype)
        return {"input_features": features, "decoder_input_ids": ids}
    if name in ("t5", "bart", "marian"):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


@torch.no_grad()
def output(model, name, dtype=torch.float32):
    """The first tensor that the model returns."""
    return model(**inputs(name, dtype))[0]
