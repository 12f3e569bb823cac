"""Save a pruned model, check the folder, load it without a dense copy, export it for others."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk
from sparsekern.checkpoint import export_dense, verify_checkpoint
from sparsekern.integrations.loading import folder_bytes


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (2, 16))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sk.save_pretrained(model, folder / "dense")
        sk.prune_model(model, "magnitude", progress=False)
        sk.save_pretrained(model, folder / "pruned")
        print(verify_checkpoint(folder / "pruned").table())
        loaded = sk.from_pretrained(folder / "pruned", device="cpu")
        with torch.no_grad():
            same = torch.equal(model(ids).logits, loaded(ids).logits)
        print(f"logits of the loaded model are the same bits: {same}")
        export_dense(folder / "pruned", folder / "exported")
        for name in ("dense", "pruned", "exported"):
            print(f"{name:<9}{folder_bytes(folder / name):>9} bytes of weights")


if __name__ == "__main__":
    main()
