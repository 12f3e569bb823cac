"""One training step of an MLP block (SwiGLU; that of Llama-3-8B at 8192 tokens), sparse against
dense in one run, and a LoRA step on a frozen 2:4 block against LoRA on a dense one.

    dense     three nn.Linear
    masked    the same under Masked: what 2:4 training costs without sparse tensor cores
    sparse    three SparseTrainingLinear with transposable masks: forward and input gradient on
              sparse tensor cores, values alone in the optimizer

A step is forward, backward, AdamW (fused where there is a GPU), and for `sparse` the weights of the
kernels made again. Steps of the providers take turns; each part is timed between CUDA events, the
median of each is recorded. silu(gate)·up is compiled, for all. Before timing, output and gradients
of `sparse` are compared with a dense block of its weights, and afterwards its masks are checked.

LoRA: adapters of rank --rank on the three layers, everything else frozen; `lora_memory` counts
weights and adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsekern import SparseLinear, prune
from sparsekern.finetune import Masked, SparseTrainingLinear, sparse_training
from sparsekern.finetune.transposable import is_transposable, transposable_mask

from . import timing
from .options import Run, parser, watchdog
from .timing import quantile

PARTS = ("forward", "backward", "optimizer", "refresh")


def make_parser():
    result = parser("training", "A training step of an MLP block, sparse and dense.", budget=90)
    result.add_argument("--hidden", type=int, default=4096)
    result.add_argument("--inner", type=int, default=14336)
    result.add_argument("--tokens", type=int, default=8192)
    result.add_argument("--rounds", type=int, default=40)
    result.add_argument("--rank", type=int, default=16)
    result.add_argument(
        "--values", default="bfloat16", help="dtype of weights; float32 runs under autocast"
    )
    result.add_argument("--eager", action="store_true", help="no torch.compile of silu(gate)·up")
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    run = Run(path, args)
    with watchdog(300 + args.budget):
        with run.phase("training step"):
            step(run, args)
        with run.phase("LoRA step"):
            lora(run, args)
    run.close()
    return 0


class Block(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden: int, inner: int, join: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.join(self.gate(x), self.up(x)))


def joined(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def make_block(run: Run, args, join) -> Block:
    """A dense block with a seed, on the device."""
    torch.manual_seed(args.seed if hasattr(args, "seed") else 0)
    with torch.device(run.device):
        return Block(args.hidden, args.inner, join).to(getattr(torch, args.values))


def inputs(run: Run, args, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, the gradient of the output)."""
    shape = (args.tokens, args.hidden)
    x = torch.randn(shape, device=run.device).to(dtype)
    return x, (torch.randn(shape, device=run.device) / args.tokens).to(dtype)


def step(run: Run, args) -> None:
    cuda = run.device.type == "cuda"
    low = torch.bfloat16 if cuda or args.values == "float32" else getattr(torch, args.values)
    join = torch.compile(joined) if cuda and not args.eager else joined
    x, slope = inputs(run, args, low)
    autocast = args.values == "float32"
    blocks, memory, refresh = {}, {}, {}
    for name in ("dense", "masked", "sparse"):
        before = torch.cuda.memory_allocated() if cuda else 0
        block = make_block(run, args, join)
        masked = None
        if name == "sparse":
            sparse_training(block, dtype=low)
            with run.phase("sparse: check"):
                run.say(f"masks: {check(block, x, slope, autocast)}")
        optimizer = torch.optim.AdamW(block.parameters(), 1e-4, fused=cuda)
        if name == "masked":
            masks = {
                n: prune.magnitude_mask(m.weight.detach())
                for n, m in block.named_modules()
                if isinstance(m, nn.Linear)
            }
            masked = Masked(block, masks)
            masked.attach(optimizer)
        layers = [m for m in block.modules() if isinstance(m, SparseTrainingLinear)]
        refresh[name] = lambda layers=layers: [layer.refresh() for layer in layers]
        blocks[name] = (block, optimizer, masked)
        with run.phase(f"{name}: first step"):
            one_step(blocks[name], x, slope, autocast, refresh[name], cuda)
        if cuda:
            torch.cuda.synchronize()
            memory[name] = torch.cuda.memory_allocated() - before
    times: dict[str, dict[str, list[float]]] = {n: {p: [] for p in PARTS} for n in blocks}
    for number in range(args.rounds + 3):
        for name, block in blocks.items():
            taken = one_step(block, x, slope, autocast, refresh[name], cuda)
            if number >= 3:
                for part, ms in taken.items():
                    times[name][part].append(ms)
        if run.left < 45 and number > 8:
            break
    block = blocks["sparse"][0]
    layers = {n: m for n, m in block.named_modules() if isinstance(m, SparseTrainingLinear)}
    for name, layer in layers.items():
        if not is_transposable(layer.to_linear().weight):
            raise RuntimeError(f"bench training: {name} is no longer transposable")
    run.say(f"{args.rounds} rounds at most, {number + 1} run")
    with run.phase("parts"):
        parts = single_parts(run, layers, x, slope) if cuda and run.left > 20 else {}
    totals = {
        name: [sum(values) for values in zip(*by_part.values())] for name, by_part in times.items()
    }
    dense_ms = quantile(totals["dense"], 0.5)
    choices = {n: [str(choice) for choice in m.choices.values()] for n, m in layers.items()}
    case = f"MLP {args.hidden}x{args.inner}, {args.tokens} tokens, {args.values}, AdamW"
    for name in blocks:
        total = quantile(totals[name], 0.5)
        metrics = {f"{part}_ms": round(quantile(v, 0.5), 3) for part, v in times[name].items()}
        metrics |= {"step_ms": round(total, 3), "speedup": round(dense_ms / total, 4)}
        metrics |= {f"step_ms_p{p}": round(quantile(totals[name], p / 100), 3) for p in (20, 80)}
        if cuda:
            metrics["state_gb"] = round(memory[name] / 1e9, 3)
        details = {"choices": choices, "parts_us": parts} if name == "sparse" else {}
        run.add(
            op="training_step",
            backend=name,
            check="bounded, masks kept",
            case=case,
            dtype=args.values,
            settings={"rounds": len(totals[name]), "compiled_activation": join is not joined},
            metrics=metrics,
            details=details,
        )
        run.say(f"{case}: {name} {metrics}")
    if cuda:
        for texts in choices.values():
            run.say("; ".join(texts))
        run.say(f"parts: {parts}")
    if totals["sparse"] and quantile(totals["sparse"], 0.5) > dense_ms:
        run.say(f"{case}: the sparse step is SLOWER than the dense one")


def one_step(made, x, slope, autocast: bool, refresh, cuda: bool) -> dict[str, float]:
    """One step; milliseconds of each part."""
    block, optimizer, masked = made
    marks = [mark(cuda)]
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = block(x)
    marks.append(mark(cuda))
    y.backward(slope)
    if masked is not None:
        masked.mask_gradients()
    marks.append(mark(cuda))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(mark(cuda))
    refresh()
    marks.append(mark(cuda))
    if cuda:
        torch.cuda.synchronize()
        taken = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    else:
        taken = [1000 * (b - a) for a, b in zip(marks, marks[1:])]
    return dict(zip(PARTS, taken))


def mark(cuda: bool):
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def check(block: Block, x: Tensor, slope: Tensor, autocast: bool) -> str:
    """Output and gradients against dense layers of the same weights; RuntimeError when far."""
    dense = Block(8, 8, joined)
    for name in ("gate", "up", "down"):
        setattr(dense, name, getattr(block, name).to_linear())
    rows = slice(0, min(512, x.shape[0]))
    found = []
    for model in (block, dense):
        leaf = x[rows].detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = model(leaf)
        y.backward(slope[rows])
        grads = [getattr(model, name) for name in ("gate", "down")]
        weights = [
            g.values.grad if isinstance(g, SparseTrainingLinear) else g.weight.grad for g in grads
        ]
        found.append([y.detach(), leaf.grad, *weights])
        model.zero_grad(set_to_none=True)
    for index, name in enumerate(("gate", "down")):
        layer = getattr(block, name)
        mask = layer.weight24()
        kept = dense_places(mask)
        found[1][2 + index] = found[1][2 + index][kept].view_as(found[0][2 + index])
    far = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))
        for a, b in zip(*found)
    ]
    if max(far) > 0.02:
        raise RuntimeError(f"bench training: output and gradients differ by {far}")
    return f"output and gradients differ by {max(far):.2g} of a dense block's"


def dense_places(w24) -> Tensor:
    """bool [out, in]: what the metadata keeps."""
    from sparsekern import Sparse24, decompress

    ones = torch.ones_like(w24.values, dtype=torch.float32)
    return decompress(Sparse24(ones, w24.metadata, w24.shape)) != 0


def single_parts(run: Run, layers, x: Tensor, slope: Tensor) -> dict[str, float]:
    """Median microseconds of the parts of a sparse layer that a dense one has, too, or has not."""
    from sparsekern.finetune.training import _kept

    found = {}
    stop = timing.StopRule(0.02, min_rounds=10, max_rounds=50, budget_s=1.0)
    for name in ("gate", "down"):
        layer = layers[name]
        wide = torch.randn(x.shape[0], layer.out_features, device=x.device, dtype=x.dtype)
        rows = torch.randn(x.shape[0], layer.in_features, device=x.device, dtype=x.dtype)
        gradient = wide.t() @ rows
        scores = gradient.float().abs()
        calls = {
            "weight gradient": lambda wide=wide, rows=rows: wide.t() @ rows,
            "keep": lambda g=gradient, m=layer: _kept(g, m.metadata, m.values.dtype),
            "refresh": lambda m=layer: m.refresh(),
            "mask best": lambda s=scores: transposable_mask(s),
            "mask greedy": lambda s=scores: transposable_mask(s, "greedy"),
        }
        times = timing.compare({n: [c] for n, c in calls.items()}, "events", stop, warm_s=0.05)
        found |= {f"{name}: {n}": round(t.median, 1) for n, t in times.items()}
    return found


# ---------------------------------------------------------------------- LoRA


class Adapted(nn.Module):
    """base(x) + x · Aᵀ · Bᵀ, the base frozen."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], rank: int, like: Tensor):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, shape[1], device=like.device) / shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(shape[0], rank, device=like.device))
        self.a.data, self.b.data = self.a.data.to(like.dtype), self.b.data.to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)


def lora(run: Run, args) -> None:
    cuda = run.device.type == "cuda"
    low = torch.bfloat16
    join = torch.compile(joined) if cuda and not args.eager else joined
    x, slope = inputs(run, args, low)
    made, memory, weights = {}, {}, {}
    for name in ("dense", "sparse"):
        before = torch.cuda.memory_allocated() if cuda else 0
        block = make_block(run, args, join).to(low).requires_grad_(False)
        for layer in ("gate", "up", "down"):
            base = getattr(block, layer)
            shape = tuple(base.weight.shape)
            mask = prune.magnitude_mask(base.weight)
            base.weight.data.masked_fill_(~mask, 0)  # LoRA on the dense model with zeros
            if name == "sparse":
                base = SparseLinear.from_linear(base, mask)
            setattr(block, layer, Adapted(base, shape, args.rank, x))
        trained = [p for p in block.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, fused=cuda)
        kept = [*block.parameters(), *block.buffers()]
        weights[name] = sum(t.nbytes for t in kept)
        if cuda:
            torch.cuda.synchronize()
            memory[name] = torch.cuda.memory_allocated() - before
        made[name] = (block, optimizer, None)
    nothing: list = []
    outputs = {name: block(x[:256]).detach().float() for name, (block, _, _) in made.items()}
    far = float((outputs["sparse"] - outputs["dense"]).norm() / outputs["dense"].norm())
    if far > 0.02:
        raise RuntimeError(f"bench training: LoRA outputs differ by {far}")
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(args.rounds + 3):
        for name, block in made.items():
            taken = one_step(block, x, slope, False, lambda: nothing, cuda)
            if number >= 3:
                times[name].append(sum(taken.values()))
        if run.left < 5 and number > 8:
            break
    dense_ms = quantile(times["dense"], 0.5)
    case = f"MLP {args.hidden}x{args.inner}, {args.tokens} tokens, LoRA rank {args.rank}"
    for name in made:
        ms = quantile(times[name], 0.5)
        metrics = {
            "step_ms": round(ms, 3),
            "speedup": round(dense_ms / ms, 4),
            "weight_bytes": weights[name],
            "weight_ratio": round(weights[name] / weights["dense"], 4),
        }
        if cuda:
            metrics["allocated_bytes"] = memory[name]
        run.add(
            op="lora_step",
            backend=name,
            check=f"outputs differ by {far:.2g}",
            case=case,
            dtype="bfloat16",
            metrics=metrics,
        )
        run.say(f"{case}: {name} {metrics}")
