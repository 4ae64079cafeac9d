"""One call of an op contract, and seeded tensors to make its operands of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.spec import TensorSpec

NAN = float("nan")


@dataclass
class Case:
    """One call of an op: operands (absent optionals left out) and attributes."""

    op: str
    label: str
    operands: dict[str, torch.Tensor]
    attrs: dict[str, Any] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()  # operands whose dtype says what the op rounds to between its sums

    @property
    def contract(self) -> Contract:
        return CONTRACTS[self.op]

    def specs(self) -> dict[str, TensorSpec]:
        """Specs of the operands."""
        return {name: spec_of(x) for name, x in self.operands.items()}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The case with every operand changed."""
        return replace(self, operands={k: change(x) for k, x in self.operands.items()})

    def widened(self) -> Case:
        """The case in float64, but for operands that it says are rounded."""
        return replace(
            self,
            operands={
                k: x.double() if x.is_floating_point() and k not in self.rounded else x
                for k, x in self.operands.items()
            },
        )

    def run(self, function: Callable[..., Any] | None = None) -> dict[str, torch.Tensor]:
        """Results and written operands of one call on copies of the operands, by name.

        Args:
            function: an implementation; the contract's reference where it is None.
        """
        operands = {k: copy(x) for k, x in self.operands.items()}
        arguments = [operands.get(o.name) for o in self.contract.inputs]
        made = (function or self.contract.reference)(*arguments, **self.attrs)
        made = made if isinstance(made, tuple) else (made,)
        results = {o.name: x for o, x in zip(self.contract.outputs, made, strict=False)}
        return results | {name: operands[name] for name in self.contract.writes}


def spec_of(x: torch.Tensor) -> TensorSpec:
    """Spec of a tensor."""
    return TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def copy(x: Any) -> Any:
    """A copy that keeps strides (columns of a wider buffer stay such)."""
    if not isinstance(x, torch.Tensor):  # a packed parameter, which nobody writes
        return x
    if x.is_contiguous() or x.dim() != 2:
        return x.clone()
    wide = torch.full((x.shape[0], x.stride(0)), NAN, dtype=x.dtype)
    return wide[:, : x.shape[1]].copy_(x)


def in_columns(x: torch.Tensor, before: int = 3, after: int = 5) -> torch.Tensor:
    """``x`` as columns of a wider buffer whose other columns are NaN, as lowering places views."""
    wide = torch.full((x.shape[0], before + x.shape[1] + after), NAN, dtype=x.dtype)
    view = wide[:, before : before + x.shape[1]]
    view.copy_(x)
    return view


def int32(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Random:
    """Seeded tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(getattr(torch, dtype))

    def uniform(self, *shape: int, dtype: str = "float32") -> torch.Tensor:
        """Between 0.5 and 1.5: weights of norms."""
        return (torch.rand(*shape, generator=self.generator) + 0.5).to(getattr(torch, dtype))

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator, dtype=torch.int32)

    def words(self, *shape: int) -> torch.Tensor:
        """All 32 bits of each at random."""
        return torch.randint(-(2**31), 2**31, shape, generator=self.generator).int()

    def rotary(self, tokens: int, features: int) -> torch.Tensor:
        """Rotary rows of random angles."""
        angle = torch.rand(tokens, features // 2, generator=self.generator) * 100
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator)


FLOATS = ("float32", "bfloat16", "float16")
