"""Experts of a mixture in a calibration: taken apart for the run, and what an expert that saw few
tokens is pruned on.

The rule for few tokens. An expert needs about in_features tokens for a Hessian of full rank and
many more for a good one. One that saw n of them is pruned on

    H' = (n · H + k · H_pool) / (n + k),      k = in_features / 4,      H and H_pool per token

where H_pool is of up to POOL_TOKENS of the layer's tokens, spread over the calibration, run through
this expert: for down_proj, too, that is of what this expert makes of them (the features of two
experts have nothing to do with each other). An expert that saw none is pruned on H_pool alone, one
that saw ENOUGH * in_features on H alone. Where the module cannot be run so (JetMoe's), H_pool is a
multiple of the identity, of the trace of H, and used below in_features tokens only.

On random experts of 128 features whose tokens share three quarters of their spectrum with the
layer's, the error on other tokens of the expert, of SparseGPT with (without) H_pool: 0.065 (0.130)
after 8 tokens, 0.054 (0.089) after 32, 0.042 (0.045) after 128, 0.037 (0.038) after 512. k from
in_features / 8 to in_features / 2 is within 4 % of that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekern.nn.sparse_experts import SparseExperts, fuse_experts, unfuse_experts
from sparsekern.nn.wrappers import unwrapped
from sparsekern.oneshot.discovery import Layer
from sparsekern.prune import Hessian

# Tokens of a layer that are kept for experts that saw few, and how many of one call.
POOL_TOKENS, CALL_TOKENS = 1024, 128
# A module that gets the tokens of all experts in one tensor is given no larger one than this.
POOL_ELEMENTS = 2**26
# Hessians that one pass over the calibration collects. Experts beyond it come in further passes of
# the stage, on what the passes before have made of it.
PASS_BYTES = 2**34
# k / in_features, and tokens / in_features from which on an expert's own are enough.
PRIOR, ENOUGH = 0.25, 16
P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Within: every module with experts in 3-D parameters is a SparseExperts, whose matrices are
    linear layers. At the end those without a compressed matrix become what they were, with the
    weights that they have then."""
    made: dict[str, tuple[nn.Module, SparseExperts]] = unfuse_experts(model)
    try:
        yield
    finally:
        put_together(model, made)


def put_together(model: nn.Module, made: dict[str, tuple[nn.Module, SparseExperts]]) -> None:
    """The end of `experts_apart`."""
    with torch.inference_mode(False):
        for old, new in made.values():
            if not new.is_sparse:
                fuse_experts(model, new, old)
            else:  # what stayed dense would keep the memory of all experts
                for key, _ in new.recipe.matrices:
                    for layer in new.layers(key):
                        weight = layer._parameters.get("weight")
                        if weight is not None and weight.untyped_storage().nbytes() > weight.nbytes:
                            weight.data = weight.data.contiguous().clone()
    made.clear()


def with_experts_apart(function: Callable[P, R]) -> Callable[P, R]:
    """`experts_apart` around a function whose first argument is `model`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)
        with experts_apart(unwrapped(model)):
            return function(*args, **kwargs)

    return wrapped


def split_passes(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers of one pass in passes whose Hessians take at most PASS_BYTES, as far as experts are
    what takes more; the matrices of one expert stay together."""
    first = [layer for layer in layers if layer.expert is None]
    passes, size = [first], sum(_bytes(layer) for layer in first)
    together: dict[Any, list[Layer]] = {}
    for layer in layers:
        if layer.expert is not None:
            together.setdefault(layer.expert[:2], []).append(layer)
    for members in together.values():
        more = sum(_bytes(layer) for layer in members)
        if passes[-1] and size + more > PASS_BYTES:
            passes.append([])
            size = 0
        passes[-1] += members
        size += more
    order = {layer.name: i for i, layer in enumerate(layers)}
    return [sorted(part, key=lambda layer: order[layer.name]) for part in passes if part]


def _bytes(layer: Layer) -> int:
    return 4 * layer.shape[1] ** 2


def merge_passes(passes: Sequence[Sequence[Layer]]) -> list[list[Layer]]:
    """Passes of one group each, with the experts of a layer in one pass for each parameter: none of
    them reads what another makes."""
    made: dict[Any, list[Layer]] = {}
    for number, part in enumerate(passes):
        for layer in part:
            key = number if layer.expert is None else (layer.expert[0], layer.expert[2])
            made.setdefault(key, []).append(layer)
    return list(made.values())


class ExpertPools:
    """What a HessianCollector knows of the experts among its layers.

    Hooks on each SparseExperts keep some of its tokens, and where padding is to be left out run it
    once more on the other tokens alone, for the layers' hooks.

    Attributes:
        tokens: layer name -> tokens seen, of layers of experts.
        muted: the layers' hooks are to see nothing. bare: what they see has no padding.
        filling: layer name -> (Hessian, tokens) of a pool, None while the model itself runs.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        self.device = device
        self.layers = [layer for layer in layers if layer.owner is not None]
        self.tokens: dict[str, int] = {layer.name: 0 for layer in self.layers}
        self.muted: set[int] = set()  # owners whose real call is under way after a cut one
        self.bare = self.watches_dense = False
        self.keep: tuple[Tensor, ...] = ()
        self.filling: dict[str, tuple[Hessian, int]] | None = None
        # Of each mixture, by id: what passes it, on its way into its pool.
        self.on_rows: Callable[[int, Tensor], None] = self.pool
        self._pools: dict[int, list[Tensor]] = {}
        self._owner_of = {layer.name: id(layer.owner) for layer in self.layers}

    def watch(self) -> list[RemovableHandle]:
        """Put the hooks on."""
        handles = []
        for owner in self.owners.values():
            if isinstance(owner, SparseExperts):
                handles.append(owner.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(owner.register_forward_hook(self._after))
        return handles

    @property
    def owners(self) -> dict[int, nn.Module | None]:
        """The mixtures by id, in order."""
        return {id(layer.owner): layer.owner for layer in self.layers}

    def listens(self, name: str) -> bool:
        """Whether the hook of a layer counts what comes."""
        return self._owner_of.get(name) not in self.muted

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(owner, SparseExperts)
        x = owner.hidden_of(args, kwargs)
        if x is None or self.watches_dense or self.filling is not None:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        for keep in self.keep:
            mask = keep.reshape(-1)
            if mask.numel() != rows.shape[0]:
                continue
            call = owner.cut(args, kwargs, mask)
            if call is not None and not bool(mask.all()):
                rows = rows[mask.to(rows.device)]
                self.bare = True
                owner.forward(*call[0], **call[1])
                self.bare = False
                self.muted.add(id(owner))
            break
        if owner.recipe.form == "sorted":
            rows = rows[(rows != 0).any(-1)]
        self.on_rows(id(owner), rows)

    def room(self, owner: int) -> int:
        """How many tokens of a call the pool of a mixture takes."""
        pool = self._pools.get(owner, ())
        return min(CALL_TOKENS, POOL_TOKENS - sum(part.shape[0] for part in pool))

    def pool(self, owner: int, rows: Tensor) -> None:
        """Keep some of the rows that reach a mixture."""
        room = self.room(owner)
        if room > 0 and rows.shape[0]:
            kept = rows[:: -(-rows.shape[0] // room)].to("cpu", copy=True)
            self._pools.setdefault(owner, []).append(kept)

    def _after(self, owner: nn.Module, args: Any, output: Any) -> None:
        self.muted.discard(id(owner))

    def fill(self, hessians: dict[str, Hessian], leader_of: dict[str, str]) -> None:
        """Apply the rule for few tokens to `hessians`. leader_of: layer -> the layer whose Hessian
        it shares; experts that were never called are added to both."""
        few: dict[tuple[int, int], list[Layer]] = {}
        for layer in self.layers:
            enough = self.tokens[layer.name] >= ENOUGH * layer.shape[1]
            if not enough and layer.expert is not None:
                few.setdefault((id(layer.owner), layer.expert[1]), []).append(layer)
        for (owner_id, index), layers in few.items():
            owner, pool = layers[0].owner, self._pools.get(owner_id)
            if not pool or not isinstance(owner, SparseExperts):
                continue
            x = torch.cat(pool)  # on the CPU
            if owner.recipe.form == "sorted":
                room = POOL_ELEMENTS // (owner.recipe.experts * x.shape[-1])
                x = x[: max(1, room)]
            self.filling = {}
            try:
                owner.alone(index, x.to(owner._device_of(owner.recipe.matrices[0][0])))
                made = self.filling
            finally:
                self.filling = None
            done: dict[str, Hessian] = {}
            for layer in layers:
                leader = leader_of.setdefault(layer.name, layer.name)
                if leader not in done:
                    own = hessians.get(leader)
                    done[leader] = self._filled(layer, own, made.get(layer.name)) or own  # type: ignore[assignment]
                if done[leader] is None:
                    del leader_of[layer.name]  # nothing is known of its inputs
                else:
                    hessians[layer.name] = done[leader]

    def _filled(
        self, layer: Layer, own: Hessian | None, pool: tuple[Hessian, int] | None
    ) -> Hessian | None:
        """H' of a layer; None where its own Hessian stays as it is."""
        seen, width = self.tokens[layer.name], layer.shape[1]
        total = torch.zeros(width, width, device=self.device, dtype=torch.float32)
        if own is not None and seen:
            total += own.matrix * (own.samples / 2)
        if pool is not None and pool[1]:
            extra = pool[0].matrix * (pool[0].samples / 2 / pool[1])
        elif own is not None and 0 < seen < width:
            extra = torch.eye(width, device=self.device, dtype=torch.float32) * (
                total.trace() / (seen * width)
            )
        else:
            return None
        k = PRIOR * width
        made = Hessian.from_matrix((total + extra * k) * (2 / (seen + k)), max(1, seen))
        made.unmatched = own is None or own.unmatched or own.drift is not None
        return made
