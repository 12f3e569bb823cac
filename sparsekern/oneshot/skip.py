"""Skip rules: which Linear layers `prune_model` leaves dense.

A rule is a string, an int or a range; the forms, tried in this order:

    3, -1, range(20, 30)      index of a decoder block (negative counts from the end)
    "block:3" "block:20-29"   the same as text; both ends included, "block:-1" is the last block
    "re:.*(q|k)_proj"         regular expression, `re.match` on the full layer name
    "*.down_proj" "a.[0-3].*" glob on the full layer name (any of * ? [ makes a rule a glob)
    "model.layers.0.mlp"      exact name of a layer, or of a module: every layer below it
    "LlamaMLP" "Linear"       class name of a layer, or of a module that holds it

A rule that matches no layer is an error that names the rule and the nearest names: a typing error
must not silently prune what should have stayed dense. The one exception is "lm_head", the default:
it stands for the output embedding under whatever name (and matches nothing in a model that has
none).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from sparsekern.errors import check

OP = "sparsekern.prune_model"
DEFAULT_RULE = "lm_head"


def as_rules(skip) -> tuple:
    """The rules as a tuple; a single string, int or range counts as one rule, None as no rule."""
    if skip is None:
        return ()
    if isinstance(skip, (str, int, range)):
        return (skip,)
    return tuple(skip)


def resolve(
    skip,
    names: Sequence[str],
    model: nn.Module,
    block_of: dict[str, int],
    block_count: int,
    output_layers: Iterable[str] = (),
) -> dict[str, str]:
    """Which of the layers are skipped, and by which rule.

    Args:
        skip: rule or rules (module docstring).
        names: full names of all Linear layers of the model.
        model: the model, for class names and module names.
        block_of: layer name -> index of its decoder block; layers outside the blocks are absent.
        block_count: number of decoder blocks, 0 if none were found.
        output_layers: names of the output embedding, which the rule "lm_head" stands for.
    Returns:
        layer name -> text of the first rule that matches it.
    Raises:
        ValueError: a rule matches nothing, a block index is out of range, a regular expression is
            malformed.
        TypeError: a rule is neither str, int nor range.
    """
    modules = dict(model.named_modules())
    skipped: dict[str, str] = {}
    for rule in as_rules(skip):
        if rule == DEFAULT_RULE:
            hits = [
                n
                for n in names
                if n in set(output_layers) or _below(n, rule) or n.endswith("." + rule)
            ]
        elif isinstance(rule, str):
            hits = _match_text(rule, names, modules, block_of, block_count)
            check(
                hits,
                OP,
                f"skip rule {rule!r} to match a Linear layer",
                "no match",
                near(rule, names, modules),
            )
        else:
            hits = _match_blocks(_indices(rule, block_count), rule, names, block_of)
        for name in hits:
            skipped.setdefault(name, str(rule))
    return skipped


def _match_text(rule, names, modules, block_of, block_count):
    if rule.startswith("block:"):
        return _match_blocks(_indices(rule, block_count), rule, names, block_of)
    if rule.startswith("re:"):
        try:
            pattern = re.compile(rule[3:])
        except re.error as error:
            check(
                False,
                OP,
                f"skip rule {rule!r} to hold a regular expression",
                str(error),
                "Correct the pattern.",
            )
        return [n for n in names if pattern.match(n)]
    if any(c in rule for c in "*?["):
        return [n for n in names if fnmatch.fnmatchcase(n, rule)]
    if rule in modules:
        return [n for n in names if _below(n, rule)]
    return [n for n in names if any(type(modules[p]).__name__ == rule for p in _ancestors(n))]


def _match_blocks(indices, rule, names, block_of):
    hits = [n for n in names if block_of.get(n) in indices]
    check(
        hits,
        OP,
        f"skip rule {rule!r} to match a Linear layer",
        "no Linear layer in those blocks",
        "Drop the rule.",
    )
    return hits


def _indices(rule, block_count: int) -> set[int]:
    """Block indices of a rule, negative ones resolved."""
    if isinstance(rule, bool) or not isinstance(rule, (int, range, str)):
        check(
            False,
            OP,
            "skip rules of type str, int or range",
            repr(rule),
            "See sparsekern/oneshot/skip.py.",
            TypeError,
        )
    check(
        block_count > 0,
        OP,
        f"decoder blocks for skip rule {rule!r}",
        "a model without blocks",
        "Use names or globs.",
    )
    if isinstance(rule, str):
        form = re.fullmatch(r"block:(-?\d+)(?:-(-?\d+))?", rule)
        check(
            form,
            OP,
            'skip rule of the form "block:3" or "block:20-29"',
            repr(rule),
            "Correct the rule.",
        )
        first = int(form[1])
        last = int(form[2]) if form[2] else first
        first, last = (i + block_count if i < 0 else i for i in (first, last))
        found = list(range(first, last + 1))
        check(
            found, OP, f"skip rule {rule!r} to go upwards", f"{first} to {last}", "Swap the ends."
        )
    else:
        found = [
            i + block_count if i < 0 else i for i in ([rule] if isinstance(rule, int) else rule)
        ]
    for index in found:
        check(
            0 <= index < block_count,
            OP,
            f"skip rule {rule!r} within blocks 0..{block_count - 1}",
            f"block {index}",
            "Correct the index.",
        )
    return set(found)


def _ancestors(name: str) -> list[str]:
    """The layer itself and every module above it: "a.b.c" -> ["a.b.c", "a.b", "a", ""]."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _below(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".") or module == ""


def near(rule: str, names, modules=None) -> str:
    """The remedy of the error: what the rule (or the name of a mask) may have meant."""
    if modules and any(n.rsplit(".", 1)[-1] == rule for n in names):
        return f'To skip every layer of that name, write "*.{rule}".'
    classes = (
        {type(modules[p]).__name__ for n in names for p in _ancestors(n)} if modules else set()
    )
    pool = list(
        dict.fromkeys([*names, *(p for n in names for p in _ancestors(n) if p), *sorted(classes)])
    )
    near = (
        difflib.get_close_matches(rule.removeprefix("re:"), pool, n=3, cutoff=0.4)
        or list(names)[:3]
    )
    return "Near matches: " + ", ".join(near) + "."
