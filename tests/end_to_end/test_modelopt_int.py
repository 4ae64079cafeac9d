"""Integers of NVIDIA's Model Optimizer (W4A16_AWQ, W8A8_SQ_PER_CHANNEL) against transformers models of their numbers.

Files are written element by element from the format's definition; scaled activations are hooks of the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float4_models import MIXTURE, PLAN, SMALL, Made, change, check, rewrite
from reference import Recorder, expected, make_model, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.plan.plan import PlanError

Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]


def factors(name: str, width: int) -> torch.Tensor:
    """What activations are scaled by: alike in projections of one input, as the exporter leaves them."""
    kind = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
    seed = kind[name.rpartition(".")[2]] + 10 * int(name.split(".")[2])
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) * 3 + 0.2


def hooked(model: Any, name: str, hook: Hook) -> None:
    model.get_submodule(name).register_forward_pre_hook(hook)


def in_pairs(q: torch.Tensor) -> torch.Tensor:
    """``[N, K]`` from -8 to 7 as bytes ``[N / 2, K]``: an output in the lower bits, the next in the upper ones."""
    low, high = (q[at::2].numpy().astype(np.int64) & 15 for at in (0, 1))
    return torch.from_numpy((low | high << 4).astype(np.uint8))


def save_awq(folder: Path, model: Any, group: int, scaled: tuple[str, ...], *, half: bool) -> Made:
    """As exported: what norms are ahead of has no factors any more.

    Args:
        scaled: ends of names of modules with factors.
        half: scales are such that fp16 has them.
    """
    made: Made = {}

    def one(name: str, weight: torch.Tensor) -> torch.Tensor:
        by = factors(name, weight.shape[1]) if name.endswith(scaled) else torch.ones(weight.shape[1])
        grouped = (weight / by).unflatten(1, (-1, group))
        scale = grouped.abs().amax(-1) / 7
        scale = scale.half().float() if half else scale
        q = (grouped / scale[..., None]).round().clamp(-8, 7)
        made[f"{name}.weight"], made[f"{name}.weight_scale"] = in_pairs(q.flatten(1)), scale
        if name.endswith(scaled):
            made[f"{name}.pre_quant_scale"] = by
        return (q * scale[..., None]).flatten(1) * by  # the same product, in fp32

    made |= change(model, one) | made
    said = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": group}
    said |= {"has_zero_point": False, "pre_quant_scale": True, "exclude_modules": ["lm_head", "*.mlp.gate"]}
    rewrite(
        folder,
        made,
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head", "*.mlp.gate"]},
    )
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": said}))
    return made


def ops(llm: LLM) -> Counter[str]:
    return Counter(launch.op for launch in llm.plan.programs["decode"].launches)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_awq(family: str, group: int, tmp_path: Path) -> None:
    """The size of groups is in modelopt's own file alone, as older ones have it."""
    model = make_model(tmp_path, family, **SMALL | {"intermediate_size": 256})
    save_awq(tmp_path, model, group, ("o_proj", "down_proj"), half=True)
    found = ops(check(tmp_path, model))
    # Two layers, of each: q, k and v, what attention gives, gate and up, down.
    assert (found["linear_int"], found["scale_columns"], found["linear"]) == (2 * 4, 2 * 2, 1)


def test_awq_rounds_scales_to_fp16(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", **SMALL | {"intermediate_size": 256})
    save_awq(tmp_path, model, 128, ("proj",), half=False)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    assert ops(recorder.llm)["linear_int"] == 2 * 7  # factors of each are its own as far as a plan knows
    for length in (1, 9, 30):
        prompt = prompt_of(length, 131)
        (ours,), theirs = recorder.generate([prompt], 1), expected(model, prompt, 1)
        assert np.abs(ours.logits[0] - theirs.logits[0]).max() <= 3e-3 * np.abs(theirs.logits[0]).max()


def test_awq_of_experts(tmp_path: Path) -> None:
    """They are read where they have no factors."""
    model = make_model(tmp_path, "qwen3_moe", **MIXTURE)
    save_awq(tmp_path, model, 32, ("o_proj",), half=True)
    found = ops(check(tmp_path, model))
    assert (found["grouped_silu_mul_int"], found["scale_columns"]) == (2, 2)


def test_experts_with_factors_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3_moe", **MIXTURE)
    save_awq(tmp_path, model, 32, ("down_proj",), half=True)
    with pytest.raises(
        PlanError, match=r"experts\.\d+\.down_proj has pre_quant_scale and is no projection by itself"
    ):
        LLM(tmp_path, **PLAN)


def test_factors_that_no_config_says_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", **SMALL)
    name = "model.layers.1.mlp.down_proj"
    made: Made = {f"{name}.pre_quant_scale": factors(name, SMALL["intermediate_size"])}
    rewrite(tmp_path, made, {})
    with pytest.raises(CheckpointError, match="names no quantization that has pre_quant_scale"):
        LLM(tmp_path, **PLAN)


def save_sq(folder: Path, model: Any, layers: dict[str, Any] | None = None) -> None:
    """SmoothQuant as exported: every projection has factors and one scale of its activations."""
    made: Made = {}

    def one(name: str, weight: torch.Tensor) -> torch.Tensor:
        by, step = factors(name, weight.shape[1]), torch.tensor(0.04)
        scale = (weight / by).abs().amax(1) / 127
        q = (weight / by / scale[:, None]).round().clamp(-128, 127)
        made[f"{name}.weight"], made[f"{name}.weight_scale"] = q.to(torch.int8), scale
        made[f"{name}.input_scale"], made[f"{name}.pre_quant_scale"] = step, by
        hooked(model, name, lambda _, x: ((x[0] * by / step).round().clamp(-127, 127) * step,))
        return q * scale[:, None]

    made |= change(model, one) | made
    algorithm = "W8A8_SQ_PER_CHANNEL"
    said: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    if layers is not None:
        names = [name.removesuffix(".pre_quant_scale") for name in made if name.endswith(".pre_quant_scale")]
        layers |= {name: {"quant_algo": algorithm} for name in names}
        said |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    rewrite(folder, made, said)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_smoothquant(deterministic: bool, mixed: bool, tmp_path: Path) -> None:
    """A last bit of fp32 sometimes moves an activation to the next number of 8 bits: hence two bounds."""
    model = make_model(tmp_path, "llama", **SMALL)
    save_sq(tmp_path, model, {} if mixed else None)
    recorder, errors = Recorder(LLM(tmp_path, **PLAN, deterministic=deterministic)), []
    for length in (1, 9, 30, 17, 5):
        prompt = prompt_of(length, 131)
        (ours,), theirs = recorder.generate([prompt], 1), expected(model, prompt, 1)
        errors.append(np.abs(ours.logits[0] - theirs.logits[0]).max() / np.abs(theirs.logits[0]).max())
    assert max(errors) <= 5e-2, errors
    assert np.median(errors) <= 1e-4, errors
    found = ops(recorder.llm)
    assert (found["linear_int8"], found["scale_columns"]) == (2 * 7, 2 * 7)
