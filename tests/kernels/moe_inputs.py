"""Inputs of the ops of mixtures of experts: awkward numbers of experts and tokens, and uneven routings.

T tokens, E experts, k experts of a token, M entries
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from case import NAN, Case, Random, in_columns, int32

from makeready.kernels.moe.route import sort_by_expert

SIZES = [(7, 8, 2), (1, 5, 1), (63, 3, 2), (65, 60, 4), (17, 128, 8), (300, 8, 8), (3, 200, 6)]


def slots(random: Random, tokens: int, padding: int = 0) -> torch.Tensor:
    """Cache slots of ``tokens`` tokens, the last ``padding`` of which are nobody's."""
    made = random.integers(50, tokens) + 1
    made[tokens - padding :] = 0
    return made


def route(op: str) -> Iterator[Case]:
    """All ways to score and choose, in all sizes; padding, ties and NaN among the logits."""
    ways = [
        {"score": "softmax"},
        {"score": "softmax", "renormalise": True, "scale": 1.5},
        {"score": "sigmoid", "renormalise": True, "scale": 2.5},
    ]
    for seed, ((tokens, experts, k), way) in enumerate(itertools.product(SIZES, ways)):
        random = Random(seed)
        logits = random.normal(tokens, experts, scale=2)
        padding = tokens // 3
        logits[tokens - padding :] = NAN
        operands = {"logits": logits, "kv_slot": slots(random, tokens, padding)}
        if way["score"] == "sigmoid":
            operands["bias"] = random.normal(experts, scale=0.1)
        yield Case(op, f"{tokens}x{experts}x{k}-{seed % 3}", operands, {"top_k": k, **way})
    yield from _grouped_route(op)
    logits = torch.tensor([[1.0, 2, 2, 1, 2, 0], [0, 0, 0, 0, 0, 0], [NAN, 1, NAN, 3, NAN, NAN], [NAN] * 6])
    for columns in (False, True):
        x = in_columns(logits) if columns else logits
        yield Case(op, f"ties-{columns}", {"logits": x, "kv_slot": int32([3, 1, 2, 9])}, {"top_k": 3})


def sorted_too(cases: Iterator[Case]) -> Iterator[Case]:
    """Cases of routing for the op that sorts as well."""
    for case in cases:
        yield Case(
            case.op, case.label, case.operands, {**case.attrs, "experts": case.operands["logits"].shape[1]}
        )


def _grouped_route(op: str) -> Iterator[Case]:
    """DeepSeek-V2 (the best of a group) and V3 (the best two together, a correction of the choice)."""
    for seed, (experts, k, groups, best, members) in enumerate(
        [(16, 4, 4, 2, 1), (64, 6, 8, 3, 1), (256, 8, 8, 4, 2), (24, 3, 3, 1, 2)]
    ):
        random = Random(seed)
        operands = {"logits": random.normal(9, experts, scale=2), "kv_slot": slots(random, 9, 2)}
        attrs = {"top_k": k, "groups": groups, "top_groups": best, "group_members": members}
        if members == 2:
            operands["bias"] = random.normal(experts, scale=0.3)
            attrs |= {"score": "sigmoid", "renormalise": True, "scale": 2.5}
        yield Case(op, f"groups-{experts}/{groups}", operands, attrs)


def routings(tokens: int, experts: int, k: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts of every token: at random with a third of padding, all alike, and none at all."""
    random = Random(tokens * experts)
    drawn = torch.stack([random.permutation(experts)[:k] for _ in range(tokens)]).int()
    padded = drawn.clone()
    padded[tokens - tokens // 3 :] = -1
    yield "padded", padded
    yield "alike", drawn[:1].expand(tokens, k).contiguous()
    yield "none", torch.full_like(drawn, -1)


def sort(op: str) -> Iterator[Case]:
    for tokens, experts, k in SIZES:
        for label, expert in routings(tokens, experts, k):
            yield Case(op, f"{tokens}x{experts}x{k}-{label}", {"expert": expert}, {"experts": experts})


def combine(op: str) -> Iterator[Case]:
    for seed, (tokens, experts, k) in enumerate(SIZES):
        for (label, expert), dtype in itertools.product(
            routings(tokens, experts, k), ("float32", "bfloat16", "float16")
        ):
            random = Random(seed)
            order, place, start = sort_by_expert.reference(expert, experts=experts)
            y = random.normal(len(order), 24 if seed % 2 else 130, dtype=dtype)
            y[int(start[-1]) :] = NAN
            operands = {"x": y, "place": place, "share": random.uniform(tokens, k)}
            yield Case(op, f"{tokens}x{experts}x{k}-{label}-{dtype}", operands)


def combine_norm(op: str) -> Iterator[Case]:
    """Sums that are added and normed; groups where the op quantizes, too."""
    for case in combine(op):
        x, width = case.operands["x"], case.operands["x"].shape[1]
        random = Random(width)
        dtype = str(x.dtype).removeprefix("torch.")
        more = {
            "residual": random.normal(len(case.operands["place"]), width, dtype=dtype),
            "weight": random.uniform(width, dtype=dtype),
        }
        attrs = {"eps": 1e-6} | ({"group": width} if "quantize" in op else {})
        yield Case(op, case.label, case.operands | more, attrs)


PRODUCTS = [
    (7, 8, 2, 16, 12),
    (1, 5, 1, 8, 3),
    (65, 60, 4, 64, 24),
    (17, 3, 2, 130, 33),
    (40, 128, 8, 32, 16),
]


def entries(tokens: int, experts: int, k: int) -> Iterator[tuple[str, dict[str, torch.Tensor], int, int]]:
    """Where entries lie, with rows of x: of tokens, then of entries (``top_k`` 0)."""
    for label, expert in routings(tokens, experts, k):
        order, _, start = sort_by_expert.reference(expert, experts=experts)
        made = {"order": order, "start": start}
        yield f"{label}-tokens", made, tokens, k
        yield f"{label}-entries", made, tokens * k, 0


def grouped_linear(op: str) -> Iterator[Case]:
    dtypes = [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ]
    for seed, ((tokens, experts, k, inputs, outputs), (act, stored)) in enumerate(
        itertools.product(PRODUCTS, dtypes)
    ):
        for label, where, rows, top_k in entries(tokens, experts, k):
            random = Random(seed)
            x = random.normal(rows, inputs, dtype=act)
            x[used(where, rows, top_k) :] = NAN
            operands = {"x": x, "weight": random.normal(experts, outputs, inputs, dtype=stored), **where}
            attrs = {"top_k": top_k, "out_dtype": "" if seed % 2 else "float32"}
            yield Case(op, f"{tokens}x{experts}x{inputs}x{outputs}-{label}-{act}-{stored}", operands, attrs)


def biased(made: Iterator[Case], **attrs: float) -> Iterator[Case]:
    """The cases with a bias of every expert's outputs, of the activations' dtype or of float32; and attributes."""
    for seed, case in enumerate(made):
        experts, outputs, _ = case.operands["weight"].shape
        dtype = "float32" if seed % 2 else str(case.operands["x"].dtype).removeprefix("torch.")
        bias = Random(seed).normal(experts, outputs, dtype=dtype)
        yield Case(case.op, f"{case.label}-biased", {**case.operands, "bias": bias}, {**case.attrs, **attrs})


def used(where: dict[str, torch.Tensor], rows: int, top_k: int) -> int:
    """Rows of x behind this one belong to nobody."""
    used = int(where["start"][-1])
    return -(-used // top_k) if top_k else used


def _fp8(random: Random, *shape: int) -> torch.Tensor:
    return random.normal(*shape, scale=60).clamp(-448, 448).to(torch.float8_e4m3fn)


def _int8(random: Random, *shape: int) -> torch.Tensor:
    return random.normal(*shape, scale=60).clamp(-128, 127).round().to(torch.int8)


def grouped_linear_fp8(op: str) -> Iterator[Case]:
    for seed, ((tokens, experts, k, inputs, outputs), out) in enumerate(
        itertools.product(PRODUCTS, ("bfloat16", "float32"))
    ):
        for label, where, rows, top_k in entries(tokens, experts, k):
            random = Random(seed)
            scale = random.uniform(rows, 1) / 100
            scale[used(where, rows, top_k) :] = NAN
            eight = _int8 if op.endswith("int8") else _fp8
            operands = {"x": eight(random, rows, inputs), "x_scale": scale}
            operands |= {"weight": eight(random, experts, outputs, inputs)}
            operands |= {"weight_scale": random.uniform(experts, outputs) / 500, **where}
            attrs = {"top_k": top_k, "out_dtype": out}
            yield Case(op, f"{tokens}x{experts}x{inputs}x{outputs}-{label}-{out}", operands, attrs)


def grouped_linear_fp8_block(op: str) -> Iterator[Case]:
    shapes = [(7, 8, 2, 32, 12, 16), (65, 60, 4, 64, 24, 16), (17, 3, 2, 256, 200, 128)]
    for seed, ((tokens, experts, k, inputs, outputs, block), out) in enumerate(
        itertools.product(shapes, ("bfloat16", "float32"))
    ):
        groups, bands = inputs // block, -(-outputs // block)
        for label, where, rows, top_k in entries(tokens, experts, k):
            random = Random(seed)
            scale = random.uniform(rows, groups) / 100
            scale[used(where, rows, top_k) :] = NAN
            operands = {"x": _fp8(random, rows, inputs), "x_scale": scale}
            operands |= {"weight": _fp8(random, experts, outputs, inputs)}
            operands |= {"weight_scale": random.uniform(experts, bands, groups) / 500, **where}
            attrs = {"top_k": top_k, "out_dtype": out, "block": block}
            yield Case(op, f"{tokens}x{experts}x{inputs}x{outputs}/{block}-{label}-{out}", operands, attrs)


def gated(made: Iterator[Case]) -> Iterator[Case]:
    """Those of the cases whose outputs are as many gates as factors."""
    return (case for case in made if case.operands["weight"].shape[1] % 2 == 0)
