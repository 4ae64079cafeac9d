"""Tiny plans to inspect: a Llama of random weights, and its shapes worked out by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.plan.plan import Plan
from makeready.graphs.planner.compile import Request, compile_plan, trace_checkpoint

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD, VOCABULARY, CONTEXT = 3, 48, 80, 6, 2, 8, 101, 96
ROWS, TOKENS, PAGE = 5, 24, 4

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
}

QKV = ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)
OUT, GATE_UP, DOWN = (HIDDEN, HEADS * HEAD), (2 * MLP, HIDDEN), (HIDDEN, MLP)
HEAD_MATRIX = (VOCABULARY, HIDDEN)
PARAMETERS = (
    2 * VOCABULARY * HIDDEN
    + HIDDEN
    + LAYERS * (sum(n * k for n, k in (QKV, OUT, GATE_UP, DOWN)) + 2 * HIDDEN)
)


def request(**fields: Any) -> Request:
    return Request(**{"max_rows": ROWS, "max_tokens": TOKENS, "page_size": PAGE, **fields})


def make_plan(config: dict[str, Any] | None = None, **fields: Any) -> Plan:
    checkpoint = open_checkpoint("dummy", config={**CONFIG, **(config or {})})
    return compile_plan(checkpoint, request(**fields))


@cache
def tiny() -> Plan:
    return make_plan(max_decode_buckets=3, max_extend_buckets=9)


def lowered():
    return trace_checkpoint(open_checkpoint("dummy", config=CONFIG), request()).lower()
