"""The Triton kernels of sparse training against torch; with TRITON_INTERPRET=1 on the CPU."""

import torch

from sparsekern.backends.triton import training as kernels
from sparsekern.finetune.transposable import pattern_bits, transposable_mask_torch
from sparsekern.formats.sparse24 import Sparse24
from sparsekern.ops.compress import compress, decompress


def check_tiles(device):
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 4), (20, 24), (44, 28)):
        w = torch.randn(shape, generator=generator)
        infinite = w.abs().masked_fill(w > 1, float("inf"))
        for scores in (w.abs(), w.abs().round(), w * 0, w.half(), -w.abs(), infinite, -infinite):
            for greedy in (False, True):
                want = transposable_mask_torch(scores, "greedy" if greedy else "best")
                bits = pattern_bits().to(device)
                got = kernels.tile_mask(scores.to(device).contiguous(), bits, greedy)
                assert torch.equal(got.cpu(), want), (shape, scores.dtype, greedy)
    print("tiles passed")


def check_values(device):
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 4), (12, 20), (64, 136)):
        mask = transposable_mask_torch(torch.randn(shape, generator=generator).abs(), "best")
        dense = torch.randn(shape, generator=generator)
        ones = compress(mask.float(), layout="rowmajor")
        got = kernels.kept(dense.to(device), ones.metadata.to(device), torch.float32)
        assert torch.equal(got.cpu(), dense[mask].view(shape[0], -1))
        again = decompress(Sparse24(got.cpu(), ones.metadata, shape))
        assert torch.equal(again, dense * mask)
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        low = torch.bfloat16 if device == "cuda" else torch.float16
        half = kernels.kept(dense.to(device), ones.metadata.to(device), low)
        assert torch.equal(half.cpu(), got.cpu().to(low))
        index = torch.randint(-1, got.numel(), (shape[1], shape[0]), generator=generator).int()
        out = torch.full(index.shape, 7.0, dtype=torch.float16, device=device)
        kernels.gather(got, index.to(device), out)
        want = torch.where(index < 0, 0, got.cpu().flatten()[index.clamp(min=0).long()])
        assert torch.equal(out.cpu(), want.half())
    print("values passed")


if __name__ == "__main__":
    check_tiles("cpu")
    check_values("cpu")
