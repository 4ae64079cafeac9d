"""Linears of 8-bit floats or integers in the place of wide ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.recipe import Derivation, Derived, Each, LoadCall, Operand, Param, Piece, joined
from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.quant.linears import (
    as_matrix,
    module_of,
    quantized_operands,
    quantized_ops,
    refuse_lost,
    scale_of,
    wide_sources,
)
from makeready.graphs.quant.scheme import BLOCK, CHANNEL, TENSOR, Scheme
from makeready.kernels.contract import Contract
from makeready.kernels.spec import TensorSpec


def quantize_linears(program: Program, scheme: Scheme) -> Program:
    """``linear(x, w)`` → ``linear_fp8(quantize_fp8(x), w, scales)`` wherever ``scheme`` covers the weight.

    With integers ``int8`` stands in the place of ``fp8``.

    A linear is any op that another one's contract ``quantizes`` for schemes of this kind.

    Values that several linears read are quantized once; with a static scale that is the largest of theirs,
    so that merging them changes nothing. Weights take their place and their scale's from the checkpoint or,
    where the scheme quantizes on load, from an op over the checkpoint's rows. What ops read that nothing takes
    the place of is made wide when it is loaded, where the checkpoint stores it quantized.

    Raises:
        PlanError: blocks do not divide the outputs of stacked weights that are quantized when they are loaded.
    """
    rewrite = _Rewrite(program, scheme)
    calls: list[Call] = []
    for call in program.calls:
        calls += rewrite.linear(call) if rewrite.covers(call) else [rewrite.kept(call)]
    return program.with_calls(calls, rewrite.params)


@dataclass
class _Rewrite:
    """One run over a program.

    Attributes:
        params: parameters made or changed so far.
        quantized: what an input is as 8-bit values and scales, by its name.
        ops: what takes the place of an op, by the op's name.
        wide: tensors of the checkpoint that ops read which nothing takes the place of.
    """

    program: Program
    scheme: Scheme
    params: dict[str, Param] = field(default_factory=dict)
    quantized: dict[str, tuple[str, str]] = field(default_factory=dict)
    ops: dict[str, Contract] = field(init=False)
    wide: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ops = quantized_ops(self.scheme.kind)
        self.wide = wide_sources(self.program, self.ops)

    def covers(self, call: Call) -> bool:
        """Whether the call becomes a quantized one. Tied embeddings are looked up, too: they stay wide."""
        op = self.ops.get(call.op)
        if op is None:
            return False
        param = self.program.params.get(call.operands[quantized_operands(call, op, self.program)[1]])
        if param is None or not param.quantizable or not param.pieces:
            return False
        if any(piece.source in self.wide for piece in param.pieces):
            return False
        return self.scheme.covers(module_of(param.pieces[0].source))

    def linear(self, call: Call) -> list[Call]:
        """The calls that take the place of ``call``."""
        op = self.ops[call.op]
        activation, weighted = quantized_operands(call, op, self.program)
        param = self.program.params[call.operands[weighted]]
        self._check(param)
        refuse_lost(call, op, module_of(param.pieces[0].source))
        weight, scale = self._weight(param), self._scale(param)
        self.params |= {weight.name: weight, scale.name: scale}
        x = call.operands[activation]
        before = [] if x in self.quantized else self._activation(x)
        q, row_scale = self.quantized[x]
        made = {
            activation: q,
            scale_of(activation): row_scale,
            weighted: weight.name,
            scale_of(weighted): scale.name,
        }
        given = {**call.operands, **made}
        operands = {o.name: given[o.name] for o in op.inputs if o.name in given}
        said = {"out_dtype": self.program.spec(call.result).dtype, "block": self.scheme.block}
        attrs = {name: said.get(name, call.attrs.get(name)) for name in op.attrs}
        return [*before, Call(op.name, operands, call.results, attrs)]

    def kept(self, call: Call) -> Call:
        """``call`` as it is; its parameters that are stored quantized come from an op over them."""
        if self.scheme.stored and call.op not in self.ops:
            read = (self.program.params.get(value) for value in call.operands.values())
            for param in (p for p in read if p is not None and p.quantizable and p.pieces):
                if self.scheme.covers(module_of(param.pieces[0].source)):
                    self.params[param.name] = self._wide(param)
        return call

    def _wide(self, param: Param) -> Param:
        """``param`` as a product of the stored weights and scales."""
        block, scale = self.scheme.block, self._scale(param)
        blocks = self.scheme.weights == BLOCK
        operands = {
            "q": Operand(TensorSpec(param.spec.shape, self.scheme.dtype), param.pieces, unit=block or 1),
            "scale": Operand(scale.spec, scale.pieces, unit=1),
        }
        attrs = {"out_dtype": param.spec.dtype} | ({"block": block} if blocks else {})
        op = f"dequantize_{self.scheme.number}" + ("_block" if blocks else "")
        call = LoadCall(op, {"q": "q", "scale": "scale"}, {"x": "x"}, attrs)
        return replace(param, pieces=(), derived=Derived(Derivation(operands, (call,)), "x"))

    def _check(self, param: Param) -> None:
        block, (*stacked, rows, _) = self.scheme.block, (int(n) for n in param.spec.shape)
        if block and stacked and rows % block and not self.scheme.stored:
            raise PlanError(
                f"{module_of(param.pieces[0].source)} has {rows} outputs, which are no multiple of its blocks "
                f"of {block}; use scales by channel (quant=fp8)"
            )

    def _weight(self, param: Param) -> Param:
        *others, width = (int(n) for n in param.spec.shape)
        beyond = self._whole(width) - width
        padding = (*(0 for _ in others), beyond) if beyond else ()
        made = replace(param, spec=TensorSpec((*others, width + beyond), self.scheme.dtype), padding=padding)
        return self._made(made, param, "q")

    def _whole(self, width: int) -> int:
        """Columns of all blocks that ``width`` columns of a weight or an activation touch."""
        block = self.scheme.block or 1
        return -(-width // block) * block

    def _scale(self, param: Param) -> Param:
        """One number an output, whatever stored scales stand for, or one a block."""
        *stacked, rows, width = (int(n) for n in param.spec.shape)
        spec = TensorSpec((*stacked, rows), "float32")
        made = Param(f"{param.name}_scale", spec, shard=param.shard[:-1])
        if self.scheme.weights == BLOCK:
            size = self.scheme.block
            rows = -(-rows // size)
            bands = self._whole(width) // size
            made = replace(made, spec=TensorSpec((*stacked, rows, bands), "float32"), shard=param.shard)
        if not self.scheme.stored:
            return self._made(made, param, "scale")
        return replace(made, pieces=tuple(self._scales_of(piece) for piece in param.pieces))

    def _scales_of(self, piece: Piece) -> Piece:
        """Where the scales of a stored weight's box are: rows of a fused weight have rows of its scales.

        Raises:
            PlanError: the box is no matrix of its own, or begins within a block.
        """
        source = f"{module_of(piece.source)}.{self.scheme.scale}"
        within = any(any((each.source or (0, 0))[1:]) or any(each.place[-1:]) for each in piece.each)
        if within or piece.axes or len(piece.box) != 2:
            raise PlanError(
                f"{piece.source} is stored in another form than it is used in, and its scales are not known then; "
                "use a checkpoint with 16-bit weights"
            )
        (first, stop), _ = piece.box
        by_row = tuple(replace(each, source=each.source[:1], place=each.place[:-1]) for each in piece.each)
        if self.scheme.weights == TENSOR:
            of_one = tuple(replace(each, source=()) for each in by_row)
            return Piece(source, (), piece.at[:-1], each=of_one, fills=(stop - first,))
        if self.scheme.weights == CHANNEL:
            return Piece(source, piece.box[:1], piece.at[:-1], each=by_row)
        size = self.scheme.block
        *stacked, row, column = piece.at
        moves = [n for each in piece.each for n in (*each.source[:1], *each.place[-2:-1])]
        repeated = any(any(each.source) for each in piece.each) and stop % size
        if repeated or any(n % size for n in (*(start for start, _ in piece.box), row, column, *moves)):
            raise PlanError(
                f"a part of {piece.source} begins within a block of {size}, whose scale it would share; "
                "use a checkpoint with 16-bit weights"
            )
        box = tuple((start // size, -(-end // size)) for start, end in piece.box)
        each = tuple(
            replace(one, source=_by(one.source, size), place=_by(one.place, size)) for one in piece.each
        )
        return Piece(source, box, (*stacked, row // size, column // size), each=each)

    def _made(self, made: Param, wide: Param, result: str) -> Param:
        """``made`` as a result of quantizing ``wide``, unless the checkpoint has it."""
        if self.scheme.stored:
            return made
        if self.scheme.weights == CHANNEL:
            attrs, op = {"group": int(wide.spec.shape[-1])}, f"quantize_{self.scheme.number}"
        else:
            attrs, op = {"block": self.scheme.block}, f"quantize_{self.scheme.number}_block"
        matrix = as_matrix(wide)
        rows, width = (int(n) for n in matrix.spec.shape)
        whole = self._whole(width)
        operand = replace(
            matrix,
            spec=TensorSpec((rows, whole), matrix.spec.dtype),
            padding=(0, whole - width) if whole > width else (),
            unit=self.scheme.block or 1,
        )
        call = LoadCall(op, {"x": "x"}, {"q": "q", "scale": "scale"}, attrs)
        derived = Derived(Derivation({"x": operand}, (call,)), result)
        return replace(made, pieces=(), padding=(), derived=derived)

    def _activation(self, x: str) -> list[Call]:
        """The calls that quantize the input ``x``, filled up to whole blocks."""
        number = self.scheme.number
        self.quantized[x] = q, scale = f"{x}.{number}", f"{x}.{number}_scale"
        if not self.scheme.static:
            width, filled = int(self.program.spec(x).shape[-1]), []
            whole = self._whole(width)
            if whole > width:
                filled = [Call("pad_columns", {"x": x}, {"y": f"{x}.whole"}, {"width": whole})]
                x = f"{x}.whole"
            attrs = {"group": self.scheme.group(whole)}
            return [*filled, Call(f"quantize_{number}", {"x": x}, {"q": q, "scale": scale}, attrs)]
        readers = []
        for call in filter(self.covers, self.program.calls):
            activation, weighted = quantized_operands(call, self.ops[call.op], self.program)
            if call.operands[activation] == x:
                readers.append(self.program.params[call.operands[weighted]])
        param = _static_scale(readers)
        self.params[param.name] = param
        operands = {"x": x, "scale": param.name}
        return [Call(f"quantize_{number}_static", operands, {"q": q, "row_scale": scale})]


def _by(moves: tuple[int, ...], size: int) -> tuple[int, ...]:
    """How far an index moves in blocks of rows and columns; axes before them have a matrix each."""
    return (*moves[:-2], *(n // size for n in moves[-2:]))


def _static_scale(weights: Sequence[Param]) -> Param:
    """The scale of what all of ``weights`` are multiplied with."""
    name = joined([w.name.removesuffix(".weight") + ".input_scale" for w in weights])
    pieces = (
        Piece(
            f"{module_of(piece.source)}.input_scale",
            (),
            (0,),
            each=tuple(Each(each.name, each.count) for each in piece.each),
            fills=(1,),
        )
        for w in weights
        for piece in w.pieces
    )
    return Param(name, TensorSpec((1,), "float32"), pieces=tuple(dict.fromkeys(pieces)), largest=True)
