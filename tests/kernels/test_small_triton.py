"""Triton kernels of the small ops without a GPU: interpreted against the references, and cross-compiled."""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import re

import pytest
import torch
from inputs import BUILDERS
from interpreted import (
    check_interpreted,
    columns_of,
    compiled,
    compiled_kernels,
    dtype_name,
    interpreted,
    launch_interpreted,
    op_call,
    random,
    run_interpreted,
)

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS

STEPS = ("locate", "find_pages", "draft_ngram", "accept_drafts", "count_drafts", "next_draft", "pack_drafts")
STEPS += ("force_drafts", "place_before", "hidden_write", "hidden_read", "spread_logits")
STEPS += ("plant_tree", "place_level", "grow_tree", "exclude", "take_parents", "pack_tree", "accept_tree")
STEPS += ("order_results", "place_moves", "move_entries", "move_states")

SHAPES = [(1, 64), (3, 131), (8, 576), (5, 4096)]


@compiled
@pytest.mark.slow
def test_interpreted():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norms(tokens, width, dtype):
    x, weight = columns_of(random(tokens, width, dtype=dtype)), random(width, seed=1)
    check_interpreted("rms_norm", {"x": x, "weight": weight}, eps=1e-5)
    residual = random(tokens, width, dtype=dtype, seed=2)
    check_interpreted("add_rms_norm", {"x": x, "residual": residual, "weight": weight}, eps=1e-5)
    check_interpreted("rms_norm", {"x": x, "weight": weight}, eps=1e-5, offset=1.0)
    check_interpreted("add_rms_norm", {"x": x, "residual": residual, "weight": weight}, eps=1e-5, offset=1.0)


@interpreted
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 32, 128), (7, 3, 64), (43, 9, 80)])
def test_head_norms(tokens, heads, head_dim):
    x = columns_of(random(tokens, heads * head_dim))
    operands = {"x": x, "weight": random(head_dim, seed=1)}
    attrs = {"eps": 1e-6, "heads": heads, "head_dim": head_dim}
    check_interpreted("head_rms_norm", operands, multiprocessors=1, **attrs)
    check_interpreted("head_rms_norm", operands, multiprocessors=1, offset=1.0, **attrs)


@interpreted
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (70, 300)])
def test_pointwise(tokens, width):
    x, y = columns_of(random(tokens, width)), random(tokens, width, seed=1)
    check_interpreted("add", {"x": x, "y": y}, multiprocessors=1)
    check_interpreted("multiply", {"x": y, "y": x})
    check_interpreted("concatenate", {"x": x, "y": y}, multiprocessors=1)
    check_interpreted("concatenate", {"x": y, "y": columns_of(random(tokens, 2 * width))})
    check_interpreted("silu", {"x": x})
    gate_up = columns_of(random(tokens, 2 * width, dtype=torch.float16))
    check_interpreted("silu_mul", {"gate_up": gate_up}, multiprocessors=1)
    check_interpreted("gelu_tanh", {"x": x})
    check_interpreted("gelu_tanh_mul", {"gate_up": gate_up}, multiprocessors=1)
    check_interpreted("scale", {"x": x}, by=25.25)
    check_interpreted("scale_columns", {"x": x, "scale": random(width, seed=3)}, multiprocessors=1)
    for gate in (random(tokens, 1, seed=2), columns_of(random(tokens, 1, seed=2))):
        check_interpreted("sigmoid_gate", {"x": x, "gate": gate}, multiprocessors=1)
    for whole in (width, width + 1, -(-width // 128) * 128, width + 300):
        check_interpreted("pad_columns", {"x": x}, width=whole)
        check_interpreted("pad_columns", {"x": gate_up}, width=width + whole, multiprocessors=1)


@interpreted
def test_gathers():
    start = torch.tensor([0, 2, 5, 0], dtype=torch.int32)
    length = torch.tensor([2, 3, 1, 0], dtype=torch.int32)
    operands = {"x": columns_of(random(6, 131)), "query_start": start, "query_len": length}
    check_interpreted("gather_last", operands)
    ids = torch.tensor([4, 0, 9, 9, 3], dtype=torch.int32)
    for width in (64, 3000):
        weight = random(10, width, dtype=torch.float16)
        check_interpreted("embedding", {"ids": ids, "weight": weight}, out_dtype="float32")
        check_interpreted("embedding", {"ids": ids, "weight": weight})
    check_interpreted("rope_rows", {"positions": ids, "table": random(12, 80)})


@interpreted
@pytest.mark.parametrize("op", STEPS)
def test_steps_find_their_places(op):
    for case in BUILDERS[op](op):
        check_interpreted(op, case.operands, **case.attrs)


@interpreted
@pytest.mark.parametrize(("heads", "head_dim", "rotary"), [(32, 128, 128), (3, 64, 64), (5, 80, 32)])
def test_rope(heads, head_dim, rotary):
    rows = torch.randn(7, rotary, generator=torch.Generator().manual_seed(3))
    x = columns_of(random(7, heads * head_dim))
    check_interpreted("rope", {"x": x, "rows": rows}, heads=heads, head_dim=head_dim)


DYNAMIC = {"rotary_dim": 96, "theta": 10000.0, "original_context": 4096}


@interpreted
@pytest.mark.parametrize(
    ("op", "attrs"), [("rope_rows_dynamic", DYNAMIC | {"factor": 4.0}), ("rope_rows_stepped", DYNAMIC)]
)
def test_rope_rows_of_growing_bases(op, attrs):
    operands = {
        "positions": torch.tensor([0, 1, 100, 5000, 9000, 32000, 7, 4095, 4096, 30000], dtype=torch.int32),
        "token_slot": torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 5, 6], dtype=torch.int32),
        "prompt_len": torch.tensor([1, 9000, 3, 4096, 4097, 8192, 16385], dtype=torch.int32),
    }
    call = op_call(op, operands, attrs)
    want = CONTRACTS[op].reference(**operands, **attrs)
    for kernel in registry.cuda_kernels(op):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, operands)["rows"]
            # A last-bit difference of a frequency turns a pair by position * 2**-23.
            margin = 2e-7 * (8 + operands["positions"].unsqueeze(1))
            assert ((got - want).abs() <= margin).all()


@interpreted
def test_logn_rope_rows():
    positions = torch.tensor([0, 2046, 2047, 2048, 5000, 32000, 7], dtype=torch.int32)
    operands = {"rows": random(7, 80), "positions": positions}
    check_interpreted("rope_rows_logn", operands, original_context=2048)


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def _qwen3_calls(tokens):
    """Calls at the shapes of Qwen3-8B: op, operands, attributes."""
    ints = {"dtype": torch.int32}
    x, weight = _empty(tokens, 4096), _empty(4096)
    yield "rms_norm", {"x": x, "weight": weight}, {"eps": 1e-6}
    yield "add_rms_norm", {"x": x, "residual": x, "weight": weight}, {"eps": 1e-6}
    yield "silu_mul", {"gate_up": _empty(tokens, 24576)}, {}
    yield "gelu_tanh_mul", {"gate_up": _empty(tokens, 24576)}, {}
    yield "gelu_tanh", {"x": x}, {}
    yield "scale", {"x": x}, {"by": 25.25}
    yield "scale_columns", {"x": x, "scale": _empty(4096, dtype=torch.float32)}, {}
    yield "sigmoid_gate", {"x": x, "gate": _empty(tokens, 1, dtype=torch.float32)}, {}
    yield "rms_norm", {"x": x, "weight": weight}, {"eps": 1e-6, "offset": 1.0}
    yield "embedding", {"ids": _empty(tokens, **ints), "weight": _empty(1000, 4096)}, {}
    table = _empty(1000, 128, dtype=torch.float32)
    yield "rope_rows", {"positions": _empty(tokens, **ints), "table": table}, {}
    rows = {"x": x, "rows": _empty(tokens, 128, dtype=torch.float32)}
    yield "rope", rows, {"heads": 32, "head_dim": 128}


@compiled
@pytest.mark.parametrize("tokens", [1, pytest.param(8192, marks=pytest.mark.slow)])
def test_cross_compiles_with_wide_accesses(tokens):
    for name, operands, attrs in _qwen3_calls(tokens):
        for made in compiled_kernels(name, operands, attrs):
            assert re.search(r"ld\.global\S*\.v4", made.ptx), name
            assert re.search(r"st\.global\S*\.v4", made.ptx), name


@compiled
@pytest.mark.slow
def test_cross_compiles_steps_and_rows():
    ints = torch.zeros(9, dtype=torch.int32)
    for op in STEPS:
        case = next(iter(BUILDERS[op](op)))
        list(compiled_kernels(op, case.operands, case.attrs))
    scaling = {"rotary_dim": 128, "theta": 1e4, "factor": 4.0, "original_context": 4096}
    places = {"positions": ints, "token_slot": ints, "prompt_len": ints}
    list(compiled_kernels("rope_rows_dynamic", places, scaling))
    del scaling["factor"]
    list(compiled_kernels("rope_rows_stepped", places, scaling))
    rows = {"rows": _empty(9, 128, dtype=torch.float32), "positions": ints}
    list(compiled_kernels("rope_rows_logn", rows, {"original_context": 8192}))
