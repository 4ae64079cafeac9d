"""What a model's layers are given, heard while it is traced: drafters read the hidden states of some."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from makeready.graphs.models.decoder import Decoder
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError

NORMED = -1


class Taps:
    """Hidden states before the layers ``places``, each from 0 to the number of layers, which is behind the last;
    :data:`NORMED` is behind the last norm.

    Raises:
        PlanError: there is no such layer, or the model is no decoder.
    """

    def __init__(self, target: Model, method: str, places: Sequence[int]) -> None:
        model = decoder_of(target, method)
        layers = model.layers
        if not all(type(place) is int and NORMED <= place <= len(layers) for place in places):
            raise PlanError(
                f"speculative.method={method} reads hidden states before the layers {list(places)}, and the model "
                f"has {len(layers)}; choose a checkpoint that was made for it"
            )
        self._places = tuple(places)
        self._heard: dict[int, torch.Tensor] = {}
        for place in set(places):
            if place == NORMED:
                model.norm.register_forward_hook(partial(self._behind, place))
            elif place < len(layers):
                layers[place].register_forward_pre_hook(partial(self._before, place))
            else:
                layers[-1].register_forward_hook(partial(self._behind, place))

    def _before(self, place: int, layer: nn.Module, given: Any) -> None:
        self._heard[place] = given[0]

    def _behind(self, place: int, layer: nn.Module, given: Any, made: torch.Tensor) -> None:
        self._heard[place] = made

    def heard(self) -> list[torch.Tensor]:
        """The states ``[T, C]`` of the tokens that the model has run last, in the order of the places."""
        return [self._heard[place] for place in self._places]


def decoder_of(target: Model, method: str) -> Decoder:
    """``target``, whose layers and embedding drafters share.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(target, Decoder):
        raise PlanError(
            f"speculative.method={method} shares the layers of a decoder, and {type(target).__name__} is none here; "
            "use speculative.method=draft or ngram"
        )
    return target
