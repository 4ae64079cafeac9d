"""KV caches with a scale for each token and head, against transformers with keys and values rounded as they are.

The rounding here is written anew, in float64. What remains between the two are numbers near a tie, which are rounded
either way, so logits agree far better than the format itself is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference import Recorder, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.kernels.attention import scaled

VOCABULARY = 131
PLAN: dict[str, Any] = {
    "max_rows": 4,
    "max_tokens": 32,  # less than the longest prompt, which comes in chunks
    "context_len": 96,
    "page_size": 8,
    "weight_dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 20},
    "qwen2": {},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 10},
    "gemma3": {"head_dim": 32, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]},
}
FORMATS = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
# Largest difference of logits over the largest logit from those of the same rounding: 4e-6 as a rule, and what one
# number that is rounded the other way moves them by. Without rounding they are at least twice as far.
NEAR = {"int8_per_token_head": 2e-3, "fp8_per_token_head": 1e-2, "int4_per_token_head": 2e-2}


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """``x[..., D]`` as a cache of ``kind`` has it."""
    y = x.double()
    if kind == "int4_per_token_head":
        least, most = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        step = ((most - least) / 15).half().double()
        middle = (least + 8 * step).half().double()
        return (((y - middle) / step).round().clamp(-8, 7) * step + middle).to(x.dtype)
    largest = y.abs().amax(-1, keepdim=True)
    if kind == "int8_per_token_head":
        step = (largest / 127).half().double()
        return ((y / step).round().clamp(-127, 127) * step).to(x.dtype)
    step = (largest / 448).half().double()
    z = (y / step).clamp(-448, 448)
    ulp = 2.0 ** (torch.floor(torch.log2(z.abs().clamp_min(2.0**-6))) - 3)
    return ((z / ulp).round() * ulp * step).to(x.dtype)


class RoundedCache(transformers.DynamicCache):
    """Keys and values are rounded as they come."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = (rounded(x, self.kind) if self.kind else x for x in (key_states, value_states))
        return super().update(keys, values, *args, **kwargs)


def differences(
    model: Any, recorder: Recorder, prompts: Sequence[list[int]], kinds: Sequence[str]
) -> list[float]:
    """The largest difference of logits behind our tokens from those with caches of ``kinds``, over the largest."""
    made = recorder.generate(prompts, 6)
    worst = [0.0 for _ in kinds]
    for prompt, ours in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt + ours.tokens])
        for at, kind in enumerate(kinds):
            with torch.inference_mode():
                logits = (
                    model(ids, past_key_values=RoundedCache(kind)).logits[0, len(prompt) - 1 : -1].numpy()
                )
            error = np.abs(np.stack(ours.logits) - logits).max() / np.abs(logits).max()
            worst[at] = max(worst[at], float(error))
    return worst


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make_model(folder, request.param, **MODELS[request.param]), folder


PROMPTS = [prompt_of(length, VOCABULARY) for length in (1, 9, 45)]


@pytest.mark.parametrize("kind", FORMATS)
def test_logits_are_those_of_a_rounded_cache(model: tuple[Any, Path], kind: str) -> None:
    reference, folder = model
    llm = LLM(folder, **PLAN, kv_dtype=kind)
    poison_every_step(llm)
    near, far = differences(reference, Recorder(llm), PROMPTS, (kind, ""))
    assert near <= NEAR[kind]
    assert far > 2 * NEAR[kind]


LATENT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "kv_lora_rank": 24,
    "q_lora_rank": 28,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}


def rounded_latent(x: torch.Tensor, kind: str) -> torch.Tensor:
    """As :func:`rounded`, with a scale in fp32."""
    largest = 127 if kind == "int8_per_token_head" else 448
    step = (x.abs().amax(-1, keepdim=True) / largest).double()
    z = x.double() / step
    if kind == "int8_per_token_head":
        return (z.round() * step).to(x.dtype)
    ulp = 2.0 ** (torch.floor(torch.log2(z.abs().clamp_min(2.0**-6))) - 3)
    return ((z / ulp).round() * ulp * step).to(x.dtype)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", FORMATS[:2])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latents_are_rounded_but_for_what_turns(
    family: str, kind: str, deterministic: bool, tmp_path: Path
) -> None:
    """transformers with rounded latents, which deterministic plans equal. Others have a step's own tokens as they are
    before they are rounded: what comes behind a prompt of one step is as if nothing were."""
    model = make_model(tmp_path, family, **LATENT)
    llm = LLM(tmp_path, **PLAN, max_extend_buckets=1, kv_dtype=kind, deterministic=deterministic)
    poison_every_step(llm)
    made, logits = Recorder(llm).generate(PROMPTS, 6), {}
    for name in ("", kind):
        hooks = [
            layer.self_attn.kv_a_layernorm.register_forward_hook(
                lambda module, inputs, output, name=name: rounded_latent(output, name) if name else output
            )
            for layer in model.model.layers
        ]
        with torch.inference_mode():
            logits[name] = [
                model(torch.tensor([p + ours.tokens])).logits[0, len(p) - 1 : -1].numpy()
                for p, ours in zip(PROMPTS, made, strict=True)
            ]
        for hook in hooks:
            hook.remove()

    def off(name: str) -> float:
        return max(
            float(np.abs(np.stack(ours.logits) - theirs).max() / np.abs(theirs).max())
            for ours, theirs in zip(made, logits[name], strict=True)
        )

    near, far = off(kind), off("")
    if deterministic:
        assert near <= NEAR[kind]
        assert far > 2 * near
        return
    for ours, theirs in zip(made[:2], logits[""][:2], strict=True):  # prompts of one step
        assert np.abs(ours.logits[0] - theirs[0]).max() <= 1e-4 * np.abs(theirs).max()
    assert 1e-4 < far < (5e-2 if kind == "int8_per_token_head" else 0.3)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_scale_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a twentieth too large, of every other head."""
    reference = make_model(tmp_path, "qwen3", **MODELS["qwen3"])
    monkeypatch.setattr("makeready.kernels.native._library", lambda: None)
    right = scaled.quantize_heads

    def wrong(x_TGD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, scales = right(x_TGD, dtype)
        scales[:, ::2, 0] *= 1.05
        return numbers, scales

    monkeypatch.setattr(scaled, "quantize_heads", wrong)
    llm = LLM(tmp_path, **PLAN, kv_dtype=kind)
    (near,) = differences(reference, Recorder(llm), PROMPTS, (kind,))
    assert near > NEAR[kind]
