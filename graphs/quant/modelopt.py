"""Checkpoints of NVIDIA's Model Optimizer (``modelopt``).

What they hold is said by ``quantization_config`` of config.json, or by ``quantization`` in
hf_quant_config.json, which the reader of folders puts in its place: ``quant_algo`` and the modules that stay
wide, in whose names ``*`` may stand for anything. NVFP4 is in nvfp4.py; of FP8 a module has ``weight`` and one
``weight_scale``, or one an output, and ``input_scale`` where activations have a stored one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.quant.nvfp4 import FORM, Halves
from makeready.graphs.quant.reading import (
    integer,
    names_of,
    patterns,
    refused_unless,
    tell_cache,
    tell_wide_activations,
)
from makeready.graphs.quant.scheme import CHANNEL, TENSOR, Quantization, Scheme
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import NV, WeightOnly
from makeready.kernels.nvfp4 import BLOCK

_NVFP4, _WEIGHTS_ALONE = "NVFP4", "W4A16_NVFP4"
_FP8 = {
    "FP8": (TENSOR, True),
    "FP8_PER_CHANNEL_PER_TOKEN": (CHANNEL, False),
}  # what shares a scale, and whether activations have a stored one


def _modelopt(said: Mapping[str, Any]) -> Quantization:
    inner = said.get("quantization") or said
    refused_unless(isinstance(inner, Mapping), "quantization must be an object; correct hf_quant_config.json")
    given = inner.get("quant_algo")
    algorithm = given.upper() if isinstance(given, str) else given
    known = (_NVFP4, _WEIGHTS_ALONE, *_FP8)
    refused_unless(
        algorithm in known,
        f"quant_algo {given!r:.80} of modelopt is not supported; use a checkpoint with {' or '.join(known)}",
    )
    ignored = patterns((*names_of(inner, "exclude_modules"), *names_of(inner, "ignore")))
    if inner.get("kv_cache_quant_algo"):
        tell_cache()
    if algorithm in _FP8:
        weights, static = _FP8[algorithm]
        return Scheme(weights, static=static, stored=True, ignored=ignored)
    size = integer(inner, "group_size", usual=BLOCK)
    refused_unless(
        size == BLOCK,
        f"NVFP4 in groups of {size} is not supported; use a checkpoint with groups of {BLOCK}",
    )
    if algorithm == _NVFP4:
        tell_wide_activations(4)
    layout = Halves("weight", "weight_scale", "weight_scale_2", divides=False)
    return WeightOnly(layout, FORM, ignored=ignored, kind=NV)


STORED["modelopt"] = _modelopt
