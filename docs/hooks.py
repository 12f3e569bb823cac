"""What `make docs` adds to the pages: files of the repository's root, and the list of all messages,
read from the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "results.md": "bench/RESULTS.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
MARKER = "<!-- all messages -->"


def on_files(files, config):
    """Pages that lie outside docs/; their links into docs/ become links between pages."""
    for page, source in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """The list of messages; links from docs/ to pages that lie outside of it."""
    for target, source in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({target})")
    return markdown.replace(MARKER, messages()) if MARKER in markdown else markdown


def messages() -> str:
    """A table per module: what a call of errors.check or errors.message expects, and its remedy."""
    parts = []
    for path in sorted((ROOT / "sparsekern").rglob("*.py")):
        rows = _rows(ast.parse(path.read_text(encoding="utf-8")))
        if rows:
            title = path.relative_to(ROOT).as_posix()
            table = "\n".join(
                f"| {expected} | {got} | {remedy} |" for expected, got, remedy in rows
            )
            parts.append(f"## {title}\n\n| expected | got | remedy |\n|---|---|---|\n{table}")
    return "\n\n".join(parts)


def _rows(tree: ast.AST) -> list[tuple[str, str, str]]:
    rows: dict[tuple[str, str, str], None] = {}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Module)):
            assigned = _assigned(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    known = {
                        name: expression
                        for line, name, expression in assigned
                        if line < node.lineno
                    }
                    skip = {"check": 2, "_check": 2, "message": 1}.get(node.func.id)
                    if skip is not None and len(node.args) > skip:
                        texts = [_text(arg, known) for arg in node.args[skip : skip + 3]]
                        texts += [""] * (3 - len(texts))
                        if texts[0].strip("… "):
                            rows[tuple(texts)] = None
    return list(rows)


def _assigned(function: ast.AST) -> list[tuple[int, str, ast.expr]]:
    """(line, name, expression) of what a function assigns to names, in order."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.append((node.lineno, target.id, node.value))
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for name, value in zip(target.elts, node.value.elts):
                        if isinstance(name, ast.Name):
                            found.append((node.lineno, name.id, value))
    return sorted(found, key=lambda item: item[0])


def _text(node: ast.expr, known: dict[str, ast.expr]) -> str:
    """The text of an expression, what is not literal as "…"; safe within a table."""
    if isinstance(node, ast.Name) and node.id in known:
        node = known[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        text = "".join(map(str, parts))
    else:
        text = "…"
    for plain, safe in (("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("[", "\\[")):
        text = text.replace(plain, safe)
    return text
