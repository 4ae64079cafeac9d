"""Tiny models whose linears are rounded to 4-bit floats, and what the engine makes of them beside transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Recorder, compare, expected, prompt_of
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
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
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


def rewrite(folder: Path, made: Made, said: Mapping[str, Any]) -> None:
    """The checkpoint with other tensors, None for those that go, under this ``quantization_config``."""
    tensors = load_file(folder / "model.safetensors") | made
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def nearest(size: np.ndarray) -> np.ndarray:
    """Codes of the nearest numbers of e2m1, sign aside; there are no ties among random weights."""
    return np.abs(np.abs(size)[..., None] - E2M1).argmin(-1)


def packed(weight: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    """Bytes of two neighbouring numbers with the signs of ``weight``, the first in the lower bits."""
    q = codes + 8 * np.signbit(weight)
    return torch.from_numpy((q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8))


def check(folder: Path, model: Any, **plan: Any) -> LLM:
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    for length in (1, 9, 30):
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, expected(model, prompt, 5))
    return recorder.llm
