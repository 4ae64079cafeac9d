"""Costs and places of ops by their contracts, against counts made by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_programs import handmade
from toy_ops import COPIES, toy_ops, toy_traced

from makeready.graphs.inspect.analysis import launch_costs
from makeready.graphs.inspect.html import plan_html
from makeready.graphs.inspect.padding import _step_seconds
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.memory import align, prove_places
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.program import Buffer
from makeready.graphs.plan.spec import EXTEND, Bucket
from makeready.graphs.plan.targets import find_target
from makeready.graphs.planner.cost import StepTime, call_cost, op_cost, op_work, program_cost
from makeready.graphs.planner.ir import Call
from makeready.graphs.planner.lower import lower
from makeready.graphs.planner.verify import verify
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS, contract
from makeready.kernels.spec import DTYPE_BYTES, TensorSpec


@pytest.fixture
def toys():
    with toy_ops() as made:
        yield made


def elements(spec: TensorSpec, sizes: dict[str, int]) -> int:
    count = 1
    for dim in spec.shape:
        count *= eval(str(dim), {**sizes, "cdiv": lambda a, b: -(-a // b)})
    return count


def test_costs_are_those_of_loops_over_the_program(toys):
    """Bytes and operations of the toy program, counted one call at a time from what the ops are."""
    made = toy_traced(toys, "fp8")
    program = made.lower().programs[EXTEND]
    target = find_target("cpu")
    for bucket in (Bucket(EXTEND, 1, 1), Bucket(EXTEND, 2, 9), Bucket(EXTEND, 4, 16)):
        rows, tokens = bucket.rows, bucket.tokens
        expected = {
            "toy_scale_quantize": (5 * tokens * 24, "float32"),
            "toy_project_fp8": (2 * tokens * 80 * 24, "float8_e4m3fn"),
            "multiply": (tokens * 40, "float32"),
            "toy_repeat": (min(tokens, 40) * COPIES, "float32"),
            "toy_fold": (tokens * COPIES * 40, "float32"),
            "toy_project": (2 * rows * 61 * 32, "float32"),
        }
        seconds = 0.0
        for call in program.calls:
            cost = call_cost(program, call, bucket, 16, target)
            if call.op in expected:
                flops, dtype = expected[call.op]
                values = (*call.operands.values(), *call.results.values())
                nbytes = sum(
                    elements(program.spec(v), bucket.sizes) * DTYPE_BYTES[program.spec(v).dtype]
                    for v in values
                )
                assert (cost.flops, cost.nbytes) == (flops, nbytes), call.op
                bound = max(nbytes / target.bandwidth, flops / target.flops[dtype])
                assert cost.seconds == pytest.approx(bound + target.launch_seconds)
            if call.op not in ("columns", "toy_tail"):
                seconds += cost.seconds
        assert program_cost(program, bucket, 16, target).seconds == pytest.approx(seconds)
        assert StepTime(program, target, 16)(bucket) == pytest.approx(seconds)


def test_calls_that_differ_in_attributes_alone_differ_in_cost(toys):
    @contract("x[T,C]:A -> y[T,C]:A", flops="T*C*k")
    def toy_mixed_cost(x, *, k: int):
        return x

    calls = [Call("toy_mixed_cost", {"x": "x"}, {"y": f"y{k}"}, {"k": k}) for k in (1, 10**9)]
    results = ["y1", "y1000000000"]
    x = {"x": TensorSpec(("T", 8), "float32")}
    program = handmade(calls, step=x, params={}, results=results)
    bucket, target = Bucket(EXTEND, 1, 4), find_target("cpu")
    assert StepTime(program, target, 1)(bucket) == pytest.approx(
        sum(call_cost(program, call, bucket, 1, target).seconds for call in program.calls)
    )
    assert StepTime(program, target, 1)(bucket) > 4 * 8 * 10**9 / target.flops["float32"]


@pytest.mark.parametrize("name", ["cpu", "sm_80", "sm_90a"])
def test_a_dtype_without_a_rate_is_an_error(toys, name):
    @contract("x[T,K]:int16 packed[N,K]:int16 -> y[T,N]:float32", flops="2*T*N*K", rate="packed")
    def toy_int16(x, packed):
        raise NotImplementedError

    operands = {"x": TensorSpec(("T", 8), "int16"), "packed": TensorSpec((4, 8), "int16")}
    results = [TensorSpec(("T", 4), "float32")]
    target = find_target(name)
    with pytest.raises(PlanError, match=f"{target.device.name} knows no rate for int16, only for float32"):
        op_cost(toy_int16, operands, results, {}, Bucket(EXTEND, 1, 4), 16, target)
    device = replace(target.device, flops={**target.flops, "int16": 7e12}, bandwidth=1e30)
    known = replace(target.on(device), launch_seconds=0.0)
    cost = op_cost(toy_int16, operands, results, {}, Bucket(EXTEND, 1, 4), 16, known)
    assert cost.seconds == pytest.approx(2 * 4 * 4 * 8 / 7e12)


def test_every_product_names_what_decides_its_rate():
    registry.discover()
    for name, op in CONTRACTS.items():
        products = ("linear", "paged_", "extend_", "verify_", "decode_", "tree_", "grouped_", "chunk_")
        products += ("mla_absorb", "mla_values", "mla_own_", "mla_extend_", "mla_decode_", "mla_attention")
        chains = op.chains and any(CONTRACTS[part].rate is not None for part in op.chains)
        assert (op.rate is not None) == (name.startswith(products) or bool(chains)), name


def test_a_step_reads_and_writes_every_states_block_once():
    """By hand, at Qwen3-Next's sizes in bfloat16: whatever blocks there are, and however long the row is."""
    registry.discover()
    sizes = {"key_heads": 16, "key_dim": 128, "value_heads": 32, "value_dim": 128}
    rows = TensorSpec(("R",), "int32")
    operands = {
        "qkv": TensorSpec(("T", 8192), "bfloat16"),
        "ba": TensorSpec(("T", 64), "float32"),
        "a_log": TensorSpec((32,), "float32"),
        "dt_bias": TensorSpec((32,), "float32"),
        "state": TensorSpec(("P", 32, 128, 128), "float32"),
        **dict.fromkeys(("state_in", "state_out", "query_start", "query_len"), rows),
    }
    results = [TensorSpec(("T", 4096), "bfloat16")]
    for op, flops in (("recurrent_delta_rule", 7), ("chunk_delta_rule", 6 + 128 * 5 / 128 + 0.5)):
        nbytes, counted = op_work(CONTRACTS[op], operands, results, sizes, {"R": 3, "T": 700}, 1024)
        states = 2 * 3 * 32 * 128 * 128 * 4
        assert nbytes == states + 700 * (2 * 8192 + 4 * 64 + 2 * 4096) + 2 * 32 * 4 + 4 * 3 * 4
        assert counted == 700 * 32 * 128 * 128 * flops


def test_places_are_large_enough_in_all_buckets():
    def buffer(shape: tuple[Any, ...]) -> Buffer:
        return Buffer(TensorSpec(shape, "int8"), 0, None, 0, 1)

    buckets = [Bucket(EXTEND, 2, 9), Bucket(EXTEND, 4, 9), Bucket(EXTEND, 1, 16)]
    buffers = {"a": buffer(("T*3+1", 2)), "b": buffer(("cdiv(T,4)",)), "c": buffer(("R*2",))}
    prove_places(buffers, buckets, Bucket(EXTEND, 4, 16))
    with pytest.raises(PlanError, match=r"c takes 4 bytes in bucket extend-2x9 and has 2: .* extend-1x16"):
        prove_places(buffers, buckets, Bucket(EXTEND, 1, 16))
    prove_places({k: buffers[k] for k in "ab"}, buckets, Bucket(EXTEND, 1, 16))


def test_axes_are_those_that_a_step_stages(toys):
    """Nothing knows T and R: a step with an axis of patches is verified, costed and placed by it."""
    patches = {"x": TensorSpec(("Q", 8), "float32")}
    calls = [
        Call("toy_repeat", {"x": "x"}, {"copies": "copies", "tokens": "tokens"}, {"k": 3, "block": 2}),
        Call("silu", {"x": "copies"}, {"y": "made"}),
        Call("toy_fold", {"x": "x", "copies": "made", "tokens": "tokens"}, {"y": "y"}, {"k": 3, "block": 2}),
    ]
    program = verify(handmade(calls, step=patches, params={}, results=["y"]), after="handmade")
    largest: Any = SimpleNamespace(sizes={"Q": 7})
    lowered, nbytes = lower(program, find_target("cpu"), largest, {})
    assert {n: str(b.spec) for n, b in lowered.buffers.items()} == {
        "copies": "float32[Q*3, 8]",
        "made": "float32[Q*3, 8]",
        "tokens": "int32[cdiv(Q,2)]",
    }
    assert nbytes == 2 * align(7 * 3 * 8 * 4) + align(4 * 4)
    contract, specs = calls[1].contract, program.operand_specs(calls[1])
    moved, computed = op_work(contract, specs, [program.spec("made")], {}, {"Q": 7}, 16)
    assert (moved, computed) == (2 * 7 * 3 * 8 * 4, 4 * 7 * 3 * 8)


def test_costs_of_all_batches_at_once_are_those_of_each(toys):
    """Costs with min and cdiv are no polynomials: what inspection sums over a grid is the model's own figure."""
    plan = toy_traced(toys, "fp8").lower().compile()
    rows, tokens = np.arange(1, 5)[:, None], np.arange(1, 60)[None, :]
    grid = _step_seconds(plan, EXTEND, rows, tokens, Traffic(context=16))
    for r, t in itertools.product((1, 3, 4), (1, 2, 39, 40, 41, 59)):
        costs = launch_costs(plan, Bucket(EXTEND, r, t), context=16)
        assert grid[r - 1, t - 1] == pytest.approx(sum(c.seconds for c in costs), rel=1e-12)
    assert f"T*{COPIES}" in plan_html(plan)
    assert "toy_repeat" in plan.as_text()
