"""json_store: entries survive concurrent writers; a file that cannot be used costs one warning."""

import json
import multiprocessing
import os
import warnings

import pytest

from sparsekern.utils import json_store

WRITERS, UPDATES = 4, 25


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "table.json"


def test_update_then_load(path):
    assert json_store.load(path) == {}
    assert not path.parent.exists()  # reading leaves no trace
    json_store.update(path, lambda entries: entries.update(a=[1, 2.5, None]))
    written = json_store.update(path, lambda entries: entries.update(b={"c": "text"}))
    assert written == json_store.load(path) == {"a": [1, 2.5, None], "b": {"c": "text"}}
    content = json.loads(path.read_text())
    assert content == {"version": 1, "entries": written}
    assert path.read_text().count("\n") > 5  # one can read it
    assert sorted(os.listdir(path.parent)) == ["table.json", "table.json.lock"]


def _count_up(path, writer):
    for number in range(UPDATES):

        def change(entries, number=number):
            entries["total"] = entries.get("total", 0) + 1
            entries[f"{writer}.{number}"] = number

        json_store.update(path, change)


def test_concurrent_writers_lose_nothing(path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_count_up, args=(path, w)) for w in range(WRITERS)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):  # a reader never sees half a file
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            json_store.load(path)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    entries = json_store.load(path)
    assert entries["total"] == WRITERS * UPDATES
    assert len(entries) == WRITERS * UPDATES + 1


def test_a_failing_change_leaves_the_file(path):
    json_store.update(path, lambda entries: entries.update(a=1))
    before = path.read_bytes()

    def fail(entries):
        entries["a"] = 2
        raise KeyError("no")

    with pytest.raises(KeyError):
        json_store.update(path, fail)
    with pytest.raises(TypeError):
        json_store.update(path, lambda entries: entries.update(a=object()))
    with pytest.raises(ValueError):
        json_store.update(path, lambda entries: entries.update(a=float("nan")))
    assert path.read_bytes() == before
    assert json_store.update(path, lambda entries: None) == {"a": 1}  # the lock is free again


DAMAGED = {
    "half a file": ('{"version": 1, "entries": {"a"', "JSONDecodeError"),
    "not text": (b'{"\x80": 1}', "UnicodeDecodeError"),
    "a list": ("[1, 2]", 'expected {"version"'),
    "entries of another type": ('{"version": 1, "entries": [1]}', 'expected {"version"'),
    "a version in quotes": ('{"version": "1", "entries": {}}', "expected version 1, got '1'"),
    "another version": ('{"version": 2, "entries": {"a": 1}}', "expected version 1, got 2"),
    "deep nesting": ("[" * 100_000, "Error"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_unusable_file_is_ignored_with_one_warning_and_kept(path, name):
    content, why = DAMAGED[name]
    content = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="table.json is ignored") as caught:
        assert json_store.load(path) == {}
    assert len(caught) == 1 and why in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert json_store.load(path) == {}
        json_store.update(path, lambda entries: entries.update(b=1))
        assert json_store.load(path) == {"b": 1}
    assert (path.parent / "table.json.bak").read_bytes() == content


def test_own_version(path):
    json_store.update(path, lambda entries: entries.update(a=1), version=7)
    assert json_store.load(path, version=7) == {"a": 1}
    with pytest.warns(UserWarning, match="expected version 1, got 7"):
        assert json_store.load(path) == {}


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert json_store.cache_folder() == tmp_path / "sparsekern"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert json_store.cache_folder() == tmp_path / "home" / ".cache" / "sparsekern"


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_what_is_no_file_is_ignored_without_waiting(path, kind):
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.warns(UserWarning, match="is no regular file"):
        assert json_store.load(path) == {}
    json_store.update(path, lambda entries: entries.update(a=1))
    assert json_store.load(path) == {"a": 1}


def test_a_lock_that_is_a_pipe_is_refused_without_waiting(path):
    path.parent.mkdir()
    os.mkfifo(f"{path}.lock")
    with pytest.raises(OSError, match="is no regular file"):
        json_store.update(path, lambda entries: entries.update(a=1))


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1' + "0" * 400 + ', "entries": {}}',
        '{"version": true, "entries": {}}',
        '{"version": 1.0, "entries": {}}',
        '{"version": 1, "entries": {"a": NaN}}',
        '{"version": 1, "entries": {"a": 1' + "0" * 5000 + "}}",
        '{"a":' * 100_000,
    ],
    ids=lambda text: text[:34],
)
def test_hostile_json_counts_as_empty(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="is ignored") as seen:
        assert json_store.load(path) == {}
    assert len(str(seen[0].message)) < 500
