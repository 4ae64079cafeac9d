"""Mixtures of experts in a plan: bytes, how many experts a step reaches, how unevenly, and by which kernels.

What a router does is not known before it runs. Figures called expected are of a router that gives every expert the
same chance; the worst is all tokens at the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from makeready.graphs.inspect.analysis import kernel_of
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.spec import Bucket


@dataclass(frozen=True)
class Mixture:
    """Layers whose mixtures are alike.

    Attributes:
        layers: how many.
        experts, top_k: of a layer, of a token.
        nbytes: of one expert's weights and scales.
        products: the launches of the first of the layers that take experts' weights, by kind of step.
    """

    layers: int
    experts: int
    top_k: int
    nbytes: int
    products: dict[str, tuple[Launch, ...]]


@dataclass(frozen=True)
class Spread:
    """Where the tokens of a step go.

    Attributes:
        entries: (token, expert) pairs.
        hit: experts that have one, expected.
        largest: entries of the fullest expert, expected; ``worst`` if all tokens choose alike.
    """

    entries: int
    hit: float
    largest: float
    worst: int

    @property
    def imbalance(self) -> float:
        """Entries of the fullest expert over those of an average one that is hit."""
        return self.largest * self.hit / self.entries


def mixtures(plan: Plan) -> list[Mixture]:
    """The plan's mixtures, those alike together, in the order of their layers."""
    weights = {weight.param.name: weight for weight in plan.weights}
    found: dict[tuple[int, int, int], dict[str, list[tuple[Launch, ...]]]] = {}
    for phase, program in plan.programs.items():
        for launch in program.launches:
            if "start" not in launch.results or "experts" not in launch.attrs:  # sorts entries by expert
                continue
            start = launch.results["start"]
            products = tuple(one for one in program.launches if one.operands.get("start") == start)
            stored = [
                weights[value]
                for one in products
                for name, value in one.operands.items()
                if name.startswith("weight") and value in weights
            ]
            experts = int(launch.attrs["experts"])
            nbytes = sum(weight.nbytes for weight in stored) // experts
            top_k = max(int(one.attrs["top_k"]) for one in products)
            found.setdefault((experts, top_k, nbytes), {}).setdefault(phase, []).append(products)
    return [
        Mixture(max(map(len, by_phase.values())), *key, {phase: one[0] for phase, one in by_phase.items()})
        for key, by_phase in found.items()
    ]


def spread(tokens: int, experts: int, top_k: int) -> Spread:
    """Where ``tokens`` tokens go that choose ``top_k`` of ``experts`` each, all choices alike likely."""
    share = top_k / experts
    below, largest = 0.0, 0.0
    for entries in range(tokens):  # E[max] = sum of P(max > entries); experts as if they were independent
        below += _binomial(tokens, share, entries)
        largest += 1.0 - min(below, 1.0) ** experts
    hit = experts * (1 - (1 - share) ** tokens)
    return Spread(tokens * top_k, hit, max(largest, 1.0), tokens)


def _binomial(n: int, p: float, k: int) -> float:
    if p >= 1.0:
        return float(k == n)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))


def kernels_of(plan: Plan, mixture: Mixture, bucket: Bucket) -> Iterator[str]:
    """What the products of a mixture run in a bucket, as ``op/kernel``."""
    for launch in mixture.products.get(bucket.phase, ()):
        yield f"{launch.op}/{kernel_of(plan, launch, bucket)}"
