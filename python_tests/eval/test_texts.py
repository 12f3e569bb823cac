"""sparsekern.eval.texts: sources, the WikiText join, calibration windows, and the built-in text."""

import sys
import types

import pytest
import torch

from sparsekern.eval import texts


def test_file_rows_keep_the_text_and_join_as_wikitext_does(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b" = A = \r\n\n one\x0c \n \nlast")
    rows = texts.read_rows(path, "test")
    assert rows == [" = A = \n", "\n", " one\x0c \n", " \n", "last"]
    assert texts.join_rows(rows) == " = A = \n\n\n\n\n one\x0c \n\n\n\n\nlast"


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "expected text, got none"),
        (b" \n\n", "expected text, got none"),
        (b"ab\xff", "got byte 0xff at 2"),
    ],
)
def test_bad_files(tmp_path, content, text):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        texts.read_rows(tmp_path / "t.txt", "train")


@pytest.mark.parametrize("name", ["t.jsonl", "T.JSONL", "t.ndjson", "t.json", "t.parquet"])
def test_records_are_no_plain_text(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="plain text, got records in .* Write its texts"):
        texts.read_rows(tmp_path / name, "test")


def test_a_mark_before_the_text_is_none_of_it(tmp_path):
    (tmp_path / "t.txt").write_text("a\n", encoding="utf-8-sig")
    assert texts.read_rows(tmp_path / "t.txt", "train") == ["a\n"]


def test_what_tokenizers_return():
    for made in ([5, 6], torch.tensor([5, 6]), [[5, 6]]):
        ids = texts.tokenize(lambda _, verbose, made=made: {"input_ids": made}, "a text")
        assert ids.dtype == torch.int64 and ids.tolist() == [5, 6]
    for made in ([5, 6], "ids", {"ids": [5]}, {"input_ids": [[5], [6]]}, {"input_ids": None}):
        with pytest.raises(TypeError, match="to be a list of ids, got .* Pass a tokenizer"):
            texts.tokenize(lambda _, verbose, made=made: made, "a text")


def test_other_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no text file at"):
        texts.read_rows(tmp_path / "absent", "train")
    with pytest.raises(ValueError, match="got 'validation'"):
        texts.read_rows("builtin", "validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        texts.read_rows("hf:wikitext2", "test")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="pydoc_data"):
        texts.read_rows("builtin", "test")


def test_hugging_face_sources_are_asked_for_by_name_configuration_and_split(monkeypatch):
    asked = []

    class Data(dict):
        column_names = ["text"]

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Data(text=["a\n", ""])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts.read_rows("hf:wikitext2", "test") == ["a\n", ""]
    texts.read_rows("hf:c4", "train")
    texts.read_rows("hf:owner/name:config:validation", "test")
    texts.read_rows("hf:owner/name", "test")
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
        (
            ("allenai/c4", None),
            {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        ),
        (("owner/name", "config"), {"split": "validation"}),
        (("owner/name", None), {"split": "test"}),
    ]
    Data.column_names = ["content"]
    with pytest.raises(ValueError, match=r"a column 'text' in owner/name, got \['content'\]"):
        texts.read_rows("hf:owner/name", "test")


def test_a_short_text_is_used_twice_and_the_last_windows_share_nothing():
    ids = torch.arange(47 * 8 + 3)
    once = texts.side_by_side(ids, 40, 8, 2)
    assert torch.equal(texts.side_by_side(ids, 40, 8, 2, twice=True), once)
    whole = texts.side_by_side(ids, 200, 8, 2)
    twice = texts.side_by_side(ids, 200, 8, 2, twice=True)
    assert whole.shape == (47, 8) and 60 < twice.shape[0] < 94
    assert texts.side_by_side(ids, 50, 8, 2, twice=True).shape == (50, 8)
    assert torch.equal(twice[-10:], whole[-10:])
    assert not torch.isin(twice[:-10], twice[-10:]).any()
    assert torch.equal(twice, twice[:, :1] + torch.arange(8))
    assert set(map(tuple, whole.tolist())) < set(map(tuple, twice.tolist()))
    assert torch.bincount(twice.flatten()).max() == 2


def test_calibration_windows_follow_the_published_protocol():
    ids = torch.arange(1000) * 3
    windows = texts.calibration_windows(ids, samples=20, window=64, seed=5)
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(0, 1000 - 64, (20,), generator=generator)
    assert torch.equal(windows, 3 * (starts[:, None] + torch.arange(64)))
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(windows, texts.calibration_windows(ids, 20, 64, 5))
    assert not torch.equal(windows, texts.calibration_windows(ids, 20, 64, 6))


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((0, 64), "samples >= 1, got 0"),
        ((4, 0), "window >= 1, got 0"),
        ((10**30, 64), r"<= \d+ tokens, got 10+ \* 64"),
        ((4, 1000), r"more than 1000 .*got \[1000\]"),
    ],
)
def test_calibration_windows_refuse(arguments, text):
    with pytest.raises(ValueError, match=text):
        texts.calibration_windows(torch.arange(1000), *arguments)


@pytest.mark.parametrize("cut", [texts.calibration_windows, texts.side_by_side])
def test_ids_as_lists_arrays_and_tokenizer_outputs(cut):
    ids = torch.arange(100)
    want = cut(ids, 3, 16)
    for form in (ids.tolist(), ids.numpy(), {"input_ids": ids.tolist()}):
        assert torch.equal(cut(form, 3, 16), want)
    with pytest.raises(TypeError, match="token_ids: token ids, a tensor or a list .* got 'a text'"):
        cut("a text", 3, 16)


def test_language_reference_parts_share_nothing():
    calibration, held_out = texts.language_reference()
    plain = [
        {" ".join(paragraph.split()) for paragraph in part} for part in (calibration, held_out)
    ]
    assert not plain[0] & plain[1]
    assert len("".join(calibration)) > 100_000 and len("".join(held_out)) > 20_000
    assert texts.language_reference() == (calibration, held_out)
    assert texts.read_rows("builtin", "train") == calibration
    assert texts.read_rows("builtin", "test") == held_out
