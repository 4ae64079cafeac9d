"""Memory and costs of a Qwen3 with tied embeddings in bf16, whose last extend layer sees one token a row."""

from __future__ import annotations

import math
from typing import Any

import pytest

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.inspect.analysis import cost_analysis, launch_costs, memory_analysis
from makeready.graphs.plan.plan import Plan
from makeready.graphs.planner.compile import compile_plan

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, DIM, VOCABULARY = 3, 48, 80, 6, 2, 8, 67
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
ROWS, TOKENS, PAGE = 4, 24, 8


@pytest.fixture(scope="module")
def plan() -> Plan:
    checkpoint = open_checkpoint("dummy", config=CONFIG)
    return compile_plan(
        checkpoint,
        max_rows=ROWS,
        max_tokens=TOKENS,
        page_size=PAGE,
        max_decode_buckets=2,
        max_extend_buckets=6,
    )


def matrix_elements() -> int:
    per_layer = HIDDEN * DIM * (HEADS + 2 * KV_HEADS) + HIDDEN * DIM * HEADS + 3 * HIDDEN * MLP
    return LAYERS * per_layer + VOCABULARY * HIDDEN


def vector_elements() -> int:
    return LAYERS * (2 * HIDDEN + 2 * DIM) + HIDDEN


def test_memory_is_the_models_arithmetic(plan: Plan) -> None:
    memory = memory_analysis(plan)
    assert memory["parameters"] == matrix_elements() + vector_elements()
    assert memory["stored_twice"] == 2 * VOCABULARY * HIDDEN  # the tied head is packed, the embedding is not
    assert memory["generated"] == 4 * 64 * DIM  # rotary rows, fp32
    by_dtype = memory["weights_by_dtype"]
    assert by_dtype["bfloat16"] == 2 * (matrix_elements() + VOCABULARY * HIDDEN)
    assert by_dtype["float32"] == 4 * vector_elements() + memory["generated"]
    page = LAYERS * 2 * KV_HEADS * DIM * PAGE * 4
    assert memory["kv"]["page_bytes"] == page
    assert memory["kv"]["full_bytes"] == (ROWS * 64 // PAGE + 1) * page
    tokens = memory["capacity"][1]["tokens"]
    assert (tokens // PAGE + 1) * page <= 2**30 - memory["fixed"] < (tokens // PAGE + 2) * page


def test_linear_costs_are_two_operations_a_weight(plan: Plan) -> None:
    for bucket in plan.buckets:
        costs = [c for c in launch_costs(plan, bucket, context=16) if c.op == "linear"]
        last = bucket.rows  # the head, and the last layer behind its attention, see one token a row
        per_token = (LAYERS - 1) * (matrix_elements() - VOCABULARY * HIDDEN) // LAYERS
        per_token += HIDDEN * DIM * (HEADS + 2 * KV_HEADS)
        per_row = HIDDEN * DIM * HEADS + 3 * HIDDEN * MLP + VOCABULARY * HIDDEN
        assert math.fsum(c.flops for c in costs) == 2 * (bucket.tokens * per_token + last * per_row)


def test_step_costs_add_up_and_grow_with_the_bucket(plan: Plan) -> None:
    costs = cost_analysis(plan, context=16)
    for bucket, cost in costs.items():
        assert cost["seconds"] == pytest.approx(sum(c.seconds for c in launch_costs(plan, bucket, 16)))
        for other, less in costs.items():
            if other.phase == bucket.phase and bucket.covers(other.rows, other.tokens):
                assert less["nbytes"] <= cost["nbytes"]
                assert less["flops"] <= cost["flops"]
