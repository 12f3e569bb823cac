"""LoRA by peft on a compressed 2:4 model against LoRA on the same weights stored dense with zeros.

    python -m bench lora --gguf SmolLM2-135M-Instruct.Q4_1.gguf \\
        --train c4.utf8,wiki.utf8,code.utf8,technical.utf8 --held-out c4.utf8,code.utf8 \\
        --test wiki.test.raw --calibration c4.utf8

The model is pruned once (--start), and every layer that is 2:4 then is adapted, in three arms:

    sparse   adapters on SparseLinear, sparsekern.integrations.peft
    dense    peft's own on nn.Linear with the same numbers and zeros
    masked   as sparse, with (B·A)∘M trained (masked_product=True), of which a merge loses nothing

The base is in bfloat16 and frozen, the adapters are float32, matmuls are under autocast (on a CPU
all is float32); adapters begin with the same numbers, which is checked, and see the same rows in
the same order at the same rates. The first arm takes --steps, or as many as --seconds allow, and
the others do what it did. The loss is bench finetune's: the teacher's distribution, and --alpha of
cross-entropy (--alpha 1: no teacher). `ms_per_step` leaves out the first three; it and `peak_gb`
are with the teacher, which is the same in all arms.

Then sparse and masked are merged (2:4 kept, verified) and evaluated again. `merge_logits` is the
largest difference that merging makes to a logit, over --check-tokens of the test, all in float32:
of the adapters as trained and weights not rounded ("exact"), and with the merged weights in the
base's dtype ("stored"), which the dense arm has to do, too. An exact difference of the masked arm
above 1e-3 of the largest logit is a failure. The plain adapters lose what lies outside the mask;
`merge_lost` is the share, ‖(1 − M)∘ΔW‖² / ‖ΔW‖², of the worst layer.

Perplexities as bench finetune has them, in float32 from the numbers as they are stored.
One record when all arms are done, or of sparse and dense when the process is asked to end, or
reaches --limit-seconds, in the third; a missing arm is named in `check`.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern import SparseLinear
from sparsekern.cli.finetune import densify
from sparsekern.finetune import data
from sparsekern.finetune.loop import Step
from sparsekern.finetune.losses import Target
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.recipe import Recipe
from sparsekern.finetune.teacher import LiveTeacher, Split, compiled

from .options import Run, Watch, parser, told, watchdog
from .recovery import STARTS, Evaluated, Material, add_options, finite, shown, synchronise

ARMS = ("sparse", "dense", "masked")
PARTS = ("train", "evaluation", "merge")  # of an arm, as phases
WARM = 3  # steps that do not count for the time of one
EXACT = 1e-3  # of the largest logit, that merging what was trained under the mask may change


def make_parser():
    result = parser("lora", "LoRA on a compressed model against the dense one.", budget=420)
    add_options(result, teacher_seconds=0.0)
    result.add_argument("--start", default="sparsegpt", choices=STARTS)
    result.add_argument("--arms", default=",".join(ARMS), metavar="NAME,...")
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--lora-alpha", type=float, help="default: twice the rank")
    result.add_argument("--steps", type=int, default=200)
    result.add_argument("--seconds", type=float, default=60.0, help="of the first arm (default 60)")
    result.add_argument("--lr", type=float, default=1e-3, help="highest rate (default 1e-3)")
    result.add_argument("--eval-windows", type=int, default=0, help="of each text; 0: all")
    result.add_argument("--check-tokens", type=int, default=1024)
    return result


def main(path, arguments=()) -> int:
    options = make_parser()
    args = options.parse_args(list(arguments))
    args.arms = args.arms.split(",")
    if args.arms[:2] != list(ARMS[:2]) or set(args.arms) - set(ARMS):
        options.error("argument --arms: sparse,dense or sparse,dense,masked")
    if args.steps < 1 or not args.seconds > 0:
        options.error("arguments --steps, --seconds: above 0")
    if not (args.gguf or args.model):
        print("bench lora: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    import sparsekern.integrations.peft  # noqa: F401  (says now that peft is missing)

    run = Run(path, args)
    adaptation = Adaptation(run, args)
    watch = Watch(run, args.limit_seconds, adaptation.rescue)
    with watchdog((args.limit_seconds or args.budget) + 300), watch:
        code = adaptation.measure()
    run.close()
    return code


@dataclass
class Arm:
    """What one arm did.

    weight_bytes: of the model with its adapters.      losses: of every step.
    ms_per_step: milliseconds, without the first WARM steps.      peak_gb: GB; None on a CPU.
    after, merged: perplexities.      lost: share of the adapters that merging lost.
    logits: "exact", "stored": largest change of a logit by merging; "largest": of them all.
    """

    weight_bytes: int
    losses: list[float] = field(default_factory=list)
    ms_per_step: float = math.nan
    peak_gb: float | None = None
    after: Evaluated = field(default_factory=Evaluated)
    merged: Evaluated | None = None
    lost: float | None = None
    logits: dict[str, float] = field(default_factory=dict)


class Adaptation(Material):
    """One start, its arms, one record."""

    arms: dict[str, Arm]
    concluded = False

    def rescue(self, why: str) -> None:
        """The record of the arms that are done, where those are sparse and dense."""
        if not self.concluded and set(ARMS[:2]) <= getattr(self, "arms", {}).keys():
            self.say(f"{why}: recorded as far as it came")
            self.conclude()

    def measure(self) -> int:
        run, args = self.run, self.args
        self.prepare(args.eval_windows)
        with run.phase("prune"), told(run):
            student, self.seconds_prune = self.prune(args.start)
        with run.phase("start's evaluation"):
            self.begun = self.evaluate(student, args.eval_windows)
            self.say(f"{args.start}: {shown(self.begun.values())}")
        student.requires_grad_(False).eval().to("cpu", self.bf16 or torch.float32)
        self.recipe = Recipe(
            steps=args.steps,
            batch=args.batch,
            micro_batch=args.micro_batch,
            lr=args.lr,
            alpha=args.alpha,
            compile=args.compile,
            seed=args.seed,
        )
        self.live: LiveTeacher | None = None
        if args.alpha < 1:
            self.live = LiveTeacher(
                self.teacher, run.device, autocast=self.bf16, compile=args.compile
            )
        else:
            self.teacher.cpu()
        self.masks = masks_of(student)
        self.rates: list[float] = []  # of the steps, as the first arm had them
        self.arms = {}
        with torch._dynamo.config.patch(recompile_limit=64):
            for name in args.arms:
                need = 2.0 * sum(run.phases.get(f"{part}: sparse", 0.0) for part in PARTS)
                if name == "masked" and run.left < need:
                    self.say(f"masked: left out, {run.left:.0f} s of --budget for about {need:.0f}")
                    break
                self.arms[name] = self.one(name, student)
        return self.conclude()

    def one(self, name: str, student: Any) -> Arm:
        """Adapters on a copy of the start, trained, evaluated, merged."""
        run, count = self.run, self.args.eval_windows
        model, named = self.adapted(name, student)
        kept = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
        arm = Arm(weight_bytes=sum(kept.values()))
        with run.phase(f"train: {name}"):
            self.train(arm, model, list(named.values()))
        self.say(f"{name}: {len(arm.losses)} steps, {arm.ms_per_step:.1f} ms each, loss "
                 f"{arm.losses[0]:.4f} to {arm.losses[-1]:.4f}")  # fmt: skip
        with run.phase(f"evaluation: {name}"):
            arm.after = self.evaluate(model, count)
            self.say(f"{name}: {shown(arm.after.values())}")
        with run.phase(f"merge: {name}"):
            self.merge(arm, name, model)
            if name != "dense":
                arm.merged = self.evaluate(model, count)
                self.say(f"{name}: merged {shown(arm.merged.values())}, lost {arm.lost:.3g}")
        self.say(f"{name}: merging changes logits by {arm.logits}")
        return arm

    def adapted(self, name: str, student: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        """(a copy of the start on the device with adapters in it, their parameters by name)."""
        import peft

        from sparsekern.integrations.peft import accept

        args, model = self.args, copy.deepcopy(student)
        alpha = 2 * args.rank if args.lora_alpha is None else args.lora_alpha
        config = peft.LoraConfig(
            r=args.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(self.masks)
        )
        if name != "dense":
            left = Masked(model).compress()
            if left:
                raise RuntimeError(f"bench lora: not compressed: {left}")
            config = accept(config, masked_product=name == "masked")
        torch.manual_seed(args.seed)
        wrapped = peft.get_peft_model(model, config)
        named = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        if {p.dtype for p in named.values()} != {torch.float32}:
            raise RuntimeError("bench lora: adapters are not float32")
        start = {n: p.detach().clone() for n, p in named.items()}
        if not self.arms:
            self.initial = start
        same = start.keys() == self.initial.keys()
        if not (same and all(torch.equal(start[n], p) for n, p in self.initial.items())):
            raise RuntimeError(f"bench lora: {name}: adapters begin with other numbers")
        base = wrapped.get_base_model()
        layers = dict(base.named_modules())
        for layer, mask in self.masks.items():
            weight = layers[layer].get_base_layer().weight
            dense = weight if name == "dense" else weight.to_dense()
            if not torch.equal(dense, student.get_submodule(layer).weight) or dense[~mask].any():
                raise RuntimeError(f"bench lora: {name}: {layer} is not the start's")
        return base.to(self.run.device), named

    def train(self, arm: Arm, model: Any, trained: list[torch.Tensor]) -> None:
        """The steps of one arm; the first one says how many, and at which rates."""
        args, recipe, device = self.args, self.recipe, self.run.device
        split = Split(model)
        body = compiled(split) if args.compile else split
        module = Step(split, body, recipe, self.bf16).train()
        optimizer = torch.optim.AdamW(
            trained, recipe.lr, recipe.betas, recipe.eps, 0.0, fused=device.type == "cuda"
        )
        first, losses = not self.arms, []
        rows = self.corpus.rows.to(device)
        gc.collect()  # the arm before
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = warm = time.perf_counter()
        spent, step, warmed = 0.0, 0, 0
        while step < (args.steps if first else len(self.rates)):
            if first:
                if step and spent >= args.seconds:
                    break
                share = max((step + 0.5) / args.steps, min(1.0, spent / args.seconds))
                self.rates.append(recipe.rate(share))
            optimizer.param_groups[0]["lr"] = self.rates[step]
            losses.append(self.step(module, optimizer, trained, rows, step))
            step += 1
            if step % 5 == 0 or step == WARM:
                synchronise(device)
                spent = time.perf_counter() - begin
            if step == WARM:
                warm, warmed = time.perf_counter(), step
        synchronise(device)
        if step == warmed:
            warm, warmed = begin, 0
        arm.ms_per_step = 1e3 * (time.perf_counter() - warm) / max(1, step - warmed)
        arm.losses = torch.stack(losses).tolist()
        if not all(map(math.isfinite, arm.losses)):
            raise RuntimeError("bench lora: the loss is not finite: lower --lr")
        if device.type == "cuda":
            arm.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        model.eval()

    def step(
        self, module: Step, optimizer: Any, trained: list[torch.Tensor], rows: Any, step: int
    ) -> torch.Tensor:
        """The mean loss of one step, on the device."""
        recipe, device = self.recipe, self.run.device
        numbers = data.batch_rows(rows.shape[0], recipe.batch, recipe.seed, step)
        parts = numbers.split(recipe.micro_batch or recipe.batch)
        batches = [rows[part.to(device)].long() for part in parts]
        empty: tuple[Target, list[torch.Tensor]] = (Target(), [])
        targets = [empty] * len(parts) if self.live is None else self.live.targets(batches, parts)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for ids, (target, theirs) in zip(batches, targets, strict=True):
            on, share = self.bf16 is not None, len(ids) / recipe.batch
            with torch.autocast(device.type, self.bf16, enabled=on):
                loss, _, _ = module(ids, target, theirs)
            (loss * share).backward()
            total += loss.detach() * share
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        return total

    def merge(self, arm: Arm, name: str, model: Any) -> None:
        """Merges the adapters of `model`, and says what that does to its logits."""
        exact = copy.deepcopy(model).cpu().float()
        before = self.logits(model)
        merge(exact, name)
        arm.lost = merge(model, name)
        for what, merged in (("exact", exact), ("stored", model)):
            arm.logits[what] = float((self.logits(merged) - before).abs().max())
        arm.logits["largest"] = float(before.abs().max())
        if name == "dense":
            return
        layers = dict(model.named_modules())
        for layer, mask in self.masks.items():
            weight = layers[layer].get_base_layer().weight
            sparsekern.verify(weight)
            if weight.to_dense().cpu()[~mask].any():
                raise RuntimeError(f"bench lora: {layer}: merged outside its mask")

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """Those of the test's first tokens, float32 [tokens, vocabulary], computed densely."""
        ids = next(iter(self.tests.values())).flatten()
        ids = ids[: min(self.args.check_tokens, self.args.eval_window)].unsqueeze(0)
        model = densify(copy.deepcopy(model)).float().to(self.run.device).eval()
        found = model(input_ids=ids.to(self.run.device), use_cache=False).logits[0]
        return found.float().cpu()

    def conclude(self) -> int:
        """The record of all arms."""
        run, args, arms = self.run, self.args, dict(self.arms)
        self.concluded = True
        metrics: dict[str, Any] = {}
        dense = arms["dense"].after.values()
        for test, value in self.dense.values().items():
            metrics[f"dense {test}"] = finite(value)
            metrics[f"start {test}"] = finite(self.begun.values()[test])
            for name, arm in arms.items():
                metrics[f"lora {name} {test}"] = finite(arm.after.values()[test])
                if arm.merged is not None:
                    metrics[f"merged {name} {test}"] = finite(arm.merged.values()[test])
            ratio = arms["sparse"].after.values()[test] / dense[test]
            metrics[f"ratio {test}"] = round(ratio, 5)
        for name, arm in arms.items():
            metrics[f"ms_per_step {name}"] = round(arm.ms_per_step, 2)
            metrics[f"weight_bytes {name}"] = arm.weight_bytes
            if arm.peak_gb is not None:
                metrics[f"peak_gb {name}"] = round(arm.peak_gb, 3)
            if arm.lost is not None:
                metrics[f"merge_lost {name}"] = float(f"{arm.lost:.4g}")
            for what in ("exact", "stored"):
                metrics[f"merge_logits {what} {name}"] = float(f"{arm.logits[what]:.4g}")
        tokens = len(self.rates) * args.batch * args.window
        metrics |= {"steps": len(self.rates), "tokens": tokens}
        layers = len(self.masks)
        check = f"{layers} layers, same start in all arms, 2:4 verified after merging"
        if missing := set(args.arms) - set(arms):
            check += f"; not run: {', '.join(sorted(missing))}"
        masked = arms.get("masked")
        if masked is not None and masked.logits["exact"] > EXACT * masked.logits["largest"]:
            self.say(f"FAILED: merging what was trained under the mask changes {masked.logits}")
            return 1
        part = f", the first {args.eval_windows} windows" if args.eval_windows else ""
        run.add(
            op="lora",
            backend=args.start,
            check=check,
            case=f"{self.case}, rank {args.rank}{part}",
            seed=args.seed,
            dtype="bfloat16" if self.bf16 else "float32",
            settings={
                **asdict(self.recipe),
                "rank": args.rank,
                "lora_alpha": args.lora_alpha or 2 * args.rank,
                "seconds": args.seconds,
                "calibration": args.calibration and Path(args.calibration).name,
                "calibration_samples": args.samples,
                "training_tokens": self.corpus.tokens,
                "sampled_tokens": self.made,
                "rows_left_out": self.dropped,
            },
            details={
                "sources": self.corpus.describe()["sources"],
                "overlap": self.overlap,
                "windows": {"all": self.dense.windows, "used": self.dense.used()},
                "seconds": {"prune": round(self.seconds_prune, 1)},
                "logits": {name: arm.logits for name, arm in arms.items()},
                "losses": {n: [round(v, 5) for v in arm.losses] for n, arm in arms.items()},
                "phases": run.phases,
            },
            metrics=metrics,
        )
        self.say(f"sparse over dense: {[v for k, v in metrics.items() if k.startswith('ratio')]}")
        return 0


def masks_of(student: Any) -> dict[str, torch.Tensor]:
    """Name -> mask of the layers that are 2:4 and can be compressed."""
    model, found = copy.deepcopy(student), {}
    Masked(model).compress()
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            found[name] = module.weight.mask()
    return found


def merge(model: Any, name: str) -> float | None:
    """Merge every adapter in place: the share that the masks took; None on dense layers."""
    from peft.tuners.lora.layer import LoraLayer

    from sparsekern.integrations import peft as ours

    if name != "dense":
        return ours.merge(model, quiet=True)
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            module.merge()
    return None
