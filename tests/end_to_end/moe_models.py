"""Tiny mixtures of experts as their files come: stacked, in GGUF, quantized."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoint_files import finish_gguf, interleave, start_gguf
from quantized_models import Format, QuantizedLinear, quantize_model
from safetensors.torch import load_file, save_file
from torch import nn

PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's names of the second


def stack(folder: Path) -> None:
    """Rewrite the checkpoint in ``folder`` with stacked experts, as transformers 5 holds them in memory."""
    file = folder / "model.safetensors"
    kept, experts = {}, {}
    for name, tensor in load_file(file).items():
        match = re.fullmatch(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight(.*)", name)
        if match is None:
            kept[name.replace("block_sparse_moe.gate", "mlp.gate")] = tensor
            continue
        layer, expert, part, scale = match.groups()
        part = next((ours for ours, theirs in PARTS.items() if part == theirs), part)
        experts.setdefault((layer, part, scale), {})[int(expert)] = tensor

    def stacked(layer: str, part: str, scale: str) -> torch.Tensor:
        return torch.stack([tensor for _, tensor in sorted(experts[layer, part, scale].items())])

    for layer, scale in {(layer, scale) for layer, _, scale in experts}:
        gate_up = [stacked(layer, part, scale) for part in ("gate_proj", "up_proj")]
        kept[f"{layer}.mlp.experts.gate_up_proj{scale}"] = torch.cat(gate_up, 1)
        kept[f"{layer}.mlp.experts.down_proj{scale}"] = stacked(layer, "down_proj", scale)
    save_file(kept, file)


GGUF = {  # architecture: what its converter calls the sizes of experts, and config fields
    "qwen2moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    "llama": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "deepseek": {
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "leading_dense_block_count": "first_k_dense_replace",
    },
}


def gguf_file(folder: Path, architecture: str, quantized: gguf.GGMLQuantizationType | None = None) -> Path:
    """The checkpoint in ``folder`` as llama.cpp's converter writes it; experts in a block type where one is given."""
    config = json.loads((folder / "config.json").read_text())
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if other in config:  # transformers writes one of the two
            config.setdefault(name, config[other])
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    writer = start_gguf(folder / "model.gguf", architecture, config)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    for key, field in GGUF[architecture].items():
        writer.add_uint32(f"{architecture}.{key}", config[field])
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for name, tensor in stacked_by_part(load_file(folder / "model.safetensors")).items():
        values = tensor.float().numpy()
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if architecture in ("llama", "deepseek") and f".{part}_proj." in name:
                values = interleave(values, config[heads])
        values = np.ascontiguousarray(values)
        stored = names.get_name(name, (".weight", ".bias"))
        if quantized is not None and ".experts." in name:
            blocks = gguf.quants.quantize(values, quantized)
            writer.add_tensor(stored, blocks, raw_dtype=quantized)
        else:
            writer.add_tensor(stored, values)
    return finish_gguf(writer)


def stacked_by_part(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+\.weight)", name)
        if match is None:
            made[name] = tensor
        else:
            made.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    return {
        name: torch.stack([one for _, one in sorted(found.items())]) if isinstance(found, dict) else found
        for name, found in made.items()
    }


class QuantizedExperts(nn.Module):
    """transformers' experts, with each projection of each expert a :class:`QuantizedLinear`."""

    def __init__(self, experts: Any, form: Format) -> None:
        super().__init__()
        self.parts: list[dict[str, QuantizedLinear]] = []
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            weights = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            self.parts.append({name: self._linear(w, form) for name, w in weights.items()})

    @staticmethod
    def _linear(weight: torch.Tensor, form: Format) -> QuantizedLinear:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.detach().clone())
        return QuantizedLinear(linear, form, None)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t, (experts, by) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            for e, weight in zip(experts, by, strict=True):
                p, row = self.parts[e], x[t : t + 1]
                h = nn.functional.silu(p["gate_proj"](row)) * p["up_proj"](row)
                out[t] += weight * p["down_proj"](h)[0]
        return out


def quantize_mixture(model: Any, form: Format) -> dict[str, torch.Tensor]:
    """Quantize the model's linears and experts in place; returns what a checkpoint holds for them."""
    tensors = quantize_model(model, form)
    for i, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        made = layer.mlp.experts = QuantizedExperts(layer.mlp.experts, form)
        for e, parts in enumerate(made.parts):
            for name, linear in parts.items():
                at = f"model.layers.{i}.mlp.experts.{e}.{name}"
                tensors |= {f"{at}.weight": linear.q, f"{at}.{form.scale}": linear.scale}
    return tensors
