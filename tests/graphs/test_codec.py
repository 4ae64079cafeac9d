"""Dataclasses to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeready.graphs.plan.codec import CodecError, canonical, from_json, to_json


@dataclass(frozen=True)
class Leaf:
    name: str
    sizes: tuple[int | str, ...] = ()
    scale: float = 1.0
    pair: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    named: Mapping[str, Leaf]
    counts: Mapping[int, float] = field(default_factory=dict)
    one: Leaf | None = None
    flag: bool = False
    limit: int | None = None
    anything: Any = None


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
LEAVES = st.builds(
    Leaf,
    name=st.text(),
    sizes=st.lists(st.integers() | st.text(), max_size=3).map(tuple),
    scale=FLOATS,
    pair=st.tuples(st.integers(), FLOATS),
)
TREES = st.builds(
    Tree,
    leaves=st.lists(LEAVES, max_size=3).map(tuple),
    named=st.dictionaries(st.text(), LEAVES, max_size=3),
    counts=st.dictionaries(st.integers(), FLOATS, max_size=3),
    one=st.none() | LEAVES,
    flag=st.booleans(),
    limit=st.none() | st.integers(),
    anything=JSON,
)
SMALL: dict[str, Any] = {"leaves": [{"name": "a", "sizes": [1, "T"]}], "named": {"b": {"name": "b"}}}


@given(TREES)
def test_what_is_written_is_read_back(tree):
    data = json.loads(canonical(to_json(tree)))
    assert from_json(Tree, data) == tree


@given(TREES)
def test_equal_values_give_equal_bytes(tree):
    again = Tree(**{**tree.__dict__, "named": dict(reversed(tree.named.items()))})
    assert canonical(to_json(again)) == canonical(to_json(tree))
    assert canonical(json.loads(canonical(to_json(tree)))) == canonical(to_json(tree))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"x": value})


def test_defaults_are_left_out_and_filled_in():
    assert to_json(Leaf("a")) == {"name": "a"}
    assert to_json(Leaf("a", scale=2.0)) == {"name": "a", "scale": 2.0}
    made = from_json(Tree, SMALL)
    assert made == Tree((Leaf("a", (1, "T")),), {"b": Leaf("b")})
    assert type(from_json(Leaf, {"name": "a", "scale": 2}).scale) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "Tree has an unknown field 'colour'"),
        ({"leaves": [{"name": "a", "colour": 1}]}, r"leaves\[0\] has an unknown field 'colour'"),
        ({"leaves": None}, "leaves must be a list, not NoneType"),
        ({"leaves": [{"sizes": []}]}, r"leaves\[0\] lacks the field 'name'"),
        ({"leaves": [7]}, r"leaves\[0\] must be an object, not int"),
        ({"named": []}, "named must be an object, not list"),
        ({"named": {"b": {"name": 3}}}, "named.b.name must be str, not int"),
        ({"named": {"b": {"name": "b", "sizes": [1.5]}}}, r"named.b.sizes\[0\] is 1.5, which is none of"),
        ({"named": {"b": {"name": "b", "sizes": [True]}}}, r"named.b.sizes\[0\] is True"),
        ({"named": {"b": {"name": "b", "scale": "1"}}}, "named.b.scale must be a number, not str"),
        ({"named": {"b": {"name": "b", "scale": True}}}, "named.b.scale must be a number, not bool"),
        ({"named": {"b": {"name": "b", "pair": [1]}}}, "named.b.pair must be 2 entries"),
        ({"flag": 1}, "flag must be bool, not int"),
        ({"limit": True}, "limit is True, which is none of"),
        ({"one": "a"}, "one is 'a', which is none of"),
        ({"counts": {"many": 1.0}}, "counts.many must be int"),
    ],
)
def test_another_shape_names_the_field(changes, message):
    with pytest.raises(CodecError, match=message):
        from_json(Tree, SMALL | changes)


def test_a_missing_field_is_named():
    with pytest.raises(CodecError, match="Tree lacks the field 'named'"):
        from_json(Tree, {"leaves": []})


def test_a_value_that_its_type_refuses_names_the_field():
    @dataclass(frozen=True)
    class Even:
        number: int

        def __post_init__(self) -> None:
            if self.number % 2:
                raise ValueError(f"{self.number} is odd")

    assert from_json(Even, {"number": 2}) == Even(2)
    with pytest.raises(CodecError, match="Even: 3 is odd"):
        from_json(Even, {"number": 3})
