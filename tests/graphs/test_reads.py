"""What recipes mean: boxes, transposes and patterns put together as numpy's slices do it by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_programs import traced

from makeready.graphs.checkpoint.base import Checkpoint, TensorInfo, ranges
from makeready.graphs.executable.cpu.weights import assemble
from makeready.graphs.executable.cuda.convert import runs
from makeready.graphs.plan.codec import canonical, from_json, to_json
from makeready.graphs.plan.plan import Weight
from makeready.graphs.plan.reads import needs, reads, unrolled
from makeready.graphs.plan.recipe import (
    Derivation,
    Derived,
    Each,
    LoadCall,
    Operand,
    Param,
    Piece,
    can_concatenate,
    concatenate,
    whole,
)
from makeready.graphs.plan.spec import DECODE
from makeready.graphs.planner.derivation import complaints, infer
from makeready.graphs.planner.lower import place_weights
from makeready.kernels import registry
from makeready.kernels.spec import TensorSpec

registry.discover()


class Arrays(Checkpoint):
    """Float32 arrays as a checkpoint."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, "float32", array.shape) for name, array in self.arrays.items()}

    def read(self, name: str, box: Any = None) -> np.ndarray:
        return self.arrays[name][(*(slice(*r) for r in ranges(self.tensors[name], box)), ...)]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def on_cpu(operand: Operand, checkpoint: Checkpoint) -> np.ndarray:
    made = torch.full(operand.spec.at({}), float("nan"))
    assemble(operand, checkpoint, made)
    return made.numpy()


def on_gpu(
    operand: Operand, checkpoint: Checkpoint, rows: tuple[int, int] | None = None, most: int = 100
) -> np.ndarray:
    """By the byte ranges that are copied."""
    first, stop = rows or (0, int(operand.spec.shape[0]))
    made = np.full((stop - first, *operand.spec.at({})[1:]), np.nan, np.float32)
    raw = made.reshape(-1).view(np.uint8)
    for run in runs(checkpoint, operand, most, rows):
        part = np.ascontiguousarray(run.make()).reshape(-1).view(np.uint8)
        raw[run.offset : run.offset + part.size] = part
    return made


def check(operand: Operand, checkpoint: Checkpoint, wanted: np.ndarray) -> None:
    """Whole, on either device; and rows of it."""
    assert wanted.shape == operand.spec.at({})
    assert np.array_equal(on_cpu(operand, checkpoint), wanted)
    assert np.array_equal(on_gpu(operand, checkpoint), wanted)
    for first in range(len(wanted)):
        for stop in range(first + 1, len(wanted) + 1):
            assert np.array_equal(on_gpu(operand, checkpoint, (first, stop)), wanted[first:stop])


def f32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "float32")


EXPERTS = {
    f"m.{e}.{n}": numbers(3, 4, seed=10 * e + i) for e in range(5) for i, n in enumerate(("gate", "up"))
}
STACKED = numbers(5, 4, 6)
FUSED = numbers(24, 4)

CASES: dict[str, tuple[Operand, dict[str, np.ndarray], np.ndarray]] = {
    "columns": (
        Operand(f32(3, 4), (Piece("a", ((1, 4), (2, 6)), (0, 0)),)),
        {"a": (a := numbers(5, 7))},
        a[1:4, 2:6],
    ),
    "zeros behind": (
        Operand(f32(4, 9), (Piece("a", ((1, 4), (0, 7)), (0, 0)),), padding=(1, 2)),
        {"a": a},
        np.pad(a[1:4], ((0, 1), (0, 2))),
    ),
    "side by side": (
        Operand(f32(5, 9), (whole("a", (5, 7)), Piece("b", ((0, 5), (1, 3)), (0, 7)))),
        {"a": a, "b": (b := numbers(5, 3, seed=1))},
        np.hstack([a, b[:, 1:]]),
    ),
    "transposed": (
        Operand(f32(7, 5), (Piece("a", ((0, 5), (0, 7)), (0, 0), axes=(1, 0)),)),
        {"a": a},
        a.T,
    ),
    "one of a stack": (
        Operand(f32(6, 4), (Piece("s", ((2, 3), (0, 4), (0, 6)), (0, 0), axes=(2, 1)),)),
        {"s": STACKED},
        STACKED[2].T,
    ),
    "a stack, transposed, in halves": (
        Operand(
            f32(5, 6, 4),
            (
                Piece("s", ((0, 5), (0, 4), (3, 6)), (0, 0, 0), axes=(0, 2, 1)),
                Piece("s", ((0, 5), (0, 4), (0, 3)), (0, 3, 0), axes=(0, 2, 1)),
            ),
        ),
        {"s": STACKED},
        np.concatenate([STACKED[:, :, 3:], STACKED[:, :, :3]], axis=2).swapaxes(1, 2),
    ),
    "experts": (
        Operand(
            f32(5, 6, 4),
            tuple(
                Piece(
                    f"m.{{e}}.{name}",
                    ((0, 3), (0, 4)),
                    (0, at, 0),
                    each=(Each("e", 5, place=(1, 0, 0)),),
                )
                for name, at in (("gate", 0), ("up", 3))
            ),
        ),
        EXPERTS,
        np.stack([np.vstack([EXPERTS[f"m.{e}.gate"], EXPERTS[f"m.{e}.up"]]) for e in range(5)]),
    ),
    "experts, transposed, in one matrix": (
        Operand(
            f32(20, 3),
            (
                Piece(
                    "m.{e}.up",
                    ((0, 3), (0, 4)),
                    (0, 0),
                    axes=(1, 0),
                    each=(Each("e", 5, place=(4, 0)),),
                ),
            ),
        ),
        EXPERTS,
        np.vstack([EXPERTS[f"m.{e}.up"].T for e in range(5)]),
    ),
    "every third of a head": (  # q, k and v of 4 heads of 2 stored head by head: k's rows
        Operand(
            f32(8, 4),
            (
                Piece(
                    "f",
                    ((2, 4), (0, 4)),
                    (0, 0),
                    each=(Each("h", 4, source=(6, 0), place=(2, 0)),),
                ),
            ),
        ),
        {"f": FUSED},
        FUSED.reshape(4, 3, 2, 4)[:, 1].reshape(8, 4),
    ),
    "experts times heads": (
        Operand(
            f32(5, 2, 3, 2),
            (
                Piece(
                    "m.{e}.up",
                    ((0, 3), (0, 2)),
                    (0, 0, 0, 0),
                    each=(
                        Each("e", 5, place=(1, 0, 0, 0)),
                        Each("h", 2, source=(0, 2), place=(0, 1, 0, 0)),
                    ),
                ),
            ),
        ),
        EXPERTS,
        np.stack([np.stack([EXPERTS[f"m.{e}.up"][:, 2 * h : 2 * h + 2] for h in (0, 1)]) for e in range(5)]),
    ),
    "numbers": (
        Operand(
            f32(7),
            (
                Piece("n0", (), (0,), fills=(3,)),
                Piece("n1", (), (3,), fills=(2,)),
                whole("v", (2,), (5,)),
            ),
        ),
        {"n0": np.float32(2).reshape(()), "n1": np.full((1, 1), 3, np.float32), "v": (v := numbers(2))},
        np.array([2, 2, 2, 3, 3, *v], np.float32),
    ),
    "a number for every expert": (
        Operand(f32(5, 2), (Piece("n.{e}", (), (0, 0), each=(Each("e", 5, place=(1, 0)),), fills=(1, 2)),)),
        {f"n.{e}": np.full((1,), e, np.float32) for e in range(5)},
        np.repeat(np.arange(5, dtype=np.float32), 2).reshape(5, 2),
    ),
    "a column stored as a matrix": (
        Operand(f32(5), (whole("c", (5,)),)),
        {"c": (c := numbers(5, 1))},
        c[:, 0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operands_are_put_together_as_by_hand(name):
    operand, arrays, wanted = CASES[name]
    assert list(complaints(Param("p", operand.spec, operand.pieces, padding=operand.padding))) == []
    check(operand, Arrays(arrays), wanted)


def test_the_largest_number_counts():
    pieces = tuple(Piece(f"n{i}", (), (0,), fills=(1,)) for i in range(3))
    operand = Operand(f32(1), pieces, largest=True)
    arrays = {f"n{i}": np.array([x], np.float32) for i, x in enumerate((1.5, 7.25, -9.0))}
    check(operand, Arrays(arrays), np.array([7.25], np.float32))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_into_boxes_gives_the_whole(data):
    """A matrix cut by rows, each band by columns, each box stored as it is or transposed, in any order."""
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    target = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    pieces, arrays = [], {}
    row_bounds = [0, *sorted(data.draw(st.sets(st.integers(1, rows)))), rows]
    for top, bottom in itertools.pairwise(row_bounds):
        bounds = [0, *sorted(data.draw(st.sets(st.integers(1, columns)))), columns]
        for left, right in itertools.pairwise(bounds):
            if top == bottom or left == right:
                continue
            box = target[top:bottom, left:right]
            turned = data.draw(st.booleans())
            before, after = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
            stored = np.pad(box.T if turned else box, before, constant_values=-1)
            stored = np.pad(stored, ((0, after), (0, 0)), constant_values=-2)
            name = f"t{len(pieces)}"
            arrays[name] = stored
            span = tuple((before, before + n) for n in (box.T if turned else box).shape)
            pieces.append(Piece(name, span, (top, left), axes=(1, 0) if turned else ()))
    order = data.draw(st.permutations(pieces))
    operand = Operand(f32(rows, columns), tuple(order))
    assert list(complaints(Param("p", operand.spec, operand.pieces))) == []
    check(operand, Arrays(arrays), target)
    if len(pieces) > 1:
        fewer = Param("p", operand.spec, tuple(order[1:]))
        assert [c.partition(" do not tile")[1] for c in complaints(fewer)] == [" do not tile"]


def test_runs_split_what_is_put_together_and_boxes():
    operand, arrays, _ = CASES["side by side"]
    sizes = [run.make().nbytes for run in runs(Arrays(arrays), operand, 80)]
    assert sizes == [72, 72, 36]  # rows of 36 bytes, two at a time
    (read,) = reads(Operand(f32(5, 7), (whole("a", (5, 7)),)))
    assert [part.box for part in read.cut(14)] == [((0, 2), (0, 7)), ((2, 4), (0, 7)), ((4, 5), (0, 7))]


def expert_params(layer: int, experts: int, width: int, hidden: int) -> list[Param]:
    """As Qwen3-30B-A3B stores them: a matrix of its own for each expert and projection."""
    source = f"model.layers.{layer}.mlp.experts.{{e}}."

    def piece(name: str, shape: tuple[int, int], at: int) -> Piece:
        return Piece(
            f"{source}{name}.weight",
            tuple((0, n) for n in shape),
            (0, at, 0),
            each=(Each("e", experts, place=(1, 0, 0)),),
        )

    up = (piece("gate_proj", (width, hidden), 0), piece("up_proj", (width, hidden), width))
    down = (piece("down_proj", (hidden, width), 0),)
    return [
        Param(f"layers.{layer}.up", TensorSpec((experts, 2 * width, hidden), "bfloat16"), pieces=up),
        Param(f"layers.{layer}.down", TensorSpec((experts, hidden, width), "bfloat16"), pieces=down),
    ]


def test_a_model_of_many_experts_has_a_small_recipe():
    """48 layers of 128 experts: three pieces a layer, which stand for 18,432 tensors."""
    params = [param for layer in range(48) for param in expert_params(layer, 128, 768, 2048)]
    weights, _ = place_weights(params)
    data = to_json(weights)
    assert sum(len(param.pieces) for param in params) == 144
    assert len(canonical(data)) < 100_000
    assert [from_json(Weight, entry) for entry in data] == list(weights)
    wanted = needs(params)
    assert len(wanted) == 48 * 128 * 3
    assert wanted["model.layers.47.mlp.experts.127.down_proj.weight"].shape == (2048, 768)
    assert [complaint for param in params for complaint in complaints(param)] == []


@pytest.mark.parametrize("name", CASES)
def test_some_rows_are_read_as_all_of_them_are(name):
    """Pieces that stand for many are asked only for those that have something of the rows; none is missed."""
    operand, _, wanted = CASES[name]
    for first, stop in itertools.combinations(range(len(wanted) + 1), 2):
        whole_of = [
            replace(part, place=((begin - first, end - first), *others))
            for read in reads(operand)
            if (part := read.within(0, first, stop)) is not None
            for (begin, end), *others in [part.place]
        ]
        assert list(reads(operand, (first, stop))) == whole_of


def test_reading_expert_by_expert_costs_as_much_as_reading_them_all():
    """512 experts, each made by a run of its own: no more boxes are looked at than there are, twice."""
    (up, _) = expert_params(0, 512, 16, 16)
    operand, looked = Operand(up.spec, up.pieces), 0
    for expert in range(512):
        looked += sum(1 for piece in operand.pieces for _ in unrolled(piece, (expert, expert + 1)))
    assert looked == 2 * 512


def test_needs_are_those_of_all_parameters_together():
    """A fused tensor is as long as the last of its parts, and may have nothing behind it."""
    parts = [
        Param(n, f32(8, 4), (Piece("f", ((at, at + 8), (0, 4)), (0, 0)),))
        for n, at in zip("qkv", (0, 8, 16), strict=True)
    ]
    need = needs(parts)["f"]
    assert need.fits((24, 4), exactly=True)
    assert need.fits((25, 4))
    assert not need.fits((25, 4), exactly=True)
    assert not need.fits((23, 4))
    assert not need.fits((24, 5), exactly=True)
    assert needs([Param("s", f32(8), (whole("s", (8,)),))])["s"].fits((8, 1), exactly=True)
    number = needs([Param("n", f32(8), (Piece("n", (), (0,), fills=(8,)),))])["n"]
    assert [number.fits(shape) for shape in ((), (1,), (1, 1), (8,), (2, 1))] == [
        True,
        True,
        True,
        False,
        False,
    ]


def derived(name: str, rows: int, *, unit: int = 1, group: int = 8) -> Param:
    operand = Operand(f32(rows, 8), (whole(name, (rows, 8)),), unit=unit)
    call = LoadCall("quantize_fp8", {"x": "x"}, {"q": "q", "scale": "scale"}, {"group": group})
    made = Derived(Derivation({"x": operand}, (call,)), "q")
    return Param(name, TensorSpec((rows, 8), "float8_e4m3fn"), derived=made)


def test_parameters_are_concatenated_only_where_no_unit_would_hold_rows_of_two():
    assert can_concatenate([derived("a", 3), derived("b", 5)])
    assert can_concatenate([derived("a", 4, unit=2), derived("b", 5, unit=2)])
    assert not can_concatenate([derived("a", 3, unit=2), derived("b", 4, unit=2)])
    assert not can_concatenate([derived("a", 4, unit=0), derived("b", 4, unit=0)])
    assert not can_concatenate([derived("a", 4), derived("b", 4, group=4)])
    assert not can_concatenate(
        [derived("a", 4), Param("b", TensorSpec((4, 8), "float8_e4m3fn"), (whole("b", (4, 8)),))]
    )
    wide, padded, taller = (
        Param("a", f32(4, 8), (whole("a", (4 - n, 8 - m)),), padding=(n, m) if n + m else ())
        for n, m in ((0, 0), (0, 3), (1, 0))
    )
    assert can_concatenate([padded, padded])
    assert list(complaints(concatenate([padded, padded]))) == []
    assert not can_concatenate([wide, padded])
    assert not can_concatenate([taller, taller])
    merged = concatenate([derived("a", 3), derived("b", 5)])
    assert list(complaints(merged)) == []
    (operand,) = merged.operands
    assert [(piece.source, piece.at) for piece in operand.pieces] == [("a", (0, 0)), ("b", (3, 0))]
    assert merged.derived is not None
    assert infer(merged.derived.by)["scale"] == f32(8, 1)


def test_units_cut_all_operands_alike():
    by = Derivation(
        {
            "w": Operand(f32(10, 2), (whole("w", (10, 2)),), unit=4),
            "s": Operand(f32(3, 1), (whole("s", (3, 1)),), unit=1),
            "table": Operand(f32(16), (whole("t", (16,)),)),
        },
        (),
    )
    assert by.units == 3
    assert by.rows(0, 2) == {"w": (0, 8), "s": (0, 2), "table": (0, 16)}
    assert by.rows(2, 3) == {"w": (8, 10), "s": (2, 3), "table": (0, 16)}


def test_mesh_axes_are_kept_with_parameters():
    """Columns of q, k, v, gate and up over ranks, rows of what follows them; norms everywhere."""
    params = traced().lower().programs[DECODE].params
    shards = {name.split(".", 2)[-1]: param.shard for name, param in params.items() if ".0." in name}
    assert shards["attention.q+k+v.weight"] == shards["mlp.gate+up.weight"] == ("tp", None)
    assert shards["attention.o.weight"] == shards["mlp.down.weight"] == (None, "tp")
    assert shards["input_norm.weight"] == ()
    assert params["embedding"].shard == ("tp", None)
    scales = traced(quant="fp8").lower().programs[DECODE].params
    assert scales["layers.0.attention.q+k+v.weight_scale"].shard == ("tp",)
    assert scales["layers.0.attention.o.weight_scale"].shard == (None,)
