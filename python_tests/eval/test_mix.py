"""Calibration from several sources: what goes in, in which shares, and how far texts are apart."""

import json

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build
from sparsekern.eval import mix
from sparsekern.eval.mix import calibration_mix, parse


class Letters:
    """One token per character; a chat template with a marker per role."""

    eos_token_id = 0
    chat_template = "x"

    def __call__(self, text, **kwargs):
        return {"input_ids": [1 + ord(c) % 60 for c in text]}

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * 200)
    rows = [{"text": "efgh" * 40}, {"text": "ij" * 3}, {"text": "kl" * 50}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    chats = [
        {
            "messages": [
                {"role": "user", "content": "q" * 40},
                {"role": "assistant", "content": "!"},
            ]
        },
        {"conversations": [{"from": "human", "value": "r" * 40}, {"from": "gpt", "value": "?"}]},
    ]
    (tmp_path / "c.json").write_text(json.dumps(chats))
    return tmp_path


def test_parse():
    assert parse("a.txt") == [("a.txt", 1.0)]
    assert parse("a=3,b.jsonl=1") == [("a", 0.75), ("b.jsonl", 0.25)]
    assert parse("a,b") == [("a", 0.5), ("b", 0.5)] == parse(["a", "b"])
    assert parse({"a=b,c": 2, "d": 2}) == [("a=b,c", 0.5), ("d", 0.5)]
    for wrong, text in [
        ("", "at least one source"),
        ("a,a", "each source once"),
        ("a=1,b", "a share for every source, or none"),
        ("a=0", "a positive share of a, got 0"),
        ("a=x", "a number as the share of a, got 'x'"),
        ({"a": float("nan")}, "a positive share of a"),
    ]:
        with pytest.raises(ValueError, match=text):
            parse(wrong)
    for wrong in ([torch.arange(9)], [{"text": "a"}], [[1, 2, 3]]):
        with pytest.raises(
            TypeError, match=r"names of text sources, .*prune_model\(calibration=\)"
        ):
            parse(wrong)


def test_a_text_is_no_name():
    """One too long for a path, and one with a byte that no path has."""
    for text in ("to be " * 5000, "a\0b"):
        with pytest.raises(FileNotFoundError, match="no text file at .{3,200}. Give a UTF-8"):
            calibration_mix([text], lambda text: [])


def test_shares_seed_and_checksum(files):
    spec = f"{files / 'a.txt'}=0.75,{files / 'b.jsonl'}=0.25"
    made = calibration_mix(spec, Letters(), tokens=320, window=16, seed=1)
    assert [row["taken"] for row in made.sources] == [240, 80] and made.tokens == 320
    assert {row.numel() for row in made} == {16} and len(made) == 20
    assert [row["documents"] for row in made.sources] == [1, 3]
    again = calibration_mix(spec, Letters(), tokens=320, window=16, seed=1)
    other = calibration_mix(spec, Letters(), tokens=320, window=16, seed=2)
    assert torch.equal(torch.stack(made.rows), torch.stack(again.rows))
    assert not torch.equal(torch.stack(made.rows), torch.stack(other.rows))
    shas = [row["sha256"] for row in made.sources]
    assert len(set(shas)) == 2 and shas == [row["sha256"] for row in other.sources]
    (files / "a.txt").write_text("abce" + "abcd" * 199)
    changed = calibration_mix(spec, Letters(), tokens=320, window=16, seed=1)
    assert changed.sources[0]["sha256"] != shas[0] and changed.sources[1]["sha256"] == shas[1]
    with pytest.raises(ValueError, match="of .*a.txt, got 800. Give a longer text, or a budget"):
        calibration_mix(spec, Letters(), tokens=3200, window=16)
    with pytest.raises(ValueError, match=r"of .*a.txt, got 0. Give a longer text\.$"):
        calibration_mix(str(files / "a.txt"), Letters(), tokens=1024, window=1024)


def test_whole_documents(files):
    """Each row is a piece of one document, in multiples of an eighth of the window."""
    letters = Letters()
    path = str(files / "b.jsonl")
    made = calibration_mix(path, letters, tokens=224, window=32, whole_documents=True)
    texts = ["efgh" * 40, "ij" * 3, "kl" * 50]
    documents = [letters(text)["input_ids"] for text in texts]
    for row in made.rows:
        assert row.numel() % 4 == 0
        ids = row.tolist()
        assert any(ids == d[i : i + len(ids)] for d in documents for i in range(len(d))), ids
    lengths = [row.numel() for row in made.rows]
    assert lengths == sorted(lengths, reverse=True) and sum(lengths) >= 224
    joined = calibration_mix(path, letters, tokens=224, window=32)
    assert any(0 in row.tolist() for row in joined.rows)  # the end token between documents


def test_chats_go_through_the_template(files):
    made = calibration_mix(str(files / "c.json"), Letters(), tokens=16, window=16)
    letters = Letters()
    texts = ["<u>" + "q" * 40 + "<a>!", "<u>" + "r" * 40 + "<a>?"]
    assert made.sources[0]["tokens"] == sum(len(t) for t in texts)
    streams = [sum(([*letters(t)["input_ids"], 0] for t in order), [])[:-1]
               for order in (texts, texts[::-1])]  # fmt: skip
    assert any(made.rows[0].tolist() == s[i : i + 16] for s in streams for i in (0, 16, 32, 48, 64))
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(ValueError, match="a chat template for the messages in"):
        calibration_mix(str(files / "c.json"), plain, tokens=16, window=16)


@pytest.mark.parametrize(
    "content, text",
    [
        ('{"text": 3}', "line 1 of .* got 3 as text"),
        ('{"body": "a"}', r"line 1 of .* got the keys \['body'\]"),
        ("{", "line 1 of .* to hold JSON"),
        ('{"text": "é"}', r"UTF-8 text in .*x\.jsonl, got byte 0xe9 at 10"),
        ("[1]", 'an object with "text" or "messages" in line 1'),
        ('{"messages": [{"role": "user"}]}', 'messages with "role" and "content" in line 1'),
        ('{"messages": []}', "messages in line 1 of .* got none"),
        ('{"text": ""}', "text in .* got none"),
        (r'{"text": "a\ud800"}', r"a text in line 1 of .*, got '\\ud800' at 1. Mend it"),
    ],
)
def test_wrong_lines(content, text, tmp_path):
    (tmp_path / "x.jsonl").write_text(content + "\n", encoding="latin-1")
    with pytest.raises(ValueError, match=text):
        calibration_mix(str(tmp_path / "x.jsonl"), Letters(), tokens=16, window=8)


def test_a_file_goes_by_its_name_and_pairs_may_be_lists(files):
    odd = files / "a=b,c.NDJSON"
    odd.write_text('{"text": "abcdefgh"}\n' * 4, encoding="utf-8-sig")
    for name in (str(odd), odd):
        made = calibration_mix(name, Letters(), tokens=16, window=8)
        assert made.tokens == 16 and made.sources[0]["documents"] == 4
    assert mix.is_mix(str(odd)) and mix.is_mix("T.JSONL")
    assert mix.parse([["a", 1], ["b", 3]]) == [("a", 0.25), ("b", 0.75)]
    with pytest.raises(ValueError, match="a number as the share of a, got 'x'. Write NAME=0.5"):
        mix.parse({"a": "x"})


def test_parquet_needs_a_reader(files, monkeypatch):
    path = files / "d.parquet"
    path.write_bytes(b"PAR1")
    real = mix.importlib.import_module

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(mix.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="Parquet needs pyarrow, or pandas"):
        calibration_mix(str(path), Letters(), tokens=16, window=8)

    class Reader:
        @staticmethod
        def read_table(place):
            assert place == path
            return Reader

        @staticmethod
        def to_pylist():
            return [{"text": "abcdefgh" * 4}]

    monkeypatch.setattr(mix.importlib, "import_module", lambda name: Reader)
    made = calibration_mix(str(path), Letters(), tokens=16, window=8)
    assert made.tokens == 16
    monkeypatch.setattr(mix.importlib, "import_module", real)
    with pytest.raises(FileNotFoundError, match="no file at"):
        calibration_mix("none.jsonl", Letters())


def test_it_is_in_the_report(files):
    made = calibration_mix(str(files / "a.txt"), Letters(), tokens=64, window=16)
    report = sk.prune_model(build(), "sparsegpt", made, device="cpu", progress=False)
    found = report.calibration
    assert found["tokens"] == 64 and found["sources"][0]["name"] == "a.txt"
    assert found["seed"] == 0 and len(found["sources"][0]["sha256"]) == 64
    again = sk.PruneReport.from_json(report.to_json()).calibration
    assert mix.distance(again["unigrams"], torch.cat(made.rows)) == 0


def test_distance():
    """0 for the same, 1 for nothing in common; a hand-made case between."""
    known = mix.sketch(torch.tensor([1, 1, 2, 2]))
    assert known == {"tokens": "1:2 2:2", "rest": 0}
    assert mix.distance(known, [2, 1]) == 0
    assert mix.distance(known, [3, 4, 900]) == pytest.approx(1)
    # p = (1/2, 1/2, 0), q = (1/2, 0, 1/2), m = (1/2, 1/4, 1/4): KL = 1/2 each
    assert mix.distance(known, [1, 7]) == pytest.approx(0.5)
    short = mix.sketch([torch.tensor([5, 5, 5]), torch.tensor([6, 7])], most=1)
    assert short == {"tokens": "5:3", "rest": 2}
    assert mix.warning({"unigrams": known}, torch.tensor([1, 2]), "x") is None
    assert mix.warning({"samples": 3}, torch.tensor([9]), "x") is None
    assert mix.warning(None, torch.tensor([9]), "x") is None
    assert "x is far from" in mix.warning({"unigrams": known}, torch.tensor([8, 9]), "x")
    with pytest.raises(ValueError, match="a sketch of token frequencies"):
        mix.distance({"rest": 3}, [1])


def test_what_the_command_line_takes_for_a_mix(files):
    assert mix.is_mix("a.txt=0.5,hf:c4=0.5") and mix.is_mix("x.jsonl") and mix.is_mix("a,b")
    assert not mix.is_mix("builtin") and not mix.is_mix("hf:c4")
    odd = files / "a=b,c.txt"
    odd.write_text("x")
    assert not mix.is_mix(str(odd))
