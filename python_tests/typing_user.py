"""A user's script with every public function, which `mypy --strict` accepts (test_house.py)."""

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.backends.protocol import Backend


def script(x: Tensor, w: Tensor, model: nn.Module, ours: Backend, layout: sk.Layout) -> Tensor:
    w24: sk.Sparse24 = sk.prune_compress(w)
    again: sk.Sparse24 = sk.compress(sk.decompress(w24), mask=sk.prune.magnitude_mask(w))
    sk.verify(again)
    y: Tensor = sk.linear(x, w24, bias=torch.zeros(64), activation="silu")
    why: sk.Explanation = sk.explain(x, w24)
    layer: sk.SparseLinear = sk.SparseLinear.from_linear(nn.Linear(32, 64))
    report: sk.PruneReport = sk.prune_model(model, "wanda", calibration=[x], skip=("2",))
    turned: sk.RotationReport = sk.rotate(model, [x], untie=True)
    mixed: sk.Mix = sk.calibration_mix("a.txt=0.7,b.jsonl=0.3", None)
    swept: sk.SensitivityReport = sk.sensitivity(model, mixed, torch.arange(4096), by="type")
    print(swept.skip_list(share=0.1))
    step: sk.Reconstruction = sk.Reconstruction(span=None, epochs=2)
    fits: list[sk.Fit] = sk.reconstruct(model, model, [x], step)
    done: sk.PruneReport = sk.compress_model(model)
    masked: sk.finetune.Masked = sk.finetune.Masked(model)
    groups: list[int | None] = [group.block for group in sk.calibrate(model, [x])]
    sk.register_backend(ours, device="cpu", before="cpu")
    spec: sk.WeightSpec = w24.spec
    half: sk.ElementType = sk.ElementType("half_again", torch.float16, 16)
    print(sk.register_layout(layout).name, sk.register_dtype(half).name, spec.shape, groups)
    print(fits[0].kept, masked.check(), turned.lost_after, done.summary())
    print(report.summary(), why.backend, layer.weight.nbytes, sk.__version__)
    try:
        sk.save_pretrained(model, "folder")
        loaded: nn.Module = sk.from_pretrained("folder", device="cpu", dtype=torch.float32)
        sk.load_into(model, "folder")
        ppl: float = sk.perplexity(loaded, torch.arange(4096), window=512)
        print(ppl)
    except sk.FormatError as error:
        print(error)
    z: Tensor = layer(x)
    return y + z + sk.gated_linear(x, w24, again)
