"""Prune a Transformers model in three ways and compare: error of the layers, perplexity, bytes."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk

METHODS = ("magnitude", "wanda", "sparsegpt")


def tiny_model() -> LlamaForCausalLM:
    """A random model, so that this runs anywhere in seconds. Put your own here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
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
    calibration, held_out = ids[:12], ids[12:].flatten()
    print(f"{'dense':<10} perplexity {sk.perplexity(dense, held_out, window=64):8.2f}")
    for method in METHODS:
        model = copy.deepcopy(dense)
        report = sk.prune_model(model, method, calibration, progress=False)
        errors = [layer.relative_error for layer in report.pruned]
        before = sum(layer.bytes_dense for layer in report.pruned)
        after = sum(layer.bytes_sparse for layer in report.pruned)
        print(
            f"{method:<10} perplexity {sk.perplexity(model, held_out, window=64):8.2f}, "
            f"mean error {sum(errors) / len(errors):.4f}, "
            f"{len(report.pruned)} layers {before} -> {after} bytes, "
            f"left dense: {', '.join(layer.name for layer in report.skipped)}"
        )


if __name__ == "__main__":
    main()
