"""KV caches with scales in plans: names, tensors, programs, costs, and what is refused."""

from __future__ import annotations

import pytest
from tiny_programs import LIMITS, LLAMA, dummy, ops, traced

from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.graphs.planner.compile import compile_plan, trace_checkpoint
from makeready.graphs.planner.cost import call_cost
from makeready.graphs.planner.request import Request

LAYERS, HEADS, SIZE = LLAMA["num_hidden_layers"], LLAMA["num_key_value_heads"], LLAMA["head_dim"]
LATENT = {
    **{k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")},
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
# name → dtype, bytes of a token and head: two rows of numbers and their scales
KINDS = {
    "int8_per_token_head": ("int8", 2 * SIZE + 4),
    "fp8_per_token_head": ("float8_e4m3fn", 2 * SIZE + 4),
    "int4_per_token_head": ("uint8", SIZE + 8),
}


@pytest.mark.parametrize(
    ("asked", "name"),
    [*zip(KINDS, KINDS, strict=True), ("int8", "int8_per_token_head"), ("int4", "int4_per_token_head")],
)
def test_a_layer_has_numbers_and_scales(asked: str, name: str) -> None:
    plan = compile_plan(dummy(), **LIMITS, kv_dtype=asked)
    dtype, nbytes = KINDS[name]
    assert plan.options.kv_dtype == name
    assert plan.kv.token_bytes == LAYERS * HEADS * nbytes
    (group,) = plan.kv.groups
    assert [(p.name, p.dtype) for p in group.parts[:3]] == [
        ("layers.0.k", dtype),
        ("layers.0.v", dtype),
        ("layers.0.scales", "float16"),
    ]


@pytest.mark.parametrize("disabled", [(), ("fuse_qkv",)])
@pytest.mark.parametrize("phase", [DECODE, EXTEND])
def test_programs_write_and_read_them(phase: str, disabled: tuple[str, ...]) -> None:
    lowered = traced(kv_dtype="int4", disabled_passes=disabled).lower()
    made = ops(lowered.programs[phase])
    write = "kv_write_scaled" if disabled else "norm_rope_kv_write_scaled"
    assert made.count(write) == made.count(f"{phase}_attention_scaled") == LAYERS
    assert not {"kv_write", "norm_rope_kv_write", f"{phase}_attention"} & set(made)


@pytest.mark.parametrize("name", KINDS)
def test_costs_count_bytes_of_scales(name: str) -> None:
    """A decode step of 3 rows reads 1,000 tokens of each, besides queries, results, page table and lengths."""
    lowered = traced(kv_dtype=name).lower()
    program, target = lowered.programs[DECODE], lowered.traced.target
    (call, *_) = (c for c in program.calls if c.op == "decode_attention_scaled")
    both = {
        context: call_cost(program, call, Bucket(DECODE, 3, 3), context, target).nbytes
        for context in (0, 1000)
    }
    assert both[1000] - both[0] == 3 * 1000 * HEADS * KINDS[name][1]
    (write, *_) = (c for c in program.calls if c.op == "norm_rope_kv_write_scaled")
    one, other = (
        call_cost(program, write, Bucket(DECODE, n, n), 0, target).nbytes
        - n
        * sum(
            program.spec(v).nbytes({"R": 1, "T": 1, "P": 0})
            for k, v in write.operands.items()
            if k in ("qkv", "rows", "kv_slot")
        )
        - n * program.spec(write.result).nbytes({"R": 1, "T": 1})
        for n in (1, 5)
    )
    assert other - one == 4 * HEADS * KINDS[name][1]


def test_latents_have_no_heads() -> None:
    """In 8 bits a token has its numbers, what turns in the activations' dtype, and one scale."""
    plan = compile_plan(dummy(LATENT), **LIMITS, kv_dtype="int8")
    rank, rope = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
    (group,) = plan.kv.groups
    assert [(p.name, p.dtype, p.page_shape[1:]) for p in group.parts[:3]] == [
        ("layers.0.latent", "int8", (rank,)),
        ("layers.0.rope", "float32", (rope,)),
        ("layers.0.scales", "float32", (1,)),
    ]
    assert plan.kv.token_bytes == len(group.parts) / 3 * (rank + 4 * rope + 4)
    with pytest.raises(
        UnsupportedModelError, match=r"this model caches latents; choose kv\.dtype=int8_per_token"
    ):
        compile_plan(dummy(LATENT), **LIMITS, kv_dtype="int4")


def test_a_target_without_8_bit_floats_has_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("makeready.graphs.planner.compile._discover", lambda target: None)
    for name in ("int8", "int4"):
        lowered = trace_checkpoint(dummy(), Request(target="sm_80", kv_dtype=name, max_rows=2)).lower()
        assert "decode_attention_scaled" in ops(lowered.programs[DECODE])
    with pytest.raises(PlanError, match=r"kv\.dtype=fp8_per_token_head needs 8-bit floats, which sm_80"):
        trace_checkpoint(dummy(), Request(target="sm_80", kv_dtype="fp8_per_token_head", max_rows=2))
