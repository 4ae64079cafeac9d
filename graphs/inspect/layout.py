"""Layered drawing of a directed acyclic graph, top to bottom (after Sugiyama, Tagawa and Toda 1981).

Nodes get a layer by longest path; edges over several layers are led through a point in each between;
the order within a layer is improved by barycentres; and the places along a layer minimise the squared
distance to the neighbours above and below, with the order and the gaps kept (isotonic regression).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

GAP_X, GAP_Y = 28.0, 46.0
_LANE = 14.0  # width that an edge takes where it passes a layer
_ORDER_SWEEPS, _PLACE_SWEEPS = 16, 120


@dataclass(frozen=True)
class Layout:
    """Top left corners of nodes, and the points of every edge between its ends.

    ``lanes[e]`` lists (x, top, bottom) for each layer that edge ``e`` passes.
    """

    width: float
    height: float
    places: Mapping[str, tuple[float, float]]
    lanes: Sequence[Sequence[tuple[float, float, float]]]


_Point: TypeAlias = str | tuple[int, int]
"""A node by its name, or the place (edge, layer) where an edge passes a layer."""


@dataclass
class _Graph:
    """Points by layer, their widths, and their links (point, weight) to the layers next to them."""

    layers: list[list[_Point]]
    width: dict[_Point, float]
    above: dict[_Point, list[tuple[_Point, float]]] = field(default_factory=dict)
    below: dict[_Point, list[tuple[_Point, float]]] = field(default_factory=dict)

    def link(self, upper: _Point, lower: _Point, weight: float) -> None:
        self.below.setdefault(upper, []).append((lower, weight))
        self.above.setdefault(lower, []).append((upper, weight))


def arrange(
    sizes: Mapping[str, tuple[float, float]],
    edges: Sequence[tuple[str, str]],
    *,
    late: Sequence[str] = (),
    last: Sequence[str] = (),
) -> Layout:
    """Place nodes and edges.

    Args:
        sizes: width and height by node, in an order in which edges go forward.
        edges: (from, to).
        late: nodes that nothing leads to, drawn just above the first that uses them.
        last: nodes that lead nowhere, drawn in the bottom layer.
    """
    layer = _layers(sizes, edges, late, last)
    graph = _Graph([[] for _ in range(max(layer.values(), default=0) + 1)], {})
    for node, (width, _) in sizes.items():
        graph.layers[layer[node]].append(node)
        graph.width[node] = width
    chains = [_chain(graph, layer, at, edge, late) for at, edge in enumerate(edges)]
    _order(graph)
    centre = _place(graph)
    for chain in chains:
        _straighten(graph, chain, centre)
    heights = [max((sizes[n][1] for n in nodes if isinstance(n, str)), default=0.0) for nodes in graph.layers]
    tops = [sum(heights[:at]) + at * GAP_Y for at in range(len(heights))]
    left = min((centre[n] - graph.width[n] / 2 for n in centre), default=0.0)
    return Layout(
        width=max((centre[n] + graph.width[n] / 2 for n in centre), default=0.0) - left,
        height=sum(heights) + GAP_Y * (len(heights) - 1),
        places={n: (centre[n] - sizes[n][0] / 2 - left, tops[layer[n]]) for n in sizes},
        lanes=[[(centre[p] - left, tops[p[1]], tops[p[1]] + heights[p[1]]) for p in c] for c in chains],
    )


def _layers(
    sizes: Iterable[str], edges: Sequence[tuple[str, str]], late: Sequence[str], last: Sequence[str]
) -> dict[str, int]:
    """Layer of every node, counted from 0 at the top, none left empty."""
    layer = dict.fromkeys(sizes, 1)
    for node in sizes:
        for upper, lower in edges:
            if upper == node:
                layer[lower] = max(layer[lower], layer[node] + 1)
    for node in late:
        layer[node] = min((layer[b] for a, b in edges if a == node), default=2) - 1
    bottom = max((layer[n] for n in sizes if n not in last), default=0) + 1
    layer |= dict.fromkeys(last, bottom)
    used = {number: at for at, number in enumerate(sorted(set(layer.values())))}
    return {node: used[number] for node, number in layer.items()}


def _chain(
    graph: _Graph, layer: Mapping[str, int], at: int, edge: tuple[str, str], late: Sequence[str]
) -> list[tuple[int, int]]:
    """Lane points of an edge, added to the graph and linked."""
    upper, lower = edge
    points = [(at, number) for number in range(layer[upper] + 1, layer[lower])]
    for point in points:
        graph.layers[point[1]].append(point)
        graph.width[point] = _LANE
    path: list[_Point] = [upper, *points, lower]
    for a, b in pairwise(path):
        # Nodes stay in line with the nodes they follow; lanes and what comes from outside make way.
        graph.link(a, b, 1.0 if not points and upper not in late else 0.001)
    return points


def _order(graph: _Graph) -> None:
    """Sort every layer, by turns from above and from below; the order with the fewest crossings is kept."""
    best, fewest = [list(nodes) for nodes in graph.layers], _crossings(graph)
    for sweep in range(_ORDER_SWEEPS):
        down = sweep % 2 == 0
        numbers = range(1, len(graph.layers)) if down else range(len(graph.layers) - 2, -1, -1)
        for number in numbers:
            links = graph.above if down else graph.below
            beside = graph.layers[number - 1 if down else number + 1]
            at = {node: i for i, node in enumerate(beside)}
            here = {node: i for i, node in enumerate(graph.layers[number])}

            def mean(node: _Point, links=links, at=at, here=here) -> float:
                linked = [at[n] for n, _ in links.get(node, ())]
                return sum(linked) / len(linked) if linked else float(here[node])

            graph.layers[number].sort(key=mean)
        if (count := _crossings(graph)) < fewest:
            best, fewest = [list(nodes) for nodes in graph.layers], count
    graph.layers[:] = best


def _crossings(graph: _Graph) -> int:
    """Pairs of links between neighbouring layers that cross."""
    total = 0
    for upper, lower in pairwise(graph.layers):
        at = {node: i for i, node in enumerate(lower)}
        ends = [(i, at[n]) for i, node in enumerate(upper) for n, _ in graph.below.get(node, ())]
        total += sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(ends) for c, d in ends[:i])
    return total


def _place(graph: _Graph) -> dict[_Point, float]:
    """Centre of every node and lane point along its layer."""
    centre: dict[_Point, float] = {}
    for nodes in graph.layers:
        end = 0.0
        for node in nodes:
            centre[node] = end + graph.width[node] / 2
            end += graph.width[node] + GAP_X
        for node in nodes:
            centre[node] -= (end - GAP_X) / 2
    for sweep in range(_PLACE_SWEEPS):
        for nodes in graph.layers if sweep % 2 == 0 else reversed(graph.layers):
            wanted, weights, gaps, offset = [], [], [], 0.0
            for at, node in enumerate(nodes):
                if at:
                    offset += (graph.width[nodes[at - 1]] + graph.width[node]) / 2 + GAP_X
                links = (*graph.above.get(node, ()), *graph.below.get(node, ()))
                weight = sum(w for _, w in links)
                goal = sum(centre[n] * w for n, w in links) / weight if links else centre[node]
                wanted.append(goal - offset)
                weights.append(weight or 0.1)
                gaps.append(offset)
            for node, x, gap in zip(nodes, isotonic(wanted, weights), gaps, strict=True):
                centre[node] = x + gap
    return centre


def _straighten(graph: _Graph, chain: Sequence[tuple[int, int]], centre: dict[_Point, float]) -> None:
    """Draw an edge that passes beside everything as one vertical line."""
    places = [centre[point] for point in chain]
    for end, outermost in ((-1, max), (0, min)):
        if chain and all(graph.layers[point[1]][end] == point for point in chain):
            centre.update(dict.fromkeys(chain, outermost(places)))
            return


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The ascending sequence nearest to ``values`` in weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (v, w, n), (u, x, m) = pools.pop(), pools.pop()
            pools.append(((u * x + v * w) / (x + w), x + w, n + m))
    return [value for value, _, n in pools for _ in range(n)]
