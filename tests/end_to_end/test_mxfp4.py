"""MXFP4 of dense projections, experts and latent attention against transformers models with what it stands for.

Files are written and widened by compressed-tensors; what loading makes is computed in float64 from the definition of
the OCP Microscaling Formats Specification v1.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of
from safetensors.torch import load_file, save_file
from torch import nn

from makeready.engine.llm import LLM

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
# A block and a half of a span; k and v have a whole tile of outputs.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "head_dim": 32,
    "initializer_range": 0.1,
}
MIXTURE = {**SMALL, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"},
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen2", SMALL),  # which has biases
    "mixture": ("qwen3_moe", MIXTURE),
    "latent": ("deepseek_v3", LATENT),
}
SCHEME = preset_name_to_scheme("MXFP4A16", ["Linear"])
Made = dict[str, torch.Tensor | None]


def linears(model: Any, skip: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Name, weight and the stacked tensor that it is of, of all linears; those of experts as files have them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(skip):
            yield name, module.weight, f"{name}.weight"
        for stacked in ("gate_up_proj", "down_proj"):
            if isinstance(weights := getattr(module, stacked, None), nn.Parameter):
                for e, weight in enumerate(weights):
                    halves = weight.chunk(2) if stacked == "gate_up_proj" else (weight,)
                    parts = ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",)
                    for part, half in zip(parts, halves, strict=True):
                        yield f"{name}.{e}.{part}", half, f"{name}.{stacked}"


def change(model: Any, of: Callable[[str, torch.Tensor], torch.Tensor], *skip: str) -> Made:
    """Replace the weights of all linears but the head and routers; returns the tensors that were there, as None."""
    gone: Made = {}
    for name, weight, source in linears(model, ("lm_head", "mlp.gate", *skip)):
        weight.data.copy_(of(name, weight.detach()))
        gone |= {source: None, f"{name}.weight": None}
    return gone


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

    tensors = load_file(folder / "model.safetensors") | change(model, compressed) | made
    assert {t.dtype for name, t in tensors.items() if t is not None and "_scale" in name} == {torch.uint8}
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(kept, folder / "model.safetensors")
    said = QuantizationConfig(
        config_groups={"group_0": SCHEME},
        format="mxfp4-pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*mlp.gate$"],
    ).model_dump(mode="json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """To the nearest number under the scale of the block, which may be short; no ties among random weights."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.concatenate((numbers, -numbers))
    wide = weight.double().numpy()
    made = np.empty_like(wide)
    for first in range(0, wide.shape[1], 32):
        block = wide[:, first : first + 32]
        scale = 2.0 ** (np.floor(np.log2(np.abs(block).max(1, keepdims=True))) - 2)
        nearest = np.abs(block[..., None] / scale[..., None] - numbers).argmin(-1)
        made[:, first : first + 32] = numbers[nearest] * scale
    return torch.from_numpy(made).float()


def check(folder: Path, model: Any, **plan: Any) -> LLM:
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    for length in (1, 9, 30):
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, expected(model, prompt, 5))
    return recorder.llm


@pytest.mark.parametrize("name", MODELS)
def test_files_of_compressed_tensors(name: str, tmp_path: Path) -> None:
    """What makes keys and values of latents is widened while it is loaded; all else stays packed."""
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    save_compressed(tmp_path, model)
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
