"""What a model's forward is given besides token ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Inputs:
    """Step, slot and KV values by name: ``inputs.positions``, ``inputs.kv("layers.0.k")``.

    The names are those of the fields that the kind of step declares, of what it derives from them
    (``positions``, ``kv_slot``, ...), and of the model's KV parts.
    """

    def __init__(self, fields: Mapping[str, torch.Tensor], kv: Mapping[str, torch.Tensor]) -> None:
        self._fields = fields
        self._kv = kv

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(f"a step has no field {name!r}") from None

    def adding(self, **derived: torch.Tensor) -> Inputs:
        """These inputs and what was derived from them."""
        return Inputs({**self._fields, **derived}, self._kv)

    def kv(self, name: str) -> torch.Tensor:
        """The cache tensor called ``name``."""
        return self._kv[name]
