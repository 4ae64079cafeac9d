"""The graph drawing on random graphs: nothing overlaps, edges go down, lanes pass beside boxes."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.graphs.inspect.layout import arrange, isotonic


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 12))
    names = [f"n{i}" for i in range(count)]
    sizes = {n: (draw(st.integers(20, 200)), draw(st.integers(20, 90))) for n in names}
    pairs = list(combinations(names, 2))
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20)) if pairs else []
    return sizes, edges


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_nothing_overlaps_and_edges_go_down(graph):
    sizes, edges = graph
    sources = [n for n in sizes if not any(b == n for _, b in edges)]
    sinks = [n for n in sizes if not any(a == n for a, _ in edges) and n not in sources]
    layout = arrange(sizes, edges, late=sources, last=sinks)
    boxes = {n: (x, y, x + sizes[n][0], y + sizes[n][1]) for n, (x, y) in layout.places.items()}
    for a, b in combinations(boxes.values(), 2):
        assert a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6 or a[3] <= b[1] + 1e-6 or b[3] <= a[1] + 1e-6
    for (upper, lower), lanes in zip(edges, layout.lanes, strict=True):
        heights = [boxes[upper][3], *(y for _, top, bottom in lanes for y in (top, bottom)), boxes[lower][1]]
        assert heights == sorted(heights)
        for x, top, bottom in lanes:
            assert not any(b[0] < x < b[2] and b[1] < bottom and b[3] > top for b in boxes.values())
    assert all(b[0] >= -1e-6 and b[2] <= layout.width + 1e-6 for b in boxes.values())
    assert all(b[1] >= 0 and b[3] <= layout.height + 1e-6 for b in boxes.values())


def test_a_chain_is_a_straight_column_and_its_residual_a_straight_lane():
    sizes = {"in": (60, 24), "a": (200, 40), "b": (90, 40), "c": (150, 40), "d": (80, 40)}
    edges = [("in", "a"), ("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    layout = arrange(sizes, edges, late=["in"])
    centres = [layout.places[n][0] + sizes[n][0] / 2 for n in "abcd"]
    assert max(centres) - min(centres) < 1
    lanes = layout.lanes[-1]
    assert len({x for x, *_ in lanes}) == 1
    assert len(lanes) == 2


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0.1, 10)), min_size=1, max_size=8), st.randoms())
def test_isotonic_is_ascending_and_no_ascending_sequence_is_nearer(points, random):
    values, weights = zip(*points, strict=True)
    found = isotonic(values, weights)
    assert all(a <= b + 1e-9 for a, b in pairwise(found))

    def distance(sequence):
        return sum(w * (x - v) ** 2 for x, v, w in zip(sequence, values, weights, strict=True))

    for _ in range(20):
        other = sorted(x + random.uniform(-5, 5) for x in found)
        assert distance(found) <= distance(other) + 1e-6
    assert sum(w * x for x, w in zip(found, weights, strict=True)) == pytest.approx(
        sum(w * v for v, w in zip(values, weights, strict=True)), abs=1e-6
    )
