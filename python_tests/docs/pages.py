"""Reads the Markdown pages for the tests: their code blocks with what stands above them, and the
quotes of source lines.

Marks are HTML comments on the line above a block:

    <!-- not run: REASON -->         parsed, not executed; REASONS in test_blocks.py counts them
    <!-- needs: MODULE:NAME ... -->  executed where these exist
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (not run|needs): (.*?) -->\n *$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; line is that of its first line of code."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    needs: tuple[str, ...]


def pages() -> list[Path]:
    """README, CONTRIBUTING and everything below docs."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in found if path.is_file())


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text[: match.start()])
        kind, words = mark.groups() if mark else ("", "")
        indent = len(match[1])
        code = "".join(line[indent:] for line in match[3].splitlines(keepends=True))
        found.append(
            Block(
                name(page),
                text.count("\n", 0, match.start(3)) + 1,
                match[2],
                code,
                words if kind == "not run" else None,
                tuple(words.split()) if kind == "needs" else (),
            )
        )
    return found
