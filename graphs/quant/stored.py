"""Quantized checkpoints: what their ``quantization_config`` says, as a :class:`Scheme`.

Known are ``fp8`` (as Qwen3 and DeepSeek store 128x128 blocks, and as AutoFP8 stores whole tensors) and
``compressed-tensors`` with 8-bit floats or integers; other modules of this package add theirs to :data:`STORED`
and, of ``compressed-tensors``, to :data:`COMPRESSED`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from makeready.graphs import quant
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.quant.reading import expect, flag, names_of, refused_unless, tell_cache
from makeready.graphs.quant.scheme import BLOCK, CHANNEL, FP8, INT8, TENSOR, Quantization, Scheme


def stored_scheme(config: Mapping[str, Any]) -> Quantization | None:
    """How a checkpoint with this ``config.json`` stores its linears; None where it does not quantize.

    Raises:
        UnsupportedModelError: a method, or a setting of one, that nothing here computes.
    """
    said = config.get("quantization_config") or config.get("compression_config")
    if not said:
        return None
    if not isinstance(said, Mapping):
        raise UnsupportedModelError(
            f"config.json: quantization_config must be an object, not {said!r:.80}; correct it"
        )
    method = said.get("quant_method", "unnamed")
    _check_types(said, "quantization_config")
    discover()
    if said.get("kv_cache_scheme"):
        tell_cache()
    if method in STORED:
        return STORED[method](said)
    raise UnsupportedModelError(
        f"checkpoints quantized with {method} are not supported; "
        "use the model's bf16, fp16, GGUF, fp8, AWQ, GPTQ, MXFP4 or NVFP4 files"
    )


def discover() -> None:
    """Import every module of this package, so that all that it offers is registered."""
    for module in pkgutil.iter_modules(quant.__path__, f"{quant.__name__}."):
        importlib.import_module(module.name)


def _fp8(said: Mapping[str, Any]) -> Scheme:
    """``weight_scale_inv`` is what blocks' scales are called, though weights are multiplied by them too."""
    expect(said, "fmt", ("e4m3",))
    expect(said, "activation_scheme", ("dynamic", "static"))
    expect(said, "scale_fmt", ("float",))
    static = said.get("activation_scheme") == "static"
    # The vocabulary projection is left alone whether or not the list says so.
    ignored = ("lm_head", *(said.get("modules_to_not_convert") or ()), *(said.get("ignored_layers") or ()))
    size = said.get("weight_block_size")
    if size is None:
        return Scheme(TENSOR, static=static, stored=True, ignored=ignored)
    if static:
        raise UnsupportedModelError(
            "quantization_config: weight_block_size with activation_scheme 'static' is not supported; "
            "use a checkpoint with dynamic activations"
        )
    return Scheme(
        BLOCK, _square(size, "weight_block_size"), stored=True, scale="weight_scale_inv", ignored=ignored
    )


def _compressed_tensors(said: Mapping[str, Any]) -> Quantization:
    groups = list((said.get("config_groups") or {}).values())
    for form in (said.get("format"), *(group.get("format") for group in groups)):
        if form in COMPRESSED:
            return COMPRESSED[form](said)
    known = ("float-quantized", "int-quantized", "naive-quantized", "mixed-precision", *COMPRESSED)
    for place in (said, *groups):
        expect(place, "format", known)
    ignored = names_of(said, "ignore")
    schemes = [_eight_bits(said, group, ignored) for group in groups]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        raise UnsupportedModelError(
            "quantization_config: compressed-tensors needs config_groups that quantize alike; "
            "use a checkpoint whose quantized linears are all of one kind"
        )
    targets = tuple(target for group in groups for target in names_of(group, "targets"))
    refused_unless(bool(targets), "config_groups name no targets; correct config.json")
    return replace(schemes[0], targets=() if "Linear" in targets else targets)


_NUMBERS = {"float": (FP8, "float-quantized"), "int": (INT8, "int-quantized")}


def _eight_bits(said: Mapping[str, Any], group: Mapping[str, Any], ignored: tuple[str, ...]) -> Scheme:
    """One of ``config_groups``, for all linears."""
    weights, activations = group.get("weights"), group.get("input_activations")
    kind = weights.get("type", "int") if isinstance(weights, Mapping) else None
    for name, part in (("weights", weights), ("input_activations", activations)):
        if (
            not part
            or part.get("num_bits") != 8
            or part.get("type", "int") != kind
            or kind not in _NUMBERS
            or not flag(part, "symmetric", True)
        ):
            raise UnsupportedModelError(
                f"quantization_config: {name} must be symmetric 8-bit floats or integers, both of one type; "
                "use a W8A8 checkpoint"
            )
    assert isinstance(weights, Mapping)
    assert isinstance(activations, Mapping)
    dtype, form = _NUMBERS[kind]
    # A file of several groups is of mixed precision, though all of them may be alike.
    expect(said, "format", (form, "naive-quantized", "mixed-precision"))
    expect(group, "format", (form, "naive-quantized"))
    for field, found in (
        ("output_activations", group.get("output_activations")),
        ("transform_config", said.get("transform_config")),
        ("sparsity_config", (said.get("sparsity_config") or {}).get("format", "dense") != "dense"),
    ):
        refused_unless(not found, f"{field} is not supported; use a checkpoint without it")
    expect(weights, "strategy", (CHANNEL, TENSOR, *((BLOCK,) if dtype == FP8 else ())))
    if weights.get("strategy") == BLOCK:
        block = _square(weights.get("block_structure"), "block_structure")
        refused_unless(
            activations.get("strategy") == "group" and activations.get("group_size") == block,
            f"weights in blocks of {block} need input_activations in groups of as many; use another checkpoint",
        )
        return Scheme(BLOCK, block, stored=True, ignored=ignored)
    dynamic = bool(activations.get("dynamic"))
    refused_unless(
        activations.get("strategy", TENSOR) == ("token" if dynamic else TENSOR),
        "input_activations must be dynamic with strategy 'token' or static with 'tensor'; use another checkpoint",
    )
    by = weights.get("strategy") or TENSOR
    return Scheme(by, static=not dynamic, stored=True, dtype=dtype, ignored=ignored)


_OBJECTS = ("config_groups", "weights", "input_activations", "sparsity_config")
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "targets")


def _check_types(said: Mapping[str, Any], place: str) -> None:
    """Fields that are objects or lists of names are such, at every depth."""
    for name, value in said.items():
        if name in _OBJECTS and value is not None and not isinstance(value, Mapping):
            raise UnsupportedModelError(
                f"{place}: {name} must be an object, not {value!r:.80}; correct config.json"
            )
        names = value if name in _LISTS and value is not None else []
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            raise UnsupportedModelError(
                f"{place}: {name} must be a list of names, not {value!r:.80}; correct config.json"
            )
        if name == "config_groups":
            for key, group in (value or {}).items():
                if not isinstance(group, Mapping):
                    raise UnsupportedModelError(
                        f"{place}: {name}.{key} must be an object, not {group!r:.80}; correct config.json"
                    )
        if isinstance(value, Mapping):
            _check_types(value, f"{place}.{name}")


def _square(size: Any, field: str) -> int:
    if not isinstance(size, list | tuple) or len(size) != 2 or size[0] != size[1] or type(size[0]) is not int:
        raise UnsupportedModelError(
            f"quantization_config: {field} {size!r} is not supported; blocks must be square, such as [128, 128]"
        )
    return size[0]


STORED: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
"""What reads a ``quantization_config``, by its ``quant_method``."""

COMPRESSED: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {}
"""What reads that of ``compressed-tensors``, by a format that it or one of its groups has."""
