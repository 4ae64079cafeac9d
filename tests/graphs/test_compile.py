"""Compiling: what cannot be planned for is refused in one sentence that says what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_programs import LIMITS, LLAMA, QWEN2, QWEN3, dummy, traced

from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.passes import REWRITES
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND, INPUT_LOGPROBS, Bucket
from makeready.graphs.planner.compile import Request, compile_plan, trace_checkpoint
from makeready.kernels.spec import DTYPE_BYTES, TensorSpec

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: value}, PlanError, rf"plan\.{name}={value} must be a whole number of at least 1")
        for name in ("max_rows", "max_tokens", "context_len", "page_size")
        for value in (0, -1, 2.5, "8", True)
    ),
    *(
        ({name: value}, PlanError, rf"plan\.{name}={value} must be")
        for name in ("max_decode_buckets", "max_extend_buckets")
        for value in (0, -3, 1.5)
    ),
    ({"max_rows": "8", "max_tokens": None}, PlanError, r"plan\.max_rows=8 must be a whole number"),
    ({"traffic": Traffic(decode_rows={2: -1.0})}, PlanError, "size 2 the weight -1.0; weights are"),
    ({"traffic": Traffic(extend_rows={2: float("nan")})}, PlanError, "size 2 the weight nan; weights are"),
    ({"context_len": 65}, PlanError, r"plan\.context_len=65 is beyond the 64 tokens .* lower it to 64"),
    ({"max_rows": 17}, PlanError, r"steps of 16 tokens are below 17 rows.*raise plan\.max_tokens"),
    ({"target": "sm_35"}, ValueError, "target 'sm_35' is not built yet; targets are cpu"),
    ({"weight_dtype": "int3"}, PlanError, r"plan\.weight_dtype=int3 is not supported; choose one of float32"),
    (
        {"activation_dtype": "float16"},
        PlanError,
        r"plan\.activation_dtype=float16 is not supported; choose .* float32",
    ),
    ({"kv_dtype": "int3"}, PlanError, r"kv\.dtype=int3 is not supported; choose one of float32"),
    (
        {"disabled_passes": ("fuse_all",)},
        ValueError,
        "no pass 'fuse_all' to disable; passes are merge_linears",
    ),
    ({"traffic": Traffic(decode_rows={5: 1.0})}, PlanError, "a size of 5; sizes go from 1 to 4"),
    ({"traffic": Traffic(extend_tokens={0: 1.0})}, PlanError, "a size of 0; sizes go from 1 to 16"),
]


@pytest.mark.parametrize(
    ("request_", "error", "message"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_impossible_requests_are_refused(request_, error, message):
    with pytest.raises(error, match=message) as caught:
        compile_plan(dummy(), **(LIMITS | request_))
    assert "\n" not in str(caught.value)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="max_roows"):
        compile_plan(dummy(), max_roows=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LLAMA | {"architectures": ["BertModel"]},
            r"architecture BertModel is not supported; supported are .*LlamaForCausalLM",
        ),
        (
            LLAMA | {"quantization_config": {"quant_method": "hqq"}},
            "quantized with hqq are not supported; use",
        ),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_unsupported_models_are_refused(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        compile_plan(dummy(config), **LIMITS)


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_tensors_that_the_config_contradicts_are_named(tmp_path):
    made = traced()
    shapes = {p.pieces[0].source: p.spec.shape for p in made.programs[EXTEND].params.values() if p.pieces}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    assert compile_plan(write_checkpoint(tmp_path / "sound", tensors), **LIMITS)

    up = "model.layers.1.mlp.up_proj.weight"
    folder = write_checkpoint(tmp_path / "lacking", {k: v for k, v in tensors.items() if k != up})
    with pytest.raises(PlanError, match=f"checkpoint {folder} lacks the tensor {up}; is it complete"):
        compile_plan(folder, **LIMITS)
    folder = write_checkpoint(tmp_path / "other", tensors | {up: np.zeros((36, 25), np.float32)})
    with pytest.raises(
        PlanError, match=rf"{up} of {folder} is \[36, 25\], the config implies \[36, 24\]; config.json"
    ):
        compile_plan(folder, **LIMITS)
    norm = "model.norm.weight"
    folder = write_checkpoint(tmp_path / "norm", tensors | {norm: np.zeros((1, 24), np.float32)})
    with pytest.raises(PlanError, match=rf"{norm} of {folder} is \[1, 24\], the config implies \[24\]"):
        compile_plan(folder, **LIMITS)


def test_the_defaults_are_the_models_and_the_targets():
    plan = compile_plan(dummy(), max_rows=2)
    assert plan.limits.context_len == LLAMA["max_position_embeddings"]
    assert plan.options.weight_dtype == "float32"  # the config's
    assert plan.target == "cpu"
    assert plan.limits.max_tokens >= plan.limits.max_rows == 2
    assert compile_plan(dummy(LLAMA | {"dtype": "bfloat16"})).options.weight_dtype == "bfloat16"
    assert compile_plan(dummy(), max_rows=3000).limits.max_tokens == 3000
    # Dynamic scaling reaches beyond the config's positions, by its factor and no more.
    assert compile_plan(dummy(QWEN3)).limits.context_len == 128
    with pytest.raises(PlanError, match="beyond the 128 tokens"):
        compile_plan(dummy(QWEN3), context_len=129)


YARN = {"type": "yarn", "factor": 4.0}
SCALED: list[tuple[str, int, dict[str, Any], int]] = [
    # Qwen2.5's card: this goes into config.json for 131,072 tokens.
    ("qwen2.5", 32768, {**YARN, "original_max_position_embeddings": 32768}, 131072),
    # Qwen3's card: as well, beside positions that leave room for an answer.
    ("qwen3", 40960, {**YARN, "original_max_position_embeddings": 32768}, 131072),
    ("without the original", 32768, YARN, 131072),
    # DeepSeek-V3 states the scaled positions: 40 * 4096.
    ("deepseek", 163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
    # The factor follows from both lengths, and 100000 / 30000 * 30000 is no whole number in floats.
    ("no factor", 100000, {"type": "yarn", "original_max_position_embeddings": 30000}, 100000),
    # vicuna-7b-v1.5-16k.
    ("linear", 4096, {"type": "linear", "factor": 4.0}, 16384),
    ("dynamic", 4096, {"type": "dynamic", "factor": 2.0}, 8192),
    # Llama 3.1 states the scaled positions: 128 Ki, 16 times the original.
    (
        "llama3",
        131072,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
    ),
]


@pytest.mark.parametrize(
    ("positions", "scaling", "context"), [c[1:] for c in SCALED], ids=[c[0] for c in SCALED]
)
def test_the_context_is_the_scaled_one(positions, scaling, context):
    """The lengths that model cards state, and vLLM derives."""
    config = {k: v for k, v in LLAMA.items() if k != "rope_parameters"}
    config |= {"max_position_embeddings": positions, "rope_scaling": scaling}
    assert traced(config, context_len=None).limits.context_len == context
    with pytest.raises(PlanError, match=f"beyond the {context} tokens"):
        traced(config, context_len=context + 1)


@pytest.mark.parametrize("dtype", [np.float64, np.bool_, np.int64, np.uint16], ids=str)
def test_tensors_that_nothing_reads_have_no_say_in_the_dtype(dtype, tmp_path):
    checkpoint = dummy()
    compile_plan(checkpoint, **LIMITS)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    unread = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, dtype)}
    folder = write_checkpoint(tmp_path, {**tensors, **unread}, dtype="bfloat16")
    asked = {k: v for k, v in LIMITS.items() if k != "weight_dtype"}
    assert compile_plan(folder, **asked).options.weight_dtype == "bfloat16"


def test_a_plan_says_what_was_asked():
    traffic = Traffic(decode_rows={2: 1.0}, context=9)
    request = Request(
        max_rows=3, max_tokens=11, context_len=33, page_size=5, weight_dtype="float16", kv_dtype="bfloat16",
        disabled_passes=("hoist_gather", "fuse_qkv", "hoist_gather"), max_decode_buckets=2, traffic=traffic,
    )  # fmt: skip
    plan = compile_plan(dummy(), request, max_extend_buckets=3)
    limits, options = plan.limits, plan.options
    assert (limits.max_rows, limits.max_tokens, limits.context_len, limits.page_size) == (3, 11, 33, 5)
    assert (options.weight_dtype, options.kv_dtype) == ("float16", "bfloat16")
    assert options.disabled_passes == ("fuse_qkv", "hoist_gather")
    assert options.traffic["context"] == 9
    assert {part.spec for part in plan.kv.parts} == {TensorSpec(("P", 5, 1, 8), "bfloat16")}
    assert Bucket(DECODE, 2, 2) in plan.buckets
    assert sum(b.phase == EXTEND for b in plan.buckets) <= 3
    ops = {launch.op for program in plan.programs.values() for launch in program.launches}
    assert {"rope", "kv_write"} <= ops
    assert "norm_rope_kv_write" not in ops


@pytest.mark.parametrize("config", [LLAMA, QWEN2 | {"dtype": "bfloat16"}, QWEN3])
def test_every_byte_is_named(config):
    """Regions are as large as what lies in them, weights do not overlap, launches name only what exists."""
    plan = compile_plan(dummy(config), max_rows=4, max_tokens=16, max_logprob_tokens=8)
    assert tuple(plan.programs) == tuple(plan.steps) == (DECODE, EXTEND, INPUT_LOGPROBS)
    end = 0
    for weight in plan.weights:
        assert weight.offset >= end
        assert weight.nbytes == np.prod(weight.param.spec.shape) * DTYPE_BYTES[weight.param.spec.dtype]
        end = weight.offset + weight.nbytes
    assert end <= plan.memory.weights < end + 256
    names = {weight.param.name for weight in plan.weights}
    assert len(names) == len(plan.weights)
    for phase, step in plan.steps.items():
        used = set()
        for launch in plan.programs[phase].launches:
            for name in (*launch.operands.values(), *launch.results.values()):
                plan.spec(phase, name)
                used.add(name)
        assert {field.name for field in (*step.staged, *step.results)} <= used
        names -= used
        most = max((b for b in plan.buckets if b.phase == phase), key=lambda b: b.tokens)
        for buffer in plan.programs[phase].buffers.values():
            assert buffer.offset < plan.memory.arena
            if buffer.row_stride is None:
                assert buffer.offset + buffer.spec.nbytes(most.sizes) <= plan.memory.arena
    assert not names, "a weight that no launch reads"
    pages = plan.pages_in(plan.memory.fixed + 5 * plan.kv.page_bytes)
    assert pages == 5
    with pytest.raises(PlanError, match="too little"):
        plan.pages_in(plan.memory.fixed + plan.kv.page_bytes)


def test_stages_can_be_looked_at():
    made = trace_checkpoint(dummy(), Request(**LIMITS))
    assert made.as_text().count("= paged_attention(") == 4
    lowered = made.lower()
    assert lowered.as_text().count("= decode_attention(") == 2
    assert lowered.as_text().count("= extend_attention(") == 2
    small, large = (lowered.cost_analysis(Bucket(EXTEND, 4, tokens)) for tokens in (4, 16))
    assert 0 < small.flops < large.flops
    assert 0 < small.nbytes < large.nbytes
    assert 0 < small.seconds < large.seconds
    stages: list[str] = []
    assert compile_plan(dummy(), progress=stages.append, **LIMITS) == lowered.compile()
    assert stages == ["trace", "lower", "compile"]


def test_costs_are_those_of_the_model():
    """Two operations a weight and token, and every weight read once."""
    made = traced(LLAMA, disabled_passes=tuple(REWRITES)).lower()
    hidden, inner, layers, vocabulary, queries, keys = 24, 36, 2, 61, 24, 8
    matrices = layers * (2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner) + hidden * vocabulary
    cost = made.cost_analysis(Bucket(DECODE, 1, 1))
    more = made.cost_analysis(Bucket(DECODE, 3, 3))
    context = made.traced.traffic.context
    attention = layers * 4 * context * queries
    assert 2 * matrices + attention < cost.flops < 1.2 * (2 * matrices + attention) + 8 * vocabulary * 2
    cached = layers * 2 * context * keys * 4
    assert 4 * matrices + cached < cost.nbytes
    assert more.flops == pytest.approx(3 * cost.flops)
    assert more.nbytes - cost.nbytes < 2 * (cost.nbytes - 4 * matrices) + 1


@pytest.mark.parametrize(
    ("tied", "dtype", "count"), [(True, "float32", 1), (True, "bfloat16", 2), (False, "float32", 2)]
)
def test_a_tied_head_is_stored_once_unless_its_kernel_wants_another_layout(tied, dtype, count):
    checkpoint = dummy({**LLAMA, "tie_word_embeddings": tied})
    plan = compile_plan(checkpoint, **(LIMITS | {"weight_dtype": dtype}))
    shape = plan.config["vocab_size"], plan.config["hidden_size"]
    stored = [w for w in plan.weights if w.param.spec.shape == shape]
    assert len(stored) == count
    for program in plan.programs.values():
        used = {
            launch.operands["weight"] for launch in program.launches if launch.op in ("embedding", "linear")
        }
        assert {w.param.name for w in stored} <= used
