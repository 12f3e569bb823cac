"""csrc/core/fastcall.h: what C++ is given, what Python gets back, and what is refused.

On a probe module (fastcall_probe.cpp), where every value can be seen.
"""

import inspect

import numpy
import pytest

from python_tests.csrc.building import build_probe

STUB = "See sparsekern/_C.pyi."


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    return build_probe(tmp_path_factory.mktemp("probe"), "fastcall_probe")


class Seven:
    def __index__(self):
        return 7


class Broken:
    def __index__(self):
        raise RuntimeError("no index")


def by_name(probe, address, size, stride):
    return probe.see_named(address=address, size=size, stride=stride)


def by_other_order(probe, address, size, stride):
    return probe.see_named(stride=stride, address=address, size=size)


def by_mapping(probe, address, size, stride):
    return probe.see_named(**dict(zip(("size", "stride", "address"), (size, stride, address))))


def by_new_strings(probe, address, size, stride):
    names = ("".join(list(name)) for name in ("size", "address", "stride"))  # not interned
    return probe.see_named(**dict(zip(names, (size, address, stride), strict=True)))


def by_position(probe, *arguments):
    return probe.see(*arguments)


CALLS = (by_position, by_name, by_other_order, by_mapping, by_new_strings)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "arguments",
    [
        (0, 0, 0),
        (1, 2, 3),
        (2**64 - 1, 2**31 - 1, 2**63 - 1),
        (2**63, -(2**31), -(2**63)),
        (140_000_000_000_000, -1, -1),
    ],
)
def test_cpp_is_given_the_integers_of_the_call(probe, call, arguments):
    assert call(probe, *arguments) is None
    assert probe.last_seen() == arguments


def test_calls_that_take_turns_keep_their_places(probe):
    for number in range(50):
        call = CALLS[1 + number % 4]
        call(probe, number, number + 1, number + 2)
        assert probe.last_seen() == (number, number + 1, number + 2)


def test_whatever_has_an_index_is_an_integer(probe):
    probe.see(Seven(), True, numpy.int64(-5))
    assert probe.last_seen() == (7, 1, -5)
    probe.see(numpy.uint64(2**64 - 1), Seven(), False)
    assert probe.last_seen() == (2**64 - 1, 7, 0)


def test_results(probe):
    assert probe.nothing() == 7
    assert probe.is_even(2) is True and probe.is_even(3) is False
    assert probe.same(2**64 - 1) == 2**64 - 1
    assert probe.twice(3) == (3, 3)
    assert probe.opposite(True) is False


def test_numbers(probe):
    assert probe.half(5) == 2.5 and probe.half(1e-6) == 5e-7 and probe.half(-2.0) == -1.0
    assert probe.half(numpy.float32(3)) == 1.5
    for bad in ("1", None, 10**400):
        with pytest.raises(TypeError, match="half: expected number as a number, got"):
            probe.half(bad)


def test_element_types_are_numbers_of_the_table(probe):
    assert [probe.number_of(i) for i in range(4)] == [0, 1, 2, 3]
    for value in (-1, 99, "float16", 1.0):
        with pytest.raises(TypeError, match=r"expected dtype as 0 \(float16\) or 1 \(bfloat16\)"):
            probe.number_of(value)
    with pytest.raises(TypeError, match="expected truth as True or False, got 1"):
        probe.opposite(1)


@pytest.mark.parametrize("call, name", [(by_position, "see"), (by_name, "see_named")])
@pytest.mark.parametrize(
    "position, kind, values",
    [
        (0, "an unsigned integer of 64 bits", (-1, 2**64, 10**30)),
        (1, "a signed integer of 32 bits", (2**31, -(2**31) - 1, 2**32, 10**30)),
        (2, "a signed integer of 64 bits", (2**63, -(2**63) - 1, -(10**30))),
    ],
)
def test_what_does_not_fit_is_refused_by_name(probe, call, name, position, kind, values):
    argument = ("address", "size", "stride")[position]
    for value in (*values, 1.0, "1", None, [1], Broken()):
        arguments = [1, 2, 3]
        arguments[position] = value
        with pytest.raises(TypeError) as caught:
            call(probe, *arguments)
        expected = f"sparsekern._C.{name}: expected {argument} as {kind}, got {value!r}"
        assert str(caught.value) == f"{expected}. {STUB}"
        assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("arguments", [(), (1,), (1, 2), (1, 2, 3, 4)])
def test_a_wrong_number_of_arguments_is_refused(probe, arguments):
    with pytest.raises(TypeError, match=f"see: expected 3 arguments, got {len(arguments)}"):
        probe.see(*arguments)


def test_keywords_of_another_function_are_refused(probe):
    with pytest.raises(TypeError, match="keyword"):
        probe.see(1, 2, stride=3)
    with pytest.raises(TypeError, match=r"see_named: expected known keyword arguments, got 'step'"):
        probe.see_named(address=1, size=2, stride=3, step=4)
    with pytest.raises(TypeError, match=r"see_named: expected the keyword argument size, got none"):
        probe.see_named(address=1, stride=3)
    with pytest.raises(TypeError, match=r"see_named: expected the keyword argument address"):
        probe.see_named()
    with pytest.raises(TypeError, match=r"expected keyword arguments alone, got 2 positional"):
        probe.see_named(1, 2, stride=3)
    by_name(probe, 4, 5, 6)  # a refused call leaves nothing behind
    assert probe.last_seen() == (4, 5, 6)


def test_exceptions_of_cpp_arrive(probe):
    with pytest.raises(KeyError, match="5"):
        probe.key_error(5)
    with pytest.raises(RuntimeError, match="from C..$"):
        probe.failure(5)


def test_functions_know_their_names_and_parameters(probe):
    assert (probe.see.__name__, probe.see.__module__) == ("see", "fastcall_probe")
    assert probe.see.__doc__ == "For last_seen."
    assert str(inspect.signature(probe.see)) == "(address, size, stride, /)"
    assert str(inspect.signature(probe.see_named)) == "(*, address, size, stride)"
    assert str(inspect.signature(probe.nothing)) == "()"


def test_more_than_six_positional_parameters_are_not_bound(probe):
    with pytest.raises(RuntimeError, match="seven: its parameters do not fit"):
        probe.bind_seven()
