"""Checkpoints of AMD's Quark: weights in MXFP4, or weights and activations in FP8.

``global_quant_config`` says how linears are quantized, ``layer_quant_config`` how those of some names are, in
which ``*`` may stand for anything, and ``exclude`` which stay wide. Of MXFP4 a module has ``weight[N, K / 2]``,
bytes of two neighbouring inputs with the first in the lower bits, and ``weight_scale[N, K / 32]``, e8m0; of FP8
``weight``, one ``weight_scale`` or one an output, and ``input_scale`` where activations have a stored one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from makeready.graphs.quant.mxfp4 import FORM, Blocks
from makeready.graphs.quant.reading import (
    flag,
    names_of,
    patterns,
    refused_unless,
    tell_cache,
    tell_wide_activations,
)
from makeready.graphs.quant.scheme import CHANNEL, TENSOR, Quantization, Scheme
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import MX, Form, WeightOnly
from makeready.kernels.mx import BLOCK

_FP4, _FP8 = "fp4", "fp8_e4m3"
_SHARES = {"per_tensor": TENSOR, "per_channel": CHANNEL}


def _quark(said: Mapping[str, Any]) -> Quantization:
    export = _object(said, "export")
    written = export.get("weight_format", "real_quantized")
    refused_unless(
        written == "real_quantized",
        f"weight_format {written!r:.80} of quark is not supported; export it as 'real_quantized'",
    )
    refused_unless(
        not said.get("layer_type_quant_config"),
        "layer_type_quant_config is not supported; use a checkpoint without it",
    )
    _check_rotations(said.get("algo_config"))
    cache = names_of(export, "kv_cache_group")
    usual = _read(_object(said, "global_quant_config"), False)
    layers = {}
    for pattern, entry in _object(said, "layer_quant_config").items():
        refused_unless(
            isinstance(entry, Mapping),
            f"layer_quant_config: {pattern} must be an object; correct config.json",
        )
        layers[pattern] = _read(entry, any(fnmatch.fnmatchcase(pattern, name) for name in cache))
    ignored = patterns(names_of(said, "exclude"))
    found = [read for read in (usual, *layers.values()) if read is not None]
    refused_unless(bool(found), "quark quantizes no weights; correct config.json")
    if all(isinstance(read, Form) for read in found):
        rules = tuple((fnmatch.translate(pattern), form) for pattern, form in layers.items())
        return WeightOnly(Blocks("weight", "weight_scale"), usual, rules, ignored, kind=MX)  # type: ignore[arg-type]
    refused_unless(
        usual is not None and all(read == usual for read in layers.values()),
        "quark's FP8 must be the same in all layers but those of exclude; use another checkpoint",
    )
    assert isinstance(usual, Scheme)
    return replace(usual, ignored=ignored)


def _object(said: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = said.get(field) or {}
    refused_unless(isinstance(value, Mapping), f"{field} must be an object; correct config.json")
    return value


def _check_rotations(given: Any) -> None:
    """Refuse activations that are to be rotated while the model runs; AWQ and its like are in the weights."""
    entries = given if isinstance(given, list) else [given] if given else []
    named = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    for name in named:
        refused_unless(
            isinstance(name, str) and name.lower() not in ("rotation", "quarot"),
            f"algo_config {name!r:.80} of quark is not supported; use a checkpoint without it",
        )


def _read(entry: Mapping[str, Any], of_cache: bool) -> Form | Scheme | None:
    """What one entry says; None where weights stay wide.

    Args:
        of_cache: results are keys or values, whose scales are those of a cache.
    """
    refused_unless(not entry.get("bias"), "quark's bias is not supported; use a checkpoint without it")
    refused_unless(
        of_cache or not entry.get("output_tensors"),
        "quark's output_tensors are not supported; use a checkpoint without them",
    )
    if entry.get("output_tensors"):
        tell_cache()
    weight, inputs = entry.get("weight"), entry.get("input_tensors")
    if not weight and not inputs:
        return None
    for name, part in (("weight", weight), ("input_tensors", inputs)):
        refused_unless(
            isinstance(part, Mapping) or (name == "input_tensors" and part is None),
            f"quark's {name} must be one object; use a checkpoint in MXFP4 or FP8",
        )
    assert isinstance(weight, Mapping)
    dtype = weight.get("dtype")
    refused_unless(
        dtype in (_FP4, _FP8),
        f"quark's weights of {dtype!r:.80} are not supported; use a checkpoint in MXFP4 or FP8",
    )
    refused_unless(not flag(weight, "is_dynamic", False), "weights must not be dynamic; correct config.json")
    return _mxfp4(weight, inputs) if dtype == _FP4 else _fp8(weight, inputs or {})


def _mxfp4(weight: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Form:
    refused_unless(
        _blocks(weight),
        f"quark's fp4 weights must be per_group, of {BLOCK} inputs with scale_format e8m0; use another checkpoint",
    )
    if inputs is not None:
        refused_unless(
            inputs.get("dtype") == _FP4 and _blocks(inputs) and flag(inputs, "is_dynamic", False),
            "quark's input_tensors beside fp4 weights must be absent, or fp4 and dynamic; use another checkpoint",
        )
        tell_wide_activations(4)
    return FORM


def _blocks(part: Mapping[str, Any]) -> bool:
    """Whether 32 neighbouring inputs share a power of two."""
    said = (part.get("qscheme"), part.get("group_size"), part.get("scale_format"))
    return said == ("per_group", BLOCK, "e8m0") and part.get("ch_axis") in (None, -1, 1)


def _fp8(weight: Mapping[str, Any], inputs: Mapping[str, Any]) -> Scheme:
    shares = _SHARES.get(weight.get("qscheme", ""))
    refused_unless(
        shares is not None and (shares == TENSOR or weight.get("ch_axis") in (None, 0)),
        "quark's fp8_e4m3 weights must be per_tensor, or per_channel with ch_axis 0; use another checkpoint",
    )
    assert shares is not None
    dynamic = flag(inputs, "is_dynamic", False)
    refused_unless(
        inputs.get("dtype") == _FP8 and inputs.get("qscheme") == ("per_channel" if dynamic else "per_tensor"),
        "quark's input_tensors beside fp8_e4m3 weights must be fp8_e4m3, dynamic and per_channel or static and "
        "per_tensor; use another checkpoint",
    )
    for part in (weight, inputs):
        refused_unless(
            part.get("scale_format") in (None, "float32"),
            f"scale_format {part.get('scale_format')!r:.80} of fp8_e4m3 is not supported; use another checkpoint",
        )
    return Scheme(shares, static=not dynamic, stored=True)


STORED["quark"] = _quark
