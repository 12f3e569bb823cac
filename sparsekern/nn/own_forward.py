"""Which layers compute x·Wᵀ + b and nothing else, so that a SparseLinear may stand in their place:
a forward of one's own is tried out on a few numbers, not read off a name."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekern.nn.replace import is_conv1d
from sparsekern.utils.exact import exact_float32

UNDERFLOW = 2.0**-14  # the smallest normal number of 16 bits


def own_forward(module: nn.Module) -> str | None:
    """Why this module with a weight is not x·Wᵀ + b in inference, or None."""
    kind = type(module).__name__
    if type(module).__call__ is not nn.Module.__call__:
        return f"{kind} has its own __call__"
    if _standard(module) or computes_linear(module):
        return None
    return f"{kind} has its own forward" if not _set(module) else _set_on(kind)


def lost_forward(module: nn.Module) -> str | None:
    """Why a SparseLinear in its place would compute something else than this module does with the
    same weight, in inference or in training, or None."""
    reason, kind = own_forward(module), type(module).__name__
    if reason is not None or _standard(module):
        return reason
    if _set(module):
        return _set_on(kind)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    more = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if more:
        return f"{kind} has a forward with further arguments ({', '.join(more)})"
    same = computes_linear(module, training=True)
    return None if same else f"{kind} computes something else in training"


def _set(module: nn.Module) -> bool:
    """Whether somebody has set a forward on the object; that of accelerate is as the class's."""
    return "forward" in module.__dict__ and "_hf_hook" not in module.__dict__


def _set_on(kind: str) -> str:
    return f"{kind} has a forward of its own, set on the layer"


def _standard(module: nn.Module) -> bool:
    plain = is_conv1d(module) or type(module).forward is nn.Linear.forward
    return plain and not _set(module)


def computes_linear(module: nn.Module, training: bool = False) -> bool:
    """Whether this module is a linear layer: it owns a 2-D weight [out_features, in_features], and
    its forward gives x·Wᵀ + bias for one tensor x [..., in_features]. Tried out with a few rows,
    without hooks, in inference or in training."""
    parameters = module._parameters
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 2 or weight.is_meta or 0 in weight.shape:
        return False
    if not weight.is_floating_point() or not is_plain(weight):
        return False
    others = set(parameters) - {"weight", "bias"} or any(c is not None for c in module.children())
    if others or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return False
    bias = parameters.get("bias")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(weight.device, weight.dtype)
    flag = module.training
    try:
        module.training = training
        forward = module.forward if _set(module) else partial(type(module).forward, module)
        gpus = [weight.device] if weight.is_cuda else []
        with exact_float32(weight.device), torch.random.fork_rng(gpus):
            got, again = forward(x), forward(2 * x)
    except Exception:  # another signature, or another kind of input: not a linear layer
        return False
    finally:
        module.training = flag
    if not isinstance(got, Tensor) or not isinstance(again, Tensor):
        return False
    wide = torch.float64 if weight.device.type != "mps" else torch.float32
    w = weight.detach().to(wide)
    b = 0 if bias is None else bias.detach().to(wide)
    bound = x.to(wide).abs() @ w.abs().t() + (0 if bias is None else bias.detach().to(wide).abs())
    slack = 4 * torch.finfo(weight.dtype).eps * max(4.0, weight.shape[1] ** 0.5)
    for factor, y in ((1, got), (2, again)):
        exact = factor * (x.to(wide) @ w.t()) + b
        if y.shape != exact.shape:
            return False
        wrong = (y.to(wide) - exact).abs() > slack * factor * bound + UNDERFLOW
        if bool(wrong.any()):
            return False
    return True


def computed_weight(module: nn.Module) -> str | None:
    """Why the weight of a linear layer is no Parameter of its own (weight_norm, torch's prune, a
    parametrization), or None."""
    if parametrize.is_parametrized(module, "weight"):
        return "weight is parametrized"
    if "weight" not in module._parameters:
        made = ", ".join(sorted(module._parameters)) or "a plain attribute"
        return f"weight is computed in every forward from {made}"
    return None


def is_plain(weight: Tensor) -> bool:
    """A tensor of its own, not a subclass such as a quantised or a distributed one."""
    return type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
