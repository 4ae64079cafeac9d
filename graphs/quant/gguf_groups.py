"""GGUF's blocks on a GPU: integers with scales by groups, as small as the file has them or little larger.

Load programs make the words, scales and offsets of kernels/gguf_groups.py while the file's bytes arrive. Parts that
differ in their types do not merge. What is used in another form than it is stored in, or is put together of several
types, is widened when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from makeready.graphs.checkpoint.base import AS_STORED
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import unrolled
from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand, Param
from makeready.graphs.planner.ir import Program
from makeready.graphs.quant.linears import as_matrix
from makeready.graphs.quant.weight_only import GGUF, Form, quantize_weights, stored_rows
from makeready.kernels.contract import Contract
from makeready.kernels.embedding_int import embedding_int
from makeready.kernels.gguf import row_bytes
from makeready.kernels.gguf_groups import GROUPS
from makeready.kernels.integers import TILE
from makeready.kernels.spec import TensorSpec

assert isinstance(embedding_int, Contract)


@dataclass(frozen=True)
class Blocks:
    """Bytes of whole outputs, one after the other."""

    stored = False  # what is no product's is widened by the reader

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        width = int(matrix.spec.shape[1])
        row = row_bytes(form.blocks, width)
        of = {"kind": form.blocks, "row": row, "inputs": width}
        grouped = {**of, "group": form.group}
        calls = [
            LoadCall("repack_gguf", {"blocks": "blocks"}, {"weight": "weight"}, {**of, "bits": form.bits}),
            LoadCall("scales_gguf", {"blocks": "blocks"}, {"scale": "scale"}, grouped),
        ]
        if form.zeros:
            calls.append(LoadCall("offsets_gguf", {"blocks": "blocks"}, {"offset": "zero"}, grouped))
        return Derivation({"blocks": _bytes(matrix, form.blocks, row)}, tuple(calls))

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


def _bytes(matrix: Operand, kind: str, row: int) -> Operand:
    """The bytes of ``matrix[N, K]``: uint8 ``[N * row]``."""
    stored = stored_rows(matrix, f"weight{AS_STORED}{kind}", row, "uint8")
    pieces = tuple(
        replace(
            piece,
            box=((piece.box[0][0] * row, piece.box[0][1] * row),),
            at=(piece.at[0] * row,),
            each=tuple(replace(e, place=tuple(n * row for n in e.place[:1])) for e in piece.each),
        )
        for piece in stored.pieces
    )
    return Operand(TensorSpec((int(matrix.spec.shape[0]) * row,), "uint8"), pieces, unit=TILE * row)


@dataclass(frozen=True)
class StoredGroups:
    """A quantization (graphs/quant/scheme.py): block types by the names of their tensors."""

    kinds: Mapping[str, str]
    layout: Blocks = Blocks()
    kind: str = GGUF

    @property
    def features(self) -> frozenset[str]:
        """Nothing that a GPU must have."""
        return frozenset()

    def rewrite(self, program: Program) -> Program:
        """``program`` with products and embeddings of packed weights wherever all of one is stored alike."""
        return quantize_weights(program, self)

    def form_of(self, param: Param) -> Form | None:
        """See :class:`~makeready.graphs.quant.weight_only.Weights`."""
        if param.padding or param.largest or not param.pieces:
            return None
        kinds = {self.kinds.get(read.source) for piece in param.pieces for read in unrolled(piece)}
        kind = kinds.pop()
        *stacked, rows, _ = (int(n) for n in param.spec.shape)
        if kinds or kind is None or (stacked and rows % TILE):
            return None
        made = GROUPS[kind]
        form = Form(made.bits, made.group, zeros=made.offsets, blocks=kind)
        try:
            self.layout.derivation(as_matrix(param), form)
        except PlanError:  # it is used in another form than it is stored in
            return None
        return form
