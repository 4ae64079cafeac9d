"""Tiny transformers models quantized to 8-bit floats or integers, as published checkpoints are and simulated.

Nothing of makeready is used: rounding is PyTorch's, products are float64; stored integers are written by the
compressed-tensors library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

LARGEST = {"float": 448.0, "int": 127.0}


@dataclass(frozen=True)
class Format:
    """How linears are stored.

    Attributes:
        weights: "channel", "tensor" or "block".
        block: of weights, and of activations' groups.
        static: whether activations have one stored scale; else one a token or group.
        tool: whose spelling config and tensors have: "fp8" or "compressed-tensors".
        scale_dtype: of stored weight scales.
        number: "float" or "int".
    """

    weights: str
    block: int = 0
    static: bool = False
    tool: str = "fp8"
    scale_dtype: torch.dtype = torch.float32
    number: str = "float"

    @property
    def largest(self) -> float:
        return LARGEST[self.number]

    def config(self) -> dict[str, Any]:
        """The ``quantization_config``."""
        if self.tool == "fp8":
            made: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
            if self.static:
                made |= {"activation_scheme": "static", "ignored_layers": ["lm_head"]}
            if self.block:
                made |= {"weight_block_size": [self.block, self.block]}
                made |= {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}
            return made
        weights: dict[str, Any] = {"num_bits": 8, "type": self.number, "symmetric": True, "dynamic": False}
        activations = {
            **weights,
            "dynamic": not self.static,
            "strategy": "tensor" if self.static else "token",
        }
        weights["strategy"] = self.weights
        if self.block:
            weights["block_structure"] = [self.block, self.block]
            activations |= {"strategy": "group", "group_size": self.block}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": f"{self.number}-quantized",
            "config_groups": {"group_0": {**group, "output_activations": None}},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }

    @property
    def scale(self) -> str:
        return "weight_scale_inv" if self.tool == "fp8" and self.block else "weight_scale"


def rounded(x: torch.Tensor, form: Format) -> torch.Tensor:
    x = x.clamp(-form.largest, form.largest)
    return x.round().to(torch.int8) if form.number == "int" else x.to(torch.float8_e4m3fn)


def by_library(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales as the compressed-tensors library has them, whose scales are 127.5ths of the largest."""
    # It takes seconds to import.
    from compressed_tensors.compressors import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    (group,) = form.config()["config_groups"].values()
    scheme = QuantizationScheme(**group)
    over = {"dim": 1, "keepdim": True} if form.weights == "channel" else {}
    low, high = weight.amin(**over), weight.amax(**over)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    scale = scale.reshape(-1, 1) if form.weights == "channel" else scale.reshape(1)
    scale = scale.to(form.scale_dtype)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.reshape(scale.shape)}
    made = IntQuantizationCompressor.compress(state, scheme)
    assert set(made) == {"weight", "weight_scale"}
    return made["weight"], made["weight_scale"].float()


def quantize_weight(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit weights, and scales in the shape in which they are stored."""
    if form.number == "int" and form.tool == "compressed-tensors":
        return by_library(weight, form)
    rows, columns = weight.shape
    if form.weights == "tensor":
        scale = weight.abs().max() / form.largest
        return rounded(weight / scale, form), scale.reshape(() if form.tool == "fp8" else (1,))
    if form.weights == "channel":
        scale = weight.abs().amax(1, keepdim=True) / form.largest
        scale = scale.to(form.scale_dtype).float()
        return rounded(weight / scale, form), scale
    size = form.block
    made, scales = torch.empty_like(weight), []
    for top in range(0, rows, size):
        for left in range(0, columns, size):
            part = weight[top : top + size, left : left + size]
            scales.append(part.abs().max() / form.largest)
            made[top : top + size, left : left + size] = part / scales[-1]
    return rounded(made, form), torch.stack(scales).view(-(-rows // size), -(-columns // size))


def dequantize_weight(q: torch.Tensor, scale: torch.Tensor, form: Format) -> torch.Tensor:
    wide, scale = q.double(), scale.double()
    if form.block:
        for top in range(scale.shape[0]):
            for left in range(scale.shape[1]):
                size = form.block
                wide[top * size : (top + 1) * size, left * size : (left + 1) * size] *= scale[top, left]
        return wide
    return wide * scale


class QuantizedLinear(nn.Module):
    """A linear with quantized weights that quantizes what it is given."""

    def __init__(self, linear: nn.Linear, form: Format, input_scale: float | None) -> None:
        super().__init__()
        self.form, self.input_scale, self.bias = form, input_scale, linear.bias
        self.q, self.scale = quantize_weight(linear.weight.detach(), form)
        self.wide = dequantize_weight(self.q, self.scale, form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group, width = self.form.block or x.shape[-1], x.shape[-1]
        grouped = nn.functional.pad(x, (0, -width % group)).unflatten(-1, (-1, group))
        if self.input_scale is None:
            scale = grouped.abs().amax(-1, keepdim=True) / self.form.largest
        else:
            scale = torch.tensor(self.input_scale)
        scale = scale.clamp_min(1e-30)  # of nothing but zeros
        near = (rounded(grouped / scale, self.form).double() * scale.double()).flatten(-2)[..., :width]
        y = near @ self.wide.T
        return (y if self.bias is None else y + self.bias.double()).float()


# What is read by several linears is quantized once, with the largest of their static scales.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def static_scales(model: Any, form: Format) -> dict[str, float]:
    """Some scale for every linear, all different, wide enough for most values."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    return {name: (4.9 + 0.3 * (at % 7)) / form.largest for at, name in enumerate(names)}


def quantize_model(
    model: Any, form: Format, chosen: Callable[[str], bool] = lambda name: True
) -> dict[str, torch.Tensor]:
    """Quantize the model's linears in place, of those ``chosen`` by name all but lm_head; returns what a checkpoint
    holds for them.
    """
    tensors: dict[str, torch.Tensor] = {}
    stored = static_scales(model, form) if form.static else {}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head" or not chosen(name):
            continue
        parent, _, last = name.rpartition(".")
        together = next((group for group in TOGETHER if last in group), (last,))
        used = max(stored[f"{parent}.{n}"] for n in together) if form.static else None
        made = QuantizedLinear(linear, form, used)
        setattr(model.get_submodule(parent), last, made)
        tensors[f"{name}.weight"] = made.q
        tensors[f"{name}.{form.scale}"] = made.scale.to(form.scale_dtype)
        if form.static:
            value = torch.tensor(stored[name])
            tensors[f"{name}.input_scale"] = value if form.tool == "fp8" else value[None]
    return tensors


def save_quantized(folder: Path, tensors: dict[str, torch.Tensor], form: Format, **said: Any) -> None:
    """Change the checkpoint in ``folder``, which holds the wide model, to the quantized one; ``said``: of its
    quantization_config.
    """
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in (load_file(file) | tensors).items()}, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form.config() | said}))
