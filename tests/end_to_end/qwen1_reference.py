"""Qwen 1 in plain PyTorch, from its paper (arXiv:2309.16609) and the config and behaviour of its modeling file.

It recomputes the whole sequence for every token, with the base of the rotary embedding that the prompt set.
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
from torch.nn.functional import linear, silu

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 32,
    "max_position_embeddings": 256,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "scale_attn_weights": True,
}


def write(folder: Path, seed: int = 0, **changes: Any) -> Qwen1:
    """Random fp32 weights in ``folder``, large enough that greedy tokens vary."""
    config = CONFIG | changes
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(*shape, generator=generator)

    hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
    tensors = {
        "transformer.wte.weight": random(config["vocab_size"], hidden),
        "transformer.ln_f.weight": random(hidden, mean=1.0),
        "lm_head.weight": random(config["vocab_size"], hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = {
            "ln_1.weight": random(hidden, mean=1.0),
            "attn.c_attn.weight": random(3 * hidden, hidden),
            "attn.c_attn.bias": random(3 * hidden),
            "attn.c_proj.weight": random(hidden, hidden),
            "ln_2.weight": random(hidden, mean=1.0),
            "mlp.w1.weight": random(inner, hidden),
            "mlp.w2.weight": random(inner, hidden),
            "mlp.c_proj.weight": random(hidden, inner),
        }
        if not config["no_bias"]:
            layer |= {"attn.c_proj.bias": random(hidden), "mlp.c_proj.bias": random(hidden)}
            layer |= {"mlp.w1.bias": random(inner), "mlp.w2.bias": random(inner)}
        tensors |= {f"transformer.h.{i}.{name}": tensor for name, tensor in layer.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return Qwen1(config, tensors)


class Qwen1:
    """The model in float64, but for rotary angles, which are products of float32 as in its own code."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def alpha(self, prompt: int) -> int:
        """How far the first forward, which sees ``prompt`` tokens, stretches the base."""
        if not self.config["use_dynamic_ntk"]:
            return 1
        return max(2 ** math.ceil(math.log(prompt / self.config["seq_length"], 2) + 1) - 1, 1)

    def logits(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Logits behind every token ``[tokens, vocabulary]``."""
        x = self.tensors["transformer.wte.weight"][torch.tensor(ids)]
        for i in range(self.config["num_hidden_layers"]):
            name = f"transformer.h.{i}"
            x = x + self.attention(f"{name}.attn", self.norm(f"{name}.ln_1", x), prompt)
            y = self.norm(f"{name}.ln_2", x)
            y = self.linear(f"{name}.mlp.w1", y) * silu(self.linear(f"{name}.mlp.w2", y))
            x = x + self.linear(f"{name}.mlp.c_proj", y)
        return self.linear("lm_head", self.norm("transformer.ln_f", x))

    def attention(self, name: str, x: torch.Tensor, prompt: int) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(0, 1)
            for part in self.linear(f"{name}.c_attn", x).chunk(3, dim=-1)
        )
        q, k = self.rotate(q, prompt), self.rotate(k, prompt)
        tokens, trained = len(x), self.config["seq_length"]
        if self.config["use_logn_attn"]:
            longer = [math.log(i, trained) if i > trained else 1.0 for i in range(1, tokens + 1)]
            q = q * torch.tensor(longer, dtype=q.dtype).unsqueeze(-1)
        score = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        return self.linear(f"{name}.c_proj", (score.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def rotate(self, x: torch.Tensor, prompt: int) -> torch.Tensor:
        size = x.shape[-1]
        base = self.config["rotary_emb_base"] * self.alpha(prompt) ** (size / (size - 2))
        frequency = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
        angle = torch.outer(torch.arange(x.shape[1]).float(), frequency)
        cos, sin = (torch.cat((f(angle), f(angle)), -1).double() for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["layer_norm_epsilon"])
        return x * root * self.tensors[f"{name}.weight"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def generate(self, prompt: list[int], count: int) -> Generation:
        """Greedy tokens and the logits that they were taken from."""
        ids, made = list(prompt), Generation([], [])
        for _ in range(count):
            logits = self.logits(ids, len(prompt))[-1]
            made.logits.append(logits.numpy().astype(np.float32))
            made.tokens.append(int(logits.argmax()))
            ids.append(made.tokens[-1])
        return made
