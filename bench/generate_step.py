"""One decode step of a Transformers model with its own static cache, and how it is launched.

    graph    model.forward, compiled by torch.compile(fullgraph=True), and the choice of the next
             token are captured once in a CUDA graph over fixed tensors; a step is one replay, and
             the host does nothing else
    trees    torch.compile(mode="reduce-overhead"): what `generate` runs. Before each replay the
             host checks what the compiler assumed of every module: some tenths of a millisecond
    eager    neither compiled nor captured: for dry runs

A step is whole: it embeds the tokens of the step before, writes one position of the cache, and
leaves the most likely next tokens where the following step reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LAUNCHES = ("graph", "trees", "eager")
_WARM = (
    3  # calls before a capture: the compiler's, the kernels', and one that shows nothing is left
)


def compiled(model: nn.Module, launch: str) -> Callable:
    """model.forward as `launch` wants it."""
    if launch == "eager":
        return model.forward
    # Each model and batch size is an entry of the same function's cache.
    torch._dynamo.config.recompile_limit = 64
    mode = "reduce-overhead" if launch == "trees" else None
    return torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)


class Step:
    """A decode step; a call runs it and gives the logits [batch, vocabulary].

    The first half of the cache is filled with random numbers and is the context; when the other
    half is full too, the step begins anew behind the context.

    Args:
        forward: of the model, maybe compiled.   context: positions of the cache, at least 2.
    """

    def __init__(self, forward: Callable, model: nn.Module, batch: int, context: int):
        import transformers

        self.forward = forward
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        config = model.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=context)
        heads = config.num_key_value_heads
        self.cache.early_initialization(batch, heads, config.head_dim, dtype, device)
        self.first_ids = torch.arange(batch, device=device).unsqueeze(1) * 7919 % config.vocab_size
        self.ids = self.first_ids.clone()
        self.positions = torch.empty(1, 1, dtype=torch.int64, device=device)
        self.context, self.start = context, context // 2
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.fill()

    def fill(self) -> None:
        """The context, the same for every step of these sizes, and the first tokens behind it."""
        generator = torch.Generator(self.ids.device).manual_seed(1)
        for layer in self.cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        self.begin()

    def begin(self) -> None:
        """The step after the context is the next one."""
        for layer in self.cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(self.start)  # how far the cache is filled
        self.ids.copy_(self.first_ids)
        self.positions.fill_(self.start)
        self.left = self.context - self.start

    def run(self) -> Tensor:
        """The work of one step, for the current stream."""
        output = self.forward(
            input_ids=self.ids,
            position_ids=self.positions,
            cache_position=self.positions[0],
            past_key_values=self.cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.positions.add_(1)
        return logits

    def capture(self) -> None:
        """From now on a call replays one CUDA graph of the step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                self.begin()
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self.run()
        self.graph = graph
        self.begin()

    def __call__(self) -> Tensor:
        if self.left == 0:
            self.begin()
        self.left -= 1
        if self.graph is None:
            return self.run()
        self.graph.replay()
        assert self.logits is not None
        return self.logits
