"""Sampler: many rows of text at once from a causal language model, one token a step.

    ids [rows, window] ─► token at `place` ─► model, keys and values kept here ─► logits
        ▲                                                                          │
        └── place + 1: the prompt's token, or argmax(logits / T − ln Exp(1)) ◄─────┘

Every step is the same work on the same memory, `place` is a tensor, so on a GPU a step is one
replay of a CUDA graph: one graph for each length to which attention is rounded up. Keys and values
take 2 · layers · rows · window · key-value heads · head size elements.

Source: argmax(p / Exp(1)) is a sample of p (exponential races; Gumbel 1954 in logarithms).
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.finetune import attention
from sparsekern.formats import dtypes

LENGTH = 128  # attention runs over multiples of it
LOOK = 16  # steps between looks at the clock
_CURRENT: contextvars.ContextVar[Sampler] = contextvars.ContextVar("sampler")


class Sampler:
    """A sampler for `rows` rows of up to `window` tokens.

    Args:
        model: on its device, in eval mode; not changed.
        rows, window: sizes.      temperature: of the softmax.      seed: of a private generator.
        autocast: dtype of the matmuls where the weights have another one, or None.
    Attributes:
        how: "cuda graphs", "eager", or "eager: reason" where graphs could not be made.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        window: int,
        temperature: float = 1.0,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        first = next(model.parameters())
        self.model, self.rows, self.window = model, rows, window
        self.temperature, self.device = temperature, first.device
        self.autocast = None if autocast == first.dtype else autocast
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.ids = torch.zeros(rows, window, dtype=torch.int64, device=self.device)
        self.given = torch.zeros_like(self.ids, dtype=torch.bool)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.length = 0  # that attention runs over
        self.later = torch.empty(0, dtype=torch.bool, device=self.device)  # positions of it
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values
        self.graphs: dict[int, Any] = {}
        self.how = "eager"
        self.wide = _wide_products(self.device, self.autocast or first.dtype)

    # ------------------------------------------------------------------ one step

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[rows, heads, 1, d] and the new key and value [rows, key-value heads, 1, d] ->
        [rows, 1, heads, d]."""
        rows, heads, tokens, size = query.shape
        if tokens != 1:
            raise RuntimeError(f"{tokens} tokens at once")
        pairs = rows * key.shape[1]
        query, key = query.to(value.dtype), key.to(value.dtype)
        if layer not in self.kept:
            shape = (pairs, self.window, size)
            self.kept[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.kept[layer]
        keys.index_copy_(1, self.place, key.reshape(pairs, 1, size))
        values.index_copy_(1, self.place, value.reshape(pairs, 1, size))
        n = self.length
        query, turned = query.reshape(pairs, -1, size), keys[:, :n].transpose(1, 2)
        wide = self.wide and query.dtype != torch.float32
        scores = torch.bmm(query, turned, torch.float32) if wide else torch.bmm(query, turned)
        scores = (scores.float() * scale).masked_fill_(self.later, float("-inf"))
        y = torch.bmm(scores.softmax(-1).to(values.dtype), values[:, :n])
        return y.view(rows, 1, heads, size)

    def step(self) -> Tensor:
        """Token place + 1 of every row; place goes on by one. Returns the logits [rows, vocabulary]
        in float32."""
        last = self.ids.index_select(1, self.place)
        self.later = torch.arange(self.length, device=self.device) > self.place
        positions = self.place.view(1, 1).expand(self.rows, 1)
        kind, on = self.device.type, self.autocast is not None
        dtype = self.autocast or dtypes.DEFAULT_16_BIT
        with torch.autocast(kind, dtype, enabled=on, cache_enabled=False):
            output = self.model(input_ids=last, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits[:, -1].float()
        self.finite.logical_and_(logits.isfinite().all())
        noise = torch.empty_like(logits).exponential_(generator=self.generator)
        drawn = noise.log_().neg_().add_(logits, alpha=1 / self.temperature).argmax(1, keepdim=True)
        self.place.add_(1)
        there = self.ids.index_select(1, self.place)
        given = self.given.index_select(1, self.place)
        self.ids.index_copy_(1, self.place, torch.where(given, there, drawn))
        return logits

    # ------------------------------------------------------------------ rows

    def fill(self, prompts: Tensor, deadline: float | None = None, bar: Any = None) -> Tensor:
        """Rows that begin with the prompts.

        Args:
            prompts: int64 [rows, n], n < window; -1 is sampled, the first column is none.
            deadline: of time.perf_counter(), after which no further step is begun.
            bar: a tqdm that is moved a step at a time.
        Returns:
            int32 [rows, window] on the CPU; with a deadline [rows, tokens that there was time for].
        Raises:
            RuntimeError: logits that are not finite.
        """
        n = prompts.shape[1]
        self._reset()
        self.given[:, :n] = (prompts >= 0).to(self.device)
        self.ids[:, :n] = prompts.clamp(min=0).to(self.device)
        made = 1
        with self._running():
            self._capture()
            for place in range(self.window - 1):
                if place % LOOK == 0 and deadline is not None:
                    self._wait()
                    if time.perf_counter() > deadline:
                        break
                self._advance(place)
                made = place + 2
                if bar is not None:
                    bar.update()
        if not bool(self.finite):
            raise RuntimeError("logits are not finite")
        return self.ids[:, :made].to(torch.int32).cpu()

    def _reset(self) -> None:
        self.place.zero_()
        self.ids.zero_()
        self.given.zero_()
        self.finite.fill_(True)

    def _advance(self, place: int) -> None:
        self.length = self._rounded(place + 1)
        if self.length in self.graphs:
            self.graphs[self.length].replay()
        else:
            self.step()

    def _rounded(self, tokens: int) -> int:
        return min(self.window, -(-tokens // LENGTH) * LENGTH)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        token = _CURRENT.set(self)
        try:
            with attention.use(self.model, attention.SAMPLING, _attend), torch.no_grad():
                yield
        finally:
            _CURRENT.reset(token)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------ graphs

    def _capture(self) -> None:
        """A graph for each length, once; the state is as before."""
        if self.device.type != "cuda" or self.graphs or self.how != "eager":
            return
        ids, given = self.ids.clone(), self.given.clone()
        try:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(2):  # allocates keys and values, and what libraries want once
                    self.length = self._rounded(1)
                    self.place.zero_()
                    self.step()
            torch.cuda.current_stream(self.device).wait_stream(side)
            pool = torch.cuda.graph_pool_handle()
            lengths = {self._rounded(place + 1) for place in range(self.window - 1)}
            for length in sorted(lengths, reverse=True):
                self.length = length
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(self.generator)
                with torch.cuda.graph(graph, pool=pool):
                    self.step()
                self.graphs[length] = graph
            self.how = "cuda graphs"
        except Exception as error:
            self.graphs.clear()
            self.how = f"eager: {type(error).__name__}: {error}"
            torch.cuda.synchronize(self.device)
        self._reset()
        self.ids.copy_(ids)
        self.given.copy_(given)


def _wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.bmm here gives float32 for factors of a 16-bit dtype."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    try:
        one = torch.ones(2, 8, 8, device=device, dtype=dtype)
        return torch.bmm(one, one, torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError, TypeError):  # an older torch has no such overload
        return False


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _CURRENT.get().attend(int(module.layer_idx), query, key, value, scale), None


def why_not(model: nn.Module, prompt: Tensor, window: int, autocast: torch.dtype | None) -> str:
    """Why the sampler cannot be used with this model, "" when it can: its logits at every position
    of eight given tokens are those of one forward, and no window slides within `window`.

    Args:
        prompt: int64 [n, tokens] on the model's device; the first token of each is used.
    """
    config: Any = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (isinstance(slides, int) and slides < window):
        return "windows slide"
    try:
        with torch.no_grad():
            size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
            generator = torch.Generator().manual_seed(0)
            more = torch.randint(size, (prompt.shape[0], 7), generator=generator, device="cpu")
            ids = torch.cat((prompt[:, :1], more.to(prompt.device)), dim=1)
            probe = Sampler(model, ids.shape[0], 9, autocast=autocast)
            probe.ids[:, :8] = ids
            probe.given[:, :8] = True
            with probe._running():
                probe.length = 9
                ours = torch.stack([probe.step() for _ in range(8)], dim=1)
            if not probe.kept:
                return "its layers do not use Transformers' AttentionInterface"
            kind, on = ids.device.type, probe.autocast is not None
            with torch.autocast(kind, probe.autocast or dtypes.DEFAULT_16_BIT, enabled=on):
                theirs = model(input_ids=ids, use_cache=False).logits.float()
        distance = float((ours.softmax(-1) - theirs.softmax(-1)).abs().sum(-1).max() / 2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if distance < 0.3 else f"probabilities differ by {distance:.2f}"
