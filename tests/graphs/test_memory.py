"""The arena: no two live buffers share a byte, on random intervals and on real programs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_programs import CONFIGS, traced

from makeready.graphs.plan.memory import ALIGNMENT, Interval, align, assign, layout
from makeready.graphs.plan.spec import CacheGroup, CacheSpec, Field, Limits
from makeready.graphs.planner.request import Request
from makeready.graphs.steps.base import declare
from makeready.kernels.spec import DTYPE_BYTES, TensorSpec

SPANS = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)
SIZES = st.one_of(st.integers(0, 3000), st.sampled_from([1, 255, 256, 257, 512, 4096]))
INTERVALS = st.lists(st.tuples(SIZES, SPANS), max_size=24).map(
    lambda made: [Interval(f"v{i}", nbytes, first, last) for i, (nbytes, (first, last)) in enumerate(made)]
)


def owners(intervals: Sequence[Interval], offsets: dict[str, int], total: int) -> None:
    """Paint every launch's live buffers on a map of the arena, one owner a byte."""
    for at in range(1 + max((i.last for i in intervals), default=0)):
        painted = np.zeros(total, bool)
        for i in (i for i in intervals if i.first <= at <= i.last):
            start, stop = offsets[i.name], offsets[i.name] + i.nbytes
            assert 0 <= start <= stop <= total, f"{i.name} leaves the arena"
            assert start % ALIGNMENT == 0
            assert not painted[start:stop].any(), f"{i.name} overlaps another at launch {at}"
            painted[start:stop] = True


@settings(max_examples=150)
@given(INTERVALS)
def test_live_buffers_never_overlap(intervals):
    offsets, total = assign(intervals)
    assert set(offsets) == {i.name for i in intervals}
    owners(intervals, offsets, total)
    assert total <= sum(align(i.nbytes) for i in intervals)
    alive = [sum(align(i.nbytes) for i in intervals if i.first <= at <= i.last) for at in range(13)]
    assert total >= max(alive)


@given(INTERVALS, st.randoms(use_true_random=False))
def test_the_order_of_intervals_does_not_matter(intervals, shuffle: random.Random):
    shuffled = list(intervals)
    shuffle.shuffle(shuffled)
    assert assign(shuffled) == assign(intervals)


def test_buffers_that_never_meet_share_their_place():
    one, two, three = Interval("a", 1000, 0, 1), Interval("b", 900, 2, 3), Interval("c", 1, 1, 2)
    offsets, total = assign([one, two, three])
    assert offsets["a"] == offsets["b"] == 0
    assert total == align(1000) + align(1)
    # Both ends are included: what a launch reads and what it writes are alive together.
    assert assign([one, Interval("b", 900, 1, 3)])[1] == align(1000) + align(900)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("disabled", [(), ("fuse_qkv", "merge_linears"), ("hoist_gather",)])
def test_a_real_plans_buffers_never_overlap(name, disabled):
    plan = traced(CONFIGS[name], disabled_passes=disabled).lower().compile()
    for phase, program in plan.programs.items():
        for bucket in (b for b in plan.buckets if b.phase == phase):
            live = []
            for buffer_name, buffer in program.buffers.items():
                if buffer.row_stride is None:
                    nbytes = buffer.spec.nbytes(bucket.sizes)
                    live.append(Interval(buffer_name, nbytes, buffer.first, buffer.last))
                    named = [
                        at
                        for at, launch in enumerate(program.launches)
                        if buffer_name in (*launch.operands.values(), *launch.results.values())
                    ]
                    assert not named or buffer.first <= named[0] <= named[-1] <= buffer.last
            offsets = {i.name: program.buffers[i.name].offset for i in live}
            owners(live, offsets, plan.memory.arena)


def test_views_lie_within_their_base_while_it_lives():
    plan = traced().lower().compile()
    views = 0
    for phase, program in plan.programs.items():
        sizes = max(b for b in plan.buckets if b.phase == phase).sizes
        for name, view in program.buffers.items():
            if view.row_stride is None:
                continue
            views += 1
            rows, columns = view.spec.at(sizes)
            end = view.offset + ((rows - 1) * view.row_stride + columns) * DTYPE_BYTES[view.spec.dtype]
            bases = [
                b
                for b in program.buffers.values()
                if b.row_stride is None
                and b.spec.shape[-1] == view.row_stride
                and b.offset <= view.offset
                and end <= b.offset + b.spec.nbytes(sizes)
                and (b.first, b.last) == (view.first, view.last)
            ]
            assert bases, f"{name} is a view of nothing"
            for at, launch in enumerate(program.launches):
                if name in launch.operands.values():
                    assert view.first <= at <= view.last
    assert views or "columns" not in str(plan.programs)


@given(st.lists(st.integers(0, 600), max_size=8), st.integers(1, 40))
def test_fields_lie_one_after_the_other(widths, tokens):
    fields = [Field(f"f{i}", TensorSpec(("T", width), "int32")) for i, width in enumerate(widths)]
    offsets, total = layout(fields, {"T": tokens})
    end = 0
    for field in fields:
        assert offsets[field.name] >= end
        assert offsets[field.name] % ALIGNMENT == 0
        end = offsets[field.name] + field.spec.nbytes({"T": tokens})
    assert end <= total < end + ALIGNMENT or total == end == 0


def test_a_small_buckets_fields_fit_where_the_largest_ones_do():
    limits = Limits(max_rows=5, max_tokens=33, context_len=100, page_size=8)
    windowed = CacheGroup("local", (), 8, 20)
    cache = CacheSpec(8, (CacheGroup("kv", (), 8), windowed, CacheGroup("state", (), None)))
    steps, slots = declare(limits, Request(max_logprob_tokens=20), cache)
    assert {"pages", "pages.local"} <= {field.name for field in slots}
    assert {"grow_page.local", "state_in.state"} <= {field.name for field in steps["decode"].staged}
    assert len(steps) == 3
    for step in steps.values():
        for fields in (step.staged, slots, step.results):
            most = layout(fields, {"R": 5, "T": step.tokens})[1]
            assert all(
                layout(fields, {"R": r, "T": t})[1] <= most
                for r in range(1, 6)
                for t in range(1, step.tokens + 1)
            )
