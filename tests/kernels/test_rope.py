"""Rotary tables and rotation against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.models.family import build
from makeready.graphs.plan.constants import rope_table
from makeready.kernels.rope import rope, rope_rows_dynamic

CONTEXT = 640
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SETTINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "llama3-8192": LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0},
    "yarn": YARN,
    "yarn-long": YARN | {"factor": 40.0, "original_max_position_embeddings": 4096},
    "yarn-betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn-mscale-alone": YARN | {"mscale": 0.707},
    "yarn-untruncated": YARN | {"truncate": False},
    "yarn-attention": YARN | {"attention_factor": 0.8},
}


def config_of(settings: dict, head_dim: int, theta: float) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": theta, **settings},
    }


def theirs(config: dict, positions: torch.Tensor) -> torch.Tensor:
    """Rows ``[T, head_dim]`` in our layout: their tables hold every angle twice."""
    module = LlamaRotaryEmbedding(LlamaConfig(**config))
    cos, sin = module(torch.zeros(1), positions[None].long())
    half = config["head_dim"] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


@pytest.mark.parametrize(("head_dim", "theta"), [(32, 10000.0), (80, 500000.0), (128, 1000000.0)])
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_are_transformers(name, head_dim, theta):
    config = config_of(SETTINGS[name], head_dim, theta)
    normalised = normalise_config(config)
    generated = next(
        p.declaration.source
        for n, p in build(normalised, context_len=CONTEXT, activation="float32").named_parameters()
        if n == "rope.table"
    )
    assert generated.function == "rope_table"
    made = torch.from_numpy(rope_table(**generated.arguments))
    wanted = theirs(config, torch.arange(CONTEXT))
    assert made.dtype == torch.float32
    # One last bit of a frequency moves the angle at 640 by 640 * 2**-24.
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(made[:64], wanted[:64], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [32, 80])
def test_dynamic_rows_are_transformers(head_dim):
    """A whole prompt in one forward, then one token at a time, as generate() does."""
    settings = {"rope_type": "dynamic", "factor": 3.0}
    config = config_of(settings, head_dim, 10000.0)
    module = LlamaRotaryEmbedding(LlamaConfig(**config))
    half = head_dim // 2

    def forward(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = module(torch.zeros(1), positions[None].long())
        return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)

    for prompt in (1, 127, 128, 129, 300):
        module = LlamaRotaryEmbedding(LlamaConfig(**config))
        wanted = torch.cat(
            [forward(torch.arange(prompt)), *(forward(torch.tensor([prompt + i])) for i in range(4))]
        )
        made = rope_rows_dynamic(
            torch.arange(prompt + 4, dtype=torch.int32),
            torch.ones(prompt + 4, dtype=torch.int32),
            torch.tensor([9999, prompt, 7], dtype=torch.int32),
            rotary_dim=head_dim,
            theta=10000.0,
            factor=3.0,
            original_context=128,
        )
        torch.testing.assert_close(made, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_rotation_is_transformers(head_dim):
    torch.manual_seed(head_dim)
    x, angle = torch.randn(5, 3 * head_dim), torch.rand(5, head_dim // 2) * 100
    cos, sin = (f(torch.cat((angle, angle), dim=-1))[None] for f in (torch.cos, torch.sin))
    heads = x.view(1, 5, 3, head_dim).transpose(1, 2)
    wanted = apply_rotary_pos_emb(heads, heads, cos, sin)[0].transpose(1, 2).reshape(5, -1)
    made = rope(x, torch.cat((angle.cos(), angle.sin()), dim=-1), heads=3, head_dim=head_dim)
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)


def test_partial_rotation_leaves_the_rest_alone():
    torch.manual_seed(0)
    x, angle = torch.randn(4, 2 * 40), torch.rand(4, 5) * 100
    rows = torch.cat((angle.cos(), angle.sin()), dim=-1)
    made = rope(x, rows, heads=2, head_dim=40).view(4, 2, 40)
    turned = rope(x.view(4, 2, 40)[..., :10].flatten(1), rows, heads=2, head_dim=10)
    assert torch.equal(made[..., 10:], x.view(4, 2, 40)[..., 10:])
    assert torch.equal(made[..., :10].flatten(1), turned)


def test_rows_keep_their_length_but_for_yarns_magnitude():
    arguments = {"context_len": 50, "rotary_dim": 16}
    for name, magnitude in (("default", 1.0), ("llama3", 1.0), ("yarn", 0.1 * math.log(4) + 1)):
        table = torch.from_numpy(rope_table(**arguments, rope={"rope_theta": 1e4, **SETTINGS[name]}))
        length = table.view(50, 2, 8).square().sum(1).sqrt()
        torch.testing.assert_close(length, torch.full_like(length, magnitude))
