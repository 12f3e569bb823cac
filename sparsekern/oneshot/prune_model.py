"""prune_model: a whole model in, the same model with 2:4 layers out, block by block on the inputs
the pruned model produces. Arguments, checks and plan; run.py goes through it, the stages are in
executor.py."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.nn.count import num_parameters
from sparsekern.nn.sparse_linear import check_before_loading
from sparsekern.nn.wrappers import whole
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot import keep_dense as dense_rule
from sparsekern.oneshot import uses
from sparsekern.oneshot.calibration import digest, make_batches
from sparsekern.oneshot.devices import working_device
from sparsekern.oneshot.estimate import free_host_bytes
from sparsekern.oneshot.executor import Calibration
from sparsekern.oneshot.experts import with_experts_apart
from sparsekern.oneshot.extra import OP, Extra
from sparsekern.oneshot.layerwise import (
    DAMP,
    Options,
)
from sparsekern.oneshot.portion import splits
from sparsekern.oneshot.presets import find_preset
from sparsekern.oneshot.ranks import joined
from sparsekern.oneshot.report import PruneReport
from sparsekern.oneshot.resume import ResumeDir
from sparsekern.oneshot.rounds import Given, warn_unjudged
from sparsekern.oneshot.run import Run
from sparsekern.oneshot.selection import check_options, check_weights, describe, select
from sparsekern.oneshot.skip import DEFAULT_RULE
from sparsekern.oneshot.source import Source
from sparsekern.prune import Hessian, Method
from sparsekern.prune.methods import find_method
from sparsekern.prune.pattern import Pattern
from sparsekern.utils.arguments import checked
from sparsekern.utils.staging import check_writable


@checked(OP, leave=("pattern",), uses=uses.PRUNE_MODEL, refine=(0, 10**6), damp=(0, 10**6))
@with_experts_apart
def prune_model(
    model: nn.Module,
    method: str | Method | Callable[[Tensor, Hessian | None], Tensor] | None = None,
    calibration: Any = None,
    skip: Any = (DEFAULT_RULE,),
    compress: bool = True,
    *,
    targets: Any = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    tokenizer: Callable[..., Any] | None = None,
    pattern: tuple[int, int] | str = (2, 4),
    masks: Mapping[str, Tensor] | None = None,
    true_sequential: bool = False,
    damp: float | None = None,
    blocksize: int | None = None,
    refine: int | None = None,
    match_dense: float | None = None,
    on_error: str = "raise",
    offload_activations: bool | str | os.PathLike[str] = "auto",
    keep_dense: str | None = None,
    keep_dense_tokens: Sequence[int] = dense_rule.TOKENS,
    hessians: Mapping[str, Hessian | Tensor] | None = None,
    keep_hessians: bool = False,
    resume: str | os.PathLike[str] | None = None,
    undo: bool | str = "auto",
    progress: bool = True,
    quantize: str | None = None,
    quantize_method: str | None = None,
    quantize_group: int | None = None,
    preset: str | None = None,
    reconstruct: Given = None,
    rotate: bool | Mapping[str, Any] | None = None,
    untie: bool = False,
    permute: bool | Mapping[str, Any] | None = None,
    ranks: Any = "auto",
    source: Source | None = None,
    **options: Any,
) -> PruneReport:
    """Prune the linear layers of `model` to 2:4, in place: W' minimises ‖(W − W')X‖² layer by layer
    (SparseGPT), or keeps the weights of highest score.

    Args:
        model: a Transformers model, or any nn.Module. Where it is a chain of blocks they are
            calibrated one by one on what the pruned blocks before them return; else, with a
            warning, every layer in one pass on the unpruned model.
        method: "sparsegpt" (mask and weight update), "admm" (masks and weights in turn, see
            prune.admm: lower errors, more time), "wanda" (|W|·‖x‖₂), "magnitude" (|W|), the
            name of a method registered with prune.register_method, a prune.Method, or a function
            (w [out_features, in_features], Hessian or None) -> scores of the same shape, higher =
            kept. None: the preset's, and "sparsegpt" without one.
        calibration: token ids, int64 [samples, tokens], or whatever else the model takes: texts
            (with tokenizer=), a tokenizer's output, dicts, (ids, target) pairs, a dataset, a
            DataLoader, pixel tensors; for plain modules a tensor [samples, ...] or an iterable of
            tensors, tuples or dicts, each one forward call. Positions where an attention mask is 0
            do not count. See oneshot/calibration.py. Needed by methods that need more than the
            weights; the others then report errors too.
        skip: layers to leave dense: names, globs, "re:...", class names, block indices or ranges;
            see oneshot/skip.py.
        compress: replace each pruned layer by a SparseLinear. False leaves dense weights with
            zeros.
        targets: rules as for skip: only layers that match are pruned. None: all.
        device: where blocks are run and pruned, one at a time; None: "cuda" if there is one, else
            where the model is.
        batch_size: samples per forward; None: by tokens, 16384 on a GPU and 4096 on a CPU.
        tokenizer: for texts as calibration: a callable text -> {"input_ids": [...]}.
        pattern: (n, m) or "n:m", n kept of each m, or "4:8 in pairs": of each four consecutive
            pairs of columns two are kept, as Blackwell's instructions for fp4 read them, where
            in_features is a multiple of 8. compress=True needs 2:4.
        masks: layer name -> bool [out_features, in_features], True = kept; other layers get the
            method's mask. A method that updates weights ("sparsegpt") still does.
        true_sequential: prune the layers of a block in order of execution, each group on the
            outputs of the groups before. Slower: one more forward of the block per group.
        damp, blocksize: as in prune.sparsegpt; None: 0.01 and 128. damp is also that of admm,
            refine, match_dense and gptq; blocksize is for methods that have it alone.
        refine: steps of prune.refine after each layer's own method: the kept weights move towards
            the least-squares fit under the mask. None: the method's default, 16 with "sparsegpt"
            and "admm", else 0. With 0 the method is the published one.
        match_dense: with these two, the share (0 to 1) of prune.retarget that is applied before
            them: layers then make up for what pruning has changed in their inputs. Costs one more
            forward per block and a second set of hidden states. 0 is the published method. None:
            the method's default (0.25 with these two) on a model that is a chain of decoder
            blocks, unless true_sequential or hessians; else 0. Layers that get only some of the
            tokens, as experts do, are left out.
        on_error: "raise" or "skip" (leave the layer dense, reason in the report): NaN or Inf in a
            weight or its inputs, or a method that fails on it (prune.PruneError). Layers that no
            method could prune (in_features, dtype, tied weights, never called) are always skipped
            with the reason.
        offload_activations: True keeps the hidden states of the calibration on the host, False on
            `device`, a folder in files there, "auto" decides by free memory.
        keep_dense: "if-slower" measures every distinct layer shape on `device`, dense and 2:4, and
            leaves those dense whose time, summed over keep_dense_tokens, is longer with 2:4. They
            are in the report with the times. Times that a tuned table of the GPU has are taken
            from there. On a CPU that is every layer, with a warning.
        keep_dense_tokens: numbers of tokens per call that matter to you.
        hessians: layer name -> Hessian (or its matrix) for every layer to prune, in place of a
            calibration.
        keep_hessians: report.hessians then holds them, on the host.
        resume: a directory. Each finished block is stored there; the same call on a freshly loaded
            model continues after the last of them, with the same result as an uninterrupted run.
        undo: True keeps the dense weights on the host until the run has succeeded, so that an
            exception leaves the model as it was; "auto": where half of the free memory holds them.
            Without it, and with `resume`, which True does not go with, an exception leaves the
            finished blocks pruned and the others as they were, and its notes name the last one.
        progress: show a progress bar with the time left.
        quantize: "fp8", "int8" or "int4": each layer's kept weights become levels with scales once
            it is pruned and refined (see sparsekern.quantize), and the layers after it are
            calibrated on that. With reconstruct, blocks are then trained through the levels
            (Reconstruction.levels). Needs pattern (2, 4). With compress=False the dense weights
            hold the numbers of the levels.
        quantize_method: "gptq" (needs a calibration; prune.gptq), "rtn" (every weight to its
            nearest level), or None: "gptq" where there is a calibration. The report says which.
        quantize_group: columns that share a scale, of int4: 64, 128 or None (128).
        preset: "fast", "default" or "best" (oneshot/presets.py): what method, reconstruct, rotate
            and permute are where they are None. What the model or the calibration does not allow is
            then left out with a warning, and blocks of 2^27 weights or more have 60 % of its epochs
            of reconstruction. None: none of the three, and SparseGPT.
        reconstruct: rounds of gradient descent on the hidden states that pruned blocks return: a
            Reconstruction, its keywords as a dict, a list of them, True for one with the defaults,
            () for none. For a model that is a chain of decoder blocks.
        rotate: True, or keywords of sparsekern.rotate (steps, seconds, rate, heads, seed): change
            the basis of the residual stream first. The dense model stays the same up to rounding.
            False: not.
        untie: allow `rotate` to give the head a weight of its own.
        permute: True, or keywords of sparsekern.permute (rounds, heads, seed): change the order of
            the channels inside MLPs and heads first, after `rotate`. The dense model stays the same
            up to rounding. Needs pattern 2:4.
        ranks: "auto": all processes of an initialised torch.distributed prune together, each called
            with the same model and arguments; a process group: those; False: this one by itself.
            The result is that of one process, bit for bit (oneshot/ranks.py), and the same on all;
            with reconstruction in the walk up to rounding. Rank 0 alone writes, logs and shows
            progress. Rounds after the walk need one process, and so do those in it with experts,
            seconds, or another target, loss or parts than the default.
        source: where the blocks' weights are while they are not in memory: a checkpoint.Streamed.
            Needs `resume`, where the result is; a rotation, and rounds of reconstruction after the
            walk, need the whole model.
        **options: of a registered method.
    Returns:
        PruneReport with one row per weight that takes part in matrix products.
    Raises:
        ValueError: an argument that does not fit, or that nothing in this call reads
            (oneshot/uses.py); a skip rule or mask name that matches nothing;
            non-finite weights; a resume directory of another run. Checked before anything is
            changed.
        TypeError: arguments of the wrong type.
        PruneError (a RuntimeError): the method failed on a layer.
        RankError (a RuntimeError): another rank failed or is gone; it is named, and the model is as
            it is after an exception of one's own.
    Warns:
        UserWarning: nothing, or less than half of what was asked for, is 2:4 in the end
            (report.partial); it names the largest reasons.
    Notes:
        Experts in 3-D parameters are pruned one by one, as layers `<module>.<expert>.<parameter>`,
        each on the tokens that reach it and, the fewer these are, on others of its layer
        (oneshot/experts.py has the rule); the report names those that saw fewer tokens than they
        have in_features (report.few_tokens). With compress their module becomes a SparseExperts.
        Training flags, hooks, config.use_cache, tied weights and the model's device are left as
        they were. The output is deterministic for one device and batch size. Progress is logged to
        "sparsekern".
    Source: Frantar and Alistarh 2023 (arXiv:2301.00774); Sun et al. 2024, "Wanda"
    (arXiv:2306.11695).
    """
    start, model = time.perf_counter(), whole(OP, model)
    with joined(ranks, OP) as crew:
        first = crew is None or crew.rank == 0
        method = find_preset(OP, preset).method if method is None else method
        chosen = find_method(OP, method)
        calibrated = calibration is not None or hessians is not None
        extra = Extra(
            preset, reconstruct, rotate, untie, calibration, hessians, true_sequential, permute
        )
        may_match = match_dense is None and bool(chosen.match_dense) and not true_sequential
        may_match = may_match and hessians is None
        wanted = Options(
            chosen,
            Pattern.of(pattern, OP),
            dict(masks or {}),
            _values(chosen, {"damp": damp, "blocksize": blocksize}, options),
            DAMP if damp is None else damp,
            chosen.refine if refine is None else refine,
            float(chosen.match_dense or 0) if may_match else match_dense or 0.0,
            on_error,
            quantize,
            quantize_method,
            quantize_group,
            OP,
        )
        check_options(wanted, true_sequential, compress, calibrated, offload_activations, OP)
        if resume is not None:
            check_writable(resume, f"{OP}(resume=)")
        extra.check_order(wanted.pattern, bool(masks))
        late = bool(extra.spans) and not extra.spans[-1].levels and quantize_method == "gptq"
        expected = 'quantize_method "rtn" or None with levels=False in a round after the walk'
        check(not late, OP, expected, "'gptq'", "No Hessian is left after it; pass levels=True.")
        check(undo in (True, False, "auto"), OP, 'undo True, False or "auto"', repr(undo))
        timed_tokens = dense_rule.check_arguments(keep_dense, keep_dense_tokens, compress, OP)

        took: dict[str, float] = {}

        def walked() -> Calibration:
            begin = time.perf_counter()
            selection = select(
                model, skip, wanted.pattern, compress, targets=targets, op=OP, source=source
            )
            check_weights(selection, wanted, compress)
            took["before: checks"] = time.perf_counter() - begin
            keeps = undo if isinstance(undo, bool) else _fits_twice(selection.active)
            keeps = keeps if crew is None else bool(crew.share(keeps, 0))
            kept_for = "run" if keeps and resume is None else "stage"
            return Calibration(
                model,
                selection,
                op=OP,
                device=device,
                true_sequential=true_sequential,
                beside_dense=bool(wanted.match_dense) or extra.needs_dense,
                optional_dense=may_match or not wanted.match_dense,
                offload=None if offload_activations == "auto" else offload_activations,
                hessians=hessians,
                undo=None if source is not None else kept_for,
                ranks=crew,
                source=source,
            )

        if source is not None:
            _check_streamed(extra, compress, resume, preset)
        if crew is not None:
            crew.device = working_device(OP, model, device)
        walk = walked()
        if crew is not None:
            experts = any(layer.owner is not None for layer in walk.selection.active)
            _check_together(chosen, extra, preset, experts)
        extra.adapt(walk.selection.blocks)
        batches = []
        if calibration is not None and hessians is None:
            batches = make_batches(calibration, model, batch_size, walk.device, tokenizer, OP)
            warn_unjudged(extra.rounds, len(batches), OP, 5)
        report = PruneReport(
            type(model).__name__, chosen.name, device=str(walk.device), preset=preset
        )
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
            if extra.rotate is not None:
                undo_rotation = extra.turn(model, batches, walk.device, resume, report, crew)
                if undo_rotation is not None:
                    if walk.undo == "run":
                        stack.push(_on_error(undo_rotation))
                    phases = {"rotate": report.rotation["seconds"]} if report.rotation else {}
                    walk = walked()  # the head may have a weight of its own now
                    walk.phases |= phases
            if extra.permute is not None:
                undo_order = extra.reorder(model, batches, walk.device, resume, report, crew)
                if undo_order is not None:
                    if walk.undo == "run":
                        stack.push(_on_error(undo_order))
                    seconds = report.permutation["seconds"] if report.permutation else 0.0
                    walk.phases["permute"] = seconds
                    parts = report.permutation["parts"] if report.permutation else {}
                    walk.parts |= {f"permute: {name}": took for name, took in parts.items()}
            walk.batches = batches
            walk.parts |= took
            report.phases, report.parts = walk.phases, walk.parts
            report.options = describe(skip, wanted, compress, true_sequential, targets)
            report.options |= extra.described()
            if keep_dense:
                report.options |= {
                    "keep_dense": keep_dense,
                    "keep_dense_tokens": list(timed_tokens),
                }
            if batches:
                keys = ("samples", "tokens")
                totals = {key: sum(getattr(b, key) for b in walk.batches) for key in keys}
                report.calibration = {**totals, "sha256": digest(walk.batches)}
                more = getattr(calibration, "described", None)  # eval/mix.py
                report.calibration |= more() if callable(more) else {}
            if keep_hessians:
                report.hessians = {}
            wanted.part = walk.part
            run = Run(model, wanted, compress, walk, report, extra)
            if crew is not None:
                found = [(a.name, a.shape, a.dtype, a.reason) for a in walk.selection.layers]
                calls = [b.samples for b in batches]
                remedy = "Give the same model, data and arguments on each, or ranks=False."
                crew.same(
                    "call",
                    [report.method, report.options, report.calibration, calls, found],
                    remedy,
                )
            run.resumes = resume is not None
            if resume is not None and first:
                run.resume = ResumeDir(resume, run.manifest(method, hessians))
                stack.callback(run.resume.close)
            if keep_dense:
                run.leave_slow_layers_dense(timed_tokens)
            run.execute(progress and first)
        if compress and report.pruned:
            check_before_loading(model)
        counted = num_parameters(model)
        report.parameters = {"dense": counted.dense, "stored": counted.stored}
        report.seconds = time.perf_counter() - start
        run.say()
        return report


def _check_together(chosen: Method, extra: Extra, preset: str | None, experts: bool) -> None:
    """Refuse what one process alone does as it is meant. experts: whether any are to be pruned."""
    remedy = "Leave it out, or run it in one process, with ranks=False."
    trains = bool(extra.spans) or not splits(extra.block) or (extra.block is not None and experts)
    reason = (
        "which takes one step for each batch in turn: with several ranks it would train another way"
    )
    name = f"reconstruct (of preset {preset}) " if extra.optional else "reconstruct "
    expected = "one process for what trains"
    check(not trains, OP, expected, f"{name}on several ranks, {reason}", remedy)
    got = f"{chosen.name} on several ranks, each of which has some of the outputs"
    remedy = "Run it in one process, with ranks=False."
    check(chosen.finish is None, OP, "one process for a method that reads outputs", got, remedy)


def _check_streamed(extra: Extra, compress: bool, resume: Any, preset: str | None) -> None:
    """Refuse what needs the whole model in memory."""
    check(resume is not None, OP, "a folder as resume, for source", None)
    check(compress, OP, "compress=True with source", compress)
    remedy = "Leave it out, or prune the model in memory."
    of = f" (of preset {preset})"
    got = "a rotation" + of * extra.turn_optional
    check(extra.rotate is None, OP, "one block at a time, for source", got, remedy)
    extra.drop_order("with source, whose blocks are not all in memory")
    expected = "one block at a time, for source"
    check(extra.permute is None, OP, expected, "a permutation", remedy)
    got = "reconstruct of several blocks together" + of * extra.optional
    check(not extra.spans, OP, "one block at a time, for source", got, remedy)


def _on_error(undo: Callable[[], None]) -> Callable[..., None]:
    """For ExitStack.push: call undo where the block ends with an exception."""

    def leave(kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            undo()

    return leave


def _values(
    method: Method, common: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The method's own options: what prune_model has a keyword for, where the method knows it, and
    the rest as given."""
    declared = {option.name for option in method.options}
    taken = sorted((declared & set(inspect.signature(prune_model).parameters)) - set(common))
    remedy = "prune_model has arguments of these names: give the options others."
    check(not taken, OP, f"options of {method.name} with names of their own", taken, remedy)
    given = {k: v for k, v in common.items() if v is not None and k in declared}
    return method.values(OP, {**given, **options})


def _fits_twice(layers: Sequence[models.Layer]) -> bool:
    """Whether half of the host's free memory holds a copy of these weights."""
    free = free_host_bytes()
    return free is not None and sum(layer.bytes_dense for layer in layers) <= free / 2
