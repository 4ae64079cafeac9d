"""Whether a plan's launches satisfy the contracts of the ops and kernels that they name.

The CPU's kernels take addresses and go by the sizes that the plan says, so what a plan from elsewhere says of
operands is held against the signature lines before memory is touched. See also graphs/plan/check.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.recipe import Derived, Param
from makeready.graphs.planner.derivation import infer
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.gguf import rows_of
from makeready.kernels.spec import TensorSpec

MOST = 2**31 - 1


def check_launches(plan: Plan) -> None:
    """Check every launch of every phase, and the ops that parameters are derived by.

    Raises:
        PlanError: naming the launch and what is wrong.
    """
    layouts = {weight.param.name: weight.param.layout for weight in plan.weights}
    writable = {f.name for f in plan.slots} | {part.name for part in plan.kv.parts}
    seen: set[Hashable] = set()
    for phase, program in plan.programs.items():
        for launch in program.launches:
            try:
                _check(plan, phase, launch, layouts, writable, seen)
            except PlanError:
                raise
            except Exception as error:  # attributes of any type meet arithmetic here
                raise _contradiction(phase, launch, str(error)) from None
    for weight in plan.weights:
        if weight.param.derived is not None:
            _check_derived(weight.param, weight.param.derived)


def _contradiction(phase: str, launch: Launch, reason: str) -> PlanError:
    return PlanError(f"the plan contradicts itself: {phase}: {launch.op}: {reason}; compile it again")


def _check(
    plan: Plan,
    phase: str,
    launch: Launch,
    layouts: Mapping[str, str],
    writable: set[str],
    seen: set[Hashable],
) -> None:
    """``seen``: launches that differed in nothing but names; layers are alike."""
    contract = CONTRACTS.get(launch.op)
    if contract is None:
        raise _contradiction(phase, launch, "there is no such op")
    given, attrs = contract.bind((), {**launch.operands, **launch.attrs})
    unsaid = sorted(attrs.keys() - launch.attrs.keys())
    if unsaid:
        raise _contradiction(phase, launch, f"has no attribute {unsaid[0]}")
    specs = {name: plan.spec(phase, value) for name, value in given.items()}
    said = {name: plan.spec(phase, value) for name, value in launch.results.items()}
    stored = {name: layouts.get(value, "rows") for name, value in given.items()}
    for operand in contract.writes:
        if operand in given and given[operand] not in writable:
            raise _contradiction(
                phase, launch, f"writes {given[operand]}, which is neither a cache nor kept by a slot"
            )
    facts = (sorted((name, repr(value)) for name, value in attrs.items()), *specs.items(), *said.items())
    alike = (launch.op, launch.kernel, str(facts), *stored.items())
    if alike in seen:
        return
    _check_attributes(contract, attrs)
    made = contract.infer(specs, attrs)
    if made != said:
        raise _contradiction(phase, launch, f"gives {_text(made)}, the plan says {_text(said)}")
    try:
        kernel = registry.find(launch.op, launch.kernel, plan.target)
    except KeyError:  # of another version of the code; it is named when the launch is to run
        return
    if not kernel.applies(specs, attrs):
        raise _contradiction(phase, launch, f"kernel {launch.kernel} does not take such operands")
    for name, layout in stored.items():
        wanted = kernel.layouts.get(name, "rows")
        if layout != wanted:
            raise _contradiction(
                phase, launch, f"{name} is stored as {layout}, kernel {launch.kernel} takes {wanted}"
            )
    _check_reach(plan, phase, launch, specs)
    seen.add(alike)


def _check_reach(plan: Plan, phase: str, launch: Launch, specs: Mapping[str, TensorSpec]) -> None:
    """Rows that are fetched by an index are there for all the indices that the engine may give."""
    named = {name: spec for name, spec in specs.items() if launch.operands.get(name) is not None}
    fetched = {
        "embedding": ("weight", int(plan.config["vocab_size"])),
        "rope_rows": ("table", plan.limits.context_len),
    }
    if launch.op in fetched:
        operand, least = fetched[launch.op]
        rows = named[operand].shape[0]
        if not isinstance(rows, int) or rows < least:
            raise _contradiction(phase, launch, f"{operand} has {rows} rows, {least} may be asked for")
    if launch.op == "embedding_gguf":
        rows = sum(count for _, count in rows_of(launch.attrs["rows"]))
        if rows < int(plan.config["vocab_size"]):
            raise _contradiction(
                phase, launch, f"blocks have {rows} rows, {plan.config['vocab_size']} may be asked for"
            )
    if launch.op == "sample" and named["logits"].shape[1] != plan.config["vocab_size"]:
        raise _contradiction(
            phase,
            launch,
            f"logits are of {named['logits'].shape[1]} tokens, config says {plan.config['vocab_size']}",
        )


def _check_attributes(contract: Contract, attrs: Mapping[str, Any]) -> None:
    """Attributes have the type that the op's code says, and counts are counts: -2 heads of -64 are 128, too."""
    parameters = inspect.signature(contract.reference).parameters
    for name, value in attrs.items():
        if not _KINDS.get(str(parameters[name].annotation), _is_text)(value) or (
            name in _COUNTS and value < 1
        ):
            raise ValueError(f"attribute {name} is {value!r}")
    heads, kv_heads = attrs.get("heads"), attrs.get("kv_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise ValueError(f"{heads} heads do not share {kv_heads} KV heads")
    keys, values = attrs.get("key_heads"), attrs.get("value_heads")
    if keys is not None and values is not None and values % keys:
        raise ValueError(f"{values} value heads do not share {keys} key heads")


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_COUNTS = {"heads", "kv_heads", "head_dim", "block", "group", "rotary_dim"}
_COUNTS |= {"key_heads", "key_dim", "value_heads", "value_dim"}
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and 0 <= value <= MOST,
    "float": lambda value: type(value) in (int, float) and math.isfinite(value),
    "bool": lambda value: type(value) is bool,
}


def _check_derived(param: Param, derived: Derived) -> None:
    try:
        for call in derived.by.calls:
            if call.op not in CONTRACTS:
                raise ValueError(f"there is no op {call.op}")
            _, attrs = CONTRACTS[call.op].bind((), {**call.operands, **call.attrs})
            _check_attributes(CONTRACTS[call.op], attrs)
        made = infer(derived.by)[derived.result]
        if made.dtype != param.spec.dtype or made.nbytes({}) != param.spec.nbytes({}):
            raise ValueError(f"its derivation gives {made}, the plan says {param.spec}")
    except Exception as error:  # attributes of any type meet arithmetic here
        raise PlanError(
            f"the plan contradicts itself: weight {param.name}: {error}; compile it again"
        ) from None


def _text(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in specs.items()) or "nothing"
