"""What a model's forward is given besides token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from makeready.graphs.plan.spec import CacheGroup, CacheSpec


class Inputs:
    """Step, slot and KV values by name: ``inputs.positions``, ``inputs.kv("layers.0.k")``.

    The names are those of the fields that the kind of step declares, of what it derives from them
    (``positions``, ``kv_slot``, ...), and of the model's KV parts. What every cache group has one of
    (``kv_slot``, ``page_table``, ``state_in``, ...) is the first group's, and another's in ``inputs.of(name)``.
    """

    def __init__(
        self,
        fields: Mapping[str, torch.Tensor],
        kv: Mapping[str, torch.Tensor],
        cache: CacheSpec,
        group: str = "",
        deep: int = 0,
    ) -> None:
        self._fields = fields
        self._kv = kv
        self.cache = cache
        self._group = group or cache.groups[0].name
        self.deep = deep

    def __getattr__(self, name: str) -> torch.Tensor:
        own = self.cache.field(self._group, name)
        if own in self._fields:
            return self._fields[own]
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(f"a step has no field {name!r}") from None

    def of(self, group: str) -> Inputs:
        """These inputs as the cache group of that name sees them."""
        return Inputs(self._fields, self._kv, self.cache, group, self.deep)

    def beside(self, group: str, prefix: str) -> Inputs:
        """These inputs as a second model sees them, whose cache is the tensors whose names begin with ``prefix``.

        They are parts of ``group``. Its own names of them, and of the group's fields, are plain.
        """
        named = {p.name: replace(p, name=p.name.removeprefix(prefix)) for p in self.cache.parts}
        own = {name: part for name, part in named.items() if name != part.name}
        cache = CacheSpec(
            self.cache.page_size, (CacheGroup(group, tuple(own.values()), self.cache.page_size),)
        )
        behind = self.cache.field(group, "")
        plain = {n.removesuffix(behind): x for n, x in self._fields.items() if behind and n.endswith(behind)}
        return Inputs(
            {**self._fields, **plain}, {p.name: self._kv[n] for n, p in own.items()}, cache, "", self.deep
        )

    def adding(self, **derived: torch.Tensor) -> Inputs:
        """These inputs and what was derived from them, for the cache group that they are of."""
        named = {self.cache.field(self._group, name): value for name, value in derived.items()}
        return Inputs({**self._fields, **named}, self._kv, self.cache, self._group, self.deep)

    def branching(self, deep: int) -> Inputs:
        """These inputs, of tokens that are nodes of trees so many levels ``deep``: 0 where tokens follow each other.

        Such tokens have ``visible`` and ``tree_start``, see :func:`makeready.kernels.attention.tree.tree_attention`.
        """
        return Inputs(self._fields, self._kv, self.cache, self._group, deep)

    def kv(self, name: str) -> torch.Tensor:
        """The cache tensor called ``name``."""
        return self._kv[name]
