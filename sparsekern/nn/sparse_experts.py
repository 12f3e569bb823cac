"""SparseExperts: the experts of a mixture, each with 2:4-compressed weights of its own.

Transformers keeps the matrices of all experts of a layer in one 3-D parameter, gate_up_proj
[experts, 2 * intermediate, hidden] and down_proj [experts, hidden, intermediate], or transposed
(gpt-oss, Llama 4). SparseExperts takes such a module apart: expert i has one linear layer for each
parameter, `3.gate_up_proj` and `3.down_proj`, at first an nn.Linear that is a view into the
parameter, later a SparseLinear. To everything else they are linear layers like any other.

What the module computes stays the code of the module that it stands for: its own forward runs, with
`self` a SparseExperts, and wherever that code multiplies by a matrix of an expert (F.linear, @,
torch.bmm) the expert's linear layer is called. Activations, gates, clamps, biases and the weighting
of the experts are therefore that module's, whatever they are. It is the forward in the model's file
(experts_implementation "eager"), a loop over the experts that were chosen: it waits for the device
once per expert, and torch.compile leaves it out of its graphs (fullgraph=True and torch.export are
errors).

Which parameters hold experts, and which way round, is found by running that forward once on
stand-ins that note how each parameter is used (`find_experts`).
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional

from sparsekern.errors import check, message
from sparsekern.nn.replace import replace_module
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.wrappers import named_modules
from sparsekern.utils.arguments import checked

_OP = "sparsekern.SparseExperts"
_PLAIN = frozenset(nn.Module().__dict__)
# Parameters of three dimensions that are no matrices.
_NO_MATRIX = re.compile(r"bias|norm|scale|embed|position|token|conv|latent|mask|anchor|quer", re.I)
_PROBE_TOKENS, _PROBE_ELEMENTS = 6, 2**20
_INDEX, _WEIGHT, _SIZES = re.compile("ind"), re.compile("weight|score|prob"), re.compile("size")
# The products that a forward may use; everything else that it does with a parameter is refused.
_LINEAR = functional.linear
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_BMM = (torch.bmm, Tensor.bmm)


@dataclass(frozen=True)
class Recipe:
    """How a module holds experts and is called.

    matrices: parameter -> whether it is stored [experts, in_features, out_features].
    experts: number of them.      roles: parameter of forward -> "hidden", "index", "weight" or
        "sizes".      form: "routed" (tokens, with the indices of their experts), "sorted" (the
        tokens of each expert in turn, as many for each) or "split" (the same with their numbers).
    """

    matrices: tuple[tuple[str, bool], ...]
    experts: int
    roles: tuple[tuple[str, str], ...]
    form: str


class _Unsupported(TypeError):
    """A forward does something with a parameter of experts that is no matrix product."""


class _Stack:
    """Stands for a parameter of all experts in the code of a forward."""

    def __init__(self, owner: Any, key: str, shape: torch.Size, flipped: bool = False) -> None:
        self._owner, self._key, self._flipped = owner, key, flipped
        self.shape = torch.Size((shape[0], shape[2], shape[1])) if flipped else shape
        self._stored = shape

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self._owner._dtype_of(self._key))

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self._owner._device_of(self._key))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def _turned(self) -> Any:
        return type(self)(self._owner, self._key, self._stored, not self._flipped)

    def transpose(self, a: int, b: int) -> Any:
        last = {len(self.shape) - 1, len(self.shape) - 2}
        if {a % len(self.shape), b % len(self.shape)} != last:
            raise _Unsupported(f"{self._key}.transpose({a}, {b})")
        return self._turned()

    @property
    def mT(self) -> Any:
        return self._turned()

    def contiguous(self) -> Any:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        if any(dtype != self.dtype for dtype in wanted):
            raise _Unsupported(f"{self._key} in {wanted[0]}")
        return self

    def float(self) -> Any:
        return self.to(torch.float32)

    def __getitem__(self, index: Any) -> _Matrix:
        if isinstance(index, Tensor) and index.numel() != 1:
            raise _Unsupported(f"{self._key}[several experts]")
        if isinstance(index, (tuple, slice, list)) or index is None:
            raise _Unsupported(f"{self._key}[{index!r}]")
        return _Matrix(self._owner, self._key, self._stored, self._flipped, int(index))

    def __iter__(self) -> Iterator[_Matrix]:
        return (self[i] for i in range(len(self)))

    def unbind(self, dim: int = 0) -> tuple[_Matrix, ...]:
        if dim != 0:
            raise _Unsupported(f"{self._key}.unbind({dim})")
        return tuple(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if (func in _BMM or func in _MATMUL) and not kwargs and len(args) == 2:
            x, stack = args
            if isinstance(x, Tensor) and type(stack) is _Stack and x.dim() == 3:
                return stack._products(x)
        raise _Unsupported(f"{getattr(func, '__name__', func)} on a parameter of all experts")

    def _products(self, x: Tensor) -> Tensor:
        """x [experts, tokens, in] times each expert's matrix. Tokens that are all zero, which a
        router without indices uses for "not this expert", are left out: their product is zero."""
        if x.shape[0] != len(self):
            raise _Unsupported(f"a product of {x.shape[0]} batches with {len(self)} experts")
        used = (x != 0).any(-1)
        outputs = []
        for i, matrix in enumerate(self):
            rows = used[i].nonzero()[:, 0]
            y = x.new_zeros(x.shape[1], self.shape[2])
            outputs.append(y.index_add(0, rows, matrix._times(x[i, rows], True)))
        return torch.stack(outputs)


class _Matrix(_Stack):
    """Stands for the matrix of one expert."""

    def __init__(self, owner: Any, key: str, stored: torch.Size, flipped: bool, index: int) -> None:
        super().__init__(owner, key, stored, flipped)
        self._index, self.shape = index, self.shape[1:]

    def _turned(self) -> Any:
        return _Matrix(self._owner, self._key, self._stored, not self._flipped, self._index)

    @property
    def T(self) -> Any:
        return self._turned()

    def t(self) -> Any:
        return self._turned()

    def __getitem__(self, index: Any) -> Any:
        raise _Unsupported(f"{self._key}[expert][{index!r}]")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR and not set(kwargs) - {"bias", "weight", "input"}:
            given = dict(zip(("input", "weight", "bias"), args)) | kwargs
            x, matrix, bias = given["input"], given["weight"], given.get("bias")
            if isinstance(x, Tensor) and isinstance(matrix, _Matrix):
                y = matrix._times(x, False)
                return y if bias is None else y + bias
        if func in _MATMUL and not kwargs and len(args) == 2:
            x, matrix = args
            if isinstance(x, Tensor) and isinstance(matrix, _Matrix):
                return matrix._times(x, True)
        raise _Unsupported(f"{getattr(func, '__name__', func)} on the matrix of an expert")

    def _times(self, x: Tensor, columns: bool) -> Tensor:
        """The product over the first dimension of the matrix as seen here (columns) or over its
        last."""
        width = self.shape[0 if columns else 1]
        if x.shape[-1] != width:
            raise ValueError(
                message(_OP, f"inputs of {width} features for {self._key}", str(list(x.shape)))
            )
        return cast(
            Tensor, self._owner._multiply(self._key, self._index, x, columns != self._flipped)
        )


class Expert(nn.Module):
    """One expert: a linear layer for each of its matrices, by the parameter's name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not called: SparseExperts calls the layers."""
        raise NotImplementedError(message(_OP, "a call of the experts", "one of a single expert"))


class SparseExperts(nn.Module):
    """Experts one by one: those of `original`, computed by its own forward.

    state_dict: the linear layers under `<expert>.<parameter>`, such as 3.down_proj.weight or
    3.down_proj.compressed; what else the module had (biases) under its own name.

    Args:
        original: a module with experts in 3-D parameters. Its matrices are shared, not copied: the
            linear layers are views into them.
        recipe: what `find_experts` says of it.
    Attributes:
        recipe: as given.      kind: class of the original.
    """

    @checked(_OP)
    def __init__(self, original: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.kind = recipe, type(original)
        for key, value in original.__dict__.items():
            if key not in _PLAIN:
                self.__dict__[key] = value
        matrices = dict(recipe.matrices)
        self._shapes: dict[str, torch.Size] = {}
        self._trained: dict[str, bool] = {}
        self._names = list(original._parameters)
        for key, parameter in original._parameters.items():
            if key not in matrices:
                self._parameters[key] = parameter
        self._buffers.update(original._buffers)
        self._non_persistent_buffers_set.update(original._non_persistent_buffers_set)
        self._modules.update(original._modules)
        experts = [Expert() for _ in range(recipe.experts)]
        for key, transposed in recipe.matrices:
            parameter = cast(nn.Parameter, original._parameters[key])
            self._shapes[key], self._trained[key] = parameter.shape, parameter.requires_grad
            for i, expert in enumerate(experts):
                view = parameter.data[i].t() if transposed else parameter.data[i]
                expert._modules[key] = linear_of(view, parameter.requires_grad)
        for i, expert in enumerate(experts):
            self._modules[str(i)] = expert
        self.training = original.training
        for expert in experts:
            expert.train(self.training)

    def __getattr__(self, name: str) -> Any:
        shapes = self.__dict__.get("_shapes")
        if shapes is not None and name in shapes:
            return _Stack(self, name, shapes[name])
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("kind")
            for base in () if kind is None else kind.__mro__:
                if name in base.__dict__ and base is not nn.Module:
                    found = base.__dict__[name]
                    return found.__get__(self, kind) if hasattr(found, "__get__") else found
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's forward; see the head of this file."""
        if torch.compiler.is_exporting():
            expected, got = "dense experts for torch.export", "a loop over those that were chosen"
            remedy = "Export sparsekern.decompress_model(copy.deepcopy(model))."
            raise NotImplementedError(message(_OP, expected, got, remedy))
        return _run(self, args, kwargs)

    def expert(self, index: int) -> dict[str, nn.Module]:
        """The linear layers of one expert, by parameter."""
        layers = cast(nn.Module, self._modules[str(index)])._modules
        return {key: cast(nn.Module, layers[key]) for key, _ in self.recipe.matrices}

    def layers(self, key: str) -> list[nn.Module]:
        """The linear layers of all experts for one parameter."""
        return [self.expert(i)[key] for i in range(self.recipe.experts)]

    @property
    def is_sparse(self) -> bool:
        """Whether any matrix of any expert is compressed."""
        return any(
            isinstance(layer, SparseLinear)
            for key, _ in self.recipe.matrices
            for layer in self.layers(key)
        )

    def alone(self, index: int, x: Tensor) -> bool:
        """Run one expert on tokens x [tokens, hidden], for what its layers see; False where the
        module is called in a way that has no place for them."""
        recipe = self.recipe
        if recipe.form == "split" or len(recipe.matrices) < 2:
            return False
        if recipe.form == "sorted":
            spread = x.new_zeros(recipe.experts, *x.shape)
            spread[index] = x
            x = spread.reshape(-1, x.shape[-1])
        given: dict[str, Any] = {}
        for name, role in recipe.roles:
            if role == "hidden":
                given[name] = x
            elif role == "index":
                given[name] = torch.full((x.shape[0], 1), index, device=x.device, dtype=torch.int64)
            else:
                given[name] = x.new_ones(x.shape[0], 1)
        self.forward(**given)
        return True

    def hidden_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The tokens among the arguments of a call, None if they are not found."""
        name = self.recipe.roles[0][0]
        x = args[0] if args else kwargs.get(name)
        return x if isinstance(x, Tensor) else None

    def cut(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The same call with the tokens that `keep` (bool [tokens]) names; None where the module is
        called in another form."""
        if self.recipe.form != "routed":
            return None

        def part(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.dim() == 2
            return value[keep.to(value.device)] if rows else value

        if any(
            isinstance(v, Tensor) and (v.dim() != 2 or v.shape[0] != keep.numel())
            for v in (*args, *kwargs.values())
        ):
            return None
        return tuple(part(a) for a in args), {k: part(v) for k, v in kwargs.items()}

    def _dtype_of(self, key: str) -> torch.dtype:
        return cast(torch.dtype, self.expert(0)[key].weight.dtype)

    def _device_of(self, key: str) -> torch.device:
        return cast(torch.device, self.expert(0)[key].weight.device)

    def _multiply(self, key: str, index: int, x: Tensor, transposed: bool) -> Tensor:
        if transposed != dict(self.recipe.matrices)[key]:
            raise _Unsupported(f"{key} multiplied the other way round")
        return cast(Tensor, self.expert(index)[key](x))

    def __repr__(self) -> str:
        parts = []
        for key, _ in self.recipe.matrices:
            layers = self.layers(key)
            sparse = sum(isinstance(layer, SparseLinear) for layer in layers)
            parts.append(f"{key} {list(self._shapes[key])} {sparse} of {len(layers)} 2:4")
        return f"SparseExperts({self.kind.__name__}: {', '.join(parts)})"


@_disable_dynamo
def _run(module: SparseExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _code_of(module.kind)(module, *args, **kwargs)


def _code_of(kind: type) -> Callable[..., Any]:
    """The forward of a class as it is written, below decorators that choose another one."""
    return cast(Callable[..., Any], inspect.unwrap(kind.forward))  # type: ignore[attr-defined]


def linear_of(weight: Tensor, trained: bool = True) -> nn.Linear:
    """nn.Linear without bias around a weight [out_features, in_features], sharing its memory."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=trained)
    return linear


# ---- taking apart and putting together ----------------------------------------------------------


def unfuse_experts(model: nn.Module, names: Any = None) -> dict[str, tuple[nn.Module, Any]]:
    """Put a SparseExperts in the place of every module that holds experts in 3-D parameters.

    The parameters' memory becomes that of the linear layers; the modules that were replaced keep
    their Parameter objects, empty, for `fuse_experts`.

    Args:
        model: changed in place; one on meta, too.      names: only these modules; None: all.
    Returns:
        {name: (module that was replaced, its SparseExperts)}.
    """
    made: dict[str, tuple[nn.Module, Any]] = {}
    for name, (old, recipe) in find_experts(model).items():
        if names is not None and name not in names:
            continue
        new = SparseExperts(old, recipe)
        replace_module(model, old, new)
        for key, _ in recipe.matrices:
            parameter = cast(nn.Parameter, old._parameters[key])
            parameter.data = parameter.data.new_empty(0)
        made[name] = old, new
    return made


@torch.no_grad()
def fuse_experts(model: nn.Module, new: SparseExperts, old: nn.Module | None = None) -> nn.Module:
    """The inverse for a SparseExperts without compressed matrices: the module that it was made of.

    Args:
        old: that module, as unfuse_experts returned it; None makes another of its class.
    Returns:
        the module with experts in 3-D parameters, in the place of `new`. Where the linear layers
        are still views into one memory it is used again, else the matrices are copied into one.
    Raises:
        ValueError: a matrix is compressed.
    """
    check(not new.is_sparse, _OP, "dense experts", repr(new), "Decompress them first.")
    if old is None:
        old = new.kind.__new__(new.kind)
        nn.Module.__init__(old)
        own = {"recipe", "kind", "_shapes", "_trained", "_names"}
        old.__dict__.update(
            {k: v for k, v in new.__dict__.items() if k not in _PLAIN and k not in own}
        )
    matrices = dict(new.recipe.matrices)
    for key, parameter in new._parameters.items():
        old._parameters[key] = parameter
    old._buffers.update(new._buffers)
    for key, module in new._modules.items():
        if not isinstance(module, Expert):
            old._modules[key] = module
    for key, transposed in matrices.items():
        weights = [cast(nn.Linear, layer).weight.data for layer in new.layers(key)]
        if transposed:
            weights = [weight.t() for weight in weights]
        data = _whole(weights)
        data = torch.stack(weights) if data is None else data
        known = old._parameters.get(key)
        if known is None:
            old._parameters[key] = nn.Parameter(data, requires_grad=new._trained[key])
        else:
            known.data = data
    old._parameters = {k: old._parameters[k] for k in new._names}
    old.training = new.training
    replace_module(model, new, old)
    return old


def _whole(weights: list[Tensor]) -> Tensor | None:
    """The tensor of which these are the parts along a first dimension, None if they are not."""
    first = weights[0]
    size = first.numel()
    base = first.untyped_storage().data_ptr() if not first.is_meta else None
    if base is None or not first.is_contiguous():
        return None
    for i, weight in enumerate(weights):
        same = weight.untyped_storage().data_ptr() == base and weight.is_contiguous()
        if not same or weight.storage_offset() != first.storage_offset() + i * size:
            return None
    shape = (len(weights), *first.shape)
    return first.as_strided(shape, (size, *first.stride()), first.storage_offset())


@torch.no_grad()
def decompress_experts(model: nn.Module) -> list[str]:
    """Turn every SparseExperts of a model back into the module that it was made of, with zeros
    where the compressed weights have none; names of the modules. Holds one layer's experts dense
    and compressed at a time."""
    names = []
    for name, module in list(named_modules(model)):
        if not isinstance(module, SparseExperts):
            continue
        for key, _ in module.recipe.matrices:
            for i in range(module.recipe.experts):
                layer = module.expert(i)[key]
                if isinstance(layer, SparseLinear):
                    dense = linear_of(layer.weight.to_dense(), module._trained[key])
                    cast(nn.Module, module._modules[str(i)])._modules[key] = dense
        fuse_experts(model, module)
        names.append(name)
    return names


# ---- finding experts ----------------------------------------------------------------------------


def find_experts(model: nn.Module) -> dict[str, tuple[nn.Module, Recipe]]:
    """{name: (module, Recipe)} of the modules of a model that hold experts in 3-D parameters.

    A module counts when its forward, run on stand-ins for these parameters and on random tokens,
    uses each of them in matrix products only, one expert at a time or all by torch.bmm, and always
    the same way round; and, where its weights are in memory, when the result is that of the module
    itself. Modules of one class with one set of shapes are tried once.
    """
    found: dict[str, tuple[nn.Module, Recipe]] = {}
    known: dict[Any, Recipe | None] = {}
    for name, module in named_modules(model):
        other = isinstance(module, (SparseExperts, torch.jit.ScriptModule))
        if not name or other or not _candidates(module):
            continue
        shapes = tuple((k, tuple(p.shape)) for k, p in module._parameters.items() if p is not None)
        key = (type(module), shapes)
        if key not in known:
            known[key] = describe_experts(module)
        recipe = known[key]
        if recipe is not None and "forward" not in module.__dict__:
            found[name] = module, recipe
    return found


def _candidates(module: nn.Module) -> list[str]:
    """Parameters of a module that may hold experts: 3-D, floating point and of one first size."""
    names = [
        key
        for key, p in module._parameters.items()
        if p is not None
        and p.dim() == 3
        and min(p.shape[1:]) >= 2
        and p.is_floating_point()
        and p.element_size() >= 2
        and type(p.data) is Tensor
        and not _NO_MATRIX.search(key)
    ]
    own = type(module).forward is not nn.Module.forward
    sizes = {cast(Tensor, module._parameters[key]).shape[0] for key in names}
    return names if own and len(sizes) == 1 else []


def describe_experts(module: nn.Module) -> Recipe | None:
    """The Recipe of one module, None if it holds no experts in the sense of `find_experts`."""
    keys = _candidates(module)
    if not keys or isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase)):
        return None
    roles = _roles(module)
    if roles is None:
        return None
    kinds = [role for _, role in roles]
    form = "routed" if "index" in kinds else "split" if "sizes" in kinds else "sorted"
    first = cast(Tensor, module._parameters[keys[0]])
    for width in dict.fromkeys((first.shape[1], first.shape[2])):
        probe = _Probe(module, keys)
        try:
            with torch.no_grad(), torch.device("cpu"):
                call = _example(module, roles, form, first.shape[0], width)
                _code_of(type(module))(probe, **call)
        except Exception:  # other inputs, or other uses of its parameters
            continue
        if set(probe.seen) != set(keys) or any(len(uses) != 1 for uses in probe.seen.values()):
            continue
        matrices = tuple((key, next(iter(probe.seen[key]))) for key in keys)
        recipe = Recipe(matrices, first.shape[0], tuple(roles), form)
        return recipe if _agrees(module, recipe, call) else None
    return None


def _roles(module: nn.Module) -> list[tuple[str, str]] | None:
    """(parameter of forward, what it is), by their names and places; None for other signatures."""
    try:
        parameters = list(inspect.signature(_code_of(type(module))).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if not 1 <= len(parameters) <= 3 or any(p.kind not in usual for p in parameters):
        return None
    roles = [(parameters[0].name, "hidden")]
    for parameter in parameters[1:]:
        for role, pattern in (("index", _INDEX), ("weight", _WEIGHT), ("sizes", _SIZES)):
            if pattern.search(parameter.name):
                roles.append((parameter.name, role))
                break
        else:
            return None
    kinds = [role for _, role in roles]
    fits = kinds in (["hidden"], ["hidden", "sizes"]) or sorted(kinds) == [
        "hidden",
        "index",
        "weight",
    ]
    return roles if fits else None


def _example(
    module: nn.Module, roles: list[tuple[str, str]], form: str, experts: int, width: int
) -> dict[str, Any]:
    """Arguments of a small call on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens = _PROBE_TOKENS if form == "routed" else experts
    dtype = next(p.dtype for p in module._parameters.values() if p is not None)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    count = min(2, experts)
    index = (
        torch.stack(
            [torch.arange(tokens, device="cpu"), torch.arange(tokens, device="cpu") + 1], 1
        )[:, :count]
        % experts
    )
    weight = torch.rand(tokens, count, generator=generator, dtype=torch.float32, device="cpu").to(
        dtype
    )
    made = {"hidden": x, "index": index, "weight": weight, "sizes": [1] * experts}
    return {name: made[role] for name, role in roles}


class _Probe:
    """`self` for a forward that is only to show how it uses its parameters: the products are zeros
    of the right shape, and nothing reads a weight."""

    def __init__(self, module: nn.Module, keys: list[str]) -> None:
        self.seen: dict[str, set[bool]] = {}
        self._module, self._keys = module, set(keys)
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        module, made = self.__dict__["_module"], self.__dict__["_made"]
        if name in made:
            return made[name]
        if name in self.__dict__["_keys"]:
            return _Stack(self, name, module._parameters[name].shape)
        if name in module._modules:
            child = module._modules[name]
            large = sum(t.numel() for t in _tensors(child)) > _PROBE_ELEMENTS
            if large:  # an activation or a norm is not
                raise _Unsupported(f"{name}, which is large")
            child = copy.deepcopy(child)
            if any(t.is_meta or t.device.type != "cpu" for t in _tensors(child)):
                child = child.to_empty(device="cpu")
            made[name] = child.eval()
            return made[name]
        value = module._parameters.get(name)
        value = module._buffers.get(name) if value is None else value
        if isinstance(value, Tensor):
            made[name] = torch.zeros(1, dtype=value.dtype, device="cpu").expand(value.shape)
            return made[name]
        if name == "training":
            return False
        for base in type(module).__mro__:
            if name in base.__dict__ and base is not nn.Module:
                found = base.__dict__[name]
                return found.__get__(self, type(self)) if hasattr(found, "__get__") else found
        return getattr(module, name)

    def _dtype_of(self, key: str) -> torch.dtype:
        return cast(Tensor, self._module._parameters[key]).dtype

    def _device_of(self, key: str) -> torch.device:
        return torch.device("cpu")

    def _multiply(self, key: str, index: int, x: Tensor, transposed: bool) -> Tensor:
        self.seen.setdefault(key, set()).add(transposed)
        _, a, b = cast(Tensor, self._module._parameters[key]).shape
        return x.new_zeros(*x.shape[:-1], b if transposed else a)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _agrees(module: nn.Module, recipe: Recipe, call: Mapping[str, Any]) -> bool:
    """Whether the module taken apart computes what it computes; True on meta, where nothing can be
    compared."""
    first = cast(Tensor, module._parameters[recipe.matrices[0][0]])
    if any(t.is_meta for t in _tensors(module)):
        return True
    call = {k: v.to(first.device) if isinstance(v, Tensor) else v for k, v in call.items()}
    flag = module.training
    try:
        module.training = False
        apart = SparseExperts(module, recipe)
        with torch.no_grad():
            got = apart(**copy.deepcopy(call))
            own = _code_of(type(module))(module, **copy.deepcopy(call))
    except Exception:  # its own forward fails, or does something else with these parameters
        return False
    finally:
        module.training = flag
    if not isinstance(got, Tensor) or not isinstance(own, Tensor) or got.shape != own.shape:
        return False
    got, own = got.double(), own.double()
    slack = 8 * torch.finfo(first.dtype).eps * max(4.0, math.sqrt(first[0].numel()) ** 0.5)
    return bool((got - own).abs().max() <= slack * own.abs().max().clamp(min=1e-30) + 1e-30)
