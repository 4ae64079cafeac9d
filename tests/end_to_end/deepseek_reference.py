"""DeepSeek-V1 (DeepSeekMoE, arXiv:2401.06066) in plain PyTorch, from its paper, config and modeling file.

It recomputes the whole sequence for every token, in float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Generation
from safetensors.torch import save_file
from torch.nn.functional import silu

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def write(folder: Path, seed: int = 0, **changes: Any) -> DeepSeek:
    """Random fp32 weights in ``folder``, large enough that greedy tokens vary."""
    config = CONFIG | changes
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(*shape, generator=generator)

    hidden, width, vocabulary = config["hidden_size"], config["moe_intermediate_size"], config["vocab_size"]

    def mlp(name: str, inner: int) -> dict[str, torch.Tensor]:
        sides = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        return {f"{name}.{part}.weight": random(*shape) for part, shape in sides.items()}

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "model.norm.weight": random(hidden, mean=1.0),
        "lm_head.weight": random(vocabulary, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{name}.self_attn.{part}.weight"] = random(hidden, hidden)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{part}.weight"] = random(hidden, mean=1.0)
        if not sparse(config, i):
            tensors |= mlp(f"{name}.mlp", config["intermediate_size"])
            continue
        tensors[f"{name}.mlp.gate.weight"] = random(config["n_routed_experts"], hidden)
        for e in range(config["n_routed_experts"]):
            tensors |= mlp(f"{name}.mlp.experts.{e}", width)
        if config["n_shared_experts"]:
            tensors |= mlp(f"{name}.mlp.shared_experts", width * config["n_shared_experts"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return DeepSeek(config, tensors)


def sparse(config: dict[str, Any], layer: int) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


class DeepSeek:
    """The model in float64, but for rotary angles, which are products of float32."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits behind every token ``[tokens, vocabulary]``."""
        x = self.tensors["model.embed_tokens.weight"][torch.tensor(ids)]
        for i in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{i}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x))
            y = self.norm(f"{name}.post_attention_layernorm", x)
            x = x + (self.experts if sparse(self.config, i) else self.mlp)(f"{name}.mlp", y)
        return self.linear("lm_head", self.norm("model.norm", x))

    def experts(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scores = self.linear(f"{name}.gate", x).softmax(-1)
        out = torch.zeros_like(x)
        for t, row in enumerate(scores):
            weights, chosen = row.topk(self.config["num_experts_per_tok"])
            if self.config["norm_topk_prob"]:
                weights = weights / weights.sum()
            for weight, e in zip(weights, chosen.tolist(), strict=True):
                out[t] += weight * self.mlp(f"{name}.experts.{e}", x[t])
        if self.config["n_shared_experts"]:
            out = out + self.mlp(f"{name}.shared_experts", x)
        return out

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", y)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self.linear(f"{name}.{part}_proj", x).unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qkv"
        )
        q, k = self.rotate(q), self.rotate(k)
        score = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        score = score.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        return self.linear(f"{name}.o_proj", (score.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        frequency = 1.0 / self.config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        angle = torch.outer(torch.arange(x.shape[1]).float(), frequency)
        cos, sin = (torch.cat((f(angle), f(angle)), -1).double() for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * root * self.tensors[f"{name}.weight"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def generate(self, prompt: list[int], count: int) -> Generation:
        """Greedy tokens and the logits that they were taken from."""
        ids, made = list(prompt), Generation([], [])
        for _ in range(count):
            logits = self.logits(ids)[-1]
            made.logits.append(logits.numpy().astype(np.float32))
            made.tokens.append(int(logits.argmax()))
            ids.append(made.tokens[-1])
        return made
