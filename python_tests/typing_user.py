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
    ordered: sk.PermutationReport = sk.permute(model, [x])
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
    print(fits[0].kept, masked.check(), turned.lost_after, ordered.sites, done.summary())
    print(report.summary(), why.backend, layer.weight.nbytes, sk.__version__)
    try:
        sk.save_pretrained(model, "folder")
        loaded: nn.Module = sk.from_pretrained("folder", device="cpu", dtype=torch.float32)
        sk.load_into(model, "folder")
        ppl: float = sk.perplexity(loaded, torch.arange(4096), window=512)
        print(ppl)
    except sk.FormatError as error:
        print(error)
    counted: sk.ParameterCount = sk.num_parameters(model)
    dense: nn.Linear = layer.to_linear()
    plain: nn.Module = sk.decompress_model(model)
    print(counted.stored, dense.weight.shape, plain)
    joined: sk.OptimizeReport = sk.optimize(model)
    joined.undo()
    split: nn.Module = sk.tensor_parallel(model, plan={"*.q_proj": "colwise"})
    experts: list[str] = [n for n, m in split.named_modules() if isinstance(m, sk.SparseExperts)]
    print(joined, experts)
    levels: sk.Sparse24 = sk.quantize(w24, "int8", scale="mse", importance=torch.ones(32))
    numbers: sk.Sparse24 = sk.dequantize(levels)
    x8, scale = sk.quantize_rows(x, "int8")
    normed: Tensor = sk.rms_norm_quantize(x, torch.ones(32), "int8", eps=1e-5)[0]
    gated: Tensor | None = sk.silu_mul_quantize(x, x, "fp8", with_y=True)[2]
    print(numbers.nbytes, normed.shape, gated)
    z: Tensor = layer(x) + sk.linear_quantized(x8, scale, levels)
    return y + z + sk.gated_linear(x, w24, again)
