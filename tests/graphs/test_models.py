"""A model from outside the packages, by registration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from torch import nn

from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.checkpoint import open_checkpoint
from makeready.graphs.layers.attention import Attention
from makeready.graphs.layers.dense import GatedMLP, RMSNorm
from makeready.graphs.models import family
from makeready.graphs.models.decoder import Decoder, DecoderConfig, dense
from makeready.graphs.models.family import Model, UnsupportedModelError, model
from makeready.kernels import elementwise

CONFIG: dict[str, Any] = {
    "model_type": "toy_parallel",
    "wide": 24,  # its own name for hidden_size
    "vocab_size": 61,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class ParallelLayer(nn.Module):
    """Attention and MLP of the same norm, added at once."""

    def __init__(self, c: DecoderConfig, index: int) -> None:
        super().__init__()
        self.norm = RMSNorm(f"blocks.{index}.norm", c.hidden, c.norm_eps)
        self.attention = Attention(
            *(f"blocks.{index}.attn", f"layers.{index}"),
            hidden=c.hidden,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            qkv_bias=False,
            output_bias=False,
        )
        self.mlp = GatedMLP(f"blocks.{index}.mlp", c.hidden, c.intermediate, bias=False)

    def forward(self, x: Any, rows: Any, inputs: Any) -> Any:
        y = self.norm(x)
        return elementwise.add(elementwise.add(self.attention(y, rows, inputs), self.mlp(y)), x)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_FAMILIES", dict(family.families()))

    def rename(config: dict[str, Any], source: str) -> None:
        if "wide" in config:
            config["hidden_size"] = config.pop("wide")

    @model("ToyParallelModel", model_type="toy_parallel", defaults={"rms_norm_eps": 1e-4}, rename=rename)
    def build(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
        return Decoder(dense(config), context_len=context_len, activation=activation, layer=ParallelLayer)


@pytest.mark.usefixtures("toy")
def test_a_model_is_added_by_registration_alone() -> None:
    checkpoint = open_checkpoint("dummy", config=CONFIG)
    assert checkpoint.config["architectures"] == ["ToyParallelModel"]
    assert checkpoint.config["rms_norm_eps"] == 1e-4
    llm = LLM(checkpoint=checkpoint, max_rows=2, weight_dtype="float32", page_size=4)
    prompt = np.arange(9).tolist()
    made = llm.generate(token_ids=[prompt], sampling=SamplingParams(temperature=0, max_new_tokens=4))[0]
    assert len(made.token_ids) == 4
    assert "blocks.1.mlp.up_proj.weight" in checkpoint.tensors


def test_without_it_the_name_is_unknown() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"ToyParallelModel is not supported; supported are .*QWen"
    ):
        family.family_of({"architectures": ["ToyParallelModel"]})
