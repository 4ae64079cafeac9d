"""MXFP4 of dense projections, experts and latent attention against transformers models with what it stands for.

Files are written and widened by compressed-tensors; those of quark, and what loading makes, are computed in float64
from the definition of the OCP Microscaling Formats Specification v1.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from float4_models import E2M1, MODELS, PLAN, SMALL, Made, change, check, nearest, packed, rewrite
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.base import CheckpointWarning

SCHEME = preset_name_to_scheme("MXFP4A16", ["Linear"])


@pytest.fixture(autouse=True)
def own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are told while a plan is made, not where it is found in the cache."""
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path / "plans"))


def save_compressed(folder: Path, model: Any) -> None:
    """The checkpoint as compressed-tensors writes it, and the model as that library widens it."""
    assert SCHEME.weights is not None
    made: Made = {}

    def compressed(name: str, weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.unflatten(1, (-1, 32))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), SCHEME.weights)
        state = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, SCHEME)
        made.update({f"{name}.{kind}": tensor for kind, tensor in state.items()})
        return MXFP4PackedCompressor.decompress(state, SCHEME)["weight"].float()

    made |= change(model, compressed) | made
    assert {t.dtype for name, t in made.items() if t is not None and "_scale" in name} == {torch.uint8}
    said = QuantizationConfig(
        config_groups={"group_0": SCHEME},
        format="mxfp4-pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*mlp.gate$"],
    ).model_dump(mode="json")
    rewrite(folder, made, said)


def save_quark(folder: Path, model: Any) -> None:
    """The checkpoint as AMD's Quark lays it out, by the definition of the format, activations of 4 bits included."""
    made: Made = {}

    def quantized(name: str, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.double().numpy()
        blocks = wide.reshape(len(wide), -1, 32)
        exponent = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
        codes = nearest(blocks / 2.0 ** exponent[..., None]).reshape(wide.shape)
        made[f"{name}.weight"] = packed(wide, codes)
        made[f"{name}.weight_scale"] = torch.from_numpy((exponent + 127).astype(np.uint8))
        sizes = E2M1[codes] * 2.0 ** exponent.repeat(32, 1)
        return torch.from_numpy(np.copysign(sizes, wide)).float()

    made |= change(model, quantized) | made
    part = {
        "dtype": "fp4",
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": 32,
        "scale_format": "e8m0",
        "is_dynamic": False,
        "round_method": "half_even",
        "symmetric": None,
    }
    usual = {
        "weight": part,
        "input_tensors": {**part, "is_dynamic": True},
        "output_tensors": None,
        "bias": None,
    }
    said = {
        "quant_method": "quark",
        "global_quant_config": usual,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head", "*.mlp.gate"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }
    rewrite(folder, made, said)


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """To the nearest number under the scale of the block, which may be short; no ties among random weights."""
    wide = weight.double().numpy()
    made = np.empty_like(wide)
    for first in range(0, wide.shape[1], 32):
        block = wide[:, first : first + 32]
        scale = 2.0 ** (np.floor(np.log2(np.abs(block).max(1, keepdims=True))) - 2)
        made[:, first : first + 32] = np.copysign(E2M1[nearest(block / scale)] * scale, block)
    return torch.from_numpy(made).float()


@pytest.mark.parametrize("name", MODELS)
def test_files_of_compressed_tensors(name: str, tmp_path: Path) -> None:
    """What makes keys and values of latents is widened while it is loaded; all else stays packed."""
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    save_compressed(tmp_path, model)
    llm = check(tmp_path, model)
    of = {w.param.name: w.param.spec.dtype for w in llm.engine.executable.plan.weights}
    assert {dtype for param, dtype in of.items() if "down" in param} == {"int16", "uint8"}


@pytest.mark.parametrize("name", MODELS)
def test_files_of_quark(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    save_quark(tmp_path, model)
    with pytest.warns(CheckpointWarning, match="activations of 4 bits are not computed here"):
        llm = check(tmp_path, model)
    of = {w.param.name: w.param.spec.dtype for w in llm.engine.executable.plan.weights}
    assert {dtype for param, dtype in of.items() if "down" in param} == {"int16", "uint8"}


@pytest.mark.parametrize(("name", "deterministic"), [("dense", False), ("mixture", True), ("latent", False)])
def test_made_while_loading(name: str, deterministic: bool, tmp_path: Path) -> None:
    family, config = MODELS[name]
    config = {**config, "intermediate_size": 168}  # the last block has 8 inputs
    model = make_model(tmp_path, family, **config)
    change(model, rounded, "kv_b_proj")
    check(tmp_path, model, quant="mxfp4", deterministic=deterministic)


def test_gpt_oss_keeps_its_biases_while_loading(tmp_path: Path) -> None:
    """Transformers has experts' inputs first."""
    config = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
    model = make_model(tmp_path, "gpt_oss", **config, initializer_range=0.1)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            stacked = getattr(layer.mlp.experts, name)
            stacked.data.copy_(torch.stack([rounded("", w.T).T for w in stacked.detach()]))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            own = getattr(layer.self_attn, name).weight
            own.data.copy_(rounded("", own.detach()))
    check(tmp_path, model, quant="mxfp4")


def test_padding_never_leaks(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", **SMALL)
    save_compressed(tmp_path, model)
    llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
    recorder = Recorder(llm)
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    for prompt, ours in zip(prompts, recorder.generate(prompts, 5), strict=True):
        compare(ours, expected(model, prompt, 5))


def test_deterministic(tmp_path: Path) -> None:
    """A request's logits are the same to the last bit, alone and beside others."""
    model = make_model(tmp_path, "qwen3", **SMALL)
    save_compressed(tmp_path, model)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    together = Recorder(LLM(tmp_path, **PLAN, deterministic=True)).generate(prompts, 4)
    for prompt, ours in zip(prompts, together, strict=True):
        (alone,) = Recorder(LLM(tmp_path, **PLAN, deterministic=True)).generate([prompt], 4)
        assert np.array_equal(alone.logits, ours.logits)
