"""Prune, quantise and save a model; load it without a dense copy; what is served, and its bytes."""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk
from sparsekern.checkpoint import verify_checkpoint
from sparsekern.integrations.loading import folder_bytes


def tiny_model() -> LlamaForCausalLM:
    """A random model, so that this runs anywhere in seconds. Put your own here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    dense = tiny_model()
    with torch.no_grad():  # text that the model finds likely, in place of a calibration text
        start = torch.randint(0, 256, (16, 1))
        ids = dense.generate(start, max_new_tokens=63, do_sample=True, pad_token_id=0)
    calibration, text = ids[:12], ids[12:].flatten()
    print(f"dense  perplexity {sk.perplexity(dense, text, window=64):.2f}")
    with tempfile.TemporaryDirectory() as temporary:
        for kind in (None, "fp8", "int8", "int4"):
            model = copy.deepcopy(dense)
            report = sk.prune_model(model, "sparsegpt", calibration, quantize=kind, progress=False)
            folder = Path(temporary) / (kind or "plain")
            sk.save_pretrained(model, folder)
            assert verify_checkpoint(folder).ok
            loaded = sk.from_pretrained(folder, device="cpu")
            perplexity = sk.perplexity(loaded, text, window=64)
            print(
                f"{kind or '32 bits':<8} perplexity {perplexity:.2f}, "
                f"{folder_bytes(folder)} bytes, {len(report.pruned)} layers"
            )
    print("serve a folder of your own: vllm serve FOLDER")


if __name__ == "__main__":
    main()
