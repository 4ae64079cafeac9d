"""Weights of few bits: what configs mean and what is refused, what programs and parameters become."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_programs import LIMITS, LLAMA, dummy, ops, traced

from makeready.graphs.checkpoint.base import CheckpointError, open_checkpoint
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import needs
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner import compile as planner
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.quant.stored import stored_scheme
from makeready.graphs.quant.weight_only import Form, WeightOnly

CONFIG = LLAMA | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTURE = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}


def packed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    group = {"targets": ["Linear"], "weights": {**usual, **weights}, **more.pop("group", {})}
    made = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    return {**made, "config_groups": {"group_0": group}, **more}


def scheme(said: dict[str, Any]) -> WeightOnly:
    found = stored_scheme({"quantization_config": said})
    assert isinstance(found, WeightOnly)
    return found


Q = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("said", "module", "form"),
    [
        (AWQ, Q, Form(4, 64, zeros=True)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, Q, Form(4, 128, zeros=True)),
        ({**AWQ, "quant_method": "awq_marlin"}, "lm_head", None),
        ({**AWQ, "modules_to_not_convert": ["self_attn"]}, Q, None),
        (
            {**AWQ, "modules_to_not_convert": ["gate"]},
            "model.layers.0.mlp.gate_proj",
            Form(4, 64, zeros=True),
        ),
        (GPTQ, Q, Form(4, 64)),
        ({**GPTQ, "quant_method": "gptq_marlin", "group_size": -1, "bits": 8}, Q, Form(8, 0)),
        ({**GPTQ, "sym": False, "desc_act": True}, Q, Form(4, 64, zeros=True, ordered=True)),
        ({**GPTQ, "lm_head": True}, "lm_head", Form(4, 64)),
        ({**GPTQ, "modules_in_block_to_quantize": [["self_attn.k_proj"], ["mlp.up_proj"]]}, Q, None),
        ({**GPTQ, "modules_in_block_to_quantize": ["self_attn.q_proj"]}, Q, Form(4, 64)),
        ({**GPTQ, "dynamic": {r"-:.*\.3\..*": {}}}, Q, None),
        ({**GPTQ, "dynamic": {r".*\.3\..*": {"bits": 8, "desc_act": True}}}, Q, Form(8, 64, ordered=True)),
        ({**GPTQ, "dynamic": {r"+:.*\.4\..*": {"bits": 8}}}, Q, Form(4, 64)),
        (packed({}), Q, Form(4, 64)),
        (packed({"symmetric": False, "actorder": "group"}), Q, Form(4, 64, zeros=True, ordered=True)),
        (packed({"num_bits": 8, "strategy": "channel", "group_size": None}), Q, Form(8, 0)),
        (packed({"actorder": "weight"}, ignore=["re:.*self_attn.*"]), Q, None),
        (packed({}, group={"targets": ["re:.*mlp.*"]}), Q, None),
    ],
)
def test_configs_are_read(said: dict[str, Any], module: str, form: Form | None) -> None:
    assert scheme(said).of(module) == form


def test_the_first_format_of_gptq_adds_one() -> None:
    assert scheme(GPTQ).layout.plus == 1  # type: ignore[attr-defined]
    assert scheme({**GPTQ, "checkpoint_format": "gptq_v2"}).layout.plus == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({**AWQ, "version": "gemv"}, "AWQ's version 'gemv' is not supported"),
        ({**AWQ, "bits": 3}, "AWQ with 3 bits is not supported; use a checkpoint with 4"),
        (
            {**AWQ, "group_size": 16},
            "groups of 16 inputs are not supported; use a checkpoint with groups of 32",
        ),
        ({**AWQ, "group_size": "64"}, "group_size must be a whole number, not '64'"),
        ({**GPTQ, "bits": 3}, "weights of 3 bits are not supported; use a checkpoint with 4 or 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "is_marlin_format": True}, "is not supported; use a checkpoint in format 'gptq'"),
        ({**GPTQ, "sym": "yes"}, "sym must be true or false, not 'yes'"),
        ({**GPTQ, "dynamic": {"x": 3}}, "dynamic: 'x' must be an object"),
        ({**GPTQ, "dynamic": {"x": {"bits": 2}}}, "weights of 2 bits are not supported"),
        ({**GPTQ, "modules_in_block_to_quantize": [[3]]}, "must be a list of names"),
        (packed({"num_bits": 5}), "weights of 5 bits are not supported"),
        (packed({"strategy": "tensor_group"}), "strategy 'tensor_group' is not supported"),
        (packed({"actorder": "odd"}), "actorder 'odd' is not supported"),
        (packed({}, group={"input_activations": {"num_bits": 8}}), "input_activations beside pack-quantized"),
        (packed({}, group={"format": "float-quantized"}), "format 'float-quantized' is not supported"),
        (packed({}, transform_config={"a": 1}), "transform_config is not supported"),
    ],
)
def test_other_configs_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        compile_plan(dummy(CONFIG | {"quantization_config": said}), **LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said", "message"),
    [
        (MIXTURE, {**GPTQ, "desc_act": True, "group_size": 32}, "desc_act of experts is not supported"),
        (
            MIXTURE,
            {**GPTQ, "dynamic": {r"-:.*experts\.1\..*": {}}},
            "are quantized differently; use a checkpoint",
        ),
        (MIXTURE | {"moe_intermediate_size": 48}, AWQ, "outputs of an expert are no multiple of 64"),
        (
            CONFIG | {"intermediate_size": 188},
            AWQ,
            "begins or ends within 8 outputs that are stored together",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused_by_name(
    config: dict[str, Any], said: dict[str, Any], message: str
) -> None:
    with pytest.raises((PlanError, UnsupportedModelError), match=message) as caught:
        compile_plan(dummy(config | {"quantization_config": said}), **LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [None, AWQ, packed({})], ids=["int4", "awq", "packed"])
def test_projections_merge_and_fuse_as_wide_ones_do(said: dict[str, Any] | None) -> None:
    config = CONFIG | ({"quantization_config": said} if said else {})
    programs = traced(config, quant=None if said else "int4").lower().programs
    wide = traced(CONFIG).lower().programs
    for kind in (DECODE, EXTEND):
        ours = [op.replace("linear_int", "linear") for op in ops(programs[kind])]
        assert ours == ops(wide[kind])
        assert Counter(ops(programs[kind]))["linear_int"] == 4 * CONFIG["num_hidden_layers"]


def test_experts_keep_their_gate() -> None:
    programs = traced(MIXTURE, quant="int4").lower().programs
    counted = Counter(ops(programs[DECODE]))
    layers = MIXTURE["num_hidden_layers"]
    assert (counted["grouped_silu_mul_int"], counted["grouped_linear_int"]) == (layers, layers)
    assert counted["linear"] == layers + 1  # routers, and the head


def test_ordered_inputs_are_put_in_order_and_do_not_merge() -> None:
    said = {**GPTQ, "desc_act": True}
    config = CONFIG | {"quantization_config": said}
    program = traced_of_files(config).programs[DECODE]
    counted = Counter(ops(program))
    assert counted["gather_columns"] == counted["linear_int"] == 7 * CONFIG["num_hidden_layers"]


def traced_of_files(config: dict[str, Any]) -> Any:
    """Traced without a look at the tensors, whose orders a dummy does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_check_sources", lambda params, checkpoint: None)
        return traced(config).lower()


def test_memory_is_what_is_packed() -> None:
    """4 bits a weight, 16 a scale, 8 a zero; and a plan's bytes are the same again."""
    plan = compile_plan(dummy(CONFIG | {"quantization_config": AWQ}), **LIMITS)
    weights = sum(
        CONFIG["num_hidden_layers"] * n * k
        for n, k in ((128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 256))
    )  # down's 192 inputs are two spans
    by_dtype = plan.memory_analysis()["weights_by_dtype"]
    assert by_dtype["int16"] == weights // 2
    scales = CONFIG["num_hidden_layers"] * (2 * (128 + 64 + 64 + 128 + 192 + 192) + 3 * 128)
    assert by_dtype["float16"] == 2 * scales
    assert by_dtype["uint8"] == scales


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        artifact.save(compile_plan(dummy(CONFIG | {"quantization_config": AWQ}), **LIMITS), tmp_path / name)
    one, other = ((tmp_path / name / "plan.json").read_bytes() for name in ("one", "other"))
    assert one == other


def test_quantized_checkpoints_are_not_quantized_again() -> None:
    with pytest.raises(PlanError, match="is quantized already; leave quant out"):
        compile_plan(dummy(CONFIG | {"quantization_config": AWQ}), quant="int4", **LIMITS)


@pytest.mark.parametrize(
    ("tensor", "values", "message"),
    [
        ("g_idx", [1, 0], "but its config does not say that inputs are in another order; set desc_act"),
        ("qzeros", [0x55555555, 0x77777777], "but its config says that weights are symmetric; set sym"),
        ("bias", [0.5, 0.0], "which its config leaves out"),
        ("g_idx", [0, 1], ""),
        ("qzeros", [0x77777777, 0x77777777], ""),
        ("bias", [0.0, 0.0], ""),
    ],
)
def test_what_is_not_read_is_as_the_config_says(
    tensor: str, values: list[float], message: str, tmp_path: Path
) -> None:
    config = CONFIG | {"quantization_config": GPTQ}
    wanted: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_check_sources", lambda params, checkpoint: wanted.update(needs(params)))
        traced(config)
    tensors = {
        name: torch.zeros(need.shape, dtype=torch.int32 if "int32" in need.dtypes else torch.float32)
        for name, need in wanted.items()
    }
    dtype = torch.float32 if tensor == "bias" else torch.int32
    tensors[f"model.layers.0.mlp.up_proj.{tensor}"] = torch.tensor(values, dtype=dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not message:
            compile_plan(open_checkpoint(tmp_path), **LIMITS)
            return
        with pytest.raises(CheckpointError, match=message):
            compile_plan(open_checkpoint(tmp_path), **LIMITS)
