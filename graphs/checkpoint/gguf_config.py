"""A Hugging Face config out of GGUF metadata and the tensor table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.checkpoint.gguf_names import Fields, special_tokens
from makeready.graphs.models.family import Family

_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}

# Metadata that would change the computation in ways no supported architecture has; absent or as stated.
_NEUTRAL: dict[str, float] = {
    "attention.max_alibi_bias": 0,
    "attention.clamp_kqv": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "embedding_scale": 1,
    "residual_scale": 1,
    "attention.scale": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}


def hugging_face_config(
    family: Family, fields: Fields, names: Collection[str], vocab_size: int, source: str
) -> dict[str, Any]:
    """Build a config; it still has to pass `normalise_config`.

    Args:
        family: one with `gguf`.
        fields: the metadata.
        names: Hugging Face names of the tensors in the file.
        vocab_size: rows of the token embedding.
        source: the file, for errors.

    Raises:
        CheckpointError: a setting that no supported architecture has.
    """
    assert family.gguf is not None
    architecture = family.gguf.architecture
    for key, neutral in _NEUTRAL.items():
        if key in family.gguf.reads:
            continue
        value = fields.number(f"{architecture}.{key}")
        if value not in (None, neutral):
            raise CheckpointError(
                f"{source}: {architecture}.{key}={value} is not supported; use a model without it"
            )
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        # Dequantized values are float32; a plan may store them in less.
        "dtype": "float32",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
        **special_tokens(fields),
    }
    if "attention_bias" not in family.defaults:  # where it is part of the architecture
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    for field, key in _SIZES.items():
        config[field] = fields.integer(f"{architecture}.{key}")
    eps = fields.number(f"{architecture}.attention.layer_norm_rms_epsilon")
    if eps is None:
        raise CheckpointError(
            f"{source} lacks {architecture}.attention.layer_norm_rms_epsilon; convert it again"
        )
    config["rms_norm_eps"] = eps
    if "attention.key_length" not in family.gguf.reads:
        config["head_dim"] = _head_dim(architecture, fields, config, source)
    config["sliding_window"] = fields.integer(f"{architecture}.attention.sliding_window") or None
    config["rope_parameters"] = _rope(architecture, fields, source)
    family.gguf.complete(fields, config, source)
    return config


def _head_dim(architecture: str, fields: Fields, config: Mapping[str, Any], source: str) -> int | None:
    """Key length; None leaves it to hidden_size / heads. Whole heads must be rotated."""
    keys = [
        fields.integer(f"{architecture}.{key}") for key in ("attention.key_length", "attention.value_length")
    ]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = keys[0] or (hidden // heads if hidden and heads else None)
    rotated = fields.integer(f"{architecture}.rope.dimension_count")
    for name, value in (("attention.value_length", keys[1]), ("rope.dimension_count", rotated)):
        if value not in (None, head_dim):
            raise CheckpointError(
                f"{source}: {architecture}.{name}={value} differs from the head size {head_dim}; "
                "use a model whose key, value and rotary sizes are equal"
            )
    return head_dim


def _rope(architecture: str, fields: Fields, source: str) -> dict[str, Any]:
    def number(key: str) -> float | None:
        return fields.number(f"{architecture}.rope.{key}")

    rope: dict[str, Any] = {"rope_theta": number("freq_base")}
    kind = fields.text(f"{architecture}.rope.scaling.type")
    old_scale = number("scale_linear")  # how files of 2023 spell a linear factor
    factor = number("scaling.factor") or old_scale
    if kind is None and factor not in (None, 1.0):
        kind = "linear"
    if kind in (None, "none"):
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": fields.integer(
                f"{architecture}.rope.scaling.original_context_length"
            ),
            "beta_fast": number("scaling.yarn_beta_fast"),
            "beta_slow": number("scaling.yarn_beta_slow"),
        }
    raise CheckpointError(
        f"{source}: {architecture}.rope.scaling.type {kind!r} is not supported; use one of none, linear, yarn"
    )


def llama3_rope(factors: np.ndarray, theta: float, source: str) -> dict[str, Any]:
    """Recover Llama 3's rotary scaling from the divisors that a GGUF stores in its place.

    Llama 3 divides low frequencies by `factor`, keeps high ones, and in between interpolates by
    `s = (length / wavelength - low) / (high - low)`: a divisor `1 / ((1 - s) / factor + s)`. Only
    `length : low : high` matters, so low is taken as 1, as in every released model.

    Args:
        factors: float32 [head_dim / 2], 1.0 where a frequency is kept.
        theta: base of the frequencies.

    Raises:
        CheckpointError: no such settings reproduce the divisors.
    """
    inverse = theta ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # 1 / wavelength
    factors = factors.astype(np.float64)
    factor = round(float(factors.max()), 4)
    candidates = [(4.0, 8192)]  # high_freq_factor and original length of Llama 3.1 and later
    between = (factors > 1.001) & (factors < factor * 0.999)
    if between.sum() > 1:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, level = _line(inverse[between], smooth)
        if slope > 0 > level and slope < -level * 2**31:
            candidates.append((round(1 - 1 / level, 2), round(-slope / level)))
    for high, length in candidates:
        if high > 1 and np.allclose(
            _llama3_divisors(inverse, factor, high, length), factors, rtol=1e-4, atol=0
        ):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise CheckpointError(
        f"{source}: the rotary factors in rope_freqs.weight are not Llama 3's, which is not supported; "
        "use the Hugging Face folder of this model"
    )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares: (slope, level) of y = slope * x + level."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / (dx * dx).sum())
    return slope, float(y.mean() - slope * x.mean())


def _llama3_divisors(inverse: np.ndarray, factor: float, high: float, length: int) -> np.ndarray:
    smooth = np.clip((length * inverse - 1) / (high - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
