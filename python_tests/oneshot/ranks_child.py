"""Ranks that prune together, each a fork of this process, for test_ranks.py.

python -m python_tests.oneshot.ranks_child FOLDER WORLD:CASE,CASE,... ...

The cases of each argument run in one group of WORLD ranks; rank r writes FOLDER/CASE-r.pt, what the
case returns.
"""

import contextlib
import copy
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from python_tests.oneshot.driver_models import build, plain, tokens
from sparsekern.oneshot import run as run_module
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.prune import hessian as hessian_module
from sparsekern.prune import magnitude_mask
from sparsekern.prune import team as team_module

OPTIONS = {"progress": False, "batch_size": 2, "skip": ()}
GPU = bool(os.environ.get("RANKS_ON_GPU"))


def device():
    return torch.device("cuda", dist.get_rank()) if GPU else torch.device("cpu")


def pruned(model, data, method="sparsegpt", **options):
    """The state and the report's rows of a run over all ranks; rank 0 adds those of one process."""
    alone = copy.deepcopy(model)
    knobs = {**OPTIONS, "device": device(), **options}
    report = prune_model(model, method, data, **knobs)
    found = {"got": state(model), "rows": rows(report), "fits": fits(report)}
    if dist.get_rank() == 0:
        report = prune_model(alone, method, data, **knobs, ranks=False)
        found |= {"expected": state(alone), "expected_rows": rows(report)}
        found["expected_fits"] = fits(report)
    return found


def rows(report):
    return [(r.name, r.relative_error, r.is_24, r.tokens, r.reason) for r in report.layers]


def fits(report):
    return [(fit["before"], fit["after"]) for fit in report.reconstruction]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def padded():
    ids, mask = tokens(), torch.ones(6, 20, dtype=torch.int64)
    mask[1, 12:], mask[4, :3], mask[5, 5:] = 0, 0, 0
    return [(ids, mask)]


def uneven():
    """Five batches, the last of one row."""
    return tokens(samples=9)


@contextlib.contextmanager
def splitting():
    """Ranks solve every group together, four rows at a time; one process takes so many, too."""
    before = run_module.divided, team_module.ROWS
    shared = []

    def divided(costs, world, least):
        shared.append(len(costs) * math.isfinite(least))
        return [None for _ in costs]

    run_module.divided, team_module.ROWS = divided, 4
    try:
        yield shared
    finally:
        run_module.divided, team_module.ROWS = before


def together(*arguments, **options):
    with splitting() as shared:
        return pruned(*arguments, **options) | {"shared": shared}


def together_masked(folder):
    """Masks that are given for some of the layers."""
    model = build()
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qo"]
    masks = {n: magnitude_mask(model.get_submodule(n).weight.detach()) for n in names}
    return together(model, uneven(), "admm", masks=masks)


def failing(rank, block, kind=RuntimeError):
    """prune_group that fails on one rank, in one block."""
    before = run_module.prune_group

    def solve(layers, hessian, options):
        if dist.get_rank() == rank and layers[0].block == block:
            raise kind("no luck")
        return before(layers, hessian, options)

    return solve


def with_failure(model, folder=None, rank=1, block=1):
    """The error of a run in which one rank fails."""
    before = run_module.prune_group
    run_module.prune_group = failing(rank, block)
    try:
        undo = {"undo": True} if folder is None else {"resume": folder}
        prune_model(model, "sparsegpt", uneven(), **OPTIONS, device="cpu", **undo)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    finally:
        run_module.prune_group = before
    return "no error"


def case_failure(folder):
    model = build()
    before = state(model)
    text = with_failure(model)
    return {"error": text, "got": state(model), "expected": before}


def case_resumed(folder):
    path = folder / "resume"
    text = with_failure(build(), path, rank=0)
    model, alone, other = build(), build(), build()
    knobs = {**OPTIONS, "device": "cpu", "resume": path}
    resumed = prune_model(model, "sparsegpt", uneven(), **knobs).resumed
    files = sorted(p.name for p in path.iterdir())
    prune_model(alone, "sparsegpt", uneven(), **{**knobs, "resume": None}, ranks=False)
    try:
        prune_model(other, "sparsegpt", tokens(seed=4), **knobs)
        refused = "no error"
    except (ValueError, RuntimeError) as error:
        refused = str(error)
    return {
        "error": text,
        "got": state(model),
        "expected": state(alone),
        "resumed": resumed,
        "files": files,
        "refused": refused,
    }


def refusal(model, data, **options):
    try:
        prune_model(model, "sparsegpt", data, **{**OPTIONS, "device": "cpu", **options})
    except (ValueError, RuntimeError) as error:
        return {"error": str(error)}
    return {"error": "none"}


def case_killed(folder):
    """Rank 1 dies while it solves a group."""
    before = run_module.prune_group
    if dist.get_rank() == 0:
        return refusal(build(), uneven())
    torch.save({"error": "killed"}, folder / "killed-1.pt")

    def die(layers, hessian, options):
        if layers[0].block == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(layers, hessian, options)

    run_module.prune_group = die
    return refusal(build(), uneven())


def case_command(folder):
    """The command line, in the environment that torchrun makes, from the files block by block."""
    from sparsekern.cli import main, prune
    from sparsekern.eval import texts

    prune.needed = lambda tokenizer, path: object()
    texts.read_rows = lambda source, split: ["text"]
    texts.tokenize = lambda tokenizer, text: tokens(1, 4000)[0]
    given = f"prune {folder}/dense --samples 5 --window 32 --batch-size 2 --quiet --device cpu"
    codes = [main.main([*given.split(), "--out", f"{folder}/two", "--stream"])]
    rank = os.environ["RANK"]
    if rank == "0":
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        codes.append(main.main([*given.split(), "--out", f"{folder}/one"]))
    return {"error": codes, "initialised": dist.is_initialized()}


def case_absent(folder):
    """Rank 1 does not call."""
    if dist.get_rank():
        while not (folder / "absent-0.pt").exists():
            time.sleep(0.01)
        return {"error": "absent"}
    os.environ["SPARSEKERN_RANK_TIMEOUT"] = "1"
    return refusal(build(), uneven())


def experts(folder):
    """Two passes of Hessians, and experts that see few tokens."""
    from python_tests.nn.expert_models import build as mixture
    from python_tests.nn.expert_models import ids

    return pruned(mixture("mixtral", num_hidden_layers=1), list(ids(5, 8).split(2)))


# Every row of five batches, the last of which is one row: cut, and not.
TRAINED = {"preset": "default", "reconstruct": {"epochs": 3}, "permute": {"rounds": 1}}
TRAINED |= {"compress": False}
CASES = {
    "sparsegpt": lambda folder: pruned(build(), uneven()),
    "published": lambda folder: pruned(build("gpt2"), uneven(), refine=0, match_dense=0.0),
    "padding": lambda folder: pruned(build("opt"), padded(), "wanda", true_sequential=True),
    "permuted": lambda folder: pruned(build(), uneven(), "admm", permute={"rounds": 1}),
    "together": lambda folder: together(build(), uneven(), "admm"),
    "together-masked": together_masked,
    "magnitude": lambda folder: pruned(
        build("qwen3"), None, "magnitude", compress=False, batch_size=None
    ),
    "levels": lambda folder: pruned(build(), uneven(), quantize="int8"),
    "whole": lambda folder: pruned(plain(), [torch.randn(3, 5, 16) for _ in range(3)]),
    "many": lambda folder: pruned(build(), tokens(samples=5)),
    "rotated": lambda folder: pruned(
        build(tie_word_embeddings=True), uneven(), rotate={"steps": 4}, untie=True
    ),
    "experts": experts,
    "failure": case_failure,
    "resumed": case_resumed,
    "other-data": lambda folder: refusal(build(), tokens(seed=dist.get_rank())),
    "other-weights": lambda folder: refusal(build(seed=dist.get_rank()), uneven()),
    "reconstruct": lambda folder: refusal(build(), uneven(), reconstruct={"span": None}),
    "trained": lambda folder: pruned(build(), uneven(), None, **TRAINED),
    "trained-levels": lambda folder: pruned(build(), uneven(), None, **TRAINED, quantize="int8"),
    # At the rate of its own large weights rounding grows to 2.1 %.
    "trained-padding": lambda folder: together(
        build("opt"), padded(), None, **(TRAINED | {"reconstruct": {"epochs": 3, "lr": 6e-4}})
    ),
    "absent": case_absent,
    "killed": case_killed,
    "command": case_command,
}


def work(rank, world, folder, cases, port):
    # Several blocks in each Hessian.
    hessian_module._CPU_COLUMNS = hessian_module._GPU_COLUMNS = 16
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if GPU:
        torch.cuda.set_device(rank)
    if cases == ["command"]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:
        backend, where = "nccl" if GPU else "gloo", f"file://{folder}/rendezvous-{cases[0]}"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=world)
    for case in cases:
        torch.manual_seed(0)
        torch.save(CASES[case](folder), folder / f"{case}-{rank}.tmp")
        os.replace(folder / f"{case}-{rank}.tmp", folder / f"{case}-{rank}.pt")


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def forked(world, folder, cases):
    """Fork the ranks; the exit code is that of the worst. With GPUs they are started anew."""
    children, port = [], free_port()
    if GPU:
        torch.multiprocessing.spawn(work, args=(world, folder, cases, port), nprocs=world)
        return 0
    for rank in range(world):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(rank, world, folder, cases, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def main(folder, *groups):
    """One group of ranks after the other."""
    torch.set_num_threads(1)
    folder = Path(folder)
    build(layers=3).to(torch.bfloat16).save_pretrained(folder / "dense")
    worst = 0
    for group in groups:
        world, cases = group.split(":")
        worst = max(worst, forked(int(world), folder, cases.split(",")))
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
