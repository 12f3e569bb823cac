"""Where modules are while a model is walked, and how it runs: without autograd, eagerly."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import check
from sparsekern.oneshot import discovery as models
from sparsekern.oneshot.calibration import move
from sparsekern.utils.arguments import usable_device

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
logger = logging.getLogger("sparsekern")


def quiet(function: F) -> F:
    """Run without autograd, and outside inference mode: its tensors could not be trained later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


def home_of(model: nn.Module) -> torch.device:
    """Where the inputs of the model have to be: with its embedding, or with its first parameter."""
    holder = models.input_embedding(model) or model
    tensor: Tensor | None = next(holder.parameters(), None)
    if tensor is None:
        tensor = next(model.buffers(), None)
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


def working_device(op: str, model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where a model is run: `device`, or CUDA if there is one, else where the model is.

    Raises:
        ValueError, TypeError: as usable_device; a model on "meta", whose weights hold no data.
    """
    if device is not None:
        chosen = usable_device(op, device, "device")
    else:
        chosen = torch.device("cuda") if torch.cuda.is_available() else home_of(model)
        remedy = "Load the model's weights first."
        check(chosen.type != "meta", op, "a model whose weights hold data", "meta", remedy)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def check_data(op: str, model: nn.Module, name: str = "model") -> None:
    """ValueError for a model on "meta", unless accelerate's hooks bring its weights."""
    held = [not p.is_meta for p in model.parameters()]
    brought = any("_hf_hook" in vars(module) for module in model.modules())
    expected, remedy = f"{name}: a model whose weights hold data", "Load the weights first."
    check(not held or any(held) or brought, op, expected, "one on meta", remedy)


def check_changeable(op: str, model: nn.Module, name: str = "") -> None:
    """ValueError for inference tensors, which no weight can be written to: of a model, or of its
    layer `name`."""
    names = (f"{name}.{key}".strip(".") for key, p in model.named_parameters() if p.is_inference())
    made = next(names, None)
    remedy = "Build or load the model outside of torch.inference_mode()."
    expected = f"weights that can be changed, {made}"
    check(made is None, op, expected, "inference tensors", remedy)


@contextlib.contextmanager
def on_device(module: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Move a module to `device` and back to where its first parameter was."""
    home = home_of(module) if module is not None else device
    moves = module is not None and home != device
    try:
        if moves:
            cast(nn.Module, module).to(device)
        yield
    finally:
        if moves:
            cast(nn.Module, module).to(home)


@contextlib.contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """As on_device, for work that changes no tensor of the module: it gets back those that it had,
    without a copy. Modules that do more than move when they are moved (SparseLinear) are copied."""
    if any(type(m)._apply is not nn.Module._apply for m in module.modules()):
        with on_device(module, device):
            yield
        return
    parameters = [(p, p.data) for p in module.parameters()]
    buffers = [(m, dict(m._buffers)) for m in module.modules() if m._buffers]
    try:
        module.to(device)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for owner, known in buffers:
            owner._buffers.update(known)


@contextlib.contextmanager
def lodged(blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within: blocks of a model that is elsewhere run on `device`, each there only while it runs.
    Hidden states stay there from block to block, and what the last one returns goes home. For short
    looks at a chain of blocks, which change nothing: a host would take longer than the copies.
    Blocks whose forward is replaced are left alone."""
    homes = [home_of(block) for block in blocks]
    if all(home == device for home in homes):
        yield
        return
    visits: dict[int, contextlib.ExitStack] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if "forward" in module.__dict__:
            return None
        stack = visits.setdefault(id(module), contextlib.ExitStack())
        stack.enter_context(visiting(module, device))
        return move((args, kwargs), device)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        stack = visits.pop(id(module), None)
        if stack is None:
            return None
        stack.close()
        return move(output, homes[-1]) if module is blocks[-1] else None

    handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(leave) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in visits.values():
            stack.close()


def looked(blocks: Sequence[nn.Module], device: torch.device, look: Callable[[], T]) -> T:
    """look(), a run of the whole model on a few tokens, with its blocks on a GPU while they run;
    where that does not work, where they are."""
    if device.type == "cpu" or not blocks:
        return look()
    try:
        with lodged(blocks, device):
            return look()
    except (RuntimeError, ValueError, TypeError) as error:
        logger.info("the blocks run where they are: %s: %s", type(error).__name__, error)
        return look()


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run torch.compile'd parts eagerly, and nn.TransformerEncoder on padded batches instead of the
    nested tensors that it makes of them for its fast path, so that hooks see their layers. Only
    models that are compiled pay for the import of the compiler."""
    compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    nests = [(m, m.use_nested_tensor) for m in encoders]
    try:
        for encoder in encoders:
            encoder.use_nested_tensor = False
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        for encoder, flag in nests:
            encoder.use_nested_tensor = flag
