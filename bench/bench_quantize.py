"""Perplexity of a 2:4 model whose kept weights are quantised, and of the wrong order.

    python -m bench quantize --gguf SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4.txt \\
        --eval wiki.test.raw

One mask: the model is pruned once by prune_model with its defaults, and every row "2:4, ..." below
is those weights, with the Hessians of that run, as levels. Rows:

    dense, 2:4               16 bits
    2:4, NAME METHOD         fp8, int8, int4 (groups of 128): nearest levels, or prune.gptq
    ..., x of NAME           their inputs as levels, too, a scale for each token (W8A8)
    one run                  prune_model(quantize=NAME): later blocks are calibrated on the levels
    NAME METHOD              the dense model quantised, not pruned
    NAME METHOD, then 2:4    the wrong order: that model pruned as above, and its kept weights put
                             back to the nearest levels of the scales that it has
    wanda, then int4; int4, then wanda      both orders of a method that leaves kept weights alone
    blocks, best             16 bits, presets "default" and "best": each block reconstructed in the
                             walk (the head gets a weight of its own for the rotation of "best")
    ..., NAME gptq           the same, each block's weights as levels once it is reconstructed
    ..., NAME trained        the same, and the block reconstructed once more, for as many epochs
                             again, through its levels
    ..., 16 bits twice       16 bits with as many epochs as that has altogether

Presets choose other masks, so `of_16_bit_2:4` of a row of theirs is relative to their own in 16
bits.

Calibration windows, evaluation in float32 and the text's protocol are those of `bench prune`. The
weights are evaluated dense, as the numbers that the levels stand for, so that no kernel is needed;
the levels themselves are checked (sparsekern.verify) and their bits a weight counted.

The rows come in the order of what they are worth, each is written when it is there, and what the
budget has no time for is named. --eval-windows 48 evaluates on a third of the text: for numbers
relative to the row "2:4" of the same run.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import sparsekern
from sparsekern import prune
from sparsekern.eval import texts
from sparsekern.finetune.inputs import eval_batch
from sparsekern.formats import dtypes
from sparsekern.formats.layouts import ROWMAJOR, WeightSpec
from sparsekern.integrations.loading import cast_weights, load_model
from sparsekern.nn.replace import dense_weight, write_weight
from sparsekern.oneshot import presets
from sparsekern.prune.quantize import PASSES, _picked, _Solver
from sparsekern.utils.exact import exact_float32

from .options import Run, parser, told, watchdog

GROUP = 128
HANG_S = 500.0
# Row -> seconds on an H200 to make its model from what it starts from, in the order in which they
# are measured; the evaluation comes on top.
CASES = {
    "dense": 0,
    "2:4": 0,
    "2:4, fp8 rtn": 2,
    "2:4, fp8 gptq": 6,
    "2:4, fp8 gptq, x of fp8": 6,
    "2:4, int8 rtn": 2,
    "2:4, int8 gptq": 6,
    "2:4, int8 gptq, x of int8": 6,
    "2:4, int4 g128 rtn": 2,
    "2:4, int4 g128 gptq": 6,
    "int4 g128 gptq, then 2:4": 15,
    "int4 g128 gptq": 0,
    "one run, fp8 gptq": 20,
    "one run, int4 g128 gptq": 20,
    "fp8 rtn, then 2:4": 15,
    "fp8 rtn": 0,
    "wanda, then int4 g128 gptq": 6,
    "int4 g128 gptq, then wanda": 6,
    "blocks": 20,
    "blocks, int4 g128 gptq": 25,
    "blocks, int4 g128 trained": 40,
    "blocks, fp8 gptq": 25,
    "blocks, fp8 trained": 40,
    "blocks, 16 bits twice": 40,
    "best": 35,
    "best, int4 g128 trained": 65,
    "best, fp8 trained": 65,
    "best, 16 bits twice": 65,
}
# Rows of presets: their first word.
PRESETS = {"blocks": "default", "best": "best"}
# What rows start from: seconds to make it.
STARTS = {"sparsegpt": 15, "wanda": 6, "int4 gptq": 10, "fp8 rtn": 6}
EVAL_S = 10.0  # of a row, until the first one is evaluated


def make_parser():
    result = parser("quantize", "Quantise the kept weights of a pruned model.", budget=85)
    source = result.add_mutually_exclusive_group()
    source.add_argument("--gguf", metavar="FILE", help="a .gguf file")
    source.add_argument("--model", metavar="DIR", help="a folder of safetensors files")
    result.add_argument("--calibration", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument("--eval", default="builtin", metavar="FILE|hf:NAME|builtin")
    result.add_argument(
        "--cases",
        default="",
        metavar="ROW;ROW",
        help="those rows alone, and what they start from; default: all",
    )
    result.add_argument("--samples", type=int, default=128)
    result.add_argument("--window", type=int, default=2048)
    result.add_argument("--eval-windows", type=int, help="of the test text (default: all)")
    result.add_argument("--seed", type=int, default=0)
    return result


def main(path, arguments=()) -> int:
    args = make_parser().parse_args(list(arguments))
    if not (args.gguf or args.model):
        print("bench quantize: give --gguf FILE or --model DIR; nothing was measured.", flush=True)
        return 0
    wanted = [name.strip() for name in args.cases.split(";") if name.strip()] or list(CASES)
    if unknown := set(wanted) - set(CASES):
        raise ValueError(f"bench quantize: expected rows in {list(CASES)}, got {sorted(unknown)}.")
    run = Run(path, args)
    if run.quick:
        args.samples, args.eval_windows = min(args.samples, 16), args.eval_windows or 8
    with watchdog(max(HANG_S, args.budget + 60)):
        with run.phase("load"):
            problem = Problem(run, args)
        missing = []
        for name in [case for case in CASES if case in wanted]:
            needed = problem.needed(name) if run.device.type == "cuda" else 0
            if run.left < needed:
                missing.append(name)
                run.say(f"no time for {name!r}: {run.left:.0f} s left, {needed:.0f} s needed")
                continue
            with run.phase(name), told(run):
                problem.measure(name)
        if missing:
            run.say(f"not measured: {'; '.join(missing)}")
    run.close()
    return 0


class Problem:
    """The model, its text, and what several rows start from, made when it is first needed."""

    def __init__(self, run: Run, args):
        self.run, self.args = run, args
        source = args.gguf or args.model
        model, tokenizer = load_model(source, "cpu", torch.bfloat16)
        self.dense = model.to(run.device)
        train = texts.tokenize(tokenizer, "".join(texts.read_rows(args.calibration, "train")))
        test = texts.tokenize(tokenizer, texts.join_rows(texts.read_rows(args.eval, "test")))
        self.calibration = texts.calibration_windows(train, args.samples, args.window, args.seed)
        self.test = test[: args.eval_windows * args.window] if args.eval_windows else test
        self.case = f"{Path(source).name}, {Path(args.eval).name}, window {args.window}"
        if run.quick:
            self.case += f", quick: {args.samples} samples"
        if args.eval_windows:
            self.case += f", {self.test.numel() // args.window} windows"
        self.settings = {
            "calibration": Path(args.calibration).name,
            "samples": args.samples,
            "calibration_tokens": train.numel(),
            "eval_tokens": self.test.numel(),
            "window": args.window,
            "group": GROUP,
            "passes": PASSES,
        }
        self.bases: dict[str, float] = {}  # perplexity of a 2:4 model in 16 bits, by its row
        self.eval_s = EVAL_S
        self._starts: dict = {}
        self._last: tuple = ("", None)  # levels of the last row "2:4, ...": (what of, the row)
        run.say(
            f"{self.case}: {train.numel()} calibration tokens, {self.test.numel()} of evaluation"
        )

    # ------------------------------------------------------------------ rows

    def needed(self, name: str) -> float:
        """Seconds that a row will take."""
        start = start_of(name)
        begin = STARTS[start] if start and start not in self._starts else 0
        return begin + CASES[name] + self.eval_s

    def measure(self, name: str) -> None:
        """Makes the model of a row, evaluates it, records it."""
        begin = time.perf_counter()
        model, metrics, check = self.make(name)
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        value = self.perplexity(model)
        self.eval_s = time.perf_counter() - begin
        if name == "2:4" or name in PRESETS:
            self.bases[name] = value
        found, word = {"perplexity": round(value, 4)}, name.partition(",")[0]
        base = self.bases.get(word if word in PRESETS else "2:4")
        if base is not None:
            found["of_16_bit_2:4"] = round(value / base, 4)
        self.run.add(
            op="quantize",
            backend=name,
            check=check,
            case=self.case,
            seed=self.args.seed,
            dtype="bfloat16",
            settings=self.settings,
            metrics={**found, **metrics, "seconds": round(seconds, 2)},
        )
        self.run.say(f"{name}: {found} {metrics}, {seconds:.1f} s + {self.eval_s:.1f} s")

    def make(self, name: str):
        """(model with dense weights, metrics, what was checked) of a row."""
        if name == "dense":
            return self.dense, {}, "finite"
        if name == "2:4":
            model, report, _ = self.pruned("sparsegpt")
            return model, _errors(report), "2:4"
        if name.startswith("2:4, "):
            weights, _, x = name.removeprefix("2:4, ").partition(", x of ")
            if self._last[0] != weights:
                self._last = weights, self.levels("sparsegpt", *_kind(weights))
            return self.with_levels_of_x(*self._last[1], x) if x else self._last[1]
        if name.startswith("wanda, then "):
            return self.levels("wanda", *_kind(name.removeprefix("wanda, then ")))
        if name.startswith("one run, "):
            quantize, method = _kind(name.removeprefix("one run, "))
            model, report = self.prune("sparsegpt", self.dense, quantize, method)
            return model, _errors(report), "2:4"
        word, _, kind = name.partition(", ")
        if word in PRESETS:
            return self.by_preset(PRESETS[word], kind)
        first, _, then = name.partition(", then ")
        model, scales = self.quantized(*_kind(first))
        if not then:
            return model, {}, "finite"
        method = "sparsegpt" if then == "2:4" else then
        pruned, report = self.prune(method, model)
        self.put_back(pruned, scales, _kind(first)[0])
        return pruned, _errors(report), "2:4"

    # ------------------------------------------------------------------ steps

    def prune(self, method, model, quantize=None, quantize_method=None, compress=False, **more):
        """(copy of the model with 2:4 weights, its report)."""
        model = copy.deepcopy(model)
        report = sparsekern.prune_model(
            model,
            method,
            None if "hessians" in more else self.calibration,
            device=self.run.device,
            compress=compress,
            quantize=quantize,
            quantize_method=quantize_method,
            progress=False,
            **more,
        )
        return model, report

    def by_preset(self, preset: str, kind: str):
        """A row of a preset: kind is "", "NAME gptq", "NAME trained" or "16 bits twice"."""
        quantize, how = _kind(kind) if kind else (None, "")
        (round_,) = presets.PRESETS[preset].rounds
        rounds = replace(round_, levels=how == "trained")
        if how == "twice":
            quantize, rounds = None, replace(rounds, epochs=2 * round_.epochs)
        more = {"preset": preset, "reconstruct": rounds, "untie": preset == "best"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* without .*")  # what the model forbids
            model, report = self.prune(None, self.dense, quantize, **more)
        metrics = _errors(report)
        fits = report.reconstruction
        metrics["block_error"] = round(fits[-1]["after"], 6)  # of the last block, held out
        metrics["fit_seconds"] = round(sum(fit["seconds"] for fit in fits), 2)
        return model, metrics, "2:4"

    def pruned(self, method: str):
        """(model, report, masks) of the dense model pruned by a method, once."""
        if method not in self._starts:
            model, report = self.prune(method, self.dense, keep_hessians=True)
            masks = {}
            for row in report.pruned:
                weight = dense_weight(model.get_submodule(row.name))
                masks[row.name] = sparsekern.prune.magnitude_mask(weight)
                if bool((weight.masked_fill(masks[row.name], 0) != 0).any()):
                    raise RuntimeError(f"bench quantize: expected a 2:4 {row.name}, got another.")
            self._starts[method] = model, report, masks
        return self._starts[method]

    def levels(self, start: str, quantize: str, method: str):
        """The pruned model's weights as levels, with the same masks and Hessians: what prune_model
        does with a layer once it is pruned, for the layers that read one input together."""
        pruned, report, masks = self.pruned(start)
        model, inputs = copy.deepcopy(pruned), {}
        for name in masks:
            inputs.setdefault(id(report.hessians[name]), []).append(name)
        bits = weights = seconds = 0
        errors = []
        for names in inputs.values():
            layers = [dense_weight(model.get_submodule(name)) for name in names]
            hessian = report.hessians[names[0]].to(self.run.device)
            w = torch.cat(layers).to(self.run.device)
            mask = torch.cat([masks[name] for name in names]).to(w.device)
            group = GROUP if dtypes.quantized("bench quantize", quantize).scale == "group" else None
            if method == "rtn":
                w24, found = prune.rtn(w, quantize, mask=mask, hessian=hessian, group=group)
            else:
                w24, found = prune.gptq(w, hessian, quantize, mask=mask, group=group)
            seconds += found.seconds
            sparsekern.verify(w24)
            dense = w24.to_dense()
            if bool((dense.masked_fill(mask, 0) != 0).any()):
                raise RuntimeError(f"bench quantize: expected the mask of {names}, got more.")
            bits += 8 * w24.nbytes
            weights += w24.shape.numel()
            parts = dense.split([len(layer) for layer in layers])
            for name, layer, part in zip(names, layers, parts, strict=True):
                errors.append(prune.relative_error(layer.to(w.device), part, hessian))
                write_weight(model.get_submodule(name), part.to(layer.device))
        metrics = {
            "added_error": round(sum(errors) / len(errors), 6),  # of the pruned weights
            "bits_per_weight": round(bits / weights, 4),
            f"{method}_seconds": round(seconds, 2),
        }
        return model, metrics, "masks kept, levels verified"

    def with_levels_of_x(self, model, metrics, check: str, dtype: str):
        """The same, every pruned layer reading its input as the levels of quantize_rows."""
        _, _, masks = self.pruned("sparsegpt")
        model = copy.deepcopy(model)

        def rounded(module, inputs):
            levels, scale = sparsekern.quantize_rows(inputs[0], dtype)
            return (levels.to(inputs[0].dtype) * scale[..., None].to(inputs[0].dtype),)

        for name in masks:
            model.get_submodule(name).register_forward_pre_hook(rounded)
        return model, metrics, f"{check}, x as levels"

    def quantized(self, quantize: str, method: str):
        """(the dense model with levels in every layer that is pruned, their scales), once."""
        key = f"{quantize} {method}"
        if key not in self._starts:
            model, scales = copy.deepcopy(self.dense), {}
            data = self.calibration
            for group in sparsekern.calibrate(model, data, device=self.run.device):
                for layer in group.layers:
                    weight = layer.weight
                    new, scale = dense_levels(weight, group.hessian.matrix, quantize, method)
                    scales[layer.name] = scale
                    group.replace(layer.name, new.to(weight.dtype))
            self._starts[key] = model, scales
        return self._starts[key]

    def put_back(self, model, scales, quantize: str) -> None:
        """Kept weights to the nearest levels of the scales that the model was quantised with."""
        codec = dtypes.scaled_codec(quantize)
        for name, scale in scales.items():
            module = model.get_submodule(name)
            weight = dense_weight(module)
            wide = wide_scale(scale.to(weight.device), weight.shape[1])
            write_weight(module, (codec.round(weight.float() / wide) * wide).to(weight.dtype))

    def perplexity(self, model) -> float:
        model = cast_weights(copy.deepcopy(model), torch.float32).to(self.run.device)
        window = self.args.window
        batch = eval_batch(model, window, self.run.device)
        value = sparsekern.perplexity(model, self.test, window=window, batch_size=batch)
        if not value < float("inf"):
            raise RuntimeError(f"bench quantize: expected a finite perplexity, got {value}.")
        return value


def dense_levels(weight, hessian, quantize: str, method: str):
    """(numbers float32 [out, in], scale [out, groups]) of a dense weight: the loops of prune.gptq
    with every weight kept, and for rtn the nearest levels of the same kind of scales."""
    kind = dtypes.element(quantize)
    group = GROUP if kind.scale == "group" else 0
    spec = WeightSpec.of(weight.shape, kind.name, ROWMAJOR, torch.float32, None, group)
    with exact_float32(weight.device):
        h = hessian / hessian.diagonal().mean()
        solver = _Solver(spec, h, "mse", _picked("bench quantize", None, weight))
        wt = weight.float().t().contiguous()
        keep, aim = torch.ones_like(wt, dtype=torch.bool), wt.clone()
        if method == "gptq":
            attempts = solver.sweep(wt, keep, 0.01, choose=False)
            for _ in range(PASSES):
                solver.descend(wt, aim, keep, attempts[-1][0])
            return wt.t().contiguous(), solver.scales.t().contiguous()
        size = solver.block if solver.grouped else wt.shape[0]
        parts = [slice(i, i + size) for i in range(0, wt.shape[0], size)]
        scale = torch.stack([solver._fit(aim[p], keep[p], p) for p in parts], dim=1)
        wide = wide_scale(scale, weight.shape[1])
        return solver.codec.round(weight.float() / wide) * wide, scale


def wide_scale(scale, in_features: int):
    """Scales [out, groups] by column."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(GROUP, dim=1)[:, :in_features]


def start_of(name: str) -> str | None:
    """What a row starts from, which another one may have made."""
    if name == "2:4" or name.startswith("2:4, "):
        return "sparsegpt"
    if name.startswith("wanda, then "):
        return "wanda"
    own = name.partition(",")[0] in PRESETS
    if name == "dense" or own or name.startswith("one run, "):
        return None
    return " ".join(_kind(name.partition(", then ")[0]))


def _kind(text: str) -> tuple[str, str]:
    """("int4", "gptq") of "int4 g128 gptq"."""
    words = text.split()
    return words[0], words[-1]


def _errors(report) -> dict:
    errors = [row.relative_error for row in report.pruned if row.relative_error is not None]
    found = {"mean_error": round(sum(errors) / len(errors), 6)} if errors else {}
    added = [row.quantize_error for row in report.pruned if row.quantize_error is not None]
    return found | ({"added_error": round(sum(added) / len(added), 6)} if added else {})
