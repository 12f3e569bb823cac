"""Two processes that train one masked model with gloo; what differs from one process is printed.

python -m python_tests.finetune.dist_child ddp,fsdp,... FOLDER   (writes FOLDER/ddp/out.pt, ...)
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from python_tests.finetune.small import adamw, batch, pruned
from sparsekern.finetune import Magnitude, Masked

STEPS, LONG, WORLD = 6, 2000, 2


def run(model, masked, optimizer, rank, world, device, steps=STEPS):
    """Violations; of a long run, in all looks at it, with clipping."""
    wrong = 0
    for step in range(steps):
        x, y = (t.to(device) for t in batch(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rank::world]), y[rank::world]).backward()
        if steps == LONG:
            masked.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            wrong += masked.check() if step % 100 == 0 else 0
        optimizer.step()
    return wrong + masked.check()


def schedule_of(kind):
    return Magnitude(every=2, freeze_at=4) if "moving" in kind else None


def worker(rank, kind, folder):
    torch.set_num_threads(1)
    cuda = kind.endswith("cuda")
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
    )
    model = pruned().to(device)
    steps = LONG if "long" in kind else STEPS
    schedule = schedule_of(kind)
    if kind.startswith("ddp"):
        masked = Masked(model, schedule=schedule)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = masked.attach(adamw(wrapped))
        wrong = run(wrapped, masked, optimizer, rank, WORLD, device, steps)
        weights = {n: p.detach() for n, p in model.named_parameters()}
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        masked = Masked(model, schedule=schedule)  # before sharding: it sees whole weights
        mesh = init_device_mesh(device.type, (WORLD,))
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = masked.attach(adamw(model))
        wrong = run(model, masked, optimizer, rank, WORLD, device, steps)
        weights = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    state = masked.state_dict()
    masked.load_state_dict(state)
    wrong += masked.check()
    weights = {name: weight.cpu() for name, weight in weights.items()}
    if rank == 0:
        torch.save(
            {"weights": weights, "wrong": wrong, "state": state, "steps": masked.step},
            folder / "out.pt",
        )


def workers(rank, kinds, folder):
    for kind in kinds.split(","):
        inside = Path(folder, kind)
        inside.mkdir(exist_ok=True)
        worker(rank, kind, inside)
        # Only now, without the model: DDP's reducer, as the last owner of a group of gloo, would
        # wait for its threads and hold the interpreter's lock that they end with.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(workers, args=(sys.argv[1], sys.argv[2]), nprocs=WORLD)
