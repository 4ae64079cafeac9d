"""Linears whose weights are integers of 4 or 8 bits, or 4-bit floats, and whose activations stay as they are.

One rewrite for all file formats. A format, in a module of its own, says with which load program its tensors become
what kernels want (kernels/integers.py): the plan holds one layout, whatever the file's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import unrolled
from makeready.graphs.plan.recipe import Box, Derivation, Derived, LoadCall, Operand, Param, Piece
from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.quant.linears import (
    as_matrix,
    module_of,
    quantized_operands,
    quantized_ops,
    refuse_lost,
    wide_sources,
)
from makeready.graphs.quant.scheme import matches
from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.gemm.linear_mx import linear_mx
from makeready.kernels.integers import BITS, SPAN, TILE
from makeready.kernels.moe.experts_int import grouped_linear_int
from makeready.kernels.moe.experts_mx import grouped_linear_mx
from makeready.kernels.mx import BLOCK
from makeready.kernels.spec import TensorSpec

for op in (linear_int, linear_mx, grouped_linear_int, grouped_linear_mx):
    assert isinstance(op, Contract)

# Of scheme, in contracts' traits: integers, what kernels/mx.py says, integers of kernels/gguf_groups.py.
KIND, MX, NV, GGUF = "int", "mxfp4", "nvfp4", "gguf"
_SCALES = {KIND: "float16", MX: "uint8", NV: "int16", GGUF: "float16"}  # dtypes of their scales
_ZEROS = {KIND: "uint8", GGUF: "float16"}  # of their zero points, or offsets
GROUPS = (32, 64)  # sizes below a span that kernels take, beside its multiples and whole rows


@dataclass(frozen=True)
class Form:
    """How the weights of a linear are stored.

    Attributes:
        bits: of a weight.
        group: inputs that share a scale; 0: all of them.
        zeros: whether each scale has a zero point; else weights are symmetric.
        ordered: whether inputs lie in groups by a table of the file (GPTQ's desc_act), not one after the other.
        blocks: GGUF's type of blocks that it is made of; empty elsewhere.
    """

    bits: int
    group: int
    zeros: bool = False
    ordered: bool = False
    blocks: str = ""

    def refusal(self) -> str:
        """What of it is not computed here; empty where all is."""
        if self.bits not in BITS:
            return f"weights of {self.bits} bits are not supported; use a checkpoint with 4 or 8"
        if self.group < 0 or (self.group not in GROUPS and self.group % SPAN):
            return (
                f"groups of {self.group} inputs are not supported; use a checkpoint with groups of "
                f"{', '.join(map(str, GROUPS))}, a multiple of {SPAN}, or whole rows"
            )
        return ""

    def inputs(self, width: int) -> int:
        """Inputs that share a scale, of a linear with ``width``."""
        return self.group or width


class Layout(Protocol):
    """A format of files."""

    @property
    def stored(self) -> bool:
        """Whether the checkpoint holds it; else weights are quantized while they are loaded."""
        ...

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """What makes ``weight``, ``scale`` and, where there are such, ``zero``, ``order`` and ``global_scale`` of a
        matrix.
        """
        ...

    def order(self, matrix: Operand) -> Operand:
        """The group of every input of a matrix whose form is ordered: int32 ``[K]``."""
        ...


class Weights(Protocol):
    """What the rewrite asks of a scheme."""

    @property
    def layout(self) -> Layout:
        """The format of its files."""
        ...

    @property
    def kind(self) -> str:
        """Of numbers."""
        ...

    def form_of(self, param: Param) -> Form | None:
        """The form that all of a parameter is stored in; None where it stays wide.

        Raises:
            PlanError: its parts have several, or one that kernels do not take.
        """
        ...


@dataclass(frozen=True)
class WeightOnly:
    """A scheme: a format, and which linears have which form.

    Attributes:
        form: of linears for which nothing else is said; None: they stay wide.
        rules: patterns of modules (regular expressions that match from the beginning) and their form, None for
            those that stay wide; the first that matches decides.
        ignored: modules that stay wide; see :func:`makeready.graphs.quant.scheme.matches`.
        only: if not empty, dotted ends of the names of all modules that have a form.
        kind: of numbers.
    """

    layout: Layout
    form: Form | None
    rules: tuple[tuple[str, Form | None], ...] = ()
    ignored: tuple[str, ...] = ("lm_head",)
    only: tuple[str, ...] = ()
    kind: str = KIND

    @property
    def features(self) -> frozenset[str]:
        """See :class:`makeready.graphs.quant.scheme.Quantization`: any GPU will do."""
        return frozenset()

    def rewrite(self, program: Program) -> Program:
        """``linear(x, w)`` → ``linear_int(x, words, scales, zeros)`` wherever a weight has a form, and its like.

        What other ops read stays wide; where the checkpoint stores it in few bits, it is widened while it is loaded.
        """
        return quantize_weights(program, self)

    def of(self, module: str) -> Form | None:
        """The form of a module of the checkpoint; None where it stays wide."""
        return _form(self, module)

    def form_of(self, param: Param) -> Form | None:
        """See :class:`Weights`."""
        if not param.quantizable or not param.pieces:
            return None
        modules = {module_of(read.source) for piece in param.pieces for read in unrolled(piece)}
        forms = {self.of(module) for module in modules}
        if len(forms) > 1:
            raise PlanError(
                f"{module_of(param.pieces[0].source)} and what is used with it are quantized differently; "
                "use a checkpoint whose experts are quantized alike"
            )
        (form,) = forms
        if form is None:
            return None
        name, (*stacked, rows, width) = module_of(param.pieces[0].source), (int(n) for n in param.spec.shape)
        refusal = form.refusal() if self.kind == KIND else ""  # floats' readers say it
        if stacked and rows % TILE:
            refusal = (
                f"{rows} outputs of an expert are no multiple of {TILE}; use a checkpoint with 16-bit weights"
            )
        if stacked and form.ordered and form.inputs(width) < width:
            refusal = "desc_act of experts is not supported; use a checkpoint without it"
        if refusal:
            raise PlanError(f"{name}: {refusal}")
        # One group holds all inputs: their order does not matter.
        return replace(form, ordered=form.ordered and form.inputs(width) < width)


def quantize_weights(program: Program, scheme: Weights) -> Program:
    """See :meth:`WeightOnly.rewrite`."""
    rewrite = _Rewrite(program, scheme)
    calls: list[Call] = []
    for call in program.calls:
        form = rewrite.covers(call)
        calls += rewrite.linear(call, form) if form is not None else [rewrite.kept(call)]
    return program.with_calls(calls, rewrite.params)


@lru_cache(maxsize=2**16)
def _form(scheme: WeightOnly, module: str) -> Form | None:
    if any(matches(entry, module) for entry in scheme.ignored):
        return None
    if scheme.only and not any(f".{module}".endswith(f".{name}") for name in scheme.only):
        return None
    return next((form for pattern, form in scheme.rules if re.match(pattern, module)), scheme.form)


def stored_rows(
    matrix: Operand, suffix: str, width: int, dtype: str, *, per: int = 1, transposed: bool = False
) -> Operand:
    """What the checkpoint has in the place of ``matrix[N, K]`` under another name: ``[ceil(N / per), width]``.

    Args:
        suffix: in the place of ``weight``.
        per: outputs that one element holds.
        transposed: whether the file has outputs last.

    Raises:
        PlanError: the matrix is used in another form than it is stored in.
    """
    return Operand(
        TensorSpec((-(-int(matrix.spec.shape[0]) // per), width), dtype),
        tuple(_stored(piece, matrix, suffix, width, per, transposed) for piece in matrix.pieces),
        unit=TILE // per,
    )


def width_of(matrix: Operand, block: int, name: str) -> int:
    """Inputs of ``matrix``, which blocks of the format ``name`` divide.

    Raises:
        PlanError: they do not.
    """
    width = int(matrix.spec.shape[1])
    if width % block:
        raise PlanError(
            f"{module_of(matrix.pieces[0].source)}: {width} inputs are no multiple of {name}'s blocks of {block}; "
            "use a checkpoint with 16-bit weights"
        )
    return width


def _stored(piece: Piece, matrix: Operand, suffix: str, width: int, per: int, transposed: bool) -> Piece:
    inputs = int(matrix.spec.shape[1])
    whole = len(piece.box) == 2 and not piece.axes and piece.box[-1] == (0, inputs) and piece.at[-1] == 0
    if not whole or any(any(each.source) or any(each.place[1:]) for each in piece.each):
        raise PlanError(
            f"{piece.source} is stored in another form than it is used in, and its scales are not known then; "
            "use a checkpoint with 16-bit weights"
        )
    (first, stop), row = piece.box[0], piece.at[0]
    starts = (first, row, *(each.place[0] for each in piece.each if each.place))
    # What lies below each other may end with an element that is filled up.
    filled = not transposed and row + stop - first == matrix.spec.shape[0]
    if any(start % per for start in starts) or (stop % per and not filled):
        raise PlanError(
            f"a part of {piece.source} begins or ends within {per} outputs that are stored together; "
            "use a checkpoint with 16-bit weights"
        )
    rows, columns = (first // per, -(-stop // per)), (0, width)
    box: Box = (columns, rows) if transposed else (rows, columns)
    return Piece(
        f"{module_of(piece.source)}.{suffix}",
        box,
        (row // per, 0),
        axes=(1, 0) if transposed else (),
        each=tuple(replace(e, source=(), place=tuple(n // per for n in e.place)) for e in piece.each),
    )


@dataclass
class _Rewrite:
    """One run over a program; ``params`` are those made so far, ``ordered`` inputs put in another order."""

    program: Program
    scheme: Weights
    params: dict[str, Param] = field(default_factory=dict)
    ordered: dict[tuple[str, str], str] = field(default_factory=dict)
    ops: dict[str, Contract] = field(init=False)
    wide: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ops = quantized_ops(self.scheme.kind)
        self.wide = wide_sources(self.program, self.ops)

    def covers(self, call: Call) -> Form | None:
        """The form of the call's weight. Tied embeddings are looked up, too: they stay wide."""
        op = self.ops.get(call.op)
        if op is None:
            return None
        param = self.program.params.get(call.operands[quantized_operands(call, op, self.program)[1]])
        if param is None or any(piece.source in self.wide for piece in param.pieces):
            return None
        return self.scheme.form_of(param)

    def linear(self, call: Call, form: Form) -> list[Call]:
        """The calls that take the place of ``call``."""
        op = self.ops[call.op]
        weighted = quantized_operands(call, op, self.program)[1]
        param = self.program.params[call.operands[weighted]]
        refuse_lost(call, op, module_of(param.pieces[0].source))
        before, x = [], op.inputs[0].name
        given = {**call.operands, **self._made(weighted, param, form)}
        if form.ordered:
            order = self._order(param)
            given[x] = f"{call.operands[x]}.of.{param.name}"
            before = [Call("gather_columns", {"x": call.operands[x], "order": order.name}, {"y": given[x]})]
        operands = {o.name: given[o.name] for o in op.inputs if o.name in given}
        width = int(param.spec.shape[-1])
        said = {"bits": form.bits, "group": form.inputs(width)}
        if "width" in op.attrs:  # rows of the weight themselves
            said |= {"width": width, "out_dtype": call.attrs["out_dtype"] or param.spec.dtype}
        attrs = {name: said.get(name, call.attrs.get(name, default)) for name, default in op.attrs.items()}
        return [*before, Call(op.name, operands, call.results, attrs)]

    def kept(self, call: Call) -> Call:
        """``call`` as it is; its parameters that are stored in few bits are widened while they are loaded."""
        if self.scheme.layout.stored and call.op not in self.ops:
            read = (self.program.params.get(value) for value in call.operands.values())
            for param in (p for p in read if p is not None):
                form = self.scheme.form_of(param)
                if form is not None:
                    self.params[param.name] = self._wide(param, form)
        return call

    def _made(self, operand: str, param: Param, form: Form) -> dict[str, str]:
        """Parameters of the quantized weight, by the operand that they are."""
        *stacked, rows, width = (int(n) for n in param.spec.shape)
        kind = self.scheme.kind
        group = form.inputs(width) if kind in _ZEROS else BLOCK
        tiled = (*stacked, -(-rows // TILE), -(-width // group), TILE)
        words = (*stacked, rows, -(-width // SPAN) * form.bits * SPAN // 16)
        shard = (*param.shard, None) if param.shard else ()
        made = {
            "weight": (TensorSpec(words, "int16"), param.shard),
            "scale": (TensorSpec(tiled, _SCALES[kind]), shard),
        }
        if form.zeros:
            made["zero"] = (TensorSpec(tiled, _ZEROS[kind]), shard)
        if kind == NV:
            made["global_scale"] = (TensorSpec((*stacked, rows), "float32"), param.shard[:-1])
        by, found = self.scheme.layout.derivation(as_matrix(param), form), {}
        for result, (spec, shard) in made.items():
            suffix = "" if result == "weight" else f"_{result}"
            called = found[f"{operand}{suffix}"] = f"{param.name}{suffix}"
            self.params[called] = replace(
                param, name=called, spec=spec, pieces=(), shard=shard, derived=Derived(by, result)
            )
        return found

    def _order(self, param: Param) -> Param:
        operand = self.scheme.layout.order(as_matrix(param))
        by = Derivation(
            {"group": operand}, (LoadCall("order_of_groups", {"group": "group"}, {"order": "order"}),)
        )
        made = Param(f"{param.name}_order", operand.spec, derived=Derived(by, "order"))
        self.params[made.name] = made
        return made

    def _wide(self, param: Param, form: Form) -> Param:
        """``param`` as what its words, scales and zeros stand for."""
        by, width = self.scheme.layout.derivation(as_matrix(param), form), int(param.spec.shape[-1])
        kind = self.scheme.kind
        has = {"zero": form.zeros, "order": form.ordered, "global_scale": kind == NV}
        there = ["weight", "scale", *(name for name, there in has.items() if there)]
        attrs: dict[str, Any] = {"inputs": width, "out_dtype": param.spec.dtype}
        if kind == KIND:
            attrs |= {"bits": form.bits, "group": form.inputs(width)}
        op = "dequantize_int" if kind == KIND else "dequantize_mx"
        call = LoadCall(op, {name: name for name in there}, {"x": "x"}, attrs)
        return replace(param, pieces=(), derived=Derived(replace(by, calls=(*by.calls, call)), "x"))


def stored_number(matrix: Operand, suffix: str) -> Operand:
    """One number of the checkpoint's for each of its tensors that make up ``matrix[N, K]``, for every output: fp32
    ``[N]``.

    Args:
        suffix: in the place of ``weight``.
    """
    pieces = tuple(
        Piece(
            f"{module_of(piece.source)}.{suffix}",
            (),
            piece.at[:1],
            each=tuple(replace(e, source=(), place=e.place[:1]) for e in piece.each),
            fills=(piece.box[0][1] - piece.box[0][0],),
        )
        for piece in matrix.pieces
    )
    return Operand(TensorSpec(matrix.spec.shape[:1], "float32"), pieces, unit=TILE)


def ordered(by: Derivation, group: Operand) -> Derivation:
    """``by`` behind what makes ``order`` of the group of every input."""
    call = LoadCall("order_of_groups", {"group": "group"}, {"order": "order"})
    return Derivation({**by.operands, "group": group}, (call, *by.calls))


def groups_of(width: int, form: Form) -> int:
    """Scales of an output."""
    return math.ceil(width / form.inputs(width))
