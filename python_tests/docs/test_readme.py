"""README.md and CHANGELOG.md say only what is so: code runs, paths exist, commands parse, targets
are in the Makefile."""

import re
import shlex
from pathlib import Path

import pytest

from sparsekern import __version__
from sparsekern.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!-- runnable -->\n)?```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for marked, language, code in BLOCKS if language == "python" and marked]
SHELL = [line for _, language, code in BLOCKS if language == "bash" for line in code.splitlines()]
FOLDERS = ("sparsekern", "csrc", "bench", "python_tests")


def paths(text):
    """Every word that names a file or folder of the repository, as a path from its root."""
    found = re.findall(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", text)
    found += [f"sparsekern/{name}" for name in re.findall(r"(?<![\w/])\w+\.py\b", text)]
    found += [name for name in re.findall(r"`([A-Z]+)`", text) if name != "MODEL"]
    return sorted({name.rstrip(".") for name in found})


def test_every_python_block_is_marked_or_there_is_none():
    assert len(PYTHON) == sum(language == "python" for _, language, _ in BLOCKS) == 2


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_example_is_as_short_as_promised():
    assert len(PYTHON[0].strip().splitlines()) <= 13


def test_paths_exist():
    found = paths(README)
    assert "sparsekern/ops/linear_op.py" in found and "LICENSE" in found and len(found) > 20
    assert [name for name in found if not (ROOT / name).exists()] == []


def test_commands_parse():
    commands = [shlex.split(line, comments=True) for line in SHELL]
    ours = [words[1:] for words in commands if words and words[0] == "sparsekern"]
    for words in ours:
        assert cli.build_parser().parse_args(words).command == words[0]
    help_text = cli.build_parser().format_help()
    listed = re.findall(r"^    (\w+)\s", help_text, re.MULTILINE)
    assert sorted(set(listed)) == sorted({words[0] for words in ours})


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(
            r"make ([\w-]+)",
            "\n".join(re.findall(r"`make [\w-]+`|^ +make [\w-]+", README, re.MULTILINE)),
        )
    )
    assert {"demo", "test"} <= named <= targets


def test_extras_and_names_exist():
    import sparsekern as sk

    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r'"\.\[(\w+)\]"', README):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)
    for name in set(re.findall(r"\bsk\.(\w+)", README)):
        assert hasattr(sk, name), name


def test_changelog_has_the_form_and_knows_its_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == __version__
    assert set(re.findall(r"^### (\w+)", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
