"""Constants that a loader computes from a recipe, in numpy alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

F32 = np.float32


def rope_table(*, context_len: int, rotary_dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    """Rotary rows of every position: ``[context_len, rotary_dim]`` float32, cosines then sines.

    ``rope`` is a normalised ``rope_parameters`` of the types default, linear, llama3 and yarn. Angles are
    products of float32 positions and frequencies, as in Hugging Face's models: at 10⁵ tokens a wider
    product would differ from what the weights were trained with.
    """
    frequency, magnitude = _FREQUENCIES[rope["rope_type"]](rotary_dim, rope)
    angle = np.arange(context_len, dtype=F32)[:, None] * frequency.astype(F32)[None, :]
    return np.concatenate((np.cos(angle), np.sin(angle)), axis=1) * F32(magnitude)


def _default(dim: int, rope: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    exponent = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    return F32(1.0) / np.power(F32(rope["rope_theta"]), exponent, dtype=F32), 1.0


def _linear(dim: int, rope: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Positions divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595)."""
    frequency, magnitude = _default(dim, rope)
    return frequency / F32(rope["factor"]), magnitude


def _llama3(dim: int, rope: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    frequency, magnitude = _default(dim, rope)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / F32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(F32)
    return frequency * blend + frequency / F32(rope["factor"]) * (1 - blend), magnitude


def _yarn(dim: int, rope: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), with DeepSeek's two magnitudes where they are given."""
    frequency, _ = _default(dim, rope)
    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def feature_turning(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first = feature_turning(rope.get("beta_fast") or 32)
    last = feature_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    span = max(last - first, 1e-3)
    interpolate = np.clip((np.arange(dim // 2, dtype=F32) - F32(first)) / F32(span), 0, 1)
    frequency = frequency / F32(factor) * interpolate + frequency * (1 - interpolate)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
    return frequency, attention


_FREQUENCIES: Mapping[str, Callable[[int, Mapping[str, Any]], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def zeros(*, shape: Sequence[int]) -> np.ndarray:
    """Zeros of int32."""
    return np.zeros(shape, np.int32)


def numbers(*, values: Sequence[Any], dtype: str) -> np.ndarray:
    """Integers as they are given."""
    return np.array(values, dtype)


GENERATORS: Mapping[str, Callable[..., np.ndarray]] = {
    "rope_table": rope_table,
    "zeros": zeros,
    "numbers": numbers,
}
