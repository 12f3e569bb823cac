"""The layers that are timed: linear layers of Llama-3 models, and the numbers of tokens.

q, k and v are one layer, as are gate and up, because that is how inference engines run them.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear layer: y [tokens, out_features] = x [tokens, in_features] · Wᵀ."""

    model: str
    layer: str
    out_features: int
    in_features: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


SHAPES = (
    Shape("8b", "qkv", 6144, 4096),
    Shape("8b", "o", 4096, 4096),
    Shape("8b", "gate+up", 28672, 4096),
    Shape("8b", "down", 4096, 14336),
    Shape("70b", "qkv", 10240, 8192),
    Shape("70b", "o", 8192, 8192),
    Shape("70b", "gate+up", 57344, 8192),
    Shape("70b", "down", 8192, 28672),
    Shape("3b", "qkv", 5120, 3072),
    Shape("3b", "o", 3072, 3072),
    Shape("3b", "gate+up", 16384, 3072),
    Shape("3b", "down", 3072, 8192),
    Shape("1b", "qkv", 3072, 2048),
    Shape("1b", "gate+up", 16384, 2048),
    Shape("1b", "q, o", 2048, 2048),
    Shape("1b", "gate, up", 8192, 2048),
    Shape("1b", "down", 2048, 8192),
)

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_SHAPES = ("4096x4096", "28672x4096", "8192x28672")
QUICK_TOKENS = {"decode": (1, 16, 64), "prefill": (256, 1024, 8192)}


def select(names: str | None, kind: str, quick: bool = False) -> list[Shape]:
    """Shapes by name: "8b,70b" (models) or "4096x4096,100x64" (any sizes, also others).

    Args:
        names: comma-separated; None for 8b and 70b, and 1b if it decodes, or for QUICK_SHAPES with
            `quick`.
        kind: "decode" or "prefill".
    Raises:
        ValueError: neither a model nor OUTxIN.
    """
    if names is None:
        names = ",".join(QUICK_SHAPES) if quick else {"decode": "8b,70b,1b"}.get(kind, "8b,70b")
    chosen: list[Shape] = []
    for name in names.split(","):
        found = [shape for shape in SHAPES if name in (shape.model, str(shape))]
        if not found:
            out_features, _, in_features = name.partition("x")
            if not (out_features.isdecimal() and in_features.isdecimal()):
                models = ", ".join(dict.fromkeys(shape.model for shape in SHAPES))
                raise ValueError(f"bench: expected shapes as {models} or OUTxIN, got {name!r}.")
            found = [Shape("", "", int(out_features), int(in_features))]
        chosen += found
    return list(dict.fromkeys(chosen))


def token_counts(text: str | None, kind: str, quick: bool = False) -> tuple[int, ...]:
    """Numbers of tokens from "1,16,64"; by default those of the kind."""
    if text is not None:
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"bench: expected numbers of tokens such as 1,16,64, got {text!r}.")
        return tuple(map(int, parts))
    if quick:
        return QUICK_TOKENS[kind]
    return DECODE_TOKENS if kind == "decode" else PREFILL_TOKENS
