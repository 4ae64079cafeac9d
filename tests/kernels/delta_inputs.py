"""Inputs of gated delta nets: rows of any length over blocks of states, of which nobody's are NaN."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from case import FLOATS, NAN, Case, Random, in_columns, int32

# Tokens of the rows; tokens behind them are of no row.
ROWS: dict[str, tuple[Sequence[int], int]] = {
    "few": ((3, 1, 5), 2),
    "one": ((1,), 0),
    "decode": ((1, 1, 1, 0, 0), 0),
    "chunk-borders": ((63, 64, 65, 2), 3),
    "padding": ((2, 0, 130, 0), 1),
    "nobody": ((0, 0), 1),
}
# key heads, key size, value heads, value size
HEADS = ((2, 16, 4, 16), (1, 20, 3, 12), (2, 64, 2, 33), (1, 128, 2, 128))


def rows_of(counts: Sequence[int], spare: int) -> tuple[dict[str, torch.Tensor], int]:
    """Fields of rows with states in blocks of their own, and all tokens.

    The first row is new (block 0), the second goes on in place, the third leaves its old state to others.
    """
    starts, begin = [], 0
    for count in counts:
        starts.append(begin if count else 0)
        begin += count
    decode = not spare and all(count <= 1 for count in counts)
    tokens = max(len(counts), begin) if decode else begin + spare
    before = [0 if r % 3 == 0 or not n else 2 * r + 1 for r, n in enumerate(counts)]
    after = [(2 * r + 2 if r % 3 == 2 else 2 * r + 1) if n else 0 for r, n in enumerate(counts)]
    fields = {
        "state_in": int32(before),
        "state_out": int32(after),
        "query_start": int32(starts),
        "query_len": int32(counts),
    }
    return fields, tokens


def blocks_of(
    random: Random, fields: dict[str, torch.Tensor], *shape: int, dtype: str = "float32"
) -> torch.Tensor:
    """A state in every block that a row reads; block 0 is zeros, and what nobody reads is NaN."""
    blocks = 2 * len(fields["state_in"]) + 3
    made = torch.full((blocks, *shape), NAN, dtype=getattr(torch, dtype))
    for at in fields["state_in"].tolist():
        made[at] = random.normal(*shape, dtype=dtype, scale=0.3)
    made[0] = 0
    return made


def of_nobody(x: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
    """``x`` with NaN in the tokens of no row."""
    owned = torch.zeros(len(x), dtype=torch.bool)
    for start, count in zip(fields["query_start"].tolist(), fields["query_len"].tolist(), strict=True):
        owned[start : start + count] = True
    x[~owned] = NAN
    return x


def owned(case: Case) -> torch.Tensor:
    """Tokens that are of some row: what others give is not said."""
    o = case.operands
    if "query_len" not in o:
        return torch.ones(len(o["x"]), dtype=torch.bool)
    token = torch.arange(len(o["qkv" if "qkv" in o else "x"]))[:, None]
    return ((token >= o["query_start"]) & (token < o["query_start"] + o["query_len"])).any(1)


def causal_conv_silu(op: str) -> Iterator[Case]:
    for seed, (label, dtype, (channels, taps)) in enumerate(
        itertools.product(ROWS, FLOATS, ((10, 4), (1, 2), (300, 4)))
    ):
        random = Random(seed)
        fields, tokens = rows_of(*ROWS[label])
        x = of_nobody(random.normal(tokens, channels, dtype=dtype), fields)
        operands = {
            "x": in_columns(x) if seed % 2 else x,
            "weight": random.normal(taps, channels),
            "tail": blocks_of(random, fields, taps - 1, channels, dtype=dtype),
            **fields,
        }
        yield Case(op, f"{label}-{channels}x{taps}-{dtype}", operands)


def delta_rule(op: str) -> Iterator[Case]:
    kept = ("float32", "bfloat16", "float16")
    for seed, (state, label, dtype, heads) in enumerate(itertools.product(kept, ROWS, FLOATS, HEADS)):
        key_heads, key_dim, value_heads, value_dim = heads
        if key_dim == 128 and (label not in ("few", "decode") or dtype != "float32"):
            continue
        if state != "float32" and (dtype == "float16" or key_dim not in (20, 128)):
            continue
        random = Random(seed)
        fields, tokens = rows_of(*ROWS[label])
        width = 2 * key_heads * key_dim + value_heads * value_dim
        qkv = of_nobody(random.normal(tokens, width, dtype=dtype), fields)
        ba = of_nobody(random.normal(tokens, 2 * value_heads, scale=2), fields)
        operands = {
            "qkv": in_columns(qkv) if seed % 2 else qkv,
            "ba": in_columns(ba) if seed % 3 else ba,
            "a_log": random.normal(value_heads),
            "dt_bias": random.normal(value_heads),
            "state": blocks_of(random, fields, value_heads, key_dim, value_dim, dtype=state),
            **fields,
        }
        attrs = dict(zip(("key_heads", "key_dim", "value_heads", "value_dim"), heads, strict=True))
        name = f"{label}-{'x'.join(map(str, heads))}-{dtype}"
        if state == "float32":
            yield Case(op, name, operands, attrs)
        else:
            yield Case(op, f"{name}-in_{state}", operands, attrs, frozenset({"state"}))


def gated_head_rms_norm(op: str) -> Iterator[Case]:
    for seed, ((heads, size), dtype, stored) in enumerate(
        itertools.product(((3, 12), (1, 1), (4, 128)), FLOATS, ("", "float32"))
    ):
        random = Random(seed)
        for tokens in (5, 1):
            x, gate = (random.normal(tokens, heads * size, dtype=dtype, scale=2) for _ in range(2))
            operands = {"x": x, "gate": in_columns(gate) if seed % 2 else gate}
            operands["weight"] = random.uniform(size, dtype=stored or dtype)
            attrs = {"eps": 1e-6, "heads": heads, "head_dim": size}
            yield Case(op, f"{tokens}x{heads}x{size}-{dtype}-{stored}", operands, attrs)
