"""The one form of error messages: "<op>: expected <what>, got <value>. <one remedy>".

Shape, alignment and value errors are ValueError, dtypes TypeError, unsupported layouts or devices
NotImplementedError, and everything wrong with a file or with stored tensors is FormatError.
"""

from __future__ import annotations


class FormatError(ValueError):
    """Stored 2:4 data (a file, a state_dict, values + metadata) is damaged or not supported."""


def message(op: str, expected: str, got: str, remedy: str = "") -> str:
    """The error text, e.g. "sparsekern.linear: expected x.shape[-1] == 4096, got 4000. Pad x."."""
    got = got or "''"
    text = f"{op}: expected {expected}, got {got}."
    return f"{text} {remedy}" if remedy else text


def check(
    condition: object,
    op: str,
    expected: str,
    got: object,
    remedy: str = "",
    exc: type[Exception] = ValueError,
) -> None:
    """Raise exc(message(...)) unless condition holds; for input checks, so never an assert."""
    if not condition:
        raise exc(message(op, expected, str(got), remedy))
