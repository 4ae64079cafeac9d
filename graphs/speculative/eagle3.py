"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): a layer that was trained to go on from the model's hidden states.

Its entry of a token is made of the token's embedding and of the hidden state before the token: three of the model's,
from layers at different depths, which ``fc`` brings to its width, or in a chain what it gave itself. Checkpoints are
those published for SGLang and vLLM as ``LlamaForCausalLMEagle3``. Its vocabulary is a part of the model's: token d
of its head is token ``d + d2t[d]``.

    T tokens, C features
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from makeready.graphs.checkpoint.paired import DRAFT, FIELD
from makeready.graphs.layers.attention import Attention
from makeready.graphs.layers.dense import BY_OUTPUTS, GatedMLP, Linear, RMSNorm
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import Parameter, moved, parameter
from makeready.graphs.layers.rope import RotaryRows
from makeready.graphs.models.decoder import dense
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.speculative.base import Setting, method
from makeready.graphs.speculative.chain import Chained, Followed
from makeready.graphs.speculative.second import check_second
from makeready.graphs.speculative.states import OnStates, leave
from makeready.graphs.speculative.taps import Taps, decoder_of
from makeready.kernels import elementwise
from makeready.kernels import embedding as embeddings
from makeready.kernels.gemm import linear as gemm
from makeready.kernels.step.hidden import spread_logits

ARCHITECTURE = "LlamaForCausalLMEagle3"
# Heads of other makes: what a config may say that is not computed here.
_OTHERWISE = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "tie_word_embeddings")


class Eagle3(OnStates):
    """The head, as a drafter of :mod:`~makeready.graphs.speculative.chain`."""

    def __init__(self, target: Model, setting: Setting) -> None:
        super().__init__()
        config, drafting = setting.checkpoint.config[FIELD], setting.checkpoint.parts[DRAFT]
        model, read = decoder_of(target, "eagle3"), dense(config)
        places = layers_before(config, len(model.layers))
        self.taps = Taps(target, "eagle3", places)
        self.activation, self.width = setting.activation, read.hidden
        self.vocabulary, drafted = read.vocabulary, config.get("draft_vocab_size") or read.vocabulary
        prefix = "model." if drafting.find("model.fc.weight") is not None else ""
        layer = f"{prefix}midlayer"
        norm = functools.partial(RMSNorm, width=read.hidden, eps=read.norm_eps)
        bias = bool(config.get("bias"))
        taken = len(places) * model.config.hidden
        self.fc = Linear(f"{prefix}fc", read.hidden, taken, bias=bias, shard=BY_OUTPUTS)
        self.input_norm, self.hidden_norm = norm(f"{layer}.input_layernorm"), norm(f"{layer}.hidden_norm")
        self.rope = RotaryRows(read.rope, read.rotary_dim, setting.limits.context_len)
        self.attention = Attention(
            f"{layer}.self_attn",
            "layers.0",
            hidden=read.hidden,
            heads=read.heads,
            kv_heads=read.kv_heads,
            head_dim=read.head_dim,
            qkv_bias=bool(config.get("attention_bias")),
            output_bias=bool(config.get("attention_bias")),
            inputs=2 * read.hidden,
        )
        self.mlp_norm = norm(f"{layer}.post_attention_layernorm")
        self.mlp = GatedMLP(
            f"{layer}.mlp", read.hidden, read.intermediate, bias=False, activation=read.activation
        )
        self.norm = norm(f"{prefix}norm")
        self.head = parameter((drafted, read.hidden), "lm_head.weight", shard=BY_OUTPUTS, quantizable=True)
        self.d2t = parameter((drafted,), "d2t", dtype="int64") if drafted != read.vocabulary else None
        own = f"{prefix}embed_tokens.weight"
        if drafting.find(own) is not None:
            self.embedding = parameter((read.vocabulary, read.hidden), own, shard=BY_OUTPUTS)
        for tensor in self.parameters():
            assert isinstance(tensor, Parameter)
            tensor.declaration = moved(tensor.declaration, DRAFT)
        # Not a parameter of its own: the model's, where the checkpoint has none.
        self._embeddings = (getattr(self, "embedding", model.embedding),)
        if self._embeddings[0].shape[1] != read.hidden:
            raise PlanError(
                f"the head of speculative.checkpoint is {read.hidden} wide and has no embed_tokens, and those of the "
                f"model are {self._embeddings[0].shape[1]} wide; choose one that was made for the model"
            )

    def follow(self, ids_T: torch.Tensor, inputs: Inputs) -> None:
        state = self.fc(functools.reduce(elementwise.concatenate, self.taps.heard()))
        at = leave(state, inputs)
        self._layer(ids_T, self.begin(at), at)

    def step(
        self, ids_R: torch.Tensor, before_RC: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert before_RC is not None
        y_RC = self._layer(ids_R, before_RC, inputs)
        logits = gemm.linear(self.norm(y_RC), self.head, out_dtype="float32")
        if self.d2t is not None:
            logits = spread_logits(logits, self.d2t, vocabulary=self.vocabulary)
        return logits, y_RC

    def _layer(self, ids_T: torch.Tensor, before_TC: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The layer behind tokens and the hidden states before them."""
        tokens_TC = embeddings.embedding(ids_T, self._embeddings[0], out_dtype=self.activation)
        both = elementwise.concatenate(self.input_norm(tokens_TC), self.hidden_norm(before_TC))
        x_TC = elementwise.add(self.attention(both, self.rope(inputs), inputs), before_TC)
        return elementwise.add(self.mlp(self.mlp_norm(x_TC), inputs), x_TC)


def layers_before(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers whose inputs the head reads, of a model of so many.

    By default those of the paper's code: 2, the middle, and the last but two. ``eagle_config`` of SGLang's heads
    counts outputs, so that layer i there is what layer i + 1 reads; vLLM's, beside the other fields, counts inputs.
    """
    sglang = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if sglang:
        return tuple(i + 1 for i in sglang)
    return tuple(config.get("eagle_aux_hidden_state_layer_ids") or (2, layers // 2, layers - 3))


@dataclass(frozen=True)
class Eagle3Method(Chained):
    """A trained head of one layer, in a chain."""

    name: str = "eagle3"
    second: bool = True

    def model(self, target: Model, setting: Setting) -> Model:
        config = setting.checkpoint.config[FIELD]
        named = (config.get("architectures") or ["(none)"])[0]
        if named != ARCHITECTURE:
            raise PlanError(
                f"speculative.method=eagle3 reads heads of the architecture {ARCHITECTURE}, speculative.checkpoint "
                f"has {named}; choose such a head, or speculative.method=draft for a whole model"
            )
        check_second(self.name, config, setting.limits)
        otherwise = next((field for field in _OTHERWISE if config.get(field)), None)
        if otherwise is not None or config["num_hidden_layers"] != 1:
            field = otherwise or "num_hidden_layers"
            raise PlanError(
                f"speculative.method=eagle3 has heads of one layer as the paper has it, and speculative.checkpoint "
                f"says {field}={config[field]}; choose another head"
            )
        return Followed(target, Eagle3(target, setting), setting)


method(Eagle3Method())
