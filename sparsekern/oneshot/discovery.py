"""Reading models: which weights take part in matrix products, which of them can be pruned, and
where the decoder blocks are.

Works on any nn.Module; nothing here names a model family. The decoder blocks are the largest
nn.ModuleList or nn.Sequential whose members are of one class and hold linear layers: that finds
`model.layers` (Llama, Mistral, Qwen, Gemma, Phi), `model.decoder.layers` (OPT), `transformer.h`
(GPT-2) and timm's `blocks` alike.

A linear layer is nn.Linear, Conv1D, or any module with a 2-D `weight` whose forward computes
x·Wᵀ + bias: that is tried out on a few numbers, not read off its name. Weights that are used in
matrix products otherwise (experts in one 3-D parameter, convolutions, quantised layers, adapters)
are listed with the reason why they stay dense, so that a report accounts for the whole model.
"""

from __future__ import annotations

import dis
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekern.errors import check
from sparsekern.formats import dtypes
from sparsekern.nn.own_forward import (
    computed_weight,
    computes_linear,
    is_plain,
    lost_forward,
    own_forward,
)
from sparsekern.nn.replace import dense_weight, is_conv1d, is_linear
from sparsekern.nn.sparse_experts import SparseExperts
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.nn.tied import tied_places
from sparsekern.nn.wrappers import named_modules, unwrapped

OP = "sparsekern.oneshot.find_layers"
PRUNABLE_DTYPES = tuple(dtypes.PLAIN)
# Modules that read child.weight themselves, so that a child of theirs has to stay an nn.Linear.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# What may be asked of a weight that is a Sparse24: reading these does not need a dense one.
HARMLESS = frozenset(
    "dtype device shape requires_grad is_meta is_cuda is_floating_point ndim size dim".split()
)
ALREADY = "already 2:4"
BASES_APART = 0.2  # of its norm: a rotated embedding differs by more, a trained one by less
# Methods that code beside the layer may call; those that make its weights are not among them.
_CALLED = re.compile(r"(?!_|forward$|extra_repr$|reset|init)\w+")
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# Buffers of ASP, whose masks are in the zeros of the weights.
_ASP_MASK = re.compile(r"__\w+_mma_(mask|pruned_p)")
# (whether it begins at `self`, attributes): where a method reads a weight.
Chain = tuple[bool, tuple[str, ...]]
# Parameters with two or more dimensions that enter no matrix product: tables, positions, biases,
# filters and states. A name that holds one of these words makes no row.
_NO_PRODUCT = re.compile(
    r"embed|position|pos_|token|bias|table|norm|scale|gamma|beta|a_log|conv|quer|latent|mask|anchor"
    r"|time_|state|logit|centroid|codebook|prototype",
    re.IGNORECASE,
)


@dataclass
class Layer:
    """One weight of a model that takes part in matrix products.

    name: full module name, or that of the parameter where it is not `weight`.
    module: nn.Linear, Conv1D or another that computes x·Wᵀ + b; with a reason, any module.
    block: index of its decoder block, None outside the blocks.
    reason: why it stays as it is, None if it is to be pruned.
    parameter: the attribute that holds the weight.
    asked: False where a rule of the caller left it dense.
    owner, expert: of a matrix of an expert, the SparseExperts that holds it, and (its name, index
        of the expert, parameter).      tokens: that the expert saw in the calibration.
    """

    name: str
    module: nn.Module
    block: int | None = None
    reason: str | None = None
    parameter: str = "weight"
    asked: bool = True
    owner: nn.Module | None = None
    expert: tuple[str, int, str] | None = None
    tokens: int | None = None
    raw: bool = field(default=False, repr=False)  # no linear layer: shape and bytes as stored

    @property
    def weight(self) -> Tensor:
        """The dense weight; [out_features, in_features] of a linear layer."""
        if self.raw:
            return cast(Tensor, getattr(self.module, self.parameter)).detach()
        return dense_weight(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features); of a weight that is no linear layer's as stored."""
        if isinstance(self.module, SparseLinear):
            return self.module.out_features, self.module.in_features
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> str:
        """Of the weight, such as "bfloat16"."""
        if isinstance(self.module, SparseLinear):
            return str(self.module.weight.dtype).removeprefix("torch.")
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def home(self) -> nn.Module | None:
        """The module right above a matrix of an expert, which nothing else holds; else None."""
        if self.owner is None or self.expert is None:
            return None
        return self.owner._modules[str(self.expert[1])]

    @property
    def is_24(self) -> bool:
        """Whether the module holds a 2:4 weight already."""
        return isinstance(self.module, SparseLinear)

    @property
    def bytes_dense(self) -> int:
        """Of the weight, dense."""
        if isinstance(self.module, SparseLinear):
            return math.prod(self.shape) * self.module.weight.values.element_size()
        return self.weight.numel() * self.weight.element_size()

    @property
    def bytes_now(self) -> int:
        """Of the weight as it is stored now."""
        if isinstance(self.module, SparseLinear):
            return int(self.module.weight.nbytes)
        return self.bytes_dense


def before_pruning(model: nn.Module, what: str) -> str:
    """The remedy where a model's dense layers cannot have a rotation or permutation."""
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        return f"Its layers are compressed: the {what} comes before prune_model."
    return f"Prune it without {what}."


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder blocks: (name of their list, blocks in order), or ("", []) when the model has
    none.

    Of all nn.ModuleLists, and nn.Sequentials of two or more, whose members are of one class and
    each hold a linear layer below them, the one with the most parameters. Experts inside a block
    therefore lose to the blocks around them.
    """
    best: tuple[str, list[nn.Module]] = ("", [])
    best_size = 0
    linear: dict[int, bool] = {}

    def holds_linear(module: nn.Module) -> bool:
        for m in module.modules():
            if id(m) not in linear:
                linear[id(m)] = is_linear(m) or isinstance(m, SparseLinear) or computes_linear(m)
            if linear[id(m)]:
                return True
        return False

    for name, module in named_modules(model):
        listed = isinstance(module, nn.ModuleList)
        listed |= isinstance(module, nn.Sequential) and len(module) > 1
        blocks = list(cast(Any, module)) if listed else []
        if None in blocks:  # a place without a module
            continue
        one_class = len({type(unwrapped(b)) for b in blocks}) == 1 and not is_linear(blocks[0])
        if one_class:
            size = sum(p.numel() for p in module.parameters())
            size += sum(
                b.numel()
                for m in module.modules()
                if isinstance(m, SparseLinear)
                for b in m.buffers()
            )
            if size > best_size and all(holds_linear(b) for b in blocks):
                best, best_size = (name, blocks), size
    return best


def find_layers(
    model: nn.Module,
    pattern: tuple[int, int],
    compress: bool,
    op: str = OP,
    absent: Callable[[nn.Module], bool] = lambda module: False,
) -> list[Layer]:
    """Every weight of the model that takes part in matrix products, in tree order, with the reason
    for those that cannot be pruned.

    Args:
        pattern: (n, m): n kept of every m; in_features must be a multiple of m.
        compress: the layers are to be replaced, so that a module which reads their weight itself
            rules them out.
        op: who asks, for messages.
        absent: of which modules the weights are not in memory now, and may be on meta.
    Raises:
        ValueError: the model itself is a linear layer (it cannot be replaced in place), or a weight
            is on the meta device.
    """
    got = f"a bare {type(model).__name__}"
    remedy = "Use SparseLinear.from_linear, or wrap it in nn.Sequential."
    check(not is_linear(model), op, "a model that contains Linear layers", got, remedy)
    scripted = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    # torch.export puts a function there that refuses.
    exported = isinstance(model, torch.fx.GraphModule) and "eval" in vars(model)
    got = f"TorchScript at {scripted[:1]}" if scripted else "a graph of torch.export"
    remedy = "Prune the model that it was made of."
    check(not (scripted or exported), op, "a model of Python code", got, remedy, TypeError)
    _, blocks = find_blocks(model)
    index_of = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
    tied, adapters = tied_places(model), adapter_parts(model)
    places = Places(model) if compress else None
    experts = {
        f"{name}.{i}.{key}".lstrip("."): (module, (name, i, key))
        for name, module in named_modules(model)
        if isinstance(module, SparseExperts)
        for i in range(module.recipe.experts)
        for key, _ in module.recipe.matrices
    }
    layers: list[Layer] = []
    for name, module in named_modules(model):
        block = index_of.get(id(module))
        if isinstance(module, SparseLinear):
            layers.append(Layer(name, module, block, ALREADY))
            layers[-1].owner, layers[-1].expert = experts.get(name, (None, None))
            continue
        adapted = isinstance(module._modules.get("base_layer"), nn.Module)  # which is listed itself
        linear = not adapted and (is_linear(module) or computes_linear(module))
        if linear and isinstance(getattr(module, "weight", None), Tensor):
            meta = cast(Tensor, module.weight).is_meta and not absent(module)
            check(
                not meta, op, f"weights in memory, {name}", "a meta tensor", "Load the model first."
            )
            layer = Layer(name, module, block)
            layer.owner, layer.expert = experts.get(name, (None, None))
            layer.raw = layer.weight.dim() != 2
            partners = tied.get((id(module), "weight"))
            layer.reason = _why_not(layer, partners[0].name if partners else None, pattern)
            if layer.reason is None and name in adapters:
                layer.reason = f"adapter of {adapters[name]}"
            if layer.reason is None and places is not None:
                layer.reason = places.why_no_other(module)
            layers.append(layer)
        elif isinstance(module, nn.Module):
            layers.extend(_other_weights(name, module, block))
    return layers


def _adapter(module: nn.Module, parents: Mapping[int, list[tuple[nn.Module, str]]]) -> str | None:
    """peft's adapter of a layer, where it cannot do with a SparseLinear: as DoRA, which normalises
    by the columns of the sum of both weights, or FRoD, which has taken it apart. Tried out
    on one row."""
    weight = cast(Tensor, module.weight)
    above = [parent for parent, key in parents[id(module)] if key == "base_layer"]
    if not above or weight.is_meta:
        return None
    rows, columns = dense_weight(module).shape
    kinds: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    sparse, calls = SparseLinear(columns, rows, module.bias is not None, **kinds), list[None]()
    sparse.register_forward_pre_hook(lambda *_: calls.append(None))
    x = torch.ones(1, columns, **kinds)
    for parent in above:
        if _runs(parent, x):
            parent._modules["base_layer"] = sparse
            try:
                calls.clear()
                if not _runs(parent, x) or not calls:
                    return f"an adapter ({type(parent).__module__})"
            finally:
                parent._modules["base_layer"] = module
    return None


def _runs(module: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            module(x)
    except Exception:
        return False
    return True


def _why_not(layer: Layer, tied_with: str | None, pattern: tuple[int, int]) -> str | None:
    """Why this linear layer cannot be pruned, or None."""
    module, weight = layer.module, layer.weight
    if (reason := computed_weight(module)) is not None:
        return reason
    if not is_plain(cast(Tensor, module.weight)):
        return (
            f"weight is a {type(cast(Tensor, module.weight).data).__name__}, quantised or wrapped"
        )
    if tied_with:
        return f"weight tied to {tied_with}"
    if weight.dtype not in PRUNABLE_DTYPES:
        name = str(weight.dtype).removeprefix("torch.")
        wide = weight.is_complex() or weight.is_floating_point() and weight.element_size() > 1
        return f"{'' if wide else 'quantised: '}dtype {name} is not float32, float16 or bfloat16"
    if (reason := own_forward(module)) is not None:
        return reason
    if weight.numel() == 0:
        return "the weight is empty"
    if any(step == 0 < size - 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        return "elements of the weight share their memory (expand)"
    if weight.shape[1] % pattern[1]:
        return f"in_features {weight.shape[1]} is not a multiple of {pattern[1]}"
    return None


class Places:
    """The linear layers of a model as places: what else than the dense layer may stand there."""

    def __init__(self, model: nn.Module) -> None:
        self._held, self._read = _held_elsewhere(model), _Readers()
        self._parents: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():
            for key, child in parent.named_children():
                self._parents[id(child)].append((parent, key))

    def why_no_other(self, module: nn.Module) -> str | None:
        """Why a layer without a dense weight cannot stand in the place of this linear layer, or
        None."""
        if id(module) in self._held:
            return f"{self._held[id(module)]} holds it outside of its modules, too"
        if (reason := _lost(module)) is not None:
            return reason
        owners = (self._read.owner(*above) for above in _above(module, self._parents))
        owner = next((o for o in owners if o), None) or _adapter(module, self._parents)
        return f"{owner} reads the weight itself" if owner else None


def _lost(module: nn.Module) -> str | None:
    """What a layer of weight and bias alone would lose of this linear layer, or None."""
    kind = type(module).__name__
    if (reason := lost_forward(module)) is not None:
        return reason
    names = {
        name
        for base in type(module).__mro__
        if base not in nn.Linear.__mro__ and not is_conv1d(module)
        for name, value in vars(base).items()
        if (inspect.isfunction(value) or isinstance(value, property)) and _CALLED.fullmatch(name)
    }
    if names:
        return f"{kind} has methods of its own ({', '.join(sorted(names))})"
    own = {**module._parameters, **module._buffers, **module._modules}
    lost = {name for name, value in own.items() if value is not None} - {"weight", "bias"}
    lost -= {name for name in lost if _ASP_MASK.fullmatch(name)}
    if lost:
        return f"{kind} holds more than weight and bias ({', '.join(sorted(lost))})"
    weight, bias = dense_weight(module), getattr(module, "bias", None)
    if isinstance(bias, Tensor) and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        return f"its bias is {list(bias.shape)} of {bias.dtype}"
    return None


def _held_elsewhere(model: nn.Module) -> dict[int, str]:
    """id of each module that another one holds, itself or a method of it, where nothing can be
    replaced (in a list, a tuple, a dict or a plain attribute) -> the class of that other one.
    What torch.compile made of a layer is bound anew (nn/replace.py)."""
    found: dict[int, str] = {}
    for module in model.modules():
        if hasattr(module, "dynamo_ctx"):
            continue
        for key in module.__dict__.keys() - _OF_EVERY_MODULE:
            value = module.__dict__[key]
            values = value.values() if isinstance(value, dict) else value
            for held in values if isinstance(value, (dict, list, tuple)) else (value,):
                owner = held.__self__ if isinstance(held, MethodType) else held
                if isinstance(owner, nn.Module) and owner is not module:
                    found[id(owner)] = type(module).__name__
    return found


def _other_weights(name: str, module: nn.Module, block: int | None) -> list[Layer]:
    """The parameters of a module that is no linear layer which take part in matrix products, each
    with the reason why it stays dense."""
    if isinstance(module, (nn.Embedding, parametrize.ParametrizationList)):
        return []
    kind = type(module).__name__
    found = []
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.dim() < 2 or parameter.numel() == 0:
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            reason = "convolution"
        elif isinstance(module, nn.RNNBase):
            reason = f"recurrent layer ({kind})"
        elif isinstance(module, READS_WEIGHTS):
            reason = f"{kind} reads the weight itself"
        elif hasattr(module, "to_sparse_linear"):
            reason = f"{kind} trains it: sparsekern.finetune.finish_training compresses it"
        elif min(parameter.shape) < 2 or _NO_PRODUCT.search(key):
            continue
        elif parameter.dim() == 3:
            many = "expert" in f"{name}.{kind}".lower()
            what = "experts" if many else f"a 3-D parameter of {kind}"
            reason = f"{what} in one parameter {list(parameter.shape)}"
        elif not parameter.is_floating_point() or parameter.element_size() == 1:
            reason = f"quantised: {kind} with {str(parameter.dtype).removeprefix('torch.')} weights"
        elif _NO_PRODUCT.search(kind) or parameter.dim() > 3:
            continue
        else:
            reason = f"{kind} is no linear layer: it does not compute x·Wᵀ + b"
        path = name if key == "weight" and name else f"{name}.{key}".lstrip(".")
        found.append(Layer(path, module, block, reason, key, raw=True))
    for key, buffer in module._buffers.items():
        if (
            key in ("weight", "qweight", "weight_packed")
            and buffer is not None
            and buffer.dim() == 2
        ):
            reason = f"quantised: {kind} keeps it in buffers"
            path = name if key == "weight" and name else f"{name}.{key}".lstrip(".")
            found.append(Layer(path, module, block, reason, key, raw=True))
    return found


def adapter_parts(model: nn.Module) -> dict[str, str]:
    """Name of each module that belongs to an adapter -> name of the layer that it adapts. An
    adapted layer (peft) keeps the original as `base_layer`, and names its own parts in
    `adapter_layer_names`; or as `original_module` beside the copy that is trained in its place, and
    both stay as they are; and what makes prompts is in its `prompt_encoder`."""
    found = {}
    for name, module in named_modules(model):
        whole = isinstance(module._modules.get("original_module"), nn.Module)
        prompts = "prompt_encoder" in module._modules and hasattr(module, "peft_config")
        if not (whole or prompts) and not isinstance(module._modules.get("base_layer"), nn.Module):
            continue
        named = ("prompt_encoder",) if prompts else getattr(module, "adapter_layer_names", None)
        own = (not whole and named) or set(module._modules) - {"base_layer"}
        for key in own:
            part = module._modules.get(key)
            if part is not None:
                for inner, _ in part.named_modules(prefix=f"{name}.{key}" if name else key):
                    found[inner] = name or type(model).__name__
    return found


def _above(
    module: nn.Module, parents: Mapping[int, list[tuple[nn.Module, str]]]
) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every module that holds this one, at any depth, with the path from there: (m, ("a", "b"))
    for m.a.b."""
    waiting: list[tuple[nn.Module, tuple[str, ...]]] = [(module, ())]
    seen = {id(module)}
    while waiting:
        below, path = waiting.pop()
        for parent, key in parents.get(id(below), ()):
            yield parent, (key, *path)
            if id(parent) not in seen:
                seen.add(id(parent))
                waiting.append((parent, (key, *path)))


class _Readers:
    """Which classes read the weight of a module below them in their own code, beyond asking for its
    dtype."""

    def __init__(self) -> None:
        self._known: dict[type, set[Chain]] = {}

    def owner(self, above: nn.Module, path: tuple[str, ...]) -> str | None:
        """The class of `above`, if it reads the weight of the module at this path below it."""
        kind = type(above)
        if isinstance(above, READS_WEIGHTS):
            return kind.__name__ if len(path) == 1 else None
        if kind not in self._known:
            self._known[kind] = _read_chains(kind)
        for own, chain in self._known[kind]:
            if path == chain if own else path[-len(chain) :] == chain:
                return kind.__name__
        return None


def _read_chains(kind: type) -> set[Chain]:
    """The chains of attributes ("a", "b") such that a method of the class (or of its bases below
    nn.Module) reads self.a.b.weight, or x.a.b.weight of another object, and not merely its dtype
    and the like. Read off the bytecode: nothing runs."""
    chains: set[Chain] = set()
    for base in kind.__mro__:
        if base is nn.Module or base is object:
            break
        if base.__module__.split(".")[0] == "torch":
            continue  # containers; READS_WEIGHTS names the others
        for attribute, value in vars(base).items():
            function = inspect.unwrap(getattr(value, "__func__", value))
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType) and attribute not in ("__init__", "_init_weights"):
                chains |= _chains_in(code)
    return chains


def _chains_in(code: CodeType) -> set[Chain]:
    chains: set[Chain] = set()
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG")]
    reads = [s.argval if s.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for s in steps]
    for i in range(1, len(steps)):
        if reads[i] != "weight":
            continue
        start = i  # of the chain; steps[start - 1] loads the object that it begins at
        while start > 0 and reads[start - 1] not in (None, "weight"):
            start -= 1
        if start == i or start == 0:
            continue
        following = reads[i + 1] if i + 1 < len(reads) else None
        # isinstance(self.a.weight, ...)
        asks_kind = start >= 2 and steps[start - 2].argval == "isinstance"
        if following not in HARMLESS and not asks_kind:
            loaded = steps[start - 1].argval  # Python 3.13 loads two in one step
            own = (loaded[-1] if isinstance(loaded, tuple) else loaded) == "self"
            chains.add((own, tuple(str(name) for name in reads[start:i])))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            chains |= _chains_in(constant)
    return chains


def output_layer_names(model: nn.Module) -> list[str]:
    """Names of the output embedding: what `get_output_embeddings()` returns, under whatever name it
    is registered, and what that holds; of a wrapped model (peft, torch.compile) that of the model
    inside."""
    heads = set()
    for module in (model, *model.modules()):
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                heads |= {id(inner) for inner in head.modules()}
    return [name for name, module in named_modules(model) if id(module) in heads]


def input_embedding(model: nn.Module) -> nn.Module | None:
    """What `get_input_embeddings()` returns; None where the model has none or does not say which of
    several it is (CLIP)."""
    getter = getattr(model, "get_input_embeddings", None)
    if not callable(getter):
        return None
    try:
        embedding = getter()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def positions(model: nn.Module) -> int | None:
    """Tokens that a Transformers model was made for; None where its config does not say.

    RoBERTa and its kin begin to count after the id of padding: 512 positions of the 514 there."""
    config: Any = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    text = getter() if callable(getter) else config
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "num_embeddings", 0) == count:
            return count - 1 - (-1 if module.padding_idx is None else module.padding_idx)
    return count


def is_transformers(model: nn.Module) -> bool:
    """A Transformers model, or one wrapped by peft: takes its inputs by keyword and has a config.
    Recognised without importing transformers."""
    return hasattr(model, "config") and callable(getattr(model, "get_input_embeddings", None))


@torch.no_grad()
def check_basis(op: str, model: nn.Module, dense: nn.Module) -> None:
    """Refuse hidden states of two bases: models whose embeddings are BASES_APART, of which one was
    rotated (oneshot/rotation.py). Those that have no embedding of one shape are taken as they are.

    Raises:
        ValueError: with the distance.
    """
    own, other = (getattr(input_embedding(m), "weight", None) for m in (model, dense))
    if not isinstance(own, Tensor) or not isinstance(other, Tensor) or own.shape != other.shape:
        return
    reference = other.to(own.device).float()
    far = float((own.float() - reference).norm() / reference.norm().clamp_min(1e-30))
    expected = "a dense model in the basis of the pruned one, with its embedding"
    got = f"embeddings that differ by {far:.2f} of their norm"
    remedy = "Pass the dense model after its rotation."
    check(far <= BASES_APART, op, expected, got, remedy)
