"""Errors and warnings of the Python API in the words of the command line: flags for arguments.

    expected damp from 0 to 1000000, got -1.0. The default is None.
    expected --damp from 0 to 1000000, got -1.0.

A name with an underscore is an argument wherever it stands. One that is an English word, too, is an
argument where the form of errors.message has one: before "=" or a comparison, first in what is
expected, after "with" or "leave". What is quoted is the user's, and stays. Where no flag is named
then, those whose text it holds, or that got none, are added.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

# Arguments of a function that a flag of another name is handed to, where the command has that flag.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "sparsekern.prune_model": {"targets": "target", "offload_activations": "activations"},
    "sparsekern.calibration_windows": {"window": "calibration_window"},
    "sparsekern.side_by_side": {"window": "calibration_window"},
    "sparsekern.perplexity": {"window": "eval_window"},
    "sparsekern.sensitivity": {"time_tokens": "tokens"},
    "sparsekern.finetune.data.generate": {"tokens": "teacher_tokens", "seconds": "teacher_seconds"},
    "sparsekern.finetune.distill": {"folder": "work", "evaluate": "eval"},
}
_BARE = r"(?<![\w./'\"-]){name}(?![\w/'\"-]|\.\w|==)"
_FIRST = r"(?:,|:| \(| \[| [<>*]|(?: (?:as|for|from|in|or|such|that|to|with|rule|divisible)\b))"
_WORD = (
    rf"(?:(?<=expected ){_BARE}(?={_FIRST})"
    rf"|(?:(?<=<= )|(?<=\* )|(?<=\()){_BARE}"
    rf"|{_BARE}(?==| [<>]=? )"
    r"|(?:(?<=[Ll]eave )|(?<=Raise )|(?<=Lower )|(?<=[Pp]ass )|(?<=with )|(?<=without )"
    r"|(?<=smaller )|(?<=larger )"
    rf"|(?<=as )|(?<=for )|(?<=or )){_BARE}(?=[,.]| out\b| at \S+\.))"
)
_QUOTED = re.compile(r"((?<!\w)'[^']*'(?!\w)|\"[^\"]*\")")


def as_flags(text: str, args: argparse.Namespace) -> str:
    """An error's text with flags in the place of the arguments that they are handed to.

    Args:
        text: of the error, in one line.      args: with the command's parser as `parser`.
    """
    actions = {a.dest: a for a in args.parser._actions if a.option_strings}
    renamed = RENAMED.get(re.split(r"[:(]", text, maxsplit=1)[0], {})
    names = {name: name for name in actions} | {
        name: flag for name, flag in renamed.items() if flag in actions
    }
    for name, dest in names.items():
        text = _choices(text, name, actions[dest])
    parts = _QUOTED.split(text)
    for i in range(0, len(parts), 2):
        for name, dest in names.items():
            parts[i] = _flags(parts[i], name, actions[dest])
    text = re.sub(r"(--[\w-]+)=(?=[,.) ]|$)", r"\1", "".join(parts))
    text = re.sub(r"(--[\w-]+)=(?:None|False)\b", r"no \1", text)
    text = text.replace(" The default is None.", "")
    text = re.sub(r"(Leave --[\w-]+) at (?:None|False|\(\))\.", r"\1 out.", text)
    if "--" in text:
        return text
    given = {
        flag_of(action): value
        for dest, action in actions.items()
        for value in _values(getattr(args, dest, None), args.parser.get_default(dest))
        if not value or re.search(rf"(?<![\w/.-]){re.escape(value)}(?![\w/-])", text)
    }
    named = ", ".join(f"{flag} {value or repr(value)}" for flag, value in given.items())
    return f"{text} ({named})" if given else text


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
        return f"{flag} {value}" if chosen else match[0]

    bare = rf"(?<![\w./'\"-]){name}"
    text = re.sub(rf"{bare}(=| )(['\"])([\w.:-]+)\2", spelt, text)
    if action.nargs == 0:
        text = re.sub(rf"{bare}=True\b", flag, text)
    return text


def _flags(text: str, name: str, action: argparse.Action) -> str:
    form = _BARE if "_" in name else _WORD
    return re.sub(form.replace("{name}", name), flag_of(action), text)


def _values(value: object, default: object) -> list[str]:
    """What was typed as text, of one flag."""
    if value == default:
        return []
    listed = value if isinstance(value, list) else [value]
    return [one for one in listed if isinstance(one, str) and len(one) != 1]
