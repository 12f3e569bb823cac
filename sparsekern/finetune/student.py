"""The student: the model while it is trained, with its masks and optimizer, and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.eval.perplexity import check_model
from sparsekern.finetune.masked import Masked
from sparsekern.finetune.recipe import OP, PRECISIONS, Recipe
from sparsekern.finetune.schedule import Schedule
from sparsekern.finetune.teacher import Split
from sparsekern.nn.sparse_linear import SparseLinear


@contextlib.contextmanager
def restored(model: nn.Module, device: torch.device) -> Iterator[contextlib.ExitStack]:
    """Afterwards dtypes, gradients, hooks and torch's random numbers are as distill says; what is
    on the stack is called."""
    devices = [device] if device.type == "cuda" else []
    flags = [(module, module.training) for module in model.modules()]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        with (
            contextlib.ExitStack() as end,
            torch.inference_mode(False),
            torch.enable_grad(),  # whatever the caller has
            torch.random.fork_rng(devices),
        ):
            yield end
    except BaseException:
        for module, flag in flags:
            module.training = flag
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


class Student:
    """The model in training: float32 weights, masks, AdamW, and the scaler of float16.

    Args:
        masks, schedule: as in distill.
        steps: of the run, None when the clock decides.
        ids: [1, tokens], a row to try the model out with.
        end: what is to be undone after the run.
    Attributes:
        split: body and head.   trained: the parameters that require gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masked | dict[str, Tensor] | None,
        schedule: Schedule | None,
        recipe: Recipe,
        steps: int | None,
        ids: Tensor,
        device: torch.device,
        end: contextlib.ExitStack,
    ) -> None:
        self.model = model
        packed = [n for n, m in model.named_modules() if isinstance(m, SparseLinear)]
        remedy = "Prune with compress=False; compress after training."
        got = f"{len(packed)} SparseLinear, first {packed[0] if packed else ''}"
        check(not packed, OP, "a model with dense weights", got, remedy)
        model.to(device)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        if isinstance(masks, Masked):
            check(schedule is None, OP, "schedule or a Masked object", "both")
            self.masked = masks
        else:
            self.masked = Masked(model, masks, schedule=schedule)
        _check_moves(self.masked, steps)
        self.split = Split(model)
        kwargs = {"use_cache": False} if hasattr(model, "config") else {}
        check_model(OP, model, ids.to(device, torch.int64), kwargs, causal=False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        remedy = "Call model.requires_grad_(True)."
        check(self.trained, OP, "parameters with requires_grad", "none", remedy)
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        end.callback(self.masked.detach)
        self.masked.attach(self.optimizer)
        end.callback(self.optimizer.zero_grad, set_to_none=True)
        half = recipe.autocast(device) == PRECISIONS["float16"]
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def step(self, rate: float, clip: float) -> Tensor:
        """One step at this rate along the gradients, which are scaled: the norm of the kept ones,
        before they are clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        self.masked.mask_gradients()
        norm = nn.utils.clip_grad_norm_(self.trained, clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What goes on from here; of shards every process has to ask."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "masked": self.masked.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, whatever else is in it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.masked.load_state_dict(state["masked"])


def _check_moves(masked: Masked, steps: int | None) -> None:
    """ValueError for a schedule that moves masks, but in none of the run's steps."""
    schedule, step = masked.schedule, masked.step
    first = (step // schedule.every + 1) * schedule.every
    moving = schedule.live(first) and steps is not None
    expected = f"steps >= {first - step}, at which {type(schedule).__name__} first moves a mask"
    remedy = f"Train longer, or with another schedule (every < {schedule.every})."
    check(not moving or first - step <= (steps or 0), OP, expected, steps, remedy)
