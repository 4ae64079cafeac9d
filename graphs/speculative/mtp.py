"""The layer that DeepSeek-V3 was trained to predict one more token with (arXiv:2412.19437, section 2.2), in a chain.

Its entry of a token is made of the token's embedding and of the hidden state before the token: the model's behind its
last norm, or in a chain the layer's own behind its norm, as SGLang has it. Embedding and head are the model's.

    T tokens, C features
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from makeready.graphs.layers.dense import BY_OUTPUTS, Linear, RMSNorm
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.models import family
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import KVPart
from makeready.graphs.speculative.base import Setting, method
from makeready.graphs.speculative.chain import Chained, Followed
from makeready.graphs.speculative.states import OnStates, leave, states
from makeready.graphs.speculative.taps import NORMED, Taps, decoder_of
from makeready.kernels import elementwise
from makeready.kernels import embedding as embeddings
from makeready.kernels.gemm import linear as gemm

ARCHITECTURE = "DeepseekV3ForCausalLM"


class NextToken(OnStates):
    """The layer behind the model's last, as a drafter of :mod:`~makeready.graphs.speculative.chain`."""

    def __init__(self, target: Model, setting: Setting) -> None:
        super().__init__()
        model, config = decoder_of(target, "mtp"), setting.checkpoint.config
        self.taps = Taps(target, "mtp", [NORMED])
        self.activation, self.width = setting.activation, model.config.hidden
        layers = len(model.layers)
        source, wide = f"model.layers.{layers}", model.config.hidden
        longer = {
            **config,
            "num_hidden_layers": layers + 1,
            "layer_types": [*config["layer_types"], config["layer_types"][-1]],
        }
        # A layer like the others, one further on.
        more = family.build(longer, context_len=setting.limits.context_len, activation=setting.activation)
        longest = decoder_of(more, "mtp")
        self.rope, self.layer = longest.rope, longest.layers[layers]
        self.embedding_norm = RMSNorm(f"{source}.enorm", wide, model.config.norm_eps)
        self.hidden_norm = RMSNorm(f"{source}.hnorm", wide, model.config.norm_eps)
        # Stored wide in checkpoints of 8 bits.
        self.merge = Linear(
            f"{source}.eh_proj", wide, 2 * wide, bias=False, shard=BY_OUTPUTS, quantizable=False
        )
        self.norm = RMSNorm(f"{source}.shared_head.norm", wide, model.config.norm_eps)
        self._shared = (model.embedding, model.head)  # the model's: no parameters of its own

    def parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        own = self.layer.attention.kv_parts(page_size, dtype)  # pyright: ignore
        return (*own, states(page_size, self.width, self.activation))

    def follow(self, ids_T: torch.Tensor, inputs: Inputs) -> None:
        at = leave(self.taps.heard()[0], inputs)
        self._run(ids_T, self.begin(at), at)

    def step(
        self, ids_R: torch.Tensor, before_RC: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert before_RC is not None
        y_RC = self.norm(self._run(ids_R, before_RC, inputs))
        return gemm.linear(y_RC, self._shared[1], out_dtype="float32"), y_RC

    def _run(self, ids_T: torch.Tensor, before_TC: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The layer behind tokens and the hidden states before them."""
        tokens_TC = embeddings.embedding(ids_T, self._shared[0], out_dtype=self.activation)
        both = elementwise.concatenate(self.embedding_norm(tokens_TC), self.hidden_norm(before_TC))
        return self.layer(self.merge(both), self.rope(inputs), inputs)


@dataclass(frozen=True)
class MTP(Chained):
    """The model's own further layer."""

    name: str = "mtp"
    second: bool = False

    def model(self, target: Model, setting: Setting) -> Model:
        config = setting.checkpoint.config
        named = config["architectures"][0]
        if named != ARCHITECTURE or not config.get("num_nextn_predict_layers"):
            raise PlanError(
                f"speculative.method=mtp is for {ARCHITECTURE} with num_nextn_predict_layers, and the model is "
                f"{named} with {config.get('num_nextn_predict_layers') or 'none'}; use ngram or draft"
            )
        return Followed(target, NextToken(target, setting), setting)


method(MTP())
