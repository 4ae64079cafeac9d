"""Every rule of the verifier against a defect planted in a real program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from tiny_programs import traced

from makeready.graphs.passes import rewrite
from makeready.graphs.plan.recipe import Derivation, Derived, Generated, LoadCall, Operand, Piece, whole
from makeready.graphs.plan.spec import EXTEND
from makeready.graphs.planner.ir import PARAM, STEP, TEMP, Call, Program, Value
from makeready.graphs.planner.verify import RULES, VerificationError, verify
from makeready.kernels.spec import TensorSpec


@cache
def sound() -> Program:
    return rewrite(traced().programs[EXTEND])


def at(program: Program, op: str) -> int:
    return next(i for i, call in enumerate(program.calls) if call.op == op)


def with_call(program: Program, op: str, change: Callable[[Call], Call]) -> Program:
    calls = list(program.calls)
    calls[at(program, op)] = change(calls[at(program, op)])
    return replace(program, calls=tuple(calls))


def moved(program: Program, op: str, behind: str) -> Program:
    """The first call of ``op`` behind the first of ``behind``."""
    calls = list(program.calls)
    call = calls.pop(at(program, op))
    calls.insert(at(replace(program, calls=tuple(calls)), behind) + 1, call)
    return replace(program, calls=tuple(calls))


def operand(name: str, value: str) -> Callable[[Call], Call]:
    return lambda call: replace(call, operands={**call.operands, name: value})


def param(program: Program, **changes) -> Program:
    name = "layers.0.attention.q+k+v.weight"
    return replace(program, params={**program.params, name: replace(program.params[name], **changes)})


def spec(program: Program, value: str, made: TensorSpec) -> Program:
    return replace(program, values={**program.values, value: replace(program.values[value], spec=made)})


def extra(program: Program, made: TensorSpec, kind: str) -> Program:
    return replace(program, values={**program.values, "more": Value("more", made, kind)})


def kind(program: Program, value: str) -> Program:
    return replace(program, values={**program.values, value: replace(program.values[value], kind=STEP)})


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def halved(shape: tuple[int, ...], *, reads: str = "x", beside: tuple[int, ...] = ()) -> Derived:
    """silu_mul of a tensor: as many rows, half as many columns; ``beside`` is another operand."""
    operands = {
        name: Operand(TensorSpec(of, "float32"), (whole(name, of),), unit=1)
        for name, of in (("x", shape), ("other", beside))
        if of
    }
    return Derived(Derivation(operands, (LoadCall("silu_mul", {"gate_up": reads}, {"y": "y"}),)), "y")


DEFECTS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "op without a contract": (
        "every_op_has_a_contract: warp is none",
        lambda p: with_call(p, "silu_mul", lambda c: replace(c, op="warp")),
    ),
    "use before definition": (
        "temps_are_defined_once_and_before_use: linear reads x=",
        lambda p: moved(p, "rms_norm", "linear"),
    ),
    "call left out": (
        "temps_are_defined_once_and_before_use: .* before anything defines it",
        lambda p: replace(p, calls=tuple(c for c in p.calls if c.op != "silu_mul")),
    ),
    "defined twice": (
        "temps_are_defined_once_and_before_use: silu_mul defines silu_mul.* again|.* again",
        lambda p: replace(p, calls=(*p.calls, p.calls[at(p, "silu_mul")])),
    ),
    "a parameter overwritten": (
        "temps_are_defined_once_and_before_use: silu_mul defines norm.weight again",
        lambda p: with_call(p, "silu_mul", lambda c: replace(c, results={"y": "norm.weight"})),
    ),
    "result of nothing": (
        "temps_are_defined_once_and_before_use: result tokens=dreams is never defined",
        lambda p: replace(p, results={**p.results, "tokens": "dreams"}),
    ),
    "operand missing": (
        "calls_meet_their_contracts: linear .* lacks operand 'weight'",
        lambda p: with_call(p, "linear", lambda c: replace(c, operands=without(c.operands, "weight"))),
    ),
    "operand unknown": (
        "calls_meet_their_contracts: rms_norm .* no operand or attribute 'colour'",
        lambda p: with_call(p, "rms_norm", operand("colour", "norm.weight")),
    ),
    "attribute missing": (
        "calls_meet_their_contracts: rms_norm .* lacks attribute 'eps'",
        lambda p: with_call(p, "rms_norm", lambda c: replace(c, attrs={})),
    ),
    "operand of another shape": (
        "calls_meet_their_contracts: linear .* axis K of weight",
        lambda p: with_call(p, "linear", operand("weight", "layers.0.mlp.down.weight")),
    ),
    "operand of another dtype": (
        "calls_meet_their_contracts: embedding .* ids is float32",
        lambda p: with_call(p, "embedding", operand("ids", "temperature")),
    ),
    "result declared otherwise": (
        "calls_meet_their_contracts: rms_norm gives .*, the program says",
        lambda p: spec(p, p.calls[at(p, "rms_norm")].result, TensorSpec(("T", 23), "float32")),
    ),
    "a temp that grows with no axis of the step": (
        r"sizes_are_of_the_step: more is float32\[2, Q\*2\+1\], and nothing .* has an axis Q",
        lambda p: extra(p, TensorSpec((2, "Q*2+1"), "float32"), TEMP),
    ),
    "a parameter that grows": (
        r"sizes_are_of_the_step: more is float32\[T, 2\], and nothing",
        lambda p: extra(p, TensorSpec(("T", 2), "float32"), PARAM),
    ),
    "write to a step field": (
        "only_slots_and_caches_are_written: norm_rope_kv_write writes layers.0.k, which is a step value",
        lambda p: kind(p, "layers.0.k"),
    ),
    "read before this step's write": (
        "caches_are_written_before_they_are_read: paged_attention reads layers.0.k before",
        lambda p: stale_cache(p),
    ),
    "parameter without a recipe": (
        "params_have_recipes: norm.weight has none",
        lambda p: replace(p, params=without(p.params, "norm.weight")),
    ),
    "parameter with no rows": (
        "params_have_recipes: .* needs either pieces, a generator or a derivation",
        lambda p: param(p, pieces=()),
    ),
    "parameter with both": (
        "params_have_recipes: .* needs either pieces, a generator or a derivation",
        lambda p: param(p, generated=Generated("rope_table")),
    ),
    "a gap in a parameter": (
        "params_have_recipes: the pieces of .* do not tile its",
        lambda p: param(p, pieces=(whole("a", (24, 24)), whole("b", (8, 24), (32, 0)))),
    ),
    "an overlap in a parameter": (
        "params_have_recipes: the pieces of .* do not tile its",
        lambda p: param(p, pieces=(whole("a", (24, 24)), whole("b", (16, 24), (23, 0)))),
    ),
    "a parameter's last row missing": (
        "params_have_recipes: the pieces of .* do not tile its",
        lambda p: param(p, pieces=(whole("a", (39, 24)),)),
    ),
    "a parameter's last column missing": (
        r"params_have_recipes: the pieces of .* do not tile its \[40, 24\]",
        lambda p: param(p, pieces=(whole("a", (40, 23)),)),
    ),
    "a piece where zeros are": (
        r"params_have_recipes: the pieces of .* do not tile its \[40, 20\]",
        lambda p: param(p, padding=(0, 4)),
    ),
    "zeros of another rank": (
        r"params_have_recipes: the pieces of .* are padded by \[4\], which does not fit \[40, 24\]",
        lambda p: param(p, padding=(4,)),
    ),
    "zeros behind what is no box": (
        "params_have_recipes: .* is padded, but not made of pieces",
        lambda p: param(p, pieces=(), generated=Generated("rope_table"), padding=(0, 4)),
    ),
    "a box of another rank": (
        "params_have_recipes: the pieces of .* have a piece of a whose box, axes and place do not belong",
        lambda p: param(p, pieces=(Piece("a", ((0, 40),), (0,)),)),
    ),
    "mesh axes of another rank": (
        "params_have_recipes: .* has 2 axes, mesh axes are named for 1",
        lambda p: param(p, shard=("tp",)),
    ),
    "a derivation of another shape": (
        r"params_have_recipes: .* is float32\[40, 24\], its derivation gives float32\[40, 18\]",
        lambda p: param(p, pieces=(), derived=halved((40, 36))),
    ),
    "a derivation that reads nothing": (
        "params_have_recipes: the derivation of .* is wrong: silu_mul reads z, which nothing defines",
        lambda p: param(p, pieces=(), derived=halved((40, 48), reads="z")),
    ),
    "operands in different units": (
        "params_have_recipes: operands of .* are cut into 40 and 80 units",
        lambda p: param(p, pieces=(), derived=halved((40, 48), beside=(80, 1))),
    ),
}


def stale_cache(program: Program) -> Program:
    """Unfused: kv_write defines nothing, so nothing but the rule sees that it comes too late."""
    plain = rewrite(traced().programs[EXTEND], disabled=("fuse_qkv",))
    return moved(plain, "kv_write", "paged_attention")


def test_sound_programs_pass():
    assert verify(sound(), after="trace") is sound()


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found_and_named(name):
    message, plant = DEFECTS[name]
    with pytest.raises(VerificationError, match=f"^after a_pass, {message}"):
        verify(plant(sound()), after="a_pass")


def test_every_rule_has_a_defect():
    assert {message.split(":")[0] for message, _ in DEFECTS.values()} == {rule.__name__ for rule in RULES}
