"""Programs of models with latent attention, at the sizes of DeepSeek-V3, and configs that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_programs import LLAMA, dummy, traced

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import Lowered, Request, trace_checkpoint
from makeready.graphs.planner.ir import Call
from makeready.kernels import registry

registry.discover()
PRESETS = Path(__file__).parents[2] / "conf" / "model"
ATTENTION = ("mla_", "merge_attention")


def lowered(name: str, monkeypatch: pytest.MonkeyPatch, *, layers: int, **request: Any) -> Lowered:
    """The preset ``name`` with fewer layers, for a GPU whose kernels need not be there."""
    monkeypatch.setattr("makeready.graphs.planner.compile._discover", lambda target: None)
    config = yaml.safe_load((PRESETS / f"{name}.yaml").read_text()) | {"num_hidden_layers": layers}
    request = {"target": "sm_90a", "max_rows": 32, "max_tokens": 512, **request}
    return trace_checkpoint(dummy(config), Request(**request)).lower()


def attention(calls: tuple[Call, ...]) -> list[str]:
    return [call.op for call in calls if call.op.startswith(ATTENTION)]


DECODES = ["mla_write", "mla_absorb", "mla_decode_attention", "mla_values"]
EXTENDS = ["mla_write", "mla_rope", "mla_own_attention", "mla_absorb", "mla_extend_attention", "mla_values"]
EXTENDS += ["merge_attention"]


def test_each_kind_of_step_has_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lowered("deepseek_v3", monkeypatch, layers=4)
    assert attention(made.programs[DECODE].calls) == DECODES * 4
    assert attention(made.programs[EXTEND].calls) == EXTENDS * 4


def test_deterministic_steps_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lowered("deepseek_v3", monkeypatch, layers=1, deterministic=True)
    form = ["mla_write", "mla_absorb", "mla_extend_attention", "mla_values"]
    assert attention(made.programs[DECODE].calls) == attention(made.programs[EXTEND].calls) == form


def test_weights_of_8_bit_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """576 rows end within a block and are merged behind whole ones; what makes keys and values is made wide."""
    params = lowered("deepseek_v3", monkeypatch, layers=1).programs[DECODE].params
    name = "layers.0.attention."
    merged, scale = params[f"{name}q_a+kv_a.weight"], params[f"{name}q_a+kv_a.weight_scale"]
    assert (merged.spec.shape, merged.spec.dtype) == ((1536 + 576, 7168), "float8_e4m3fn")
    assert scale.spec.shape == (17, 56)
    kv_b = params[f"{name}kv_b"]
    assert (kv_b.spec.shape, kv_b.spec.dtype) == ((128 * 256, 512), "bfloat16")
    assert kv_b.derived is not None
    assert [call.op for call in kv_b.derived.by.calls] == ["dequantize_fp8_block"]
    assert kv_b.derived.by.units == 256


@pytest.mark.parametrize("quant", ["fp8", "fp8_block"])
def test_quantizing_when_loaded_leaves_them_wide(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = lowered("deepseek_v2_lite", monkeypatch, layers=1, quant=quant).programs[DECODE].params
    assert params["layers.0.attention.kv_b"].spec.dtype == "bfloat16"
    assert params["layers.0.attention.kv_b"].pieces
    assert params["layers.0.attention.q.weight"].spec.dtype == "float8_e4m3fn"
    assert params["layers.0.attention.kv_a.weight"].spec.shape == (576, 2048)
    # 10,944 inputs are no whole blocks.
    wide = 11008 if quant == "fp8_block" else 10944
    assert params["layers.0.mlp.down.weight"].spec.shape == (2048, wide)


@pytest.mark.parametrize(("dtype", "nbytes"), [("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_a_token_keeps_a_latent_a_layer(dtype: str, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = lowered("deepseek_v3", monkeypatch, layers=2, kv_dtype=dtype).traced.kv
    assert kv.token_bytes == 2 * 576 * nbytes
    assert [part.name for part in kv.parts] == ["layers.0.latent", "layers.1.latent"]


SMALL = LLAMA | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
}
V2 = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index_topk": 2048}, UnsupportedModelError, r"sparse attention \(DSA, DeepSeek-V3.2\) is not supp"),
        ({"topk_method": "best"}, UnsupportedModelError, "topk_method 'best' is not supported; use a mod"),
        ({"scoring_func": "sqrt"}, UnsupportedModelError, "scoring_func 'sqrt' is not supported; use a m"),
        ({"n_group": 3}, CheckpointError, "n_group 3 does not cut 8 experts into groups of at least 2"),
        ({"n_group": 8}, CheckpointError, "n_group 8 does not cut 8 experts into groups of at least 2"),
        ({"topk_group": 1}, CheckpointError, "topk_group 1 of 4 groups leaves no 3 experts to choose from"),
        ({"topk_group": 5}, CheckpointError, "topk_group 5 of 4 groups leaves no 3 experts"),
        ({"q_lora_rank": 0}, CheckpointError, "q_lora_rank must be an integer from 1 to 65536, not 0"),
        ({"v_head_dim": "x"}, CheckpointError, "v_head_dim must be an integer from 1 to 65536, not 'x'"),
        ({"qk_rope_head_dim": 7}, CheckpointError, "qk_rope_head_dim must be a positive even integer, not 7"),
        ({"first_k_dense_replace": -1}, CheckpointError, "first_k_dense_replace must be an integer of at le"),
        (
            V2 | {"norm_topk_prob": True, "routed_scaling_factor": 2.0},
            UnsupportedModelError,
            "norm_topk_prob with a routed_scaling_factor is read in two ways",
        ),
        (
            {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]},
            UnsupportedModelError,
            "architecture DeepseekV32ForCausalLM is not supported",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_computed_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    traced(SMALL)
    with pytest.raises(error, match=message) as caught:
        traced(SMALL | changes)
    assert "\n" not in str(caught.value)
