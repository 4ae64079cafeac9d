"""Hidden states of the model that drafters go on from: each lies in the page of its token.

T tokens, C features
"""

from __future__ import annotations

import torch
from torch import nn

from makeready.graphs.layers.attention import Attention
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.plan.spec import KVPart
from makeready.kernels.step import hidden

NAME = "hidden"


def states(page_size: int, width: int, dtype: str) -> KVPart:
    """The cache tensor that they are kept in."""
    return KVPart(NAME, (page_size, width), dtype)


def leave(state_TC: torch.Tensor, inputs: Inputs) -> Inputs:
    """Keep the states of tokens that were run, and give inputs that are at the places before them."""
    hidden.hidden_write(state_TC, inputs.kv_slot, inputs.kv(NAME))
    if inputs.deep:
        return _leave_trees(inputs)
    prior, kv_slot = hidden.place_before(
        inputs.positions, inputs.token_slot, inputs.pages, page_size=inputs.cache.page_size
    )
    return inputs.adding(positions=prior, kv_slot=kv_slot)


def _leave_trees(inputs: Inputs) -> Inputs:
    """Inputs at the places before those of nodes, and where the states of their parents lie."""

    def before(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.place_before(places, inputs.token_slot, inputs.pages, page_size=inputs.cache.page_size)

    prior, _ = before(inputs.positions)
    _, kv_slot = before(inputs.places)
    _, state_slot = before(inputs.after)
    return inputs.adding(positions=prior, kv_slot=kv_slot, state_slot=state_slot)


def found(inputs: Inputs) -> torch.Tensor:
    """The states ``[T, C]`` that entries of the inputs are made of: where they lie, or of trees those of parents."""
    return hidden.hidden_read(inputs.state_slot if inputs.deep else inputs.kv_slot, inputs.kv(NAME))


class OnStates(nn.Module):
    """What layers that draft from such states share; ``width`` and ``activation`` are those of a state."""

    behind = 1
    attention: Attention
    width: int
    activation: str

    def parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        return (*self.attention.kv_parts(page_size, dtype), states(page_size, self.width, self.activation))

    def begin(self, inputs: Inputs) -> torch.Tensor:
        return found(inputs)
