"""Errors and warnings of the Python API in the words of the command line: flags for arguments.

    expected damp from 0 to 1000000, got -1.0. The default is None.
    expected --damp from 0 to 1000000, got -1.0.

A name with an underscore is an argument wherever it stands. One that is an English word, too, is an
argument where the form of errors.message has one: before "=" or a comparison, first in what is
expected, after "with" or "leave". What is quoted is the user's, and stays. Where no flag is named
then, those are added whose text it holds, that got none, or that ask for the error's function.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

# Arguments of a function that a flag of another name is handed to, where the command has that flag.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "sparsekern.prune_model": {
        "targets": "target",
        "offload_activations": "activations",
        "source": "stream",
    },
    "sparsekern.calibration_windows": {"window": "calibration_window"},
    "sparsekern.side_by_side": {"window": "calibration_window"},
    "sparsekern.perplexity": {"window": "eval_window"},
    "sparsekern.sensitivity": {"time_tokens": "tokens"},
    "sparsekern.finetune.data.generate": {"tokens": "teacher_tokens", "seconds": "teacher_seconds"},
    "sparsekern.finetune.distill": {"folder": "work", "evaluate": "eval"},
}
_BARE = r"(?<![\w./'\"-]){name}(?![\w/'\"-]|\.\w|==)"
_FIRST = (
    r"(?:,|:| \(| \[| [<>*]|(?: (?:as|for|from|in|of at (?:most|least)|or|such|that|to|with|rule"
    r"|divisible)\b))"
)
_WORD = (
    rf"(?:(?<=expected ){_BARE}(?={_FIRST})"
    rf"|(?:(?<=<= )|(?<=\* )|(?<=\()){_BARE}"
    rf"|{_BARE}(?==| [<>]=? )"
    r"|(?:(?<=[Ll]eave )|(?<=Raise )|(?<=Lower )|(?<=[Pp]ass )|(?<=with )|(?<=without )"
    r"|(?<=smaller )|(?<=larger )"
    rf"|(?<=as )|(?<=for )|(?<=or )){_BARE}(?=[,.]| out\b| at (?:\S+\.|$)))"
)
# What an argument that is no flag would do beside something else.
_NO_FLAGS = (
    (r"\b\w+=\w+ or (?=--)", ""),
    (r", (?:or (?:pass )?|with )[a-z_]+=[^ .,]*(?=, |\.(?: |$))", ""),
    (r"\bPass [a-z_]+=[^ ,]+, or (\w)", lambda match: match[1].upper()),
)
_QUOTED = re.compile(r"((?<!\w)'[^']*'(?!\w)|\"[^\"]*\")")


def as_flags(text: str, args: argparse.Namespace) -> str:
    """An error's text with flags in the place of the arguments that they are handed to.

    Args:
        text: of the error, in one line.
        args: with the command's parser as `parser`, and what was typed as `words`.
    """
    text = re.sub(r"^\[Errno \d+\] (?=sparsekern)", "", text)
    op = re.split(r"[:(]", text, maxsplit=1)[0]
    actions = {a.dest: a for a in args.parser._actions if a.option_strings}
    known = actions | {n: actions[d] for n, d in RENAMED.get(op, {}).items() if d in actions}
    flags = {name: flag_of(action) for name, action in known.items()}
    for name, _ in getattr(args, "option", None) or ():
        flags.setdefault(name, f"--option {name}")
    for name, action in known.items():
        text = _choices(text, name, action)
    parts = _QUOTED.split(text)
    for i in range(0, len(parts), 2):
        for name, flag in flags.items():
            form = _BARE if "_" in name else _WORD
            parts[i] = re.sub(form.replace("{name}", name), flag, parts[i])
    text = re.sub(r"(--[\w-]+)=(?=[,.) ]|$)", r"\1", "".join(parts))
    text = re.sub(r"(--[\w-]+)=[(\[].*?(?=, which nothing reads)", r"\1", text)
    text = re.sub(r"(--[\w-]+)=(?:None|False)\b", r"no \1", text)
    for form, rest in _NO_FLAGS:
        text = re.sub(form, rest, text)
    if "--pattern" in text:
        text = re.sub(r"\((\w+), (\w+)\)", r"\1:\2", text)
    text = text.replace(" The default is None.", "")
    text = re.sub(r"(Leave --[\w-]+) at (?:None|False|\(\))\.", r"\1 out.", text)
    if "--" in text:
        return text
    given = dict.fromkeys(
        f"{flag} {value or repr(value)}" if value is not None else flag
        for dest, flag, value in _typed(args)
        if (_is_shown(value, text) if value is not None else op.endswith(f".{dest}"))
    )
    return f"{text} ({', '.join(given)})" if given else text


@contextlib.contextmanager
def warnings_in_flags(args: argparse.Namespace) -> Iterator[None]:
    """Warnings of this package in the words of the command line, too."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            text = " ".join(str(message).split())
            own = text.startswith("sparsekern.")
            shown(category(as_flags(text, args)) if own else message, category, *where, **more)

        warnings.showwarning = show
        yield


def flag_of(action: argparse.Action) -> str:
    """The flag as the help shows it first."""
    return next(one for one in action.option_strings if one.startswith("--"))


def _choices(text: str, name: str, action: argparse.Action) -> str:
    """preset 'best', device="cpu" -> --preset best, --device cpu; x=True -> --x."""
    flag = flag_of(action)

    def spelt(match: re.Match[str]) -> str:
        value = match[3]
        chosen = match[1] == "=" or value in (action.choices or ())
        return f"{flag} {shlex.quote(value)}" if chosen else match[0]

    bare = rf"(?<![\w./'\"-]){name}"
    text = re.sub(rf"{bare}(=| )(['\"])([^'\"]+)\2", spelt, text)
    return re.sub(rf"{bare}=True\b", flag, text) if action.nargs == 0 else text


def _typed(args: argparse.Namespace) -> Iterator[tuple[str, str, str | None]]:
    """(dest, flag, value) of what was typed; the value of a flag that takes none is None."""
    known: Mapping[str, argparse.Action] = args.parser._option_string_actions
    action: argparse.Action | None = None
    for word in args.words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            found = [a for name, a in known.items() if name.startswith(flag)]
            action = known.get(flag, found[0] if found else None)
            if action is not None and (equals or action.nargs == 0):
                yield action.dest, flag_of(action), value if equals else None
                action = None
        elif action is not None:
            yield action.dest, flag_of(action), word
            action = action if action.nargs == "+" else None


def _is_shown(value: str, text: str) -> bool:
    """Whether a text has a value that was typed, or a name of one such as a=1 or a=0.7,b=0.3. A
    short one may stand in it by accident, other than as what the error got."""
    got = text.partition(", got ")[2]
    return not value or any(
        re.search(rf"(?<![\w/.-]){re.escape(part)}(?![\w/-])", text if len(part) > 2 else got)
        for part in (value, *(one.partition("=")[0] for one in value.split(",") if "=" in one))
        if part
    )
