"""What pages say of mixtures of experts: bytes by arithmetic, expectations beside simulated routers."""

from __future__ import annotations

import pytest
import torch

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.inspect.experts import mixtures, spread
from makeready.graphs.plan.plan import Plan
from makeready.graphs.planner.compile import compile_plan

CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "mlp_only_layers": [1],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_plan(**options: object) -> Plan:
    return compile_plan(open_checkpoint("dummy", config=CONFIG), max_rows=4, **options)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_experts(dtype, size):
    (found,) = mixtures(make_plan(weight_dtype=dtype))
    assert (found.layers, found.experts, found.top_k) == (3, 12, 3)
    assert found.nbytes == pytest.approx(3 * 24 * 32 * size, rel=0.02)  # parameters begin aligned
    assert [len(found.products[phase]) for phase in ("decode", "extend")] == [2, 2]


def test_a_dense_model_has_none():
    dense = {**CONFIG, "mlp_only_layers": [0, 1, 2, 3]}
    assert mixtures(compile_plan(open_checkpoint("dummy", config=dense), max_rows=4)) == []


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 8, 2), (7, 60, 4), (64, 128, 8), (300, 8, 8), (40, 5, 1)]
)
def test_expectations_are_those_of_simulated_routers(tokens, experts, top_k):
    torch.manual_seed(0)
    chosen = torch.rand(400, tokens, experts).argsort(-1)[..., :top_k].flatten(1)
    counts = torch.stack([torch.bincount(one, minlength=experts) for one in chosen]).float()
    found = spread(tokens, experts, top_k)
    assert found.entries == tokens * top_k
    assert found.hit == pytest.approx((counts > 0).sum(1).float().mean().item(), rel=0.03)
    assert found.largest == pytest.approx(counts.amax(1).mean().item(), rel=0.05)
    assert found.worst == tokens


def test_text_shows_them():
    text = make_plan().as_text()
    assert "Experts of 3 layers: 12 of" in text
    assert "largest~" in text
    assert all(len(line) <= 130 for line in text.splitlines())
