"""NVFP4 of dense projections, experts and latent attention against transformers models with what it stands for.

Files are written and widened by compressed-tensors; those of modelopt, and what loading makes, are computed in
float64 from the format's definition.
"""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from float4_models import E2M1, MIXTURE, MODELS, PLAN, SMALL, Made, change, check, nearest, packed, rewrite
from quantized_models import Format, quantize_model
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.base import CheckpointWarning

E4M3 = np.array(
    [(m if e == 0 else 8 + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127]
)


@pytest.fixture(autouse=True)
def own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are told while a plan is made, not where it is found in the cache."""
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path / "plans"))


def save_compressed(folder: Path, model: Any, preset: str) -> None:
    """The checkpoint as compressed-tensors writes it, and the model as that library widens it."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert scheme.weights is not None
    made: Made = {}

    def compressed(name: str, weight: torch.Tensor) -> torch.Tensor:
        whole = generate_gparam(weight.amin(), weight.amax())
        blocks = weight.unflatten(1, (-1, 16))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=whole)
        given = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
        state = NVFP4PackedCompressor.compress(given, scheme)
        made.update({f"{name}.{kind}": tensor for kind, tensor in state.items()})
        if scheme.input_activations is not None:
            made[f"{name}.input_global_scale"] = torch.tensor([3.0])
        q = NVFP4PackedCompressor.decompress(
            state | {"weight_scale": torch.ones_like(scale), "weight_global_scale": torch.ones(1)}, scheme
        )["weight"]
        # The library widens in bf16, which would round what numbers times scales are.
        own = state["weight_scale"].double() / whole.double()
        return (q.double() * own.repeat_interleave(16, 1)).float()

    made |= change(model, compressed) | made
    said = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="nvfp4-pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*mlp.gate$"],
    ).model_dump(mode="json")
    rewrite(folder, made, said)


def blocks_of(wide: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of e2m1 and e4m3 under global scales, by definition; the last block may be short."""
    firsts = range(0, wide.shape[1], 16)
    most = np.stack([np.abs(wide[:, first : first + 16]).max(1) for first in firsts], 1)
    scales = np.abs((most / (6 * whole))[..., None] - E4M3).argmin(-1)
    steps = (E4M3[scales] * whole).repeat(16, 1)[:, : wide.shape[1]]
    return nearest(wide / steps), scales


def save_modelopt(folder: Path, model: Any, scaled: tuple[str, ...] = ()) -> None:
    """The checkpoint as modelopt lays it out, activations of 4 bits and an 8-bit cache included.

    Args:
        scaled: ends of names of modules whose activations are scaled before, as AWQ does.
    """
    made: Made = {}

    def quantized(name: str, weight: torch.Tensor) -> torch.Tensor:
        by = np.ones(weight.shape[1])
        if name.endswith(scaled):
            by = np.linspace(0.25, 3, weight.shape[1], dtype=np.float32).astype(np.float64)
            made[f"{name}.pre_quant_scale"] = torch.from_numpy(by).float()
        wide = weight.double().numpy() / by
        whole = np.float32(np.abs(wide).max() / (6 * 448)).reshape(1, 1).astype(np.float64)
        codes, scales = blocks_of(wide, whole)
        made[f"{name}.weight"] = packed(wide, codes)
        made[f"{name}.weight_scale"] = torch.from_numpy(scales.astype(np.uint8)).view(torch.float8_e4m3fn)
        made[f"{name}.weight_scale_2"] = torch.tensor(whole.item(), dtype=torch.float32)
        made[f"{name}.input_scale"] = torch.tensor(0.01)
        if name.endswith("k_proj"):
            made[f"{name}.k_scale"] = torch.tensor(0.5)
        stands = np.copysign(E2M1[codes] * (E4M3[scales] * whole).repeat(16, 1), wide)
        return torch.from_numpy(stands * by).float()

    made |= change(model, quantized) | made
    rewrite(folder, made, {})
    excluded = ["lm_head", "*.mlp.gate"]
    said = {
        "quant_algo": "NVFP4_AWQ" if scaled else "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": excluded,
    }
    made_by = {"name": "modelopt", "version": "0.33.0"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": made_by, "quantization": said}))


def save_mixed(folder: Path, model: Any) -> None:
    """The checkpoint as modelopt lays out several formats: FP8 in attention, with stored scales of activations in the
    first layer and scales of tokens in the second, NVFP4 in all else but one module, which stays wide.
    """
    layers: dict[str, dict[str, Any]] = {}
    made: Made = {}
    for layer, (algorithm, form) in enumerate(
        (
            ("FP8", Format("tensor", static=True)),
            ("FP8_PER_CHANNEL_PER_TOKEN", Format("channel", tool="compressed-tensors")),
        )
    ):
        part = f"layers.{layer}.self_attn"
        tensors = quantize_model(model, form, lambda name, part=part: part in name)
        made |= tensors
        names = {name.rpartition(".")[0] for name in tensors}
        layers |= {name: {"quant_algo": algorithm} for name in names}

    def quantized(name: str, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.double().numpy()
        whole = np.float32(np.abs(wide).max() / (6 * 448)).reshape(1, 1).astype(np.float64)
        codes, scales = blocks_of(wide, whole)
        made[f"{name}.weight"] = packed(wide, codes)
        made[f"{name}.weight_scale"] = torch.from_numpy(scales.astype(np.uint8)).view(torch.float8_e4m3fn)
        made[f"{name}.weight_scale_2"] = torch.tensor(whole.item(), dtype=torch.float32)
        layers[name] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        return torch.from_numpy(np.copysign(E2M1[codes] * (E4M3[scales] * whole).repeat(16, 1), wide)).float()

    gone = change(model, quantized, "layers.1.mlp.down_proj")
    rewrite(folder, gone | made, {})
    said = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    made_by = {"name": "modelopt", "version": "0.47.0"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": made_by, "quantization": said}))


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """What loading makes of a weight: the same with a global scale for each output."""
    wide = weight.double().numpy()
    whole = (np.abs(wide).max(1, keepdims=True).astype(np.float32) / np.float32(6 * 448)).astype(np.float64)
    codes, scales = blocks_of(wide, whole)
    steps = (E4M3[scales] * whole).repeat(16, 1)[:, : wide.shape[1]]
    return torch.from_numpy(np.copysign(E2M1[codes] * steps, wide)).float()


def dtypes(llm: LLM, part: str) -> set[str]:
    return {w.param.spec.dtype for w in llm.engine.executable.plan.weights if part in w.param.name}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["NVFP4A16", "NVFP4"])
@pytest.mark.filterwarnings("ignore:.*activations of 4 bits are not computed here")
def test_files_of_compressed_tensors(name: str, preset: str, tmp_path: Path) -> None:
    """What makes keys and values of latents is widened while it is loaded; all else stays packed."""
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    save_compressed(tmp_path, model, preset)
    llm = check(tmp_path, model)
    assert dtypes(llm, "down") == {"int16", "float32"}


@pytest.mark.parametrize("name", MODELS)
def test_files_of_modelopt(name: str, tmp_path: Path) -> None:
    """Scales of activations and of a cache are not read, which is told; no other tensor is left over."""
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    save_modelopt(tmp_path, model)
    with pytest.warns(CheckpointWarning) as told:
        llm = check(tmp_path, model)
    assert dtypes(llm, "down") == {"int16", "float32"}
    said = {str(warning.message) for warning in told if warning.category is CheckpointWarning}
    wanted = ["activations of 4 bits are not computed", "the cache has the dtype that kv.dtype says"]
    wanted += [] if name == "latent" else ["they scale a quantized cache"]
    assert len(said) == len(wanted)
    assert all(any(part in sentence for sentence in said) for part in wanted)


@pytest.mark.filterwarnings("ignore::makeready.graphs.checkpoint.base.CheckpointWarning")
def test_files_of_modelopt_whose_activations_are_scaled(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", **SMALL)
    save_modelopt(tmp_path, model, ("o_proj", "down_proj"))
    llm = check(tmp_path, model)
    found = Counter(launch.op for launch in llm.plan.programs["decode"].launches)
    # Of a layer: q, k and v, what attention gives, gate, up (160 outputs are no whole tiles), down.
    assert (found["linear_mx"], found["scale_columns"]) == (2 * 5, 2 * 2)


@pytest.mark.parametrize(("family", "config"), [("llama", SMALL), ("qwen3_moe", MIXTURE)])
def test_files_of_several_formats(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """A last bit of fp32 sometimes moves an activation to the next number of 8 bits: hence two bounds."""
    model = make_model(tmp_path, family, **config)
    wide = deepcopy(model)
    save_mixed(tmp_path, model)
    recorder, errors = Recorder(LLM(tmp_path, **PLAN)), []
    for length in (1, 9, 30, 17, 5):
        prompt = prompt_of(length, 131)
        (ours,), theirs = recorder.generate([prompt], 1), expected(model, prompt, 1)
        errors.append(np.abs(ours.logits[0] - theirs.logits[0]).max() / np.abs(theirs.logits[0]).max())
        plain = expected(wide, prompt, 1).logits[0]
        assert np.abs(theirs.logits[0] - plain).max() > 8e-2 * np.abs(plain).max()
    assert max(errors) <= 8e-2, errors
    assert np.median(errors) <= 1e-5, errors
    found = Counter(launch.op for launch in recorder.llm.plan.programs["decode"].launches)
    assert found["linear_fp8"] == 2 * 2
    assert found["linear_mx" if family == "llama" else "grouped_silu_mul_mx"] >= 2


@pytest.mark.parametrize(("name", "deterministic"), [("dense", False), ("mixture", True), ("latent", False)])
def test_made_while_loading(name: str, deterministic: bool, tmp_path: Path) -> None:
    family, config = MODELS[name]
    config = {**config, "intermediate_size": 168}  # the last block has 8 inputs
    model = make_model(tmp_path, family, **config)
    change(model, rounded, "kv_b_proj")
    check(tmp_path, model, quant="nvfp4", deterministic=deterministic)


def test_padding_never_leaks(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", **SMALL)
    save_compressed(tmp_path, model, "NVFP4A16")
    llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
    recorder = Recorder(llm)
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    for prompt, ours in zip(prompts, recorder.generate(prompts, 5), strict=True):
        compare(ours, expected(model, prompt, 5))


def test_deterministic(tmp_path: Path) -> None:
    """A request's logits are the same to the last bit, alone and beside others."""
    model = make_model(tmp_path, "qwen3", **SMALL)
    save_compressed(tmp_path, model, "NVFP4A16")
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    together = Recorder(LLM(tmp_path, **PLAN, deterministic=True)).generate(prompts, 4)
    for prompt, ours in zip(prompts, together, strict=True):
        (alone,) = Recorder(LLM(tmp_path, **PLAN, deterministic=True)).generate([prompt], 4)
        assert np.array_equal(alone.logits, ours.logits)
