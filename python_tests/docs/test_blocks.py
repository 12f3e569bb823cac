"""Every code block of the pages runs: python blocks in order, one name space per page, in an empty
folder that holds a tiny model as `model/` and a text as `text.txt`; bash blocks are parsed, and
their commands checked against the parser of the command line, the Makefile and the benchmarks."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections import Counter

import pytest
import torch

from bench.__main__ import names as benchmarks
from python_tests.docs.pages import ROOT, blocks, pages
from sparsekern.cli import main as cli

BLOCKS = [block for page in pages() for block in blocks(page)]
PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})
# Blocks that nothing here can run, by reason. Another one is a decision: raise the number with it.
REASONS = {"needs a GPU": 5}
LANGUAGES = {"python", "bash", "text"}


def test_blocks_have_a_language_and_few_are_not_run():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert sum(block.language == "python" for block in BLOCKS) >= 20
    assert Counter(b.not_run for b in BLOCKS if b.not_run and b.language == "python") == REASONS


def missing(block) -> list[str]:
    """What a block needs and this package does not have (yet)."""
    absent = []
    for need in block.needs:
        module, _, attribute = need.partition(":")
        try:
            found = hasattr(importlib.import_module(module), attribute)
        except ImportError:
            found = False
        absent += [] if found else [need]
    return absent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages speak of: model/, tiny.gguf and text.txt."""
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("gguf", reason="needs gguf")
    import sparsekern as sk
    from python_tests.integrations import gguf_cases
    from sparsekern.integrations.gguf.model import load_gguf

    folder = tmp_path_factory.mktemp("pages")
    tiny = gguf_cases.tiny_llama()
    gguf_cases.write_gguf(
        folder / "tiny.gguf", gguf_cases.gguf_tensors(tiny), gguf_cases.metadata()
    )
    model, tokenizer = load_gguf(folder / "tiny.gguf")
    sk.save_pretrained(model.float(), folder / "model", tokenizer=tokenizer)
    (folder / "text.txt").write_text("the hen and the fox, 12 and 12. " * 200, encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, place, tmp_path, monkeypatch, capsys):
    for file in place.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparsekern.cli.demo.model_file", lambda cache=None: place / "tiny.gguf")
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "page"}
    absent, ran = [], 0
    for block in BLOCKS:
        if block.page != page or block.language != "python":
            continue
        code = "\n" * (block.line - 1) + block.code  # a traceback shows the line of the page
        compiled = compile(code, str(ROOT / page), "exec")
        if block.not_run:
            continue
        absent += missing(block)
        if not missing(block):
            exec(compiled, scope)
            ran += 1
    if absent:
        pytest.skip(f"{ran} blocks ran; the others need {', '.join(absent)}")


SHELL = [block for block in BLOCKS if block.language == "bash"]


def commands(block):
    """The words of each command of a block, without comments; continued lines are joined."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}:{block.line}")
def test_bash_blocks_parse(block):
    done = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(block):
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        if words[0] == "sparsekern":
            if "--help" not in words:
                assert cli.build_parser().parse_args(words[1:]).command == words[1]
        elif words[0] == "torchrun":
            given = words[words.index("-m") + 1 :]
            assert given[0] == "sparsekern"
            assert cli.build_parser().parse_args(given[1:]).command == given[1]
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        elif words[:3] == ["python", "-m", "bench"]:
            assert len(words) == 3 or words[3] in {"table", *benchmarks()}
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "git", "cd", "export", "pytest", "twine"), words
