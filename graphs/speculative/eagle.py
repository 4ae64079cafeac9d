"""EAGLE (Li et al. 2024, arXiv:2401.15077): a layer that was trained to give the model's next hidden state.

Its entry of a token is made of the token's embedding and of the hidden state before the token, which ``fc`` brings to
one width: the model's behind its last norm, or in a chain what the layer gave itself. Embedding and head are the
model's, and no norm is between. Checkpoints are those published for EAGLE-1 and EAGLE-2 (arXiv:2406.16858), which
differ in the trees that are made of drafts: here these are a chain, or a tree of one shape. Configs often say
``LlamaForCausalLM``.

    T tokens, C features
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from makeready.graphs.checkpoint.paired import DRAFT, FIELD
from makeready.graphs.layers.attention import Attention
from makeready.graphs.layers.dense import BY_OUTPUTS, GatedMLP, Linear, RMSNorm
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import Parameter, moved
from makeready.graphs.layers.rope import RotaryRows
from makeready.graphs.models.decoder import dense
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.speculative.base import Setting, method
from makeready.graphs.speculative.chain import Chained, Followed
from makeready.graphs.speculative.second import check_second
from makeready.graphs.speculative.states import OnStates, leave
from makeready.graphs.speculative.taps import NORMED, Taps, decoder_of
from makeready.kernels import elementwise
from makeready.kernels import embedding as embeddings
from makeready.kernels.gemm import linear as gemm

ARCHITECTURES = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")  # SGLang's name, and vLLM's
PLAIN = "LlamaForCausalLM"  # published heads say so, and have fc, which whole models have not
MLP_NORM = "layers.0.post_attention_layernorm"


class Eagle(OnStates):
    """The head, as a drafter of :mod:`~makeready.graphs.speculative.chain`."""

    def __init__(self, target: Model, setting: Setting) -> None:
        super().__init__()
        config, drafting = setting.checkpoint.config[FIELD], setting.checkpoint.parts[DRAFT]
        model, read = decoder_of(target, "eagle"), dense(config)
        if read.hidden != model.config.hidden:
            raise PlanError(
                f"the head of speculative.checkpoint is {read.hidden} wide, and the hidden states of the model are "
                f"{model.config.hidden} wide; choose one that was made for the model"
            )
        self.taps = Taps(target, "eagle", [NORMED])
        self.activation, self.width = setting.activation, read.hidden
        prefix = "model." if drafting.find("model.fc.weight") is not None else ""
        # What a file has counts: EAGLE's own code takes ``bias`` for true where a config says nothing, vLLM takes it
        # for one of attention. A dummy has no table yet.
        bias, qkv_bias = config.get("bias", True), config.get("qkv_bias") or config.get("attention_bias")
        if drafting.find(f"{prefix}fc.weight") is not None:
            bias = drafting.find(f"{prefix}fc.bias")
            qkv_bias = drafting.find(f"{prefix}layers.0.self_attn.q_proj.bias")
        self.fc = Linear(f"{prefix}fc", read.hidden, 2 * read.hidden, bias=bool(bias), shard=BY_OUTPUTS)
        self.rope = RotaryRows(read.rope, read.rotary_dim, setting.limits.context_len)
        self.attention = Attention(
            f"{prefix}layers.0.self_attn",
            "layers.0",
            hidden=read.hidden,
            heads=read.heads,
            kv_heads=read.kv_heads,
            head_dim=read.head_dim,
            qkv_bias=bool(qkv_bias),
            output_bias=False,
        )
        self.mlp_norm = RMSNorm(prefix + MLP_NORM, read.hidden, read.norm_eps)
        self.mlp = GatedMLP(
            f"{prefix}layers.0.mlp", read.hidden, read.intermediate, bias=False, activation=read.activation
        )
        for tensor in self.parameters():
            assert isinstance(tensor, Parameter)
            tensor.declaration = moved(tensor.declaration, DRAFT)
        # The model's: no parameters of its own. Files have copies, which were not trained.
        self._shared = (model.embedding, model.head)

    def follow(self, ids_T: torch.Tensor, inputs: Inputs) -> None:
        at = leave(self.taps.heard()[0], inputs)
        self._layer(ids_T, self.begin(at), at)

    def step(
        self, ids_R: torch.Tensor, before_RC: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert before_RC is not None
        y_RC = self._layer(ids_R, before_RC, inputs)
        return gemm.linear(y_RC, self._shared[1], out_dtype="float32"), y_RC

    def _layer(self, ids_T: torch.Tensor, before_TC: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The layer behind tokens and the hidden states before them; it has no norm before attention."""
        tokens_TC = embeddings.embedding(ids_T, self._shared[0], out_dtype=self.activation)
        x_TC = self.fc(elementwise.concatenate(tokens_TC, before_TC))
        x_TC = elementwise.add(self.attention(x_TC, self.rope(inputs), inputs), x_TC)
        return elementwise.add(self.mlp(self.mlp_norm(x_TC), inputs), x_TC)


@dataclass(frozen=True)
class EagleMethod(Chained):
    """A trained head of one layer, whose states are the model's, in a chain."""

    name: str = "eagle"
    second: bool = True

    def model(self, target: Model, setting: Setting) -> Model:
        config, drafting = setting.checkpoint.config[FIELD], setting.checkpoint.parts[DRAFT]
        named = (config.get("architectures") or ["(none)"])[0]
        merges = any(drafting.find(name) is not None for name in ("fc.weight", "model.fc.weight"))
        if named not in ARCHITECTURES and not (named == PLAIN and merges):
            raise PlanError(
                f"speculative.method=eagle reads heads of EAGLE-1 and 2 ({', '.join(ARCHITECTURES)}, or {PLAIN} with "
                f"fc.weight), speculative.checkpoint has {named}; choose such a head, or speculative.method=draft "
                "for a whole model"
            )
        check_second(self.name, config, setting.limits)
        wanted = {"num_hidden_layers": 1, "draft_vocab_size": config["vocab_size"]}
        otherwise = next(
            (field for field, value in wanted.items() if config.get(field, value) != value), None
        )
        if otherwise is not None:
            raise PlanError(
                f"speculative.method=eagle has heads of one layer and of all of the model's vocabulary, and "
                f"speculative.checkpoint says {otherwise}={config[otherwise]}; choose another head"
            )
        further = [n for n in drafting.tensors if "norm" in n and not n.endswith(f"{MLP_NORM}.weight")]
        if further:
            raise PlanError(
                f"speculative.method=eagle has heads with {MLP_NORM} alone, as published, and speculative.checkpoint "
                f"has {further[0]}; choose another head"
            )
        return Followed(target, Eagle(target, setting), setting)


method(EagleMethod())
