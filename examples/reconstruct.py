"""Which layers to leave dense, and gradient descent on what is left: error before and after."""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk


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
        start = torch.randint(0, 256, (64, 1))
        ids = dense.generate(start, max_new_tokens=31, do_sample=True, pad_token_id=0)
    calibration, text = ids[:56], ids[56:].flatten()
    found = sk.sensitivity(
        dense, calibration, text, by="type", window=32, windows=2, progress=False
    )
    print(found.table(3))
    with tempfile.TemporaryDirectory() as temporary:
        skip = Path(temporary) / "skip.json"
        names = found.save_skip(skip, share=0.2)
        print(f"left dense: {len(names)} layers, {names[0]} first")
        model = copy.deepcopy(dense)
        options = {"skip": skip, "batch_size": 4, "progress": False}
        sk.prune_model(model, "sparsegpt", calibration, **options)
    rounds = {"span": None, "epochs": 8, "lr": 1e-4}
    for fit in sk.reconstruct(model, dense, calibration, rounds, batch_size=4, progress=False):
        print(f"reconstructed: error on held-out rows {fit.before:.4f} -> {fit.after:.4f}")
    for name, of in (("dense", dense), ("2:4", model)):
        print(f"{name:<5} perplexity {sk.perplexity(of, text, window=32):.2f}")


if __name__ == "__main__":
    main()
