"""A user's script with every public function, which `mypy --strict` accepts (test_house.py)."""

import torch
from torch import Tensor, nn

import sparsekern as sk

w: Tensor = torch.randn(64, 32)
w24: sk.Sparse24 = sk.prune_compress(w)
again: sk.Sparse24 = sk.compress(sk.decompress(w24), mask=sk.prune.magnitude_mask(w))
sk.verify(again)
x: Tensor = torch.randn(3, 32)
y: Tensor = sk.linear(x, w24, bias=torch.zeros(64), activation="silu")
gated: Tensor = sk.gated_linear(x, w24, again)
why: sk.Explanation = sk.explain(x, w24)
layer: sk.SparseLinear = sk.SparseLinear.from_linear(nn.Linear(32, 64))
z: Tensor = layer(x)
model: nn.Module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
report: sk.PruneReport = sk.prune_model(model, "wanda", calibration=[x], skip=("2",))
print(report.summary(), why.backend, y.shape, gated.shape, z.shape, layer.weight.nbytes)
try:
    sk.save_pretrained(model, "folder")
    loaded: nn.Module = sk.from_pretrained("folder", device="cpu", dtype=torch.float32)
    sk.load_into(model, "folder")
    ppl: float = sk.perplexity(loaded, torch.arange(4096), window=512)
except sk.FormatError as error:
    print(error, sk.__version__)
