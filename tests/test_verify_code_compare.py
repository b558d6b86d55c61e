"""What equals what: values of calls, and lines of output."""

import math

import pytest

from cipo_fast.verify.code.compare import same_output, same_value

SAME = [
    (1, 1),
    (True, True),
    (None, None),
    ("a", "a"),
    ([1, 2], (1, 2)),
    ([[1], [2]], [(1,), (2,)]),
    ([], ()),
    (2, 2.0),
    (2.0, 2),
    (0.1 + 0.2, 0.3),
    (0.33333, 1 / 3),
    (-1234.56789, -1234.567894),
    (2.33333, 7 / 3),
    (1e300, 1e300 * (1 + 1e-9)),
    (math.nan, math.nan),
    (math.inf, math.inf),
    (10**40, 10**40),
    ({"a": 1}, {"a": 1}),
    ({"1": 2, "3": 4}, {3: 4, 1: 2}),
    ({"1.5": 0, "null": 1, "true": 2}, {1.5: 0, None: 1, True: 2}),
    ({"a": [0.5, {"b": None}]}, {"a": (0.5, {"b": None})}),
    (0.0, 1e-12),
    (0.0, 0),
]
DIFFERENT = [
    (1, True),
    (True, 1),
    (False, 0),
    (0, False),
    (False, None),
    (None, False),
    (1, "1"),
    ("1", 1),
    ("a", b"a"),
    ("a", ["a"]),
    ("ab", ["a", "b"]),
    (["a", "b"], "ab"),
    ([1, 2], {1, 2}),
    ([1, 2], frozenset([1, 2])),
    ([1, 2], [1]),
    ([1], [1, 2]),
    ([1, 2], [2, 1]),
    ([1, 2], {0: 1, 1: 2}),
    ([], {}),
    ([], None),
    ([], ""),
    (2, 2.0000001),
    (2, math.nan),
    (10**17, 1e17),
    (0, 0.0004),
    (0.0, 0.0004),
    (0.0, 1e-7),
    (0.5, 0.5004),
    (0.5, "0.5"),
    (0.5, True),
    (1.0, True),
    (0.3333, 1 / 3),
    (3.14, math.pi),
    (0.00012, 0.000123),
    (0.33333, 0.33334),
    (1e-05, 6e-06),
    (math.nan, 0.0),
    (math.nan, None),
    (math.inf, -math.inf),
    (math.inf, 1e308),
    (1e308, math.inf),
    (1.0, math.nan),
    (1.0, 10**400),
    (1e300, 10**300),
    ({"a": 1}, {"a": 1, "b": 2}),
    ({"a": 1, "b": 2}, {"a": 1}),
    ({"1": 2}, {1: 2, "1": 2}),
    ({"1": 2}, {(1,): 2}),
    ({"True": 1}, {True: 1}),
    ({"a": 1}, [("a", 1)]),
    ({}, []),
    ({}, None),
    ({"1": 1}, {10**5000: 1}),
    (1, complex(1, 0)),
]


@pytest.mark.parametrize(("expected", "got"), SAME)
def test_same(expected: object, got: object) -> None:
    assert same_value(expected, got)


@pytest.mark.parametrize(("expected", "got"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different(expected: object, got: object) -> None:
    assert not same_value(expected, got)
    assert not same_value([expected], [got])
    assert not same_value({"k": expected}, {"k": got})


def test_values_too_deep_are_different() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert not same_value(deep, deep)


class Alike(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_a_subclass_is_another_type() -> None:
    """Nothing decoded from the sandbox is one; if it were, its methods would not be asked."""
    assert Alike(3) == 4
    for expected in (4, 4.0, "4", None, True, [4], {"a": 4}):
        assert not same_value(expected, Alike(4))


EQUAL_OUTPUTS = [
    ("1\n", "1"),
    ("1", "1\n\n\n"),
    ("1 \n2\t\n", "1\n2"),
    ("1\r\n2\r\n", "1\n2\n"),
    ("", ""),
    ("", "\n \n"),
    ("1  2", "1 2"),
    ("0.25\n", "0.250000001"),
    ("0.25", ".25"),
    ("1e-3", "0.001"),
    ("2.0", "2"),
    ("0.33333", "0.333333333333"),
    ("x 0.5 y", "x 0.50 y"),
    ("\n1", "\n1"),
    ("nan inf", "nan inf"),
    ("\u0661", "\u0661"),
]
OTHER_OUTPUTS = [
    ("1\n2\n3", "1\n2"),
    ("1\n2", "1\n2\n3"),
    ("1\n2", "1 2"),
    ("1 2", "1\n2"),
    ("1 2", "1 2 3"),
    ("1", ""),
    ("", "1"),
    ("0", "0.0004"),
    ("0", "0.0"),
    ("2", "2.0"),
    ("0.0", "0.0004"),
    ("0.25", "0.2504"),
    ("0.25", "0.25x"),
    ("0.25", "1/4"),
    ("0.25", "nan"),
    ("100.0", "1_00.0"),
    ("1.0", "\u0661.\u0660"),
    ("nan", "1.0"),
    ("1.0", "inf"),
    ("inf", "1e999"),
    ("1e400", "2e400"),
    ("Yes", "YES"),
    ("1\n\n2", "1\n2"),
    ("1", "\n1"),
    ("12", "1 2"),
    ("a\u2028b", "a\nb"),
    ("0.1", "0." + "1" * 100_000),
]


@pytest.mark.parametrize(("expected", "got"), EQUAL_OUTPUTS)
def test_the_same_output(expected: str, got: str) -> None:
    assert same_output(expected, got) == ""


@pytest.mark.parametrize(("expected", "got"), OTHER_OUTPUTS, ids=range(len(OTHER_OUTPUTS)))
def test_another_output(expected: str, got: str) -> None:
    assert same_output(expected, got) != ""
