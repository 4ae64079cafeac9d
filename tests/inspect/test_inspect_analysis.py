"""Figures against arithmetic over the model's shapes, and against the costs that the planner worked with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import inspect_plans as tiny_model
import pytest
from inspect_plans import make_plan, tiny

from makeready.graphs.inspect.analysis import (
    CAPACITY_GIB,
    LaunchCost,
    by_kernel,
    cost_analysis,
    launch_costs,
    memory_analysis,
)
from makeready.graphs.inspect.html import plan_html
from makeready.graphs.inspect.segments import groups, segments
from makeready.graphs.passes import REWRITES
from makeready.graphs.plan import artifact
from makeready.graphs.plan.program import OpClass, PlanCandidate
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket


def aligned(nbytes: int) -> int:
    return (nbytes + 255) // 256 * 256


def test_weight_bytes_are_those_of_the_models_shapes():
    m = tiny_model
    layer = [m.QKV[0] * m.QKV[1], m.OUT[0] * m.OUT[1], m.GATE_UP[0] * m.GATE_UP[1], m.DOWN[0] * m.DOWN[1]]
    layer += [m.HIDDEN, m.HIDDEN]
    tensors = (
        [m.VOCABULARY * m.HIDDEN] * 2 + [m.HIDDEN] + layer * m.LAYERS + [m.CONTEXT * m.HEAD]
    )  # rope table
    analysis = memory_analysis(tiny())
    assert analysis["regions"]["weights"] == sum(aligned(4 * n) for n in tensors)
    assert analysis["weights_by_dtype"] == {"float32": 4 * sum(tensors)}
    assert analysis["generated"] == 4 * m.CONTEXT * m.HEAD
    assert analysis["parameters"] == m.PARAMETERS
    assert analysis["stored_twice"] == 0
    assert analysis["fixed"] == sum(analysis["regions"].values())


def test_tied_embeddings_are_parameters_once():
    plan = make_plan({"tie_word_embeddings": True}, weight_dtype="bfloat16")
    analysis = memory_analysis(plan)
    matrix = tiny_model.VOCABULARY * tiny_model.HIDDEN
    stored = [
        w.nbytes for w in plan.weights for p in w.param.pieces if p.source == "model.embed_tokens.weight"
    ]
    assert analysis["parameters"] == tiny_model.PARAMETERS - matrix
    assert analysis["stored_twice"] == sum(stored) - stored[0]


def test_kv_capacity():
    plan = tiny()
    analysis = memory_analysis(plan)
    kv = analysis["kv"]
    token = 2 * tiny_model.LAYERS * tiny_model.KV_HEADS * tiny_model.HEAD * 4
    assert (kv["token_bytes"], kv["page_bytes"]) == (token, token * tiny_model.PAGE)
    pages = tiny_model.ROWS * tiny_model.CONTEXT // tiny_model.PAGE + 1
    assert kv["full_bytes"] == pages * kv["page_bytes"]
    assert tuple(analysis["capacity"]) == CAPACITY_GIB
    for gib, found in analysis["capacity"].items():
        whole = analysis["fixed"] + (found["pages"] + 1) * kv["page_bytes"]
        assert whole <= gib * 2**30 < whole + kv["page_bytes"]
        assert found["tokens"] == found["pages"] * tiny_model.PAGE
        assert found["rows"] == found["tokens"] // tiny_model.CONTEXT


def test_memory_too_small_for_a_page_holds_no_tokens():
    plan = make_plan({"vocab_size": 400_000, "hidden_size": 480, "head_dim": 80})  # 1.4 GiB of weights
    assert memory_analysis(plan)["capacity"][1] == {"pages": 0, "tokens": 0, "rows": 0}


def test_linear_and_attention_costs_by_hand():
    m, rows, context = tiny_model, 3, 40
    costs = launch_costs(tiny(), Bucket(DECODE, rows, rows), context)
    linears = [c for c in costs if c.op == "linear"]
    matrices = m.LAYERS * [m.QKV, m.OUT, m.GATE_UP, m.DOWN] + [m.HEAD_MATRIX]
    assert sum(c.flops for c in linears) == sum(2 * rows * n * k for n, k in matrices)
    assert sum(c.nbytes for c in linears) == sum(4 * (n * k + rows * (n + k)) for n, k in matrices)
    attention = [c for c in costs if c.op == "decode_attention"]
    assert len(attention) == m.LAYERS
    assert {c.flops for c in attention} == {4 * rows * context * m.HEADS * m.HEAD}
    assert [c.layer for c in attention] == ["0", "1", "2"]


@pytest.mark.parametrize("context", [1, 50])
def test_costs_are_those_the_planner_chose_by(context):
    plan, lowered = tiny_model.make_plan(), tiny_model.lowered()
    traced = replace(lowered.traced, traffic=replace(lowered.traced.traffic, context=context))
    lowered = replace(lowered, traced=traced)
    for bucket, found in cost_analysis(plan, context).items():
        wanted = lowered.cost_analysis(bucket)
        assert found["nbytes"] == pytest.approx(wanted.nbytes)
        assert found["flops"] == pytest.approx(wanted.flops)
        assert found["seconds"] == pytest.approx(wanted.seconds)
        tokens = bucket.rows if bucket.phase == DECODE else bucket.tokens
        assert found["tokens_per_second"] == pytest.approx(tokens / wanted.seconds)


def test_context_counts_up_to_the_plans_length():
    bucket = Bucket(DECODE, 2, 2)
    assert launch_costs(tiny(), bucket, 10**6) == launch_costs(tiny(), bucket, tiny_model.CONTEXT)
    assert launch_costs(tiny(), bucket, 10**6) != launch_costs(tiny(), bucket, tiny_model.CONTEXT - 1)


@pytest.mark.parametrize(
    ("memory", "compute", "launch", "bound", "seconds"),
    [(3.0, 2.0, 1.0, "memory", 4.0), (2.0, 3.0, 1.0, "compute", 4.0), (1.0, 2.0, 3.0, "launch", 5.0)],
)
def test_bound_is_what_takes_longest(memory, compute, launch, bound, seconds):
    cost = LaunchCost("op", "kernel", "", None, 1.0, 1.0, memory, compute, launch)
    assert (cost.bound, cost.seconds) == (bound, seconds)


def test_a_gpus_kernel_is_the_buckets_first_candidate():
    plan, bucket, other = tiny(), tiny().buckets[0], tiny().buckets[1]
    assert bucket.phase == other.phase == DECODE
    program = plan.programs[DECODE]
    candidates = {
        str(bucket): (PlanCandidate("tiles", ()), PlanCandidate("rows", ())),
        str(other): (PlanCandidate("rows", ()),),
    }
    launches = (replace(program.launches[0], op_class=0), *program.launches[1:])
    program = replace(program, launches=launches, classes=(OpClass(launches[0].op, candidates),))
    plan = replace(plan, programs={**plan.programs, DECODE: program})
    assert [launch_costs(plan, b, 9)[0].kernel for b in (bucket, other)] == ["tiles", "rows"]
    assert launch_costs(plan, bucket, 9)[1].kernel == launches[1].kernel


def test_kernels_add_up_to_the_launches():
    costs = launch_costs(tiny(), Bucket(EXTEND, 2, 7), 30)
    for weights in (False, True):
        merged = by_kernel(costs, weights=weights)
        assert sum(c.launches for c in merged) == len(costs)
        assert sum(c.flops for c in merged) == pytest.approx(sum(c.flops for c in costs))
        assert [c.seconds for c in merged] == sorted((c.seconds for c in merged), reverse=True)
    assert len([c for c in by_kernel(costs) if c.op == "linear"]) == 1
    assert len([c for c in by_kernel(costs, weights=True) if c.op == "linear"]) == 5


@pytest.mark.parametrize("disabled", [(), tuple(REWRITES)])
def test_segments_tile_the_program_in_order(disabled):
    plan = make_plan(disabled_passes=disabled)
    for program in plan.programs.values():
        found = segments(program)
        assert [s.start for s in found[1:]] == [s.stop for s in found[:-1]]
        assert (found[0].start, found[-1].stop) == (0, len(program.launches))
        assert [s.name for s in found] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
        for segment in found:
            named = {
                value.split(".")[1]
                for launch in program.launches[segment.start : segment.stop]
                for value in launch.operands.values()
                if value.startswith("layers.")
            }
            assert named == ({segment.layer} if segment.layer else set())


def test_layers_alike_are_grouped_and_others_are_not():
    decode, extend = (groups(tiny(), phase) for phase in (DECODE, EXTEND))
    assert [g.label for g in decode] == ["embedding", "layer 0", "layers 1–2", "head"]
    # The last extend layer gathers every row's last token; the first begins with a norm without residual.
    assert [g.label for g in extend] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]


def test_plan_methods(tmp_path):
    plan = tiny()
    assert plan.digest == artifact.digest(plan)
    assert plan.save(tmp_path / "p") == tmp_path / "p"
    loaded = artifact.load(tmp_path / "p")
    assert loaded.memory_analysis() == memory_analysis(plan)
    assert loaded.cost_analysis(20) == cost_analysis(plan, 20)
    assert loaded.as_text() == plan.as_text()
    assert plan_html(loaded) == plan_html(plan)


def test_a_plan_is_read_and_measured_without_torch(tmp_path):
    folder = tiny().save(tmp_path / "p")
    code = (
        "import sys; from makeready.graphs.plan import artifact; "
        f"plan = artifact.load({str(folder)!r}); "
        "print(plan.memory_analysis()['fixed'], plan.digest, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tiny().memory.fixed), tiny().digest, "False"]
