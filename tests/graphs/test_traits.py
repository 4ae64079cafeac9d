"""Passes know ops by the traits of their contracts alone: ops that a test declares go all the way.

What a compiled program computes is held to the model written in plain torch here, with 8-bit floats made by
PyTorch's own casts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_programs import QWEN2, Weights, _step, handmade, ops, traced
from toy_ops import BLOCK, COPIES, SKIPPED, VOCABULARY, toy_ops, toy_traced

from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.passes.expand import expand
from makeready.graphs.passes.fuse_quantize import fuse_quantize
from makeready.graphs.passes.hoist_gather import hoist_gather
from makeready.graphs.passes.merge_linears import merge_linears
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.graphs.plan.targets import find_target
from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.planner.lower import lower
from makeready.graphs.planner.verify import VerificationError, verify, verify_alike
from makeready.graphs.quant.eight_bits import quantize_linears
from makeready.graphs.quant.scheme import ON_LOAD
from makeready.kernels.contract import CONTRACTS, contract
from makeready.kernels.spec import TensorSpec

ROWS = [(0, 0, 5), (2, 0, 1), (1, 0, 4)]  # slot, tokens before, tokens now
SELECTION = {"query_start": TensorSpec(("R",), "int32"), "query_len": TensorSpec(("R",), "int32")}


@pytest.fixture
def toys():
    with toy_ops() as made:
        yield made


def eighths(x: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` through 8-bit floats with a scale each."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def by_hand(checkpoint: Any, ids: torch.Tensor, quant: str | None) -> torch.Tensor:
    """The toy model's logits of every token."""
    embed, scale, a, b, head = (
        torch.from_numpy(checkpoint.read(name)).float()
        for name in ("embed.weight", "norm.weight", "a.weight", "b.weight", "lm_head.weight")
    )
    x = embed[ids.long()] * scale
    if quant is not None:
        x, a, b = eighths(x), eighths(a), eighths(b)
    h = COPIES * (x @ a.T) * (x @ b.T)
    return h[:, SKIPPED:] @ head.T


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("quant", [None, "fp8"])
def test_ops_of_a_test_go_all_the_way(toys, quant, deterministic):
    made = toy_traced(toys, quant, deterministic=deterministic)
    plan = made.lower().compile()
    executable = CpuExecutable(plan, made.checkpoint, pages=8)
    generator = np.random.default_rng(0)
    for bucket in plan.buckets:
        ids = generator.integers(0, VOCABULARY, (made.limits.slots, made.limits.context_len))
        rows = [(slot, 0, 1) for slot, *_ in ROWS] if bucket.phase == DECODE else ROWS
        rows = rows[: bucket.rows]
        if sum(count for *_, count in rows) > bucket.tokens:
            rows = [(slot, 0, 1) for slot, *_ in rows]
        step = {k: v.numpy() for k, v in _step(made, bucket, ids, rows).items()}
        executable.poison()
        executable.launch(bucket, step).wait()
        logits = executable.operand(bucket, "sample", "logits")
        last = torch.tensor([ids[slot, count - 1] for slot, _, count in rows])
        wanted = by_hand(made.checkpoint, last, quant)
        torch.testing.assert_close(torch.from_numpy(logits[: len(rows)]), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_each_trait_has_its_effect(toys, quant):
    programs = toy_traced(toys, quant).lower().programs
    body = {DECODE: ["toy_times"], EXTEND: ["toy_repeat", "toy_fold", "gather_last"]}
    project = ["toy_scale_quantize", "toy_project_fp8"] if quant else ["toy_scale", "toy_project"]
    for kind, program in programs.items():
        assert ops(program) == [
            "locate", "find_pages", "embedding", *project,  # quantized in one, a and b merged
            "columns", "columns", "multiply", *body[kind], "toy_tail", "toy_project",
            "sample", "token_logprobs",
        ]  # fmt: skip
    plan = toy_traced(toys, quant).lower().compile()
    launched = Counter(launch.op for program in plan.programs.values() for launch in program.launches)
    assert not {"toy_tail", "columns", "toy_mix"} & launched.keys(), (
        "views and what was expanded are no launches"
    )
    copies = next(b for n, b in plan.programs[EXTEND].buffers.items() if n.endswith(".copies"))
    assert str(copies.spec) == f"float32[T*{COPIES}, 40]"
    tokens = next(b for n, b in plan.programs[EXTEND].buffers.items() if n.endswith(".tokens"))
    assert str(tokens.spec) == f"int32[cdiv(T,{BLOCK})]"


def test_deterministic_plans_keep_one_op(toys):
    made = toy_traced(toys, None, deterministic=True)
    programs = made.lower().programs
    assert all({"toy_repeat", "toy_fold"} <= set(ops(p)) for p in programs.values())
    copies = next(n for n in programs[DECODE].values if n.endswith(".copies"))
    assert str(programs[DECODE].spec(copies)) == f"float32[R*{COPIES}, 40]"
    with pytest.raises(VerificationError, match="compute tokens differently"):
        verify_alike(toy_traced(toys, None).lower().programs)


def test_a_selection_is_hoisted(toys):
    calls = [
        Call("toy_scale", {"x": "x", "weight": "w"}, {"y": "scaled"}),
        Call("toy_tail", {"x": "scaled"}, {"y": "tail"}, {"start": 2}),
        Call("add", {"x": "tail", "y": "tail"}, {"z": "sum"}),
        Call("toy_first", {"x": "sum", "query_start": "query_start"}, {"y": "first"}),
    ]
    step = {"x": TensorSpec(("T", 8), "float32"), **SELECTION}
    program = handmade(calls, step=step, params={"w": TensorSpec((8,), "float32")}, results=["first"])
    hoisted = verify(hoist_gather(program), after="hoist_gather")
    assert ops(hoisted) == ["toy_first", "toy_scale", "toy_tail", "add"]
    assert hoisted.spec(hoisted.results["first"]).shape == ("R", 6)
    x, w = torch.randn(7, 8), torch.randn(8)
    wanted = 2 * (x * w)[[0, 5], 2:]
    assert torch.equal(run(hoisted, {"x": x, "w": w, "query_start": torch.tensor([0, 5])})["first"], wanted)


def test_a_selection_stays_below_what_sees_other_sizes_of_its_axis(toys):
    """``toy_glance`` is row-wise in x, but reads three rows a token besides."""

    @contract("x[T,C]:A copies[T*3,C]:A -> y[T,C]:A", rowwise="T")
    def toy_glance(x, copies):
        return x + copies[: len(x)]

    calls = [
        Call("toy_glance", {"x": "x", "copies": "copies"}, {"y": "glanced"}),
        Call("toy_first", {"x": "glanced", "query_start": "query_start"}, {"y": "first"}),
    ]
    step = {"x": TensorSpec(("T", 8), "float32"), "copies": TensorSpec(("T*3", 8), "float32"), **SELECTION}
    program = handmade(calls, step=step, params={}, results=["first"])
    assert ops(hoist_gather(program)) == ["toy_glance", "toy_first"]


def run(program: Program, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for call in program.calls:
        given = [values[call.operands[o.name]] for o in call.contract.inputs]
        values[call.result] = call.contract.reference(*given, **call.attrs)
    return {name: values[value] for name, value in program.results.items()}


@pytest.mark.parametrize(("rows", "merged"), [((8, 16), 1), ((8, 7), 1), ((7, 8), 2), ((8, 6, 8), 3)])
def test_operands_of_whole_blocks_are_merged(toys, rows, merged):
    """A scale for every 4 outputs: another weight's may follow where a block ends."""

    @contract("x[T,K]:A weight[N,K]:A scale[cdiv(N,block)]:float32 -> y[T,N]:A", merges="N", shares=("x",))
    def toy_blocks(x, weight, scale, *, block: int):
        return x @ (weight * scale.repeat_interleave(block)[: len(weight), None]).T

    calls, params = [], {}
    for i, n in enumerate(rows):
        params |= {f"w{i}": TensorSpec((n, 5), "float32"), f"s{i}": TensorSpec((-(-n // 4),), "float32")}
        operands = {"x": "x", "weight": f"w{i}", "scale": f"s{i}"}
        calls.append(Call("toy_blocks", operands, {"y": f"y{i}"}, {"block": 4}))
    results = [f"y{i}" for i in range(len(rows))]
    program = handmade(calls, step={"x": TensorSpec(("T", 5), "float32")}, params=params, results=results)
    after = verify(merge_linears(program), after="merge_linears")
    assert ops(after).count("toy_blocks") == merged
    weights, x = Weights(), torch.randn(3, 5)
    before, made = (
        run(p, {"x": x} | {name: weights.param(param) for name, param in p.params.items()})
        for p in (program, after)
    )
    for name in results:
        torch.testing.assert_close(made[name], before[name])


@pytest.mark.parametrize("plus", ["N+1", "N*2"])
def test_what_does_not_tile_is_not_merged(toys, plus):
    """Of ``N+1`` rows each, two weights have one too many for a merged call; of ``N*2`` they have as many."""

    @contract(f"x[T,K]:A weight[{plus},K]:A b[N]:A -> y[T,N]:A", merges="N", shares=("x",))
    def toy_more(x, weight, b):
        raise NotImplementedError

    rows = 7 if plus == "N+1" else 12
    params = {f"w{i}": TensorSpec((rows, 5), "float32") for i in (0, 1)}
    params |= {f"b{i}": TensorSpec((6,), "float32") for i in (0, 1)}
    calls = [Call("toy_more", {"x": "x", "weight": f"w{i}", "b": f"b{i}"}, {"y": f"y{i}"}) for i in (0, 1)]
    program = handmade(
        calls, step={"x": TensorSpec(("T", 5), "float32")}, params=params, results=["y0", "y1"]
    )
    assert ops(merge_linears(program)).count("toy_more") == (2 if plus == "N+1" else 1)


def expanding(**expands: Any) -> Program:
    @contract("x[T,C]:A -> y[T,C]:A", expands=expands)
    def toy_expanding(x):
        return x

    calls = [Call("toy_expanding", {"x": "x"}, {"y": "y"})]
    return handmade(calls, step={"x": TensorSpec(("T", 8), "float32")}, params={}, results=["y"])


def becomes(op: str, **changes: Any) -> Any:
    return lambda program, call: [replace(call, op=op, **changes)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (becomes("toy_expanding"), "becomes itself in steps of kind extend"),
        (becomes("toy_tail", attrs={"start": 1}), r"y becomes float32\[T, 7\], it was float32\[T, 8\]"),
        (becomes("silu", results={"y": "z"}), r"y becomes nothing, it was float32\[T, 8\]"),
        (becomes("silu", operands={"x": "missing"}), "becomes silu: 'missing'"),
        (becomes("add"), "becomes add"),
        (lambda program, call: [], "y becomes nothing"),
    ],
)
def test_wrong_expansions_are_named(toys, function, message):
    program = expanding(extend=function)
    with pytest.raises(VerificationError, match=f"^after expand, toy_expanding.*{message}"):
        expand(program)


def test_an_op_that_says_nothing_of_a_kind_is_named(toys):
    program = expanding(decode=becomes("silu"))
    assert ops(expand(replace(program, phase=DECODE))) == ["silu"]
    for kind, deterministic in ((EXTEND, False), (DECODE, True)):
        with pytest.raises(VerificationError, match="toy_expanding says nothing of steps of kind"):
            expand(replace(program, phase=kind), deterministic=deterministic)


def test_what_an_op_becomes_may_become_something_else(toys):
    program = expanding(**{"*": becomes("toy_mix", attrs={"k": 2, "block": 4})})
    assert ops(expand(program)) == ["toy_repeat", "toy_fold"]
    assert ops(expand(replace(program, phase=DECODE))) == ["toy_times"]


def test_what_was_not_expanded_is_not_lowered(toys):
    with pytest.raises(PlanError, match="toy_expanding is to be expanded for steps of kind extend"):
        lower(expanding(extend=becomes("silu")), find_target("cpu"), Bucket(EXTEND, 2, 4), {})


def test_what_cannot_be_a_view_is_named(toys):
    x = TensorSpec(("T", 8), "float32")
    target, bucket = find_target("cpu"), Bucket(EXTEND, 2, 4)
    tail = Call("toy_tail", {"x": "made"}, {"y": "tail"}, {"start": 2})
    made = Call("silu", {"x": "x"}, {"y": "made"})
    reader = Call("silu", {"x": "tail"}, {"y": "y"})
    outside = handmade([replace(tail, operands={"x": "x"}), reader], step={"x": x}, params={}, results=["y"])
    with pytest.raises(PlanError, match="columns of x are taken, which is not a temporary value"):
        lower(outside, target, bucket, {})
    with pytest.raises(PlanError, match="tail is a view and a result of the step"):
        lower(handmade([made, tail], step={"x": x}, params={}, results=["tail"]), target, bucket, {})
    step = {"x": TensorSpec((4, "T*2+2"), "float32"), "positions": TensorSpec(("T",), "int32")}
    growing = handmade([made, tail, reader], step=step, params={}, results=["y"])
    with pytest.raises(PlanError, match=r"toy_tail gives tail, whose rows are as long as T\*2;"):
        lower(growing, target, bucket, {})


def test_what_others_read_is_not_fused(toys):
    calls = [
        Call("toy_scale", {"x": "x", "weight": "w"}, {"y": "scaled"}),
        Call("quantize_fp8", {"x": "scaled"}, {"q": "q", "scale": "s"}, {"group": 8}),
        Call("silu", {"x": "scaled"}, {"y": "other"}),
    ]
    step, params = {"x": TensorSpec(("T", 8), "float32")}, {"w": TensorSpec((8,), "float32")}
    alone = handmade(calls[:2], step=step, params=params, results=["q", "s"])
    assert ops(fuse_quantize(alone)) == ["toy_scale_quantize"]
    for results, count in ((["q", "s", "other"], 3), (["q", "s", "scaled"], 2)):
        program = handmade(calls[:count], step=step, params=params, results=results)
        assert fuse_quantize(program) == program


def test_a_fused_op_may_be_the_first_of_another(toys):
    """And what is read may be any result of the first."""

    @contract("x[T,C]:A -> a[T,C]:A b[T,C]:A")
    def toy_two(x):
        return x, 2 * x

    @contract("x[T,C]:A weight[C]:W -> y[T,C]:A a[T,C]:A", fuses=("toy_two", "toy_scale"))
    def toy_two_scale(x, weight):
        return x * weight, 2 * x

    @contract(
        "x[T,C]:A weight[C]:W -> q[T,C]:float8_e4m3fn scale[T,C//group]:float32 a[T,C]:A",
        fuses=("toy_two_scale", "quantize_fp8"),
    )
    def toy_all(x, weight, *, group: int):
        raise NotImplementedError

    try:
        calls = [
            Call("toy_two", {"x": "x"}, {"a": "first", "b": "second"}),
            Call("silu", {"x": "first"}, {"y": "other"}),
            Call("toy_scale", {"x": "second", "weight": "w"}, {"y": "scaled"}),
            Call("quantize_fp8", {"x": "scaled"}, {"q": "q", "scale": "s"}, {"group": 8}),
        ]
        step, params = {"x": TensorSpec(("T", 8), "float32")}, {"w": TensorSpec((8,), "float32")}
        program = verify(
            fuse_quantize(handmade(calls, step=step, params=params, results=["q", "s", "other"])), after="it"
        )
        assert ops(program) == ["toy_all", "silu"]
        late = [calls[0], Call("toy_scale", {"x": "x", "weight": "w"}, {"y": "t"}), calls[2], calls[3]]
        late[2] = replace(late[2], operands={"x": "t", "weight": "w"})
        program = handmade(late, step=step, params=params, results=["q", "s", "first", "second"])
        assert ops(fuse_quantize(program)) == ["toy_two", "toy_scale", "toy_scale_quantize"]
        shared = [calls[0], Call("toy_scale", {"x": "second", "weight": "w"}, {"y": "scaled"}), calls[1]]
        shared.append(Call("silu", {"x": "second"}, {"y": "both"}))
        program = handmade(shared, step=step, params=params, results=["scaled", "other", "both"])
        assert fuse_quantize(program) == program

        @contract("x[T,C]:A weight[C]:W -> y[T,C]:A a[T,C]:A b[T,C]:A", fuses=("toy_two", "toy_scale"))
        def toy_keeping(x, weight):
            raise NotImplementedError

        try:
            fused = verify(fuse_quantize(program), after="it")
            assert ops(fused) == ["toy_keeping", "silu", "silu"]
            assert fused.calls[0].results == {"y": "scaled", "a": "first", "b": "second"}
        finally:
            del CONTRACTS["toy_keeping"]
    finally:
        for op in (toy_two, toy_two_scale, toy_all):
            del CONTRACTS[op.name]


def test_quantized_ops_give_what_the_wide_ones_gave(toys):
    """The dtype that the result had, whether it was said or followed from the input."""
    calls = [
        Call("toy_project", {"x": "x", "weight": "w"}, {"y": "same"}, {"out_dtype": ""}),
        Call("toy_project", {"x": "x", "weight": "v"}, {"y": "wide"}, {"out_dtype": "float32"}),
    ]
    params = dict.fromkeys("vw", TensorSpec((4, 8), "bfloat16"))
    step = {"x": TensorSpec(("T", 8), "bfloat16")}
    program = handmade(calls, step=step, params=params, results=["same", "wide"])
    program = replace(program, params={k: replace(p, quantizable=True) for k, p in program.params.items()})
    made = verify(quantize_linears(program, ON_LOAD["fp8"]), after="quantize_linears")
    assert ops(made) == ["quantize_fp8", "toy_project_fp8", "toy_project_fp8"]
    assert [made.spec(name).dtype for name in ("same", "wide")] == ["bfloat16", "float32"]


def test_what_is_looked_up_stays_wide():
    """Qwen2's head is its embedding: one tensor, which a lookup reads as it is."""
    program = quantize_linears(traced(QWEN2).programs[EXTEND], ON_LOAD["fp8"])
    head = [c for c in program.calls if c.op == "linear"]
    assert [c.operands["weight"] for c in head] == ["head"]
    assert ops(program).count("linear_fp8") == 7 * QWEN2["num_hidden_layers"]
    assert program.params["head"].spec.dtype == program.params["embedding"].spec.dtype
