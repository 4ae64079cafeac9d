"""Where each rewrite applies, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from tiny_programs import LLAMA, QWEN3, handmade, ops, traced

from makeready.graphs.passes import REWRITES, rewrite
from makeready.graphs.passes.expand import expand
from makeready.graphs.passes.fuse_add_norm import fuse_add_norm
from makeready.graphs.passes.fuse_qkv import fuse_qkv
from makeready.graphs.passes.fuse_silu_mul import fuse_silu_mul
from makeready.graphs.passes.hoist_gather import hoist_gather
from makeready.graphs.passes.merge_linears import merge_linears
from makeready.graphs.plan.recipe import Piece
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.planner.verify import verify
from makeready.kernels import registry
from makeready.kernels.spec import ROWS, TOKENS, TensorSpec

registry.discover()
LAYERS = LLAMA["num_hidden_layers"]
WIDE = TensorSpec((TOKENS, 8), "float32")
ROW_INDEX = TensorSpec((ROWS,), "int32")
SELECTION = {"query_start": "query_start", "query_len": "query_len"}
SELECTION_STEP = dict.fromkeys(SELECTION, ROW_INDEX)


@cache
def general(model: str = "llama", phase: str = EXTEND) -> Program:
    config = LLAMA | {"mlp_bias": True} if model == "llama" else QWEN3
    return expand(traced(config).programs[phase])


def square(*names: str) -> dict[str, TensorSpec]:
    return dict.fromkeys(names, TensorSpec((8, 8), "float32"))


def linear(x: str, weight: str, y: str, **more: str) -> Call:
    return Call("linear", {"x": x, "weight": weight, **more}, {"y": y}, {"out_dtype": ""})


def view(x: str, y: str, start: int, stop: int) -> Call:
    return Call("columns", {"x": x}, {"y": y}, {"start": start, "stop": stop})


def unchanged(apply, program: Program) -> None:
    verify(program, after="the test's own making")
    assert verify(apply(program), after=apply.__name__) == program


@pytest.mark.parametrize("apply", REWRITES.values(), ids=list(REWRITES))
@pytest.mark.parametrize("phase", [EXTEND, DECODE])
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_every_rewrite_is_legal_and_finishes(apply, phase, model):
    for before in (general(model, phase), rewrite(general(model, phase))):
        once = verify(apply(before), after=apply.__name__)
        assert apply(once).calls == once.calls


def test_unknown_passes_cannot_be_disabled():
    with pytest.raises(ValueError, match="no pass 'fuse_everything' to disable; passes are merge_linears"):
        rewrite(general(), disabled=("fuse_everything",))


def test_all_rewrites_leave_one_launch_for_each_part_of_a_layer():
    counts = Counter(ops(rewrite(general())))
    counts = {op: n for op, n in counts.items() if op != "columns"}
    assert counts == {
        "locate": 1,
        "find_pages": 1,
        "embedding": 1,
        "rope_rows": 1,
        "rms_norm": 1,  # the first, which has nothing to add
        "linear": 4 * LAYERS + 1,
        "norm_rope_kv_write": LAYERS,
        "extend_attention": LAYERS,
        "silu_mul": LAYERS,
        "add_rms_norm": 2 * LAYERS,
        "gather_last": 2,  # attention's result and the residual stream
        "sample": 1,
        "token_logprobs": 1,
    }


# merge_linears


def test_projections_of_one_value_are_merged():
    before, after = general(), merge_linears(general())
    assert ops(before).count("linear") == 7 * LAYERS + 1
    assert ops(after).count("linear") == 4 * LAYERS + 1
    qkv = after.params["layers.0.attention.q+k+v.weight"]
    heads, kv_heads, size, hidden = 3, 1, 8, LLAMA["hidden_size"]
    assert qkv.spec == TensorSpec(((heads + 2 * kv_heads) * size, hidden), "float32")
    source = "model.layers.0.self_attn.{}_proj.weight".format
    assert qkv.pieces == (
        Piece(source("q"), ((0, 24), (0, 24)), (0, 0)),
        Piece(source("k"), ((0, 8), (0, 24)), (24, 0)),
        Piece(source("v"), ((0, 8), (0, 24)), (32, 0)),
    )
    assert "layers.1.mlp.gate+up.bias" in after.params
    assert not any("attention.q.weight" in name for name in after.params)
    assert {v: before.spec(v) for c in before.calls for v in c.results.values()} == {
        v: after.spec(v) for c in before.calls for v in c.results.values()
    }


def test_shared_parameters_are_not_merged():
    step = {"x": WIDE, "z": WIDE}
    twice = [linear("x", "a", "p"), linear("x", "a", "q"), Call("add", {"x": "p", "y": "q"}, {"z": "r"})]
    unchanged(merge_linears, handmade(twice, step=step, params=square("a"), results=["r"]))
    elsewhere = [linear("x", "a", "p"), linear("x", "b", "q"), linear("z", "b", "s")]
    unchanged(merge_linears, handmade(elsewhere, step=step, params=square("a", "b"), results=["p", "q", "s"]))


def test_parameters_that_are_always_read_together_are_merged_wherever_they_are_read():
    """As by a model that drafts, whose layers run several times in a step."""
    step, params = {"x": WIDE, "z": WIDE}, square("a", "b", "c")
    whole = [linear("x", "a", "p"), linear("x", "b", "q"), linear("x", "c", "r")]
    part = [linear("z", "b", "s"), linear("z", "c", "t")]
    results = ["p", "q", "r", "s", "t"]
    after = verify(
        merge_linears(handmade([*whole, *part], step=step, params=params, results=results)),
        after="merge_linears",
    )
    assert ops(after).count("linear") == 2
    assert {name: param.spec.shape[0] for name, param in after.params.items()} == {"a+b+c": 24, "b+c": 16}
    alone = [*whole, linear("z", "b", "s")]
    unchanged(merge_linears, handmade(alone, step=step, params=params, results=results[:4]))


def test_unlike_linears_are_not_merged():
    step = {"x": WIDE, "z": WIDE}
    params = square("a", "b") | {"bias": TensorSpec((8,), "float32")}
    with_bias = [linear("x", "a", "p"), linear("x", "b", "q", bias="bias")]
    unchanged(merge_linears, handmade(with_bias, step=step, params=params, results=["p", "q"]))
    of_another = [linear("x", "a", "p"), linear("z", "b", "q")]
    unchanged(merge_linears, handmade(of_another, step=step, params=square("a", "b"), results=["p", "q"]))
    other_dtype = [linear("x", "a", "p"), replace(linear("x", "b", "q"), attrs={"out_dtype": "bfloat16"})]
    unchanged(merge_linears, handmade(other_dtype, step=step, params=square("a", "b"), results=["p", "q"]))
    stored_otherwise = square("a") | {"b": TensorSpec((8, 8), "bfloat16")}
    calls = [linear("x", "a", "p"), linear("x", "b", "q")]
    unchanged(merge_linears, handmade(calls, step=step, params=stored_otherwise, results=["p", "q"]))


def test_parameters_named_at_other_depths_are_merged_too():
    calls = [linear("x", "mlp.gate.weight", "p"), linear("x", "router.weight", "q")]
    params = square("mlp.gate.weight", "router.weight")
    after = merge_linears(handmade(calls, step={"x": WIDE}, params=params, results=["p", "q"]))
    (merged,) = verify(after, after="merge_linears").params.values()
    assert merged.spec.shape == (16, 8)


# fuse_add_norm


def test_a_sum_and_its_norm_become_one():
    after = fuse_add_norm(general())
    assert Counter(ops(after))["add_rms_norm"] == 2 * LAYERS
    assert "add" not in ops(after)
    assert ops(after).count("rms_norm") == 1


def test_the_second_norm_of_a_sum_and_the_norm_of_anything_else_stay():
    def norm(x: str, y: str) -> Call:
        return Call("rms_norm", {"x": x, "weight": "w"}, {"y": y}, {"eps": 1e-6})

    calls = [
        Call("add", {"x": "x", "y": "z"}, {"z": "sum"}),
        norm("sum", "p"),
        norm("sum", "q"),
        norm("z", "r"),
    ]
    weight = {"w": TensorSpec((8,), "float32")}
    program = handmade(calls, step={"x": WIDE, "z": WIDE}, params=weight, results=["p", "q", "r", "sum"])
    after = verify(fuse_add_norm(program), after="fuse_add_norm")
    assert ops(after) == ["add_rms_norm", "rms_norm", "rms_norm"]
    assert after.calls[0].operands == {"x": "x", "residual": "z", "weight": "w"}
    assert after.calls[0].results == {"y": "p", "residual_out": "sum"}


# fuse_silu_mul


def gated(
    *extra: Call, gate: tuple[int, int] = (0, 4), up: tuple[int, int] = (4, 8), activation: str = "silu"
) -> Program:
    calls = [
        linear("x", "w", "wide"),
        view("wide", "gate", *gate),
        view("wide", "up", *up),
        Call(activation, {"x": "gate"}, {"y": "act"}),
        Call("multiply", {"x": "act", "y": "up"}, {"z": "product"}),
        *extra,
    ]
    results = ["product", *(c.result for c in extra)]
    return handmade(calls, step={"x": WIDE}, params=square("w"), results=results)


def test_the_gate_of_merged_projections_becomes_one():
    assert "silu_mul" not in ops(fuse_silu_mul(general()))  # gate and up are still two values
    after = fuse_silu_mul(merge_linears(general()))
    assert ops(after).count("silu_mul") == LAYERS
    assert not {"silu", "multiply"} & set(ops(after))
    assert ops(fuse_silu_mul(gated())) == ["linear", "silu_mul"]
    assert ops(fuse_silu_mul(gated(activation="gelu_tanh"))) == ["linear", "gelu_tanh_mul"]
    assert "silu" in ops(fuse_silu_mul(gated(gate=(4, 8), up=(0, 4))))


def test_a_gate_that_somebody_else_reads_stays():
    unchanged(fuse_silu_mul, gated(Call("add", {"x": "act", "y": "up"}, {"z": "more"})))


def test_a_gate_read_before_its_activation_is_fused_and_kept():
    after = fuse_silu_mul(gated(Call("add", {"x": "gate", "y": "up"}, {"z": "more"})))
    assert Counter(ops(verify(after, after="it"))) == {"linear": 1, "columns": 2, "silu_mul": 1, "add": 1}


@pytest.mark.parametrize(
    ("gate", "up"), [((4, 8), (0, 4)), ((0, 3), (3, 6)), ((1, 4), (4, 7)), ((0, 4), (0, 4))]
)
def test_columns_that_are_no_halves_stay(gate, up):
    unchanged(fuse_silu_mul, gated(gate=gate, up=up))


# fuse_qkv


def projection(**changes) -> Program:
    """q and k normed and rotated, v not, out of one value of 4 + 2 + 2 heads; ``changes`` spoil it."""
    c = {
        "q_norm": True,
        "k_norm": True,
        "k_eps": 1e-6,
        "k_offset": 1.0,
        "k_rows": "rows",
        "v_rope": False,
        "width": 16,
    } | changes
    heads = {"heads": 4, "head_dim": 2}, {"heads": 2, "head_dim": 2}
    calls = [
        linear("x", "w", "qkv"),
        view("qkv", "q0", 0, 8),
        view("qkv", "k0", 8, 12),
        view("qkv", "v0", 12, 16),
    ]
    for name, normed, rows, h, eps, offset in (
        ("q", c["q_norm"], "rows", heads[0], 1e-6, 1.0),
        ("k", c["k_norm"], c["k_rows"], heads[1], c["k_eps"], c["k_offset"]),
    ):
        if normed:
            weights = {"x": f"{name}0", "weight": f"{name}_norm"}
            calls.append(
                Call("head_rms_norm", weights, {"y": f"{name}1"}, {"eps": eps, "offset": offset, **h})
            )
        calls.append(
            Call(
                "rope", {"x": f"{name}1" if normed else f"{name}0", "rows": rows}, {"y": f"{name}2"}, dict(h)
            )
        )
    if c["v_rope"]:
        calls.append(Call("rope", {"x": "v0", "rows": "rows"}, {"y": "v2"}, dict(heads[1])))
    operands = {"k": "k2", "v": "v2" if c["v_rope"] else "v0", "kv_slot": "kv_slot"}
    operands |= {"k_cache": "k_cache", "v_cache": "v_cache"}
    calls.append(Call("kv_write", operands, {}, {"kv_heads": 2, "head_dim": 2}))
    rows, cache = TensorSpec((TOKENS, 2), "float32"), TensorSpec(("P", 4, 2, 2), "float32")
    step = {"x": WIDE, "rows": rows, "rows_too": rows, "kv_slot": TensorSpec((TOKENS,), "int32")}
    step |= {"k_cache": cache, "v_cache": cache}
    params = {"w": TensorSpec((c["width"], 8), "float32")}
    params |= dict.fromkeys(("q_norm", "k_norm"), TensorSpec((2,), "float32"))
    return handmade(calls, step=step, params=params, results=["q2"])


def test_what_leads_to_attention_becomes_one():
    assert "norm_rope_kv_write" not in ops(fuse_qkv(general()))  # q, k and v are still three values
    after = fuse_qkv(merge_linears(general()))
    assert ops(after).count("norm_rope_kv_write") == LAYERS
    assert not {"rope", "kv_write"} & set(ops(after))
    (call,) = (c for c in fuse_qkv(projection()).calls if c.op == "norm_rope_kv_write")
    assert call.operands["q_norm"] == "q_norm"
    assert call.attrs == {"heads": 4, "kv_heads": 2, "head_dim": 2, "eps": 1e-6, "offset": 1.0}
    assert ops(fuse_qkv(projection(q_norm=False, k_norm=False))) == ["linear", "norm_rope_kv_write"]


def test_what_else_the_projection_gives_stays_beside_it():
    after = verify(fuse_qkv(projection(width=20)), after="fuse_qkv")
    assert ops(after) == ["linear", "columns", "norm_rope_kv_write"]
    (view,) = (call for call in after.calls if call.op == "columns")
    assert (view.operands["x"], view.attrs) == ("qkv", {"start": 0, "stop": 16})


@pytest.mark.parametrize(
    "changes",
    [
        {"q_norm": False},
        {"k_norm": False},
        {"k_eps": 1e-5},
        {"k_offset": 0.0},
        {"k_rows": "rows_too"},
        {"v_rope": True},
    ],
    ids=lambda c: "-".join(c),
)
def test_heads_that_are_treated_otherwise_stay(changes):
    unchanged(fuse_qkv, projection(**changes))


# hoist_gather


def test_only_last_tokens_leave_the_last_attention():
    after = hoist_gather(general())
    last = max(i for i, op in enumerate(ops(after)) if op == "extend_attention")
    tail = [c for c in after.calls[last + 1 :] if c.op != "gather_last"]
    assert Counter(c.op for c in tail)["linear"] == 5  # output, gate, up, down and the vocabulary
    assert all(TOKENS not in after.spec(v).shape for c in tail for v in c.results.values())
    places = ("gather_last", "locate", "find_pages")
    before = [c for c in after.calls[: last + 1] if c.op not in places]
    assert all(ROWS not in after.spec(v).shape for c in before for v in c.results.values())
    gathered = [c.operands["x"] for c in after.calls if c.op == "gather_last"]
    assert len(gathered) == len(set(gathered)) == 2
    assert after.producers()[gathered[0]].op == "extend_attention" or (
        after.producers()[gathered[1]].op == "extend_attention"
    )


def gather(x: str, y: str) -> Call:
    return Call("gather_last", {"x": x, **SELECTION}, {"y": y})


def test_a_value_that_somebody_else_reads_whole_is_not_gathered_before():
    calls = [linear("x", "a", "p"), linear("p", "b", "q"), gather("q", "last"), linear("p", "c", "r")]
    step = {"x": WIDE, **SELECTION_STEP}
    program = handmade(calls, step=step, params=square("a", "b", "c"), results=["last", "r"])
    after = verify(hoist_gather(program), after="hoist_gather")
    assert ops(after) == ["linear", "gather_last", "linear", "linear"]
    assert after.spec("r").shape[0] == TOKENS
    wanted = handmade(
        [linear("x", "a", "p"), gather("p", "last")], step=step, params=square("a"), results=["p", "last"]
    )
    unchanged(hoist_gather, wanted)


def test_a_value_gathered_for_two_readers_is_gathered_once():
    """The residual of a block whose input no row-wise op makes."""
    calls = [
        Call("rms_norm", {"x": "x", "weight": "w"}, {"y": "n"}, {"eps": 1e-6}),
        linear("n", "a", "p"),
        Call("add", {"x": "p", "y": "x"}, {"z": "sum"}),
        gather("sum", "last"),
    ]
    params = square("a") | {"w": TensorSpec((8,), "float32")}
    program = handmade(calls, step={"x": WIDE, **SELECTION_STEP}, params=params, results=["last"])
    after = verify(hoist_gather(program), after="hoist_gather")
    assert ops(after) == ["gather_last", "rms_norm", "linear", "add"]


# expand


def test_decode_has_one_token_a_row():
    program = general("llama", DECODE)
    assert not {"gather_last", "extend_attention"} & set(ops(program))
    assert ops(program).count("decode_attention") == LAYERS
    assert all(TOKENS not in value.spec.shape for value in program.values.values())


def test_other_steps_are_what_was_traced_with_attention_of_any_rows():
    for kind, program in traced(max_logprob_tokens=8).programs.items():
        renamed = ["extend_attention" if op == "paged_attention" else op for op in ops(program)]
        assert (ops(expand(program)) == renamed) == (kind != DECODE)
        assert ops(expand(program, deterministic=True)) == renamed
        assert expand(program).results == program.results
