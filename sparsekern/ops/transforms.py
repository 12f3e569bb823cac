"""The linear op under torch.func's transforms (grad, jvp, vmap, ...) and forward-mode AD.

torch derives the rules of neither from a custom op that takes a list of tensors, and a kernel that
reads memory would lose a tangent without a word. Here is one function that is closed under all of
them: the product with a frozen weight, P(x) = x · Wᵀ or x · W, whose every derivative is such a
product again. Bias and activation are then torch's own. torch.compile, torch.export and
torch.func.functionalize cannot trace such a function: there the product is torch's, with a dense
copy of the weight for the time of the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsekern.backends.compress import decompress
from sparsekern.errors import check, message
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import Sparse24

_interpreter = torch._C._functorch.peek_interpreter_stack
_interpreters = torch._C._functorch.get_interpreter_stack
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0 or _interpreter() is not None


def refuse(op: str, remedy: str) -> None:
    """NotImplementedError within a transform of torch.func or forward-mode AD."""
    if active():
        expected = "a call outside of torch.func and forward-mode AD"
        raise NotImplementedError(message(op, expected, "a call within one", remedy))


# What torch.compiler.assume_constant_result does, without importing the compiler: asked once while
# a graph is traced, which then is guarded by the transforms that are open.
active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def within(x: Tensor) -> Tensor:
    """The tensor inside of what torch.func's transforms put around it, the dimensions that vmap
    hides in front."""
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(x):
        return x
    inner = functorch.get_unwrapped(x)
    plain = within(inner)
    if not functorch.is_batchedtensor(x):
        return plain
    hidden = functorch.maybe_get_bdim(x) + plain.dim() - inner.dim()
    with torch._C._DisableFuncTorch():  # which would wrap it again
        return plain.movedim(hidden, 0)


class Product(torch.autograd.Function):
    """apply(x, w24, transposed, backend): x [..., in] -> x · Wᵀ [..., out]; transposed: x · W."""

    @staticmethod
    def forward(x: Tensor, w24: Sparse24, transposed: bool, backend: str | None) -> Tensor:
        tensors, spec = list(w24.tensors.values()), w24.spec.text
        y: Tensor
        if transposed:
            y = torch.ops.sparsekern.linear_input_grad(x.contiguous(), tensors, spec)
        else:
            y = torch.ops.sparsekern.linear(x, tensors, spec, None, None, backend)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.w24, ctx.transposed, ctx.backend = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return product(grads[0], ctx.w24, not ctx.transposed, ctx.backend), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return product(tangents[0], ctx.w24, ctx.transposed, ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return product(inputs[0].movedim(in_dims[0], 0), *inputs[1:]), 0


def product(x: Tensor, w24: Sparse24, transposed: bool, backend: str | None) -> Tensor:
    """P(x), differentiable as often as wanted."""
    y: Tensor = Product.apply(x, w24, transposed, backend)  # type: ignore[no-untyped-call]
    return y


@torch.library.custom_op("sparsekern::decompress", mutates_args=())
def _decompress_op(tensors: list[Tensor], spec: str) -> Tensor:
    """The dense weight [out, in], as one node of a graph."""
    parsed = WeightSpec.parse(spec)
    return decompress(Sparse24.from_tensors(parsed, dict(zip(parsed.tensors, tensors))))


@_decompress_op.register_fake
def _(tensors: list[Tensor], spec: str) -> Tensor:
    parsed = WeightSpec.parse(spec)
    return tensors[0].new_empty(parsed.shape, dtype=parsed.dtype)


def linear(
    x: Tensor, w24: Sparse24, bias: Tensor | None, activation: str | None, backend: str | None
) -> Tensor:
    """sparsekern.linear of checked arguments, differentiable in x and bias. The product is rounded
    to x.dtype before bias and activation, which are computed in float32 and rounded again."""
    one = not any(map(torch._C._functorch.is_batchedtensor, w24.tensors.values()))
    expected, got = "one weight for all of torch.func.vmap", "a batch of weights"
    remedy = "Give the buffers in_dims=None, or call the models in a loop."
    check(one, "sparsekern.linear", expected, got, remedy, NotImplementedError)
    traced = torch.compiler.is_compiling()
    if traced or any(level.key() == _FUNCTIONALIZE for level in _interpreters() or ()):
        dense = torch.ops.sparsekern.decompress(list(w24.tensors.values()), w24.spec.text)
        y = torch.nn.functional.linear(x, dense)
    else:
        y = product(x, w24, False, backend)
    if bias is None and activation is None:
        return y
    z = y.float() if bias is None else y.float() + bias.float()
    if activation is not None:
        z = getattr(torch.nn.functional, activation)(z)
    return z.to(x.dtype)
