"""Inputs of rotary positions; see inputs.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from case import FLOATS, Case, Random, in_columns, int32


def rope_rows(op: str) -> Iterator[Case]:
    table = Random(7).rotary(13, 8)
    for label, positions in (("any", [12, 0, 5, 5]), ("one", [3])):
        yield Case(op, label, {"positions": int32(positions), "table": table})


def rope_rows_dynamic(op: str) -> Iterator[Case]:
    attrs = {"rotary_dim": 16, "theta": 10000.0, "factor": 4.0, "original_context": 32}
    operands = {
        "positions": int32([0, 31, 32, 50, 100, 3, 0]),
        "token_slot": int32([0, 0, 0, 1, 1, 2, 3]),
        "prompt_len": int32([33, 51, 120, 0]),
    }
    yield Case(op, "any", operands, attrs)
    one = {"positions": int32([40]), "token_slot": int32([0]), "prompt_len": int32([41, 0])}
    yield Case(op, "one", one, attrs | {"rotary_dim": 6, "factor": 1.0})


def rope_rows_stepped(op: str) -> Iterator[Case]:
    """Prompts of one original context and a token less and more, and of two, four and eight of them."""
    lengths = [0, 1, 31, 32, 33, 64, 65, 100, 128, 129, 256, 257]
    slots = list(range(len(lengths)))
    operands = {
        "positions": int32([0, 0, 30, 31, 32, 63, 64, 150, 3, 128, 255, 1000]),
        "token_slot": int32(slots),
        "prompt_len": int32(lengths),
    }
    attrs = {"rotary_dim": 16, "theta": 10000.0, "original_context": 32}
    yield Case(op, "any", operands, attrs)
    one = {"positions": int32([40]), "token_slot": int32([0]), "prompt_len": int32([41, 0])}
    yield Case(op, "one", one, attrs | {"rotary_dim": 6})


def rope_rows_logn(op: str) -> Iterator[Case]:
    for positions in ([0, 30, 31, 32, 100, 5000], [7]):
        rows = Random(3).rotary(len(positions), 10)
        operands = {"rows": rows, "positions": int32(positions)}
        yield Case(op, f"{len(positions)}", operands, {"original_context": 32})


def rope(op: str) -> Iterator[Case]:
    for (heads, size, rotary), act in itertools.product(((3, 32, 32), (1, 80, 20), (8, 64, 2)), FLOATS):
        random = Random(size)
        for tokens in (5, 1):
            operands = {"x": random.normal(tokens, heads * size, dtype=act)}
            operands["rows"] = random.rotary(tokens, rotary)
            attrs = {"heads": heads, "head_dim": size}
            label = f"{tokens}x{heads}x{size}/{rotary}-{act}"
            yield Case(op, label, operands, attrs)
            yield Case(op, f"{label}-columns", operands | {"x": in_columns(operands["x"])}, attrs)
