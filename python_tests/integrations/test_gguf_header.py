"""sparsekern.integrations.gguf.header: the file is checked before it is used, and damage of any
kind is a FormatError that costs neither time nor memory."""

import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")

from gguf.constants import GGMLQuantizationType

from python_tests.integrations import gguf_cases as cases
from sparsekern import FormatError
from sparsekern.integrations.gguf.header import read_header
from sparsekern.integrations.gguf.model import load_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small quantised file."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    tensors = cases.gguf_tensors(cases.tiny_llama())
    return cases.write_gguf(path, tensors, cases.metadata(), quantise=True).read_bytes()


def entry_of(data, name):
    """Where the list of tensors has this name's dimensions: (position, number of them)."""
    key = struct.pack("<Q", len(name)) + name.encode()
    at = data.index(key) + len(key)
    return at + 4, struct.unpack_from("<I", data, at)[0]


def changed(data, at, form, value):
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def refused(tmp_path, data, match):
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=match):
        load_gguf(path)


def test_it_says_what_the_gguf_package_says(whole, tmp_path):
    import gguf

    path = tmp_path / "whole.gguf"
    path.write_bytes(whole)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert [t.name for t in header.tensors] == [t.name for t in reader.tensors]
    for ours, theirs in zip(header.tensors, reader.tensors):
        assert (ours.start, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.type == theirs.tensor_type and list(ours.shape[::-1]) == theirs.shape.tolist()
        assert np.array_equal(header.bytes_of(ours), theirs.data.reshape(-1).view(np.uint8))
    for key, value in header.values.items():
        expected = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected


@pytest.mark.parametrize("shift", [-32, -8, 8, 32, 2**40, 2**63, 2**64 - 32])
def test_offsets_that_overlap_or_wrap(whole, tmp_path, shift):
    at, dimensions = entry_of(whole, "blk.1.ffn_up.weight")
    at += 8 * dimensions + 4
    offset = struct.unpack_from("<Q", whole, at)[0]
    moved = changed(whole, at, "<Q", (offset + shift) % 2**64)
    refused(tmp_path, moved, "side by side")


@pytest.mark.parametrize("kind", ["F16", "F64", "Q8_0", "Q4_0", "Q2_K"])
def test_types_that_change_a_size(whole, tmp_path, kind):
    at, dimensions = entry_of(whole, "blk.1.ffn_up.weight")
    other = changed(whole, at + 8 * dimensions, "<I", GGMLQuantizationType[kind].value)
    refused(tmp_path, other, "side by side|whole blocks")


@pytest.mark.parametrize("size", [0, 32, 96, 2**32, 2**61, 2**63])
def test_shapes_that_change_a_size(whole, tmp_path, size):
    at, _ = entry_of(whole, "blk.1.ffn_up.weight")
    refused(tmp_path, changed(whole, at, "<Q", size), "side by side|whole blocks")


@pytest.mark.parametrize("count", [2**17, 2**33, 2**61, 2**64 - 1])
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
def test_arrays_that_are_longer_than_the_file(whole, tmp_path, key, count):
    at = whole.index(key.encode()) + len(key) + 8  # behind the types of value and element
    refused(tmp_path, changed(whole, at, "<Q", count), f"{key} with {count}")


@pytest.mark.parametrize("position", [8, 16])
@pytest.mark.parametrize("count", [2**20, 2**63])
def test_counts_of_entries(whole, tmp_path, position, count):
    refused(tmp_path, changed(whole, position, "<Q", count), "list of")


def test_bytes_behind_the_last_tensor(whole, tmp_path):
    refused(tmp_path, whole + bytes(64), "ends with its last tensor")


HEADER_BITS = 8 * 2**15


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, HEADER_BITS - 1))
@example(8 * 8 + 63)
@example(8 * 16 + 40)
def test_one_flipped_bit_costs_nothing(whole, tmp_path, bit):
    """Loads or is a FormatError; either within seconds and little memory."""
    bit %= 8 * len(whole)
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "flipped.gguf"
    path.write_bytes(damaged)
    begin = time.process_time()
    tracemalloc.start()
    try:
        header = read_header(path)
        assert sum(entry.nbytes for entry in header.tensors) <= len(whole)
    except FormatError as error:
        assert "sparsekern.load_gguf: expected" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**22 and time.process_time() - begin < 10


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_flipped_bits_never_raise_anything_else(whole, tmp_path, data):
    """The whole way to a model: FormatError, or a model of finite numbers."""
    damaged = bytearray(whole)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=3)):
        damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "flipped.gguf"
    path.write_bytes(damaged)
    try:
        model, _ = load_gguf(path)
    except FormatError:
        return
    assert all(bool(p.isfinite().all()) for p in model.parameters())
