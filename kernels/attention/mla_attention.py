"""Latent attention as models call it, and what it becomes in each kind of step.

Decode steps and deterministic plans run the absorbed form, whose arithmetic does not depend on which tokens are the
step's own. Other steps attend over their own tokens with keys and values of every head, over what was cached before
in the absorbed form, and merge the two: no buffer is as long as the context.

    letters as in :mod:`~makeready.kernels.attention.mla`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from makeready.kernels.attention import mla
from makeready.kernels.contract import ANY, CONTRACTS, INVARIANT, Tolerance, contract


class _Calls:
    """The calls that take the place of a semantic one, whose operands and attributes they have by their names."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.made: list[Any] = []

    def add(self, op: str, results: dict[str, str], operands: dict[str, str], **attrs: Any) -> None:
        """Append a call of ``op``; values are called as the semantic call's result, or after it and a dot."""
        made, call = CONTRACTS[op], self.call
        given = {name: self.named(value) for name, value in operands.items()}
        self.made.append(
            replace(
                call,
                op=op,
                operands={
                    o.name: given.get(o.name) or call.operands[o.name] for o in made.inputs if not o.optional
                },
                results={name: self.named(value) for name, value in results.items()},
                attrs={
                    name: attrs.get(name, call.attrs.get(name, value)) for name, value in made.attrs.items()
                },
            )
        )

    def named(self, value: str) -> str:
        """``value`` as the program names it: an operand of the semantic call, its result, or a further value."""
        if value in self.call.operands:
            return self.call.operands[value]
        return self.call.result if value == "y" else f"{self.call.result}.{value}"


def absorbed(attention: str) -> Any:
    """What latent attention becomes where ``attention`` has all keys."""

    def calls(program: Any, call: Any) -> list[Any]:
        made = _Calls(call)
        made.add("mla_absorb", {"y": "absorbed"}, {})
        logarithms = {"log_sum": "log_sum"} if attention.startswith("mla_extend") else {}
        made.add(attention, {"y": "latents", **logarithms}, {"q": "absorbed"}, own=True)
        made.add("mla_values", {"y": "y"}, {"x": "latents"})
        return made.made

    return calls


def merged(attention: str) -> Any:
    """What it becomes where ``attention`` has the keys before the step alone."""

    def calls(program: Any, call: Any) -> list[Any]:
        made, rank = _Calls(call), call.attrs["rank"]
        made.add("columns", {"y": "normed"}, {"x": "latent"}, start=0, stop=rank)
        made.add("linear", {"y": "kv"}, {"x": "normed", "weight": "kv_b"})
        made.add("mla_rope", {"y": "turned"}, {})
        made.add("mla_own_attention", {"y": "own", "log_sum": "own_sum"}, {"q": "turned", "kv": "kv"})
        made.add("mla_absorb", {"y": "absorbed"}, {})
        latents = {"y": "latents", "log_sum": "before_sum"}
        made.add(attention, latents, {"q": "absorbed"}, own=False)
        made.add("mla_values", {"y": "before"}, {"x": "latents"})
        parts = {"x": "own", "x_log_sum": "own_sum", "y": "before", "y_log_sum": "before_sum"}
        made.add("merge_attention", {"z": "y"}, parts)
        return made.made

    return calls


@contract(
    "q[T,heads*(nope+rope)]:A latent[T,rank+rope]:A kv_b[heads*(nope+value),rank]:A rows[T,rope]:float32 "
    "cache[P,S,rank+rope]:C page_table[R,B]:int32 query_start[R]:int32 query_len[R]:int32 context_len[R]:int32 "
    "-> y[T,heads*value]:A",
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="2*T*context*heads*(2*rank+rope)",
    rate="q",
    traffic={"cache": "R*context*(rank+rope)"},
    expands={
        "decode": absorbed("mla_decode_attention"),
        INVARIANT: absorbed("mla_extend_attention"),
        ANY: merged("mla_extend_attention"),
    },
)
def mla_attention(
    q: torch.Tensor,
    latent: torch.Tensor,
    kv_b: torch.Tensor,
    rows: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    *,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    rank: int,
    scale: float,
    interleaved: bool,
) -> torch.Tensor:
    """Causal attention of rows over their cached latents, the step's own among them; see :func:`~.mla.mla_write`.

    ``q`` is not rotated yet. ``latent`` is what the step's tokens put into the cache, before its dtype rounded it.
    """
    by: dict[str, Any] = {"heads": heads, "nope": nope, "value": value, "rank": rank}
    queries = mla.mla_absorb.reference(q, rows, kv_b, rope=rope, interleaved=interleaved, **by)
    latents, _ = mla.mla_extend_attention.reference(
        queries, cache, page_table, query_start, query_len, context_len,
        heads=heads, rank=rank, rope=rope, scale=scale, own=True,
    )  # fmt: skip
    return mla.mla_values.reference(latents, kv_b, **by)
