"""The planner's program: calls of op contracts over named values, in order.

A :class:`Program` is what tracing gives and what passes rewrite. Values are of six kinds:

    step    staged by the host for this step        (its StepSpec)
    slot    kept on the device per running request  (Plan.slots)
    kv      a tensor of the paged cache             (graphs.spec.CacheSpec)
    param   a weight or a constant, with a recipe
    temp    the result of a call
    loaded  in a program that makes parameters: what the loader copies into the arena before its launches

Temps are defined once. Slot and kv values are written in place by the calls whose contract says so, so
the order of calls is meaning, and passes keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from makeready.graphs.plan.recipe import Param
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.spec import TensorSpec

STEP, SLOT, KV, PARAM, TEMP, LOADED = "step", "slot", "kv", "param", "temp", "loaded"


@dataclass(frozen=True)
class Value:
    """A named tensor of a program."""

    name: str
    spec: TensorSpec
    kind: str


@dataclass(frozen=True)
class Call:
    """One op: operand name → value name, result name → value name, attributes."""

    op: str
    operands: Mapping[str, str]
    results: Mapping[str, str]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contract(self) -> Contract:
        """The contract that the call is held to."""
        return CONTRACTS[self.op]

    @property
    def result(self) -> str:
        """The value that a call with one result defines."""
        (name,) = self.results.values()
        return name

    def renamed(self, names: Mapping[str, str]) -> Call:
        """The call with operand values replaced where ``names`` has another."""
        return replace(self, operands={k: names.get(v, v) for k, v in self.operands.items()})


@dataclass(frozen=True)
class Columns:
    """Columns ``start:stop`` of the value ``base``."""

    base: str
    start: int
    stop: int


@dataclass(frozen=True)
class Program:
    """Calls in order, the values they name, and the values that the host reads afterwards."""

    phase: str
    values: Mapping[str, Value]
    params: Mapping[str, Param]
    calls: tuple[Call, ...]
    results: Mapping[str, str]

    def spec(self, name: str) -> TensorSpec:
        """Spec of the value called ``name``."""
        return self.values[name].spec

    def operand_specs(self, call: Call) -> dict[str, TensorSpec]:
        """Specs of a call's operands, by operand name."""
        return {operand: self.spec(value) for operand, value in call.operands.items()}

    def producers(self) -> dict[str, Call]:
        """The call that defines each temp."""
        return {value: call for call in self.calls for value in call.results.values()}

    def uses(self) -> dict[str, list[Call]]:
        """The calls that read or write each value, in order; a call once however often it names it."""
        found: dict[str, list[Call]] = {name: [] for name in self.values}
        for call in self.calls:
            for value in dict.fromkeys(call.operands.values()):
                found[value].append(call)
        return found

    def columns(self, call: Call | None) -> Columns | None:
        """What a call whose op is a view looks at; None for other ops, and where buckets differ in its width."""
        if call is None or call.contract.view is None:
            return None
        (base,), start = call.operands.values(), int(call.attrs[call.contract.view])
        width = self.spec(call.result).shape[-1]
        return Columns(base, start, start + width) if isinstance(width, int) else None

    def with_calls(
        self, calls: Iterator[Call] | list[Call], params: Mapping[str, Param] | None = None
    ) -> Program:
        """The program with other calls: result specs inferred anew, what nobody uses any more left out."""
        kept = live(list(calls), set(self.results.values()))
        params = {**self.params, **(params or {})}
        values = {name: v for name, v in self.values.items() if v.kind not in (TEMP, PARAM)}
        used = {value for call in kept for value in call.operands.values()}
        values |= {name: Value(name, p.spec, PARAM) for name, p in params.items() if name in used}
        for call in kept:
            specs = call.contract.infer({k: values[v].spec for k, v in call.operands.items()}, call.attrs)
            values |= {call.results[k]: Value(call.results[k], spec, TEMP) for k, spec in specs.items()}
        return replace(
            self,
            values=values,
            params={name: p for name, p in params.items() if name in used},
            calls=tuple(kept),
        )

    def as_text(self) -> str:
        """The program, one line a call."""
        lines = [f"program {self.phase} ({len(self.calls)} calls, {len(self.params)} params)"]
        for call in self.calls:
            results = ", ".join(f"{v}: {self.spec(v)}" for v in call.results.values()) or "()"
            operands = ", ".join(
                f"{'!' if k in call.contract.writes else ''}{k}={v}" for k, v in call.operands.items()
            )
            attrs = "".join(f" {k}={v}" for k, v in call.attrs.items() if v not in ("", None))
            lines.append(f"  {results} = {call.op}({operands}){attrs}")
        lines += [f"  return {name} = {value}" for name, value in self.results.items()]
        return "\n".join(lines)


def live(calls: list[Call], wanted: set[str]) -> list[Call]:
    """Calls whose results are wanted or that write a slot or kv value, in order."""
    kept = []
    for call in reversed(calls):
        if call.contract.writes or any(value in wanted for value in call.results.values()):
            kept.append(call)
            wanted |= set(call.operands.values())
    return kept[::-1]
