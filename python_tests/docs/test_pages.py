"""The pages say what is so: quoted lines and messages are in the sources, paths exist, the site
builds without a warning."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

from python_tests.docs import source_lines
from python_tests.docs.pages import ROOT, name, pages

PAGES = pages()
SEAMS = ROOT / "sparsekern" / "backends" / "protocol.py"
FOLDERS = ("sparsekern", "csrc", "bench", "python_tests", "examples", "docs")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_lines_stand_where_the_page_says(page):
    if not SEAMS.is_file():
        pytest.skip("the page describes the backend protocol, which is not in this tree")
    assert source_lines.wrong(page) == []


def test_the_walk_goes_through_at_most_four_files_to_wgmma():
    walk = (ROOT / "docs" / "one-matmul.md").read_text(encoding="utf-8")
    quotes = source_lines.QUOTE.findall(walk.partition("## Beside the path")[0])
    files = list(dict.fromkeys(path for path, *_ in quotes))
    assert len(files) <= 4 <= len(quotes)
    assert files[0] == "sparsekern/nn/sparse_linear.py" and "Wgmma" in quotes[-1][3]


def test_a_quote_is_found_moved_and_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(source_lines, "ROOT", tmp_path)
    monkeypatch.setattr(source_lines, "name", lambda page: page.name)
    (tmp_path / "a.py").write_text("one\ntwo = 2\nthree\ntwo = 2\n")
    page = tmp_path / "page.md"
    page.write_text("see `a.py:1` `two = 2` and `a.py:9` `four`\n")
    assert len(source_lines.wrong(page)) == 2
    source_lines.refresh(page)
    assert page.read_text() == "see `a.py:2` `two = 2` and `a.py:9` `four`\n"
    assert source_lines.wrong(page) == ["page.md: a.py:9 `four` is nowhere in it"]


def literals() -> str:
    """Every string of the package, one a line; what an f-string puts in is "…"."""
    found = []
    for path in sorted((ROOT / "sparsekern").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*`(.*?)`\*\*", page, re.MULTILINE)
    known = literals()
    parts = [part.strip(" ,.:'") for text in quoted for part in re.split(r", got |…", text)]
    assert len(quoted) >= 40
    assert [part for part in parts if len(part) > 3 and part not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)", text)
    absent = [path for path in found if not (ROOT / path.rstrip(".")).exists()]
    if absent and not SEAMS.is_file():
        pytest.skip(f"not in this tree: {', '.join(absent)}")
    assert absent == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|srcset=\"|src=\")([^)#\"]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", text):
        assert anchor in anchors(page.parent / target if target else page), (target, anchor)


def anchors(page):
    """Of the headings of a page, as GitHub and the built site make them."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (the extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "sparsekern.prune_model" in built and "SparseLinear" in built
    messages = (tmp_path / "messages" / "index.html").read_text(encoding="utf-8")
    assert "a frozen weight" in messages
