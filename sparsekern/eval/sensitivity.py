"""What pruning each part of a model costs, and which layers to leave dense under a budget.

    mode "add"     one part pruned in the dense model: what it does alone
    mode "leave"   one part dense in the pruned model: what leaving it dense would win, which is
                   what a skip list is made of; errors of the other parts are there

A part is a layer, a type of layer in all blocks, or a block. Each row has the perplexity of the
text, KL(dense ‖ model) per token in nats, and the layer-wise error. Rows are appended to a file of
JSON lines, so that an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import FormatError, check
from sparsekern.eval.perplexity import check_model, logits_of, windows_of
from sparsekern.nn.replace import dense_weight, write_weight
from sparsekern.nn.wrappers import named_modules, whole
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot.calibration import digest, make_batches
from sparsekern.oneshot.devices import check_changeable, quiet, working_device
from sparsekern.oneshot.discovery import Layer
from sparsekern.oneshot.executor import calibrate
from sparsekern.oneshot.experts import with_experts_apart
from sparsekern.oneshot.layerwise import Options, prune_group
from sparsekern.oneshot.presets import find_preset
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.selection import select
from sparsekern.oneshot.skip import DEFAULT_RULE
from sparsekern.prune.methods import find_method
from sparsekern.utils.arguments import checked
from sparsekern.utils.files import write_atomic

OP = "sparsekern.sensitivity"
SCHEMA = 1
UNITS, MODES = ("layer", "type", "block"), ("leave", "add")
CACHED = 2**32  # bytes of the dense model's logits that may stay in memory


@dataclass
class Row:
    """One part of the model.

    name: of the layer, the type ("mlp.down_proj") or the block ("block 3").
    layers: names of its linear layers.      weights: how many weights they have.
    error: mean of ‖(W − W')X‖² / ‖WX‖² over them.
    perplexity, kl: of the text with this part pruned ("add") or dense ("leave").
    effect: of the part on kl, nats per token: what pruning it adds, or leaving it dense takes away.
    extra_us: time that it takes longer dense than 2:4, where times were measured.
    """

    name: str
    layers: list[str]
    weights: int
    error: float | None
    perplexity: float
    kl: float
    effect: float
    extra_us: float | None = None


@dataclass
class SensitivityReport:
    """All rows, in the order of the model.

    by, mode: as called.      dense: perplexity of the dense model.
    base, base_kl: of what the rows change: the dense model, or the pruned one.
    weights: of all layers that are pruned.      settings: what else decides the numbers.
    """

    by: str
    mode: str
    dense: float
    base: float
    base_kl: float
    weights: int
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def ranked(self) -> list[Row]:
        """Rows by effect, largest first."""
        return sorted(self.rows, key=lambda row: -row.effect)

    def skip_list(
        self,
        *,
        share: float | None = None,
        perplexity: float | None = None,
        milliseconds: float | None = None,
    ) -> list[str]:
        """Layers to leave dense: those of largest effect per weight (or per microsecond), as many
        as the budget allows.

        Args: one of
            share: of the weights that would be pruned, 0 to 1.
            perplexity: as few weights as bring the text's perplexity to it, if the effects on its
                logarithm add up: an estimate. mode "leave" only.
            milliseconds: that the model may take longer per step than all 2:4, summed over the
                numbers of tokens that were timed.
        Returns:
            names for prune_model(skip=), in the order of the choice.
        Raises:
            ValueError: not one budget; no times; a perplexity that all parts together do not reach.
        """
        op = "sparsekern.SensitivityReport.skip_list"
        given = [v for v in (share, perplexity, milliseconds) if v is not None]
        check(len(given) == 1, op, "one of share, perplexity and milliseconds", f"{len(given)}")
        positive = type(given[0]) in (int, float) and math.isfinite(given[0]) and given[0] > 0
        check(positive, op, "a positive budget", repr(given[0]))
        check(share is None or share <= 1, op, "share, at most 1", repr(share), "10 % is 0.1.")
        timed = milliseconds is not None
        if timed:
            missing = [row.name for row in self.rows if row.extra_us is None]
            check(not missing, op, "times of every part", "none", "Pass time_tokens= to it.")
        if perplexity is not None:
            check(self.mode == "leave", op, 'mode="leave" with perplexity', self.mode)

        def cost(row: Row) -> float:
            return max(1e-9, cast(float, row.extra_us)) if timed else float(row.weights)

        useful = [row for row in self.rows if row.effect > 0]
        useful.sort(key=lambda row: -row.effect / cost(row))
        budget = math.inf
        if share is not None:
            budget = share * self.weights
        elif milliseconds is not None:
            budget = 1000 * milliseconds
        spent, log, chosen = 0.0, math.log(self.base), list[str]()
        for row in useful:
            if perplexity is not None and log <= math.log(perplexity):
                break
            if spent + cost(row) > budget:
                continue
            spent += cost(row)
            log -= math.log(self.base) - math.log(row.perplexity)
            chosen += row.layers
        if perplexity is not None:
            reached = log <= math.log(perplexity)
            best = f"{math.exp(log):.4g} with all of them"
            check(reached, op, f"parts that bring the perplexity to {perplexity:g}", best)
        return chosen

    def save_skip(self, path: str | os.PathLike[str], **budget: float) -> list[str]:
        """Write skip_list(**budget) to a JSON file that prune_model(skip=path) takes; the head is
        in it. Returns the list."""
        names = self.skip_list(**budget)
        content = {"skip": [DEFAULT_RULE, *names], "budget": budget, "by": self.by}
        content |= {"mode": self.mode, "settings": self.settings}
        write_atomic(path, json.dumps(content, indent=1).encode())
        return names

    def table(self, most: int | None = None) -> str:
        """The rows by effect, and the model's own numbers."""
        head = ("part", "weights", "error", "perplexity", "KL", "effect", "us")
        rows = [head]
        for row in self.ranked()[:most]:
            error = "" if row.error is None else f"{row.error:.4f}"
            extra = "" if row.extra_us is None else f"{row.extra_us:.2f}"
            share = f"{row.weights / max(1, self.weights):.2%}"
            numbers = (f"{row.perplexity:.3f}", f"{row.kl:.4f}", f"{row.effect:+.4f}")
            rows.append((row.name, share, error, *numbers, extra))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))
            )
            for r in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        what = "pruned in the dense model" if self.mode == "add" else "dense in the pruned model"
        last = f"each {self.by} {what}; perplexity {self.dense:.3f} dense, {self.base:.3f} before"
        return "\n".join([*(line.rstrip() for line in lines), "", f"{last}, KL {self.base_kl:.4f}"])

    __str__ = table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the effects: over the blocks, one line per type of layer, or as bars.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            text = f"{OP}: matplotlib is missing. pip install matplotlib."
            raise ImportError(text) from error
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        if self.by == "layer":
            lines: dict[str, list[tuple[int, float]]] = {}
            for position, row in enumerate(self.rows):
                block, kind = _place(row.name)
                where = position if block is None else block
                lines.setdefault(kind, []).append((where, row.effect))
            for kind, points in sorted(lines.items()):
                axes.plot(*zip(*sorted(points)), marker=".", linewidth=1, label=kind)
            axes.legend(fontsize="small")
            axes.set_xlabel("block")
        else:
            axes.bar([row.name for row in self.rows], [row.effect for row in self.rows])
            axes.tick_params(axis="x", rotation=60)
        axes.set_ylabel("effect on KL(dense ‖ model), nats per token")
        axes.set_title(f"each {self.by}, mode {self.mode}")
        axes.grid(alpha=0.3)
        figure.savefig(os.fspath(path))


@checked(OP, window=(2, 10**9), windows=(1, 10**9))
@quiet
@with_experts_apart
def sensitivity(
    model: nn.Module,
    data: Any,
    text: Any,
    *,
    by: str = "layer",
    mode: str = "leave",
    method: str = "sparsegpt",
    skip: Any = (DEFAULT_RULE,),
    targets: Any = None,
    window: int = 1024,
    windows: int = 8,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    time_tokens: Sequence[int] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> SensitivityReport:
    """Error, perplexity and KL against the dense model for each part of it. The model itself is
    not changed.

    Args:
        model: a dense Transformers causal language model.
        data: calibration, as in prune_model.
        text: token ids to evaluate, as in perplexity, other than the calibration.
        by: "layer", "type" (of layer, over all blocks) or "block".
        mode: "leave" one part dense in the pruned model, or "add" one to the dense model.
        method, skip, targets, batch_size: as in prune_model; what is skipped is no part.
        window, windows: of the text, from its start: windows of `window` tokens side by side.
        device: where the models run; None: CUDA if there is one, else where the model is.
        time_tokens: numbers of tokens for which dense and 2:4 layers are timed on the device.
        out: a .jsonl file: rows are appended as they come, and a sweep of the same arguments goes
            on from it.
        **options: of prune_model in mode "leave" (refine, match_dense, ...), of the method in mode
            "add".
    Returns:
        SensitivityReport.
    Raises:
        ValueError: arguments that do not fit; a file of another sweep.
        FormatError: a file that is no sweep.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    check(by in UNITS, OP, f"by in {UNITS}", repr(by))
    check(mode in MODES, OP, f"mode in {MODES}", repr(mode))
    model = whole(OP, model)
    check_changeable(OP, model)
    for count in time_tokens or ():
        check(type(count) is int and count > 0, OP, "time_tokens > 0, whole numbers", repr(count))
    check(window > 1 and windows > 0, OP, "window > 1 and windows > 0", f"{window}, {windows}")
    rows = windows_of(OP, "text", model, text, window)[:windows]
    target = working_device(OP, model, device)
    data = list(data) if isinstance(data, Iterator) else data
    batches = make_batches(data, model, batch_size, target, None, OP)
    manifest = {
        "sensitivity": SCHEMA,
        "weights": fingerprint.of_model(model),
        "data": digest(batches),
        "text": fingerprint.of_tensors([("text", rows)]),
        "by": by,
        "mode": mode,
        "method": method,
        "skip": str(skip),
        "targets": str(targets),
        "options": json.loads(json.dumps(options, default=str)),
    }
    stored = _Stored(out, manifest)
    knobs: dict[str, Any] = {"skip": skip, "targets": targets, "device": target}
    dense = {
        layer.name: layer for layer in select(model, skip, (2, 4), False, targets=targets).active
    }
    if mode == "add":
        work = copy.deepcopy(model)
        pruned, errors = _pruned_alone(model, data, method, batch_size, options, knobs)
    else:
        work, pruned, errors = _pruned_together(model, data, method, batch_size, options, knobs)
    layers = [layer for name, layer in dense.items() if name in pruned]
    remedy = "Pass a dense model, and rules that leave some."
    check(bool(layers), OP, "layers that can be pruned", "none", remedy)
    evaluate = _Evaluator(model, rows, target)
    dense_value, _ = evaluate(model)
    work.to(target)
    base, base_kl = evaluate(work)
    total = sum(layer.weight.numel() for layer in layers)
    settings = {"method": method, "window": window, "windows": len(rows), **manifest["options"]}
    report = SensitivityReport(by, mode, dense_value, base, base_kl, total, settings=settings)
    extra = _times(layers, time_tokens, target)
    modules = dict(named_modules(work))
    for name, members in tqdm(_parts(layers, by).items(), OP, unit=by, disable=not progress):
        names = [layer.name for layer in members]
        known = stored.rows.get(name)
        if known is None:
            for layer in members:
                new = pruned[layer.name] if mode == "add" else layer.weight
                write_weight(modules[layer.name], new)
            value, kl = evaluate(work)
            for layer in members:
                old = layer.weight if mode == "add" else pruned[layer.name]
                write_weight(modules[layer.name], old)
            known = {"name": name, "perplexity": value, "kl": kl}
            stored.add(known)
        found = [e for e in (errors.get(n) for n in names) if e is not None]
        effect = known["kl"] - base_kl if mode == "add" else base_kl - known["kl"]
        report.rows.append(
            Row(
                name,
                names,
                sum(layer.weight.numel() for layer in members),
                sum(found) / len(found) if found else None,
                known["perplexity"],
                known["kl"],
                effect,
                None if extra is None else sum(extra[n] for n in names),
            )
        )
    return report


def _pruned_alone(
    model: nn.Module,
    data: Any,
    method: str,
    batch_size: int | None,
    options: dict[str, Any],
    knobs: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """Each layer pruned on the dense model's inputs: name -> weight on the host, and error."""
    chosen = find_method(OP, method)
    values = chosen.values(OP, options)
    wanted = Options(chosen, values=values, refine=chosen.refine, on_error="skip", op=OP)
    weights: dict[str, Tensor] = {}
    errors: dict[str, float | None] = {}
    for group in calibrate(model, data, batch_size=batch_size, **knobs):
        for done in prune_group(group.layers, group.hessian, wanted):
            if done.weight is not None:
                weights[done.layer.name] = done.weight.to("cpu")
                errors[done.layer.name] = done.report.relative_error
    return weights, errors


def _pruned_together(
    model: nn.Module,
    data: Any,
    method: str,
    batch_size: int | None,
    options: dict[str, Any],
    knobs: dict[str, Any],
) -> tuple[nn.Module, dict[str, Tensor], dict[str, float | None]]:
    """(the pruned copy, name -> its weight, errors)."""
    work = copy.deepcopy(model)
    preset = find_preset(OP, options.get("preset"))
    for name, step, asked in (
        ("rotate", "rotation", preset.rotate),
        ("permute", "permutation", preset.permute),
    ):
        given = options.get(name)
        asked = bool(asked if given is None else given)
        remedy = f"Call sparsekern.{name} first, take that model as the dense one, and pass "
        check(not asked, OP, f"no {step}", "one", f"{remedy}{name}=False.")
    report = prune_model(
        work,
        method,
        data,
        compress=False,
        batch_size=batch_size,
        progress=False,
        undo=False,
        **knobs,
        **options,
    )
    modules = dict(named_modules(work))
    found = {row.name: row for row in report.pruned}
    weights = {name: dense_weight(modules[name]).to("cpu", copy=True) for name in found}
    return work, weights, {name: row.relative_error for name, row in found.items()}


class _Evaluator:
    """(perplexity, KL) of a model on rows of a text, against the dense model's logits."""

    def __init__(self, dense: nn.Module, rows: Tensor, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.known: list[Tensor] = []
        dense = copy.deepcopy(dense).to(device)
        self.dense: nn.Module | None = dense
        check_model(OP, dense, rows[:1].to(device), self._kwargs(dense), causal=False)
        for row in rows:
            logits = self._logits(dense, row)
            if logits.numel() * logits.element_size() * len(rows) > CACHED:
                return
            self.known.append(logits)
        self.dense = None

    @staticmethod
    def _kwargs(model: nn.Module) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(model, "config") else {}

    @torch.no_grad()
    def _logits(self, model: nn.Module, row: Tensor) -> Tensor:
        ids = row[None].to(self.device)
        return cast(Tensor, logits_of(OP, model, ids, self._kwargs(model)))[0]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> tuple[float, float]:
        here = next(model.parameters()).device
        model.to(self.device)
        flags = [(module, module.training) for module in model.modules()]
        model.eval()
        losses, kls = 0.0, 0.0
        try:
            for i, row in enumerate(self.rows):
                logits = self._logits(model, row).float().log_softmax(-1)
                goal = row[1:].to(self.device)
                losses += float(nn.functional.nll_loss(logits[:-1], goal).double())
                wanted = self.known[i] if self.dense is None else self._logits(self.dense, row)
                wanted = wanted.float().log_softmax(-1)
                kls += float((wanted.exp() * (wanted - logits)).sum(-1).mean().double())
        finally:
            for module, flag in flags:
                module.training = flag
            model.to(here)
        mean = losses / len(self.rows)
        return math.exp(mean) if mean < 709 else math.inf, max(0.0, kls / len(self.rows))


def _parts(layers: Sequence[Layer], by: str) -> dict[str, list[Layer]]:
    """Name of a part -> its layers."""
    parts: dict[str, list[Layer]] = {}
    for layer in layers:
        kind = _place(layer.name)[1]
        if by == "layer" or layer.block is None:
            name = layer.name
        else:
            name = kind if by == "type" else f"block {layer.block}"
        parts.setdefault(name, []).append(layer)
    return parts


def _place(name: str) -> tuple[int | None, str]:
    """(block, name below it) of a layer: "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj")."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1 :])
    return None, name


def _times(
    layers: Sequence[Layer], tokens: Sequence[int] | None, device: torch.device
) -> dict[str, float] | None:
    """Name -> microseconds that the layer takes longer dense, summed over the tokens."""
    if tokens is None:
        return None
    times = dense_rule.measure(layers, tuple(tokens), device)
    found = {}
    for layer in layers:
        dense, sparse = times[dense_rule.key(layer)]
        found[layer.name] = dense - sparse
    return found


class _Stored:
    """The rows of an earlier sweep in a file, and a place for new ones."""

    def __init__(self, path: str | os.PathLike[str] | None, manifest: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        first = json.dumps(manifest)
        if not self.path.exists() or not self.path.stat().st_size:
            write_atomic(self.path, (first + "\n").encode())
            return
        check(self.path.is_file(), OP, f"{self.path} to be a file", "none", "Give another.")
        try:
            *whole, rest = self.path.read_text(encoding="utf-8").split("\n")
            known = json.loads(whole[0]) if whole else None
            found = [json.loads(line) for line in whole[1:]]
            numbers = ("perplexity", "kl")
            self.rows = {
                row["name"]: {"name": row["name"], **{key: float(row[key]) for key in numbers}}
                for row in found
            }
        except (ValueError, KeyError, TypeError) as error:
            text = f"{OP}: {self.path} is no file of a sweep ({error}). Give another."
            raise FormatError(text) from error
        if not isinstance(known, dict) or "sensitivity" not in known:
            raise FormatError(f"{OP}: {self.path} is no file of a sweep. Give another.")
        keys = [k for k in {**known, **manifest} if known.get(k) != manifest.get(k)]
        expected = f"{self.path} to be of a sweep with the same arguments"
        check(not keys, OP, expected, f"other {', '.join(keys)}", "Give another file.")
        if rest:  # a line that was being written when the sweep was killed
            write_atomic(self.path, ("\n".join(whole) + "\n").encode())

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
