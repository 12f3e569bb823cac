"""Skip and target rules: which linear layers `prune_model` leaves dense, and which it prunes.

A rule is a string, an int or a range; the forms, tried in this order:

    3, -1, range(20, 30)      index of a decoder block (negative counts from the end)
    "block:3" "block:20-29"   the same as text; both ends included, "block:-1" is the last block
    "re:.*(q|k)_proj"         regular expression, `re.match` on the full layer name
    "*.down_proj" "a.[0-3].*" glob on the full layer name (any of * ? [ makes a rule a glob)
    "model.layers.0.mlp"      exact name of a layer, or of a module: every layer below it
    "LlamaMLP" "Linear"       class name of a layer, or of a module that holds it
    "rule-of-thumb"           the output embedding, and the attention of the first block
    "skip.json"               a file: {"skip": [rules]} (SensitivityReport.save_skip)

The matrices of experts have one name for each expert, "model.layers.0.mlp.experts.3.down_proj"; the
name of the parameter that holds all of them, "model.layers.0.mlp.experts.down_proj", stands for
them in every form.

A module that is registered under several names goes by each of them.

A rule that matches no layer is an error that names the rule and the nearest names: a typing error
must not silently prune what should have stayed dense. The one exception is "lm_head", the default:
it stands for the output embedding under whatever name (and matches nothing in a model that has
none).
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from sparsekern.errors import FormatError, check, message
from sparsekern.nn.sparse_experts import SparseExperts
from sparsekern.nn.wrappers import named_modules
from sparsekern.utils.arguments import shown

OP = "sparsekern.oneshot.skip"
DEFAULT_RULE = "lm_head"
RULE_OF_THUMB = "rule-of-thumb"
_ATTENTION = re.compile(r"\.(\w*attn|\w*attention)\.", re.IGNORECASE)


def as_rules(skip: Any, op: str = OP, kind: str = "skip") -> tuple[Any, ...]:
    """The rules as a tuple; a single string, int or range counts as one rule, None as no rule. The
    rules of a file for the path of one.

    Raises:
        FileNotFoundError: there is no such file.      FormatError: it holds no rules.
        TypeError: no rules, but something else.
    """
    if skip is None:
        return ()
    if _is_file(skip):
        return _read(os.fspath(skip))
    if isinstance(skip, (str, int, range)):
        return (skip,)
    listed = isinstance(skip, Iterable) and not isinstance(skip, (bytes, Tensor))
    expected = f"{kind} rules: text, block indices, ranges, or a list of them"
    check(listed, op, expected, shown(skip), 'For example ["*.q_proj", "block:0"].', TypeError)
    return tuple(part for rule in skip for part in (as_rules(rule) if _is_file(rule) else (rule,)))


def _is_file(rule: Any) -> bool:
    return isinstance(rule, os.PathLike) or (isinstance(rule, str) and rule.endswith(".json"))


def _read(path: str) -> tuple[Any, ...]:
    """The rules in a file."""
    expected, remedy = f"a file of skip rules at {path}", "sparsekern sensitivity writes one."
    check(os.path.isfile(path), OP, expected, "none", remedy, FileNotFoundError)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise FormatError(message(OP, f"{path} to hold JSON", str(error))) from None
    rules = content.get("skip") if isinstance(content, dict) else None
    fits = isinstance(rules, list) and all(isinstance(rule, (str, int)) for rule in rules)
    check(fits, OP, f'{{"skip": [rules]}} in {path}', repr(content)[:80], exc=FormatError)
    return tuple(rules or ())


def resolve(
    skip: Any,
    names: Sequence[str],
    model: nn.Module,
    block_of: dict[str, int],
    block_count: int,
    output_layers: Iterable[str] = (),
    kind: str = "skip",
    op: str = OP,
) -> dict[str, str]:
    """Which of the layers the rules match, and by which rule.

    Args:
        skip: rule or rules (module docstring).
        names: full names of all linear layers of the model.
        model: the model, for class names and module names.
        block_of: layer name -> index of its decoder block; layers outside the blocks are absent.
        block_count: number of decoder blocks, 0 if none were found.
        output_layers: names of the output embedding, which the rule "lm_head" stands for.
        kind, op: what the rules are called, and who asks, for messages.
    Returns:
        layer name -> text of the first rule that matches it.
    Raises:
        ValueError: a rule matches nothing, a block index is out of range, a regular expression is
            malformed.
        TypeError: a rule is neither str, int nor range.
    """
    rules = _Rules(names, model, block_of, block_count, set(output_layers), kind, op)
    matched: dict[str, str] = {}
    for rule in as_rules(skip, op, kind):
        for name in rules.match(rule):
            matched.setdefault(name, str(rule))
    return matched


class _Rules:
    """What rules are matched against; the arguments of `resolve`."""

    def __init__(
        self,
        names: Sequence[str],
        model: nn.Module,
        block_of: dict[str, int],
        block_count: int,
        output_layers: set[str],
        kind: str,
        op: str,
    ) -> None:
        self.names, self.block_of, self.block_count = names, block_of, block_count
        self.output_layers, self.kind, self.op = output_layers, kind, op
        self.modules = dict(named_modules(model, every=True))
        paths: dict[int, list[str]] = defaultdict(list)
        for path, module in self.modules.items():
            paths[id(module)].append(path)
        # A module that is registered twice goes by each of its names.
        self.paths = {name: paths[id(self.modules[name])] for name in names if name in self.modules}
        # Experts go by the name of the parameter that holds all of them, too.
        self.fused = {
            f"{name}.{i}.{key}": f"{name}.{key}"
            for name, module in self.modules.items()
            if isinstance(module, SparseExperts)
            for i in range(module.recipe.experts)
            for key, _ in module.recipe.matrices
        }

    def match(self, rule: Any) -> list[str]:
        """Names of the layers that one rule matches."""
        names = self.names
        if rule == DEFAULT_RULE:
            output = self.output_layers
            return [
                n for n in names if n in output or _below(n, rule) or n.endswith("." + DEFAULT_RULE)
            ]
        if rule == RULE_OF_THUMB:
            first = set(self._in_blocks({0}, rule))
            attention = [n for n in names if n in first and _ATTENTION.search(n)]
            if not attention:
                self._fail(rule, "to find an attention in the first block", "none", "Use names.")
            return [*self.match(DEFAULT_RULE), *attention]
        if not isinstance(rule, str):
            return self._in_blocks(self._indices(rule), rule)
        if not rule.strip():
            self._fail(rule, "to name something", "empty text", "Leave it out.")
        hits = self._match_text(rule)
        if not hits:
            self._fail(rule, "to match a Linear layer", "no match", near(rule, names, self.modules))
        return hits

    def _fail(self, rule: Any, expected: str, got: str, remedy: str) -> None:
        text = f"{self.kind} rule {rule!r} {expected}"
        raise ValueError(message(self.op, text, got, remedy))

    def _match_text(self, rule: str) -> list[str]:
        names = self.names
        if rule.startswith("block:"):
            return self._in_blocks(self._indices(rule), rule)
        if rule.startswith("re:"):
            try:
                pattern = re.compile(rule[3:])
            except re.error as error:
                remedy = "Correct the pattern."
                expected = f"{self.kind} rule {rule!r} to hold a regular expression"
                raise ValueError(message(self.op, expected, str(error), remedy)) from None
            return [n for n in names if any(pattern.match(text) for text in self._texts(n))]
        if any(c in rule for c in "*?["):
            return [n for n in names if any(fnmatch.fnmatchcase(t, rule) for t in self._texts(n))]
        if rule in self.fused.values():
            return [n for n in names if self.fused.get(n) == rule]
        if rule in self.modules or rule in names:
            return [n for n in names if any(_below(text, rule) for text in self._texts(n))]
        return [n for n in names if any(rule in _class_names(m) for m in _holders(n, self.modules))]

    def _texts(self, name: str) -> tuple[str, ...]:
        other = [self.fused[name]] if name in self.fused else []
        return (name, *self.paths.get(name, ()), *other)

    def _in_blocks(self, indices: set[int], rule: Any) -> list[str]:
        hits = [n for n in self.names if self.block_of.get(n) in indices]
        if not hits:
            got = "no Linear layer in those blocks"
            self._fail(rule, "to match a Linear layer", got, "Drop the rule.")
        return hits

    def _indices(self, rule: Any) -> set[int]:
        """Block indices of a rule, negative ones resolved."""
        kinds = not isinstance(rule, bool) and isinstance(rule, (int, range, str))
        expected = f"{self.kind} rules of type str, int or range"
        remedy = 'Layers by name or glob, a class by its name, "Linear", a block by its index.'
        check(kinds, self.op, expected, repr(rule), remedy, TypeError)
        count = self.block_count
        expected = f"decoder blocks for {self.kind} rule {rule!r}"
        check(count > 0, self.op, expected, "a model without blocks", "Use names or globs.")
        if isinstance(rule, str):
            form = re.fullmatch(r"block:(-?\d+)(?:-(-?\d+))?", rule)
            expected = f'{self.kind} rule of the form "block:3" or "block:20-29"'
            check(form is not None, self.op, expected, repr(rule), "Correct the rule.")
            form = cast("re.Match[str]", form)
            first = int(form[1])
            last = int(form[2]) if form[2] else first
            first, last = (i + count if i < 0 else i for i in (first, last))
            found = list(range(first, last + 1))
            if not found:
                self._fail(rule, "to go upwards", f"{first} to {last}", "Swap the ends.")
        else:
            found = [i + count if i < 0 else i for i in ([rule] if isinstance(rule, int) else rule)]
        for index in found:
            if not 0 <= index < count:
                within = f"within blocks 0..{count - 1}"
                self._fail(rule, within, f"block {index}", "Correct the index.")
        return set(found)


def _ancestors(name: str) -> list[str]:
    """The layer itself and every module above it: "a.b.c" -> ["a.b.c", "a.b", "a", ""]."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _below(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".") or module == ""


def _holders(name: str, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The modules on the way to a layer; a parameter of a module has no module of its own."""
    return [modules[path] for path in _ancestors(name) if path in modules]


def _class_names(module: nn.Module) -> tuple[str, ...]:
    name = type(module).__name__
    return (name, module.kind.__name__) if isinstance(module, SparseExperts) else (name,)


def near(rule: str, names: Sequence[str], modules: dict[str, nn.Module] | None = None) -> str:
    """The remedy of the error: what the rule (or the name of a mask) may have meant."""
    if modules and any(n.rsplit(".", 1)[-1] == rule for n in names):
        return f'To match every layer of that name, write "*.{rule}".'
    classes: set[str] = set()
    if modules:
        holders = (m for n in names for m in _holders(n, modules))
        classes = {kind for m in holders for kind in _class_names(m)}
    above = (p for n in names for p in _ancestors(n) if p)
    pool = list(dict.fromkeys([*names, *above, *sorted(classes)]))
    close = difflib.get_close_matches(rule.removeprefix("re:"), pool, n=3, cutoff=0.4)
    return "Near matches: " + ", ".join(close or list(names)[:3]) + "."
