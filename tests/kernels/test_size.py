"""Sizes against Python's own arithmetic over the same text, and what static places rely on."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.graphs.plan.codec import CodecError, canonical, from_json, to_json
from makeready.graphs.plan.program import Buffer
from makeready.kernels.contract import contract
from makeready.kernels.signature import ContractError, evaluate
from makeready.kernels.size import Size, SizeError, axis_of, parse, value
from makeready.kernels.spec import TensorSpec

LENGTHS = range(130)


def by_hand(text: str, length: int) -> int:
    """Python's value of the text, fractions and all."""
    made = eval(text, {"T": length, "cdiv": lambda a, b: math.ceil(Fraction(a, b))})
    assert isinstance(made, int)
    return made


def grown(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    number, shift = st.integers(1, 9), st.integers(0, 40)
    return st.one_of(
        st.builds("({})*{}".format, texts, number),
        st.builds("{1}*({0})".format, texts, number),
        st.builds("({})+{}".format, texts, shift),
        st.builds("({})-{}".format, texts, shift),
        st.builds("({})//{}".format, texts, number),
        st.builds("cdiv({},{})".format, texts, number),
        st.builds("({0})+({0})".format, st.builds("T*{}+{}".format, number, shift)),
    )


TEXTS = st.recursive(st.just("T"), grown, max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_a_size_is_what_its_text_computes(text):
    size = parse(text)
    found = [value(size, {"T": n}) for n in LENGTHS]
    assert found == [by_hand(text, n) for n in LENGTHS]
    assert found == sorted(found), "a size falls while its axis grows"
    assert parse(str(size)) == size
    assert axis_of(size) == "T"
    if isinstance(size, Size):
        assert size.of(np.array(LENGTHS)).tolist() == found
        assert [value(size.renamed({"T": "R"}), {"R": n}) for n in LENGTHS] == found


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_sizes_that_are_always_equal_compare_equal(one, other):
    same = all(by_hand(one, n) == by_hand(other, n) for n in range(2000))
    assert (parse(one) == parse(other)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("T*4//2", "T*2"),
        ("(T+127)//128", "cdiv(T,128)"),
        ("cdiv(cdiv(T,4),16)", "cdiv(T,64)"),
        ("cdiv(T,64)+1", "cdiv(T+64,64)"),
        ("cdiv(T+64,64)*64", "cdiv(T,64)*64+64"),
        ("T*3-T*2", "T"),
        ("(T+5)-T", "5"),
        ("T*0+7", "7"),
    ],
)
def test_equal_sizes(one, other):
    assert parse(one) == parse(other)


@pytest.mark.parametrize(
    "text",
    ["T*R", "T+R", "5-T", "T*2-T*3", "T*-1", "T/2", "T%2", "T//0", "T*1.5", "min(T,4)", "max(T,4)", "1.5", "T if T",
     "cdiv(T)", "f(T,2)", "T//T", "'T'", "True", "cdiv(T,-4)", "T**2", ""],
)  # fmt: skip
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SizeError):
        parse(text)


def test_specs_compute_their_shapes():
    spec = TensorSpec(("T*8+3", "cdiv(R,4)", 5), "bfloat16")
    assert spec == TensorSpec((Size("T", 8, 3), Size("R", 1, 0, 4), 5), "bfloat16")
    assert spec.axes == {"T", "R"}
    for tokens, rows in ((1, 1), (7, 4), (8192, 255)):
        sizes = {"T": tokens, "R": rows, "P": 3}
        shape = (tokens * 8 + 3, math.ceil(rows / 4), 5)
        assert spec.at(sizes) == shape
        assert spec.nbytes(sizes) == 2 * math.prod(shape)
        assert spec.under({"T": tokens}).at({"R": rows}) == shape
    assert str(spec) == "bfloat16[T*8+3, cdiv(R,4), 5]"
    assert spec.renamed({"T": "R"}) == TensorSpec(("R*8+3", "cdiv(R,4)", 5), "bfloat16")
    assert TensorSpec((Size("T"),), "int8") == TensorSpec(("T",), "int8")
    with pytest.raises(ValueError, match=r"T\*8\+3 depends on axis T, which has no length"):
        spec.at({"R": 1})


def test_a_size_is_no_number():
    with pytest.raises(SizeError, match=r"T\*8\+3 is not the same in all buckets"):
        int(Size("T", 8, 3))


@pytest.mark.parametrize("dim", [-1, "T-1", "T*8-9", 1.5, None, True, "T*", "T R", Size("T", 1, -1)])
def test_specs_of_no_size_are_refused(dim):
    with pytest.raises(ValueError, match="size"):
        TensorSpec((dim, 4), "int8")


def test_plans_keep_sizes_as_text():
    buffer = Buffer(TensorSpec(("T*8+3", "cdiv(T,64)", 5, "R"), "int8"), 256, None, 1, 2)
    written = to_json(buffer)
    assert written["spec"]["shape"] == ["T*8+3", "cdiv(T,64)", 5, "R"]
    assert from_json(Buffer, written) == buffer
    assert canonical(to_json(from_json(Buffer, written))) == canonical(written)
    for wrong in ("T*R", "5-T", "__import__('os')", "T.real", "(" * 3000, 1.5, None, ["T"]):
        with pytest.raises(CodecError):
            from_json(Buffer, {**written, "spec": {"shape": [wrong], "dtype": "int8"}})


@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 128), st.integers(1, 500))
def test_contracts_compute_with_sizes(k, c, block, tokens):
    """What is inferred for an axis of the step is what is inferred for each of its lengths."""
    op = _expert_rows
    symbolic = {"x": TensorSpec(("T", 6), "int8"), "rows": TensorSpec((f"T*{k}+{c}",), "int32")}
    concrete = {"x": TensorSpec((tokens, 6), "int8"), "rows": TensorSpec((tokens * k + c,), "int32")}
    attrs = {"k": k, "c": c, "block": block}
    made = op.infer(symbolic, attrs)
    assert {n: s.at({"T": tokens}) for n, s in made.items()} == {
        "y": (tokens * k + c, 6),
        "count": (math.ceil(tokens / block), 3),
    }
    assert {n: s.shape for n, s in op.infer(concrete, attrs).items()} == {
        n: s.at({"T": tokens}) for n, s in made.items()
    }
    with pytest.raises(ContractError, match=r"axis T\*k\+c of rows is .*, it must be"):
        op.infer(symbolic | {"rows": TensorSpec((f"T*{k}+{c + 1}",), "int32")}, attrs)


def test_contracts_refuse_what_is_no_size():
    op = _expert_rows
    attrs = {"k": 2, "c": 0, "block": 0}
    with pytest.raises(ContractError, match=r"axis cdiv\(T,block\) cannot be computed"):
        op.infer({"x": TensorSpec(("T", 6), "int8"), "rows": TensorSpec(("T*2",), "int32")}, attrs)


@pytest.mark.parametrize(
    ("signature", "traits", "message"),
    [
        ("x[T,C]:A -> y[T*k]:A", {}, "the axis T.k needs k, which is neither"),
        ("x[T,C]:A -> y[T]:A", {"flops": "T*D"}, "the cost T.D needs D"),
        ("x[T,C]:A -> y[T]:A", {"traffic": {"z": "T"}}, "traffic names z, which is no operand"),
        ("x[T,C]:A -> y[T]:A", {"rate": "z"}, "rate names z"),
        ("x?[T,C]:A -> y[T]:A", {"rate": "x"}, "rate names x, which may be absent"),
        ("x[T,C]:A -> y[T]:A", {"view": "start"}, "a view has one operand"),
        ("x[T,C]:A -> y[T]:A", {"selects_rows": "z"}, "selects_rows names z"),
        ("x[T,C]:A -> y[T,C]:A", {"merges": "T"}, "merges names T, which is not the last axis"),
        ("x[N,C]:A -> y[T,N]:A", {"merges": "N", "shares": ("x",)}, "calls cannot be merged along N with x"),
        ("x[C,N]:A -> y[C,N]:A", {"merges": "N"}, "calls cannot be merged along N with x"),
    ],
)
def test_traits_that_do_not_fit_are_refused(monkeypatch, signature, traits, message):
    from makeready.kernels import contract as contracts

    monkeypatch.setattr(contracts, "CONTRACTS", {})
    signature = signature.replace("y[T,N]", "y[C,N]")

    def same(x):
        return x

    with pytest.raises(TypeError, match=message):
        contract(signature, **traits)(same)
    assert not contracts.CONTRACTS


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 4))
def test_costs_have_min_max_and_cdiv(tokens, experts, block, context):
    names = {"T": tokens, "E": experts, "B": block, "context": context}
    text = "min(E,T*4)*7 + cdiv(T,B)*max(context,3) + T//B - min(T,E)%B"
    wanted = min(experts, 4 * tokens) * 7 + math.ceil(tokens / block) * max(context, 3)
    wanted += math.floor(tokens / block) - min(tokens, experts) % block
    assert evaluate(text, names) == wanted
    arrays = evaluate(text, names | {"T": np.array([[tokens], [tokens + 9]])})
    assert arrays.shape == (2, 1)
    assert arrays[0, 0] == wanted
    assert arrays[1, 0] == evaluate(text, names | {"T": tokens + 9})


def _made():
    from makeready.kernels.contract import CONTRACTS

    @contract(
        "x[T,C]:A rows[T*k+c]:int32 -> y[T*k+c,C]:A count[cdiv(T,block),cdiv(C+1,3)]:int32",
        flops="min(C,T*k)",
    )
    def expert_rows(x, rows, *, k: int, c: int, block: int):
        raise NotImplementedError

    return CONTRACTS.pop("expert_rows")


_expert_rows = _made()
