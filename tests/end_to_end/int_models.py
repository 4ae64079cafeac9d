"""Tiny transformers models whose linears have 4 or 8 bits: on disk as published checkpoints are, and widened.

Nothing of makeready is used. AWQ's and GPTQ's files are written element by element from the formats' definitions,
compressed-tensors' by that library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class IntFormat:
    """How linears are stored.

    Attributes:
        tool: "awq", "gptq", "gptq_v2" or "compressed-tensors"; "" for what is made while loading.
        group: inputs that share a scale; -1: all.
        zeros: whether there are zero points.
        ordered: whether inputs lie in groups at random.
    """

    tool: str
    bits: int = 4
    group: int = 128
    zeros: bool = False
    ordered: bool = False

    def config(self) -> dict[str, Any]:
        """The ``quantization_config``."""
        if self.tool == "awq":
            made = {
                "quant_method": "awq",
                "version": "gemm",
                "zero_point": True,
                "modules_to_not_convert": None,
            }
            return {**made, "bits": self.bits, "group_size": self.group}
        if self.tool.startswith("gptq"):
            made = {
                "quant_method": "gptq",
                "checkpoint_format": self.tool,
                "lm_head": False,
                "damp_percent": 0.1,
            }
            made |= {"bits": self.bits, "group_size": self.group, "sym": not self.zeros}
            return {**made, "desc_act": self.ordered}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": not self.zeros, "dynamic": False}
        weights |= (
            {"strategy": "channel", "group_size": None}
            if self.group < 0
            else {"strategy": "group", "group_size": self.group}
        )
        weights["actorder"] = "group" if self.ordered else None
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        made = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
        return {**made, "config_groups": {"group_0": group}, "kv_cache_scheme": None}


@dataclass
class IntWeight:
    """``(q - zero) * scale`` by the group of each input: q, zero ``[N, G]``, fp16 scale, group ``[K]``."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: torch.Tensor

    def wide(self) -> torch.Tensor:
        """float64 ``[N, K]``."""
        group = self.group.long()
        return (self.q.double() - self.zero.double()[:, group]) * self.scale.double()[:, group]


def quantized(weight: torch.Tensor, form: IntFormat, generator: torch.Generator) -> IntWeight:
    """Weights to the nearest step of their group."""
    rows, inputs = weight.shape
    size = inputs if form.group < 0 else form.group
    group = torch.arange(inputs) // size
    if form.ordered:
        group = group[torch.randperm(inputs, generator=generator)]
    most, groups = 2**form.bits - 1, int(group.max()) + 1
    q, scale = torch.empty(rows, inputs), torch.empty(rows, groups)
    zero = torch.full((rows, groups), 2.0 ** (form.bits - 1))
    for g in range(groups):
        part = weight[:, group == g]
        if form.zeros:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            step = ((high - low) / most).half().float()
            zero[:, g] = (-low / step).round().clamp(0, most)
        else:
            step = (part.abs().amax(1) / (most / 2)).half().float()
        scale[:, g] = step
        q[:, group == g] = (part / step[:, None] + zero[:, g, None]).round().clamp(0, most)
    return IntWeight(q.int(), scale.half(), zero.int(), group.int())


def words(x: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """``x[..., n]`` as int32 with neighbours along the last axis: field i of a word is its element ``order[i]``."""
    parts = x.long().reshape(*x.shape[:-1], -1, len(order))
    made = sum(parts[..., at] << (bits * i) for i, at in enumerate(order))
    assert isinstance(made, torch.Tensor)
    return torch.where(made >= 2**31, made - 2**32, made).int()


def stored(name: str, made: IntWeight, form: IntFormat) -> dict[str, torch.Tensor]:
    """What a checkpoint holds for the linear ``name``."""
    bits, per = form.bits, tuple(range(32 // form.bits))
    if form.tool == "awq":
        return {
            f"{name}.qweight": words(made.q.T, 4, AWQ_ORDER),
            f"{name}.qzeros": words(made.zero.T, 4, AWQ_ORDER),
            f"{name}.scales": made.scale.T.contiguous(),
        }
    if form.tool.startswith("gptq"):
        zero = made.zero.T - int(form.tool == "gptq")
        return {
            f"{name}.qweight": words(made.q, bits, per).T.contiguous(),
            f"{name}.qzeros": words(zero % 2**bits, bits, per),
            f"{name}.scales": made.scale.T.contiguous(),
            f"{name}.g_idx": made.group,
        }
    middle = 2 ** (bits - 1)
    tensors = {
        f"{name}.weight_packed": pack_to_int32((made.q - middle).to(torch.int8), bits),
        f"{name}.weight_scale": made.scale,
        f"{name}.weight_shape": torch.tensor(made.q.shape),
    }
    if form.zeros:
        zero = (made.zero - middle).to(torch.int8)
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    if form.ordered:
        tensors[f"{name}.weight_g_idx"] = made.group
    return tensors


def quantize_ints(
    model: Any, form: IntFormat, skip: tuple[str, ...] = ("lm_head", "mlp.gate")
) -> dict[str, Any]:
    """Widen the model's linears to what they stand for, in place; returns what a checkpoint holds for them.

    Experts that transformers keeps in one tensor are linears ``experts.0.gate_proj`` and so on.
    """
    tensors: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(7)

    def one(name: str, weight: torch.Tensor) -> None:
        made = quantized(weight.detach().float(), form, generator)
        weight.data.copy_(made.wide())
        tensors[f"{name}.weight"] = None
        tensors.update(stored(name, made, form))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(skip):
            one(name, module.weight)
        for stacked in ("gate_up_proj", "down_proj"):
            if isinstance(weights := getattr(module, stacked, None), nn.Parameter):
                tensors[f"{name}.{stacked}"] = None
                for e, weight in enumerate(weights):
                    halves = weight.chunk(2) if stacked == "gate_up_proj" else (weight,)
                    parts = ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",)
                    for part, half in zip(parts, halves, strict=True):
                        one(f"{name}.{e}.{part}", half)
    return tensors


def save_ints(folder: Path, tensors: dict[str, Any], form: IntFormat, **said: Any) -> None:
    """Change the checkpoint in ``folder``, which holds the wide model, to the quantized one."""
    file = folder / "model.safetensors"
    kept = {k: v for k, v in (load_file(file) | tensors).items() if v is not None}
    save_file({k: v.contiguous() for k, v in kept.items()}, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form.config() | said}))
