"""Predicted steps against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import inspect_plans as m
import pytest
from inspect_plans import tiny

from makeready.graphs.inspect.step_time import Calibration, Row, StepTimes
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import OpClass, PlanCandidate
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.graphs.plan.targets import find_target

CPU = find_target("cpu")
BUCKET = max((b for b in tiny().buckets if b.phase == DECODE), key=lambda b: b.rows)


def two_launches(nanoseconds: tuple[int, int] = (0, 0), context: int = 1024, phase: str = DECODE) -> Plan:
    """The first projection and the first attention, with what their kernels' models say."""
    plan = tiny()
    program = plan.programs[phase]
    found = [next(x for x in program.launches if x.op == op) for op in ("linear", f"{phase}_attention")]
    buckets = [b for b in plan.buckets if b.phase == phase]
    classes = tuple(
        OpClass(x.op, {str(b): (PlanCandidate("one", (), ns),) for b in buckets})
        for x, ns in zip(found, nanoseconds, strict=True)
    )
    launches = tuple(
        replace(launch, op_class=i if any(nanoseconds) else -1) for i, launch in enumerate(found)
    )
    program = replace(program, launches=launches, chains=(), lanes=(), joins=(), classes=classes)
    options = replace(plan.options, traffic={**plan.options.traffic, "context": context})
    return replace(plan, programs={**plan.programs, phase: program}, options=options)


def linear_seconds(tokens: int) -> float:
    outputs, inputs = m.QKV
    nbytes, flops = 4 * (outputs * inputs + tokens * (outputs + inputs)), 2 * tokens * outputs * inputs
    return max(nbytes / CPU.bandwidth, flops / CPU.rate("float32"))


def attention_seconds(rows: list[Row]) -> float:
    """Keys and values of every row once; every token multiplies with those before it and itself, twice."""
    width, count = m.HEADS * m.HEAD, len(rows)
    tokens = sum(row.tokens for row in rows)
    cached = sum(row.context for row in rows) * 2 * m.KV_HEADS * m.HEAD * 4
    staged = 4 * count * (m.CONTEXT // m.PAGE + 1)  # page table, and the length of every row
    if any(row.tokens > 1 for row in rows):
        staged += 2 * 4 * count  # where each row's tokens begin, and how many
    nbytes = cached + 2 * 4 * tokens * width + staged
    pairs = sum(row.context - behind for row in rows for behind in range(row.tokens))
    return max(nbytes / CPU.bandwidth, 4 * pairs * width / CPU.rate("float32"))


@pytest.mark.parametrize("contexts", [[1], [7, 90, 33], [96] * 5])
def test_two_launches_without_models_by_hand(contexts):
    rows = [Row(1, context) for context in contexts]
    calibration = Calibration(cache_seconds=3e-3, cache_share=0.5, sustained=1.25, step_seconds=0.125)
    found = StepTimes(two_launches(), calibration=calibration).seconds(BUCKET, rows)
    linear = CPU.launch_seconds + linear_seconds(BUCKET.rows)  # padding is multiplied too
    wanted = 1.25 * (linear + 3e-3 + attention_seconds(rows) / 0.5) + 0.125
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("rows", [[Row(7, 7)], [Row(3, 50), Row(5, 5), Row(1, 96)]])
def test_tokens_of_a_prompt_see_those_before_them(rows):
    tokens = sum(row.tokens for row in rows)
    bucket = min(
        b for b in tiny().buckets if b.phase == EXTEND and b.tokens >= tokens and b.rows >= len(rows)
    )
    found = StepTimes(two_launches(phase=EXTEND), calibration=Calibration()).seconds(bucket, rows)
    wanted = 2 * CPU.launch_seconds + linear_seconds(bucket.tokens) + attention_seconds(rows)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_a_kernels_model_counts_and_attention_goes_by_the_context():
    usual = 40
    times = StepTimes(two_launches((2_000_000, 5_000_000), usual), calibration=Calibration())
    as_modelled = [Row(1, usual)] * BUCKET.rows
    # Candidates of the toy have no nodes, so no launch is told from the rest of a model's figure.
    assert times.seconds(BUCKET, as_modelled) == pytest.approx(7e-3)
    longer = [Row(1, 2 * usual)] * BUCKET.rows
    ratio = attention_seconds(longer) / attention_seconds(as_modelled)
    assert times.seconds(BUCKET, longer) == pytest.approx(2e-3 + 5e-3 * ratio, rel=1e-9)


@pytest.mark.parametrize("bucket", [b for b in tiny().buckets if b.phase == EXTEND], ids=str)
def test_models_of_prompts_speak_of_one_that_fills_the_bucket(bucket):
    """Also where a bucket has room for rows of one token."""
    times = StepTimes(two_launches((2_000_000, 5_000_000), 1, EXTEND), calibration=Calibration())
    assert times.seconds(bucket, [Row(bucket.tokens, bucket.tokens)]) == pytest.approx(7e-3)


def test_more_rows_than_a_small_bucket_is_modelled_for_take_what_they_take_in_the_largest():
    """A small bucket's kernel starts and ends for little; further rows fill the device that it left idle."""
    plan = two_launches((2_000_000, 5_000_000), 1, EXTEND)
    buckets = sorted((b for b in plan.buckets if b.phase == EXTEND), key=lambda b: (b.tokens, b.rows))
    small, largest = next(b for b in buckets if 3 <= b.tokens < buckets[-1].tokens), buckets[-1]
    usual = {b: attention_seconds([Row(b.tokens, b.tokens)]) for b in (small, largest)}
    rows = [Row(2, m.CONTEXT), *[Row(1, m.CONTEXT)] * min(small.rows - 1, small.tokens - 2)]
    more = attention_seconds(rows) - usual[small]
    assert more > 0
    wanted = 7e-3 + 5e-3 / usual[largest] * more
    assert 5e-3 / usual[largest] < 5e-3 / usual[small]
    assert StepTimes(plan, calibration=Calibration()).seconds(small, rows) == pytest.approx(wanted, rel=1e-9)


def test_more_takes_longer():
    times = StepTimes(tiny())
    contexts = [times.alike(BUCKET, BUCKET.rows, context) for context in (1, 9, 50, 96)]
    assert contexts == sorted(set(contexts))
    rows = [times.alike(BUCKET, rows, 50) for rows in range(1, BUCKET.rows + 1)]
    assert rows == sorted(set(rows))
    faster = CPU.on(replace(CPU.device, bandwidth=2 * CPU.bandwidth))
    assert StepTimes(tiny(), faster).alike(BUCKET, BUCKET.rows, 50) < times.alike(BUCKET, BUCKET.rows, 50)


def test_choices_that_were_tuned_on_the_device_count():
    plan = two_launches((2_000_000, 5_000_000))
    program = plan.programs[DECODE]
    first, second = program.classes
    slow = {b: (*c, PlanCandidate("other", (), 9_000_000)) for b, c in first.candidates.items()}
    program = replace(program, classes=(OpClass(first.op, slow), second))
    tuned = {"NVIDIA H200": {f"{DECODE}/0/{BUCKET}": "other"}, "another": {f"{DECODE}/1/{BUCKET}": "none"}}
    plan = replace(plan, programs={**plan.programs, DECODE: program}, tuned=tuned)
    rows = [Row(1, 96)] * BUCKET.rows
    here, there = (
        StepTimes(replace(plan, device=device), CPU, Calibration()).seconds(BUCKET, rows)
        for device in ("h100", "h200")
    )
    assert there - here == pytest.approx(7e-3)


def test_a_bucket_of_another_plan_is_no_guess():
    with pytest.raises(KeyError):
        StepTimes(tiny()).seconds(Bucket("other", 1, 1), [Row(1, 1)])
