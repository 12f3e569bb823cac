"""MaskedCallback: masks in a training script around Transformers' Trainer (or TRL's trainers).

    masked = sk.finetune.Masked(model)                      # after prune_model(..., compress=False)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[MaskedCallback(masked)])
    trainer.train()                                         # or train(resume_from_checkpoint=True)
    masked.compress()

The optimizer is hooked when training begins; each checkpoint gets masks.pt beside the Trainer's
files and gives it back on resume. Clipping, accumulation, autocast and DDP stay the Trainer's.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from sparsekern.errors import check
from sparsekern.finetune.masked import Masked
from sparsekern.utils.files import renamed

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ModuleNotFoundError(
        "sparsekern.finetune.MaskedCallback: transformers is missing. pip install transformers.",
        name="transformers",
    ) from error

OP = "sparsekern.finetune.MaskedCallback"
FILE = "masks.pt"


class MaskedCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps the masks of a Masked object through a Trainer.

    Args:
        masked: made from the model that the Trainer gets; its schedule may move the masks.
        compress: replace the layers by SparseLinear when training ends. The Trainer's own
            save_model after that writes compressed layers; load_best_model_at_end runs before it.
    Raises (during training):
        ValueError: no masked weight in the optimizer; violations at the end.
    Warns:
        UserWarning: a checkpoint that training goes on from has no masks.
    """

    def __init__(self, masked: Masked, compress: bool = False) -> None:
        got = type(masked).__name__
        check(isinstance(masked, Masked), OP, "a Masked object", got, exc=TypeError)
        self.masked, self.compress = masked, compress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hook the optimizer; on a resumed run, load the masks of its checkpoint."""
        self.masked.detach()
        optimizer = kwargs.get("optimizer")
        check(optimizer is not None, OP, "an optimizer at the beginning of training", None)
        assert optimizer is not None
        self.masked.attach(optimizer)
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        resumed = getattr(args, "resume_from_checkpoint", None)
        if isinstance(resumed, (str, os.PathLike)):
            file = Path(resumed) / FILE
        if state.global_step > 0:
            self._load(file)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After clipping: the gradients of dropped weights become zero (the hook does it, too)."""
        self.masked.mask_gradients()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write masks.pt into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        masks = self.masked.state_dict()
        if state.is_world_process_zero and folder.is_dir():
            remedy = "Make room there, and resume from the checkpoint before."
            partial = folder / f".{FILE}"
            with renamed(OP, partial, folder / FILE, remedy):
                torch.save(masks, partial)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the violations to what is logged: 0."""
        count = self.masked.check()
        for row in (kwargs.get("logs"), *state.log_history[-1:]):
            if row is not None:
                row["mask_violations"] = count

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the masks (those of the best model where the Trainer has loaded it), remove the
        hooks, compress where that was asked for."""
        best = state.best_model_checkpoint
        if best is not None and getattr(args, "load_best_model_at_end", False):
            self._load(Path(best) / FILE)  # its weights are in the model now
        count = self.masked.check()
        remedy = "Something wrote to the weights outside the optimizer."
        check(count == 0, OP, "no violations of the masks", count, remedy)
        self.masked.detach()
        if self.compress:
            self.masked.compress()

    def _load(self, file: Path) -> None:
        """Take over the masks of a checkpoint."""
        if file.exists():
            self.masked.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            return
        text = f"expected {FILE} in {file.parent}, got a checkpoint without it: the masks stay as "
        text += "they are, and their schedule counts from here. Train with MaskedCallback."
        warnings.warn(f"{OP}: {text}", UserWarning, stacklevel=2)
