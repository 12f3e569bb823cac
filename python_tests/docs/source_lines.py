"""Quotes of source lines in the docs: `path:line` `quoted text`, both in backticks on one line.

    python -m python_tests.docs.source_lines            # what does not stand where a page says
    python -m python_tests.docs.source_lines --refresh  # the same after putting the numbers right

A quote is looked for in its file: the occurrence nearest to the old number is taken. One that is
nowhere in the file is for a person to change.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from python_tests.docs.pages import ROOT, name, pages

QUOTE = re.compile(r"`([\w./-]+\.(?:py|pyi|cu|cuh|h|cpp)):(\d+)`(\s+)`([^`]+)`")


def find(path: str, quote: str, near: int) -> int | None:
    """The line of `path` that holds `quote`, nearest to line `near`; None without any."""
    file = ROOT / path
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    at = [number for number, line in enumerate(lines, 1) if quote in line]
    return min(at, key=lambda number: abs(number - near), default=None)


def wrong(page: Path) -> list[str]:
    """One text for each quote that does not stand where the page says."""
    found = []
    for path, number, _, quote in QUOTE.findall(page.read_text(encoding="utf-8")):
        line = find(path, quote, int(number))
        if line != int(number):
            where = "nowhere in it" if line is None else f"at line {line}"
            found.append(f"{name(page)}: {path}:{number} `{quote}` is {where}")
    return found


def refresh(page: Path) -> None:
    """Write the numbers of lines as they are now."""

    def corrected(match: re.Match[str]) -> str:
        path, number, space, quote = match.groups()
        line = find(path, quote, int(number)) or number
        return f"`{path}:{line}`{space}`{quote}`"

    text = page.read_text(encoding="utf-8")
    page.write_text(QUOTE.sub(corrected, text), encoding="utf-8")


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--refresh"]):
        print("usage: python -m python_tests.docs.source_lines [--refresh]", file=sys.stderr)
        return 2
    if arguments:
        for page in pages():
            refresh(page)
    found = [text for page in pages() for text in wrong(page)]
    print("\n".join(found) or "every quote stands where the pages say")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
