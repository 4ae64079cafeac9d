"""Weights in GGUF's blocks, multiplied as the file stores them.

On a GPU: gguf_groups.py. On the CPU a projection becomes an op over the bytes of its blocks, which are mapped and not
converted. Its activations are rounded to 8 bits in groups of 32, as llama.cpp does. Types without products, and
weights that are used in another form than they are stored in, are widened when they are loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from makeready.graphs.checkpoint.base import AS_STORED, BLOCKS, Checkpoint, CheckpointWarning
from makeready.graphs.plan.recipe import Param, Piece
from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.quant.gguf_groups import StoredGroups
from makeready.kernels.gguf import KINDS, row_bytes, rows_text
from makeready.kernels.gguf_groups import GROUPS
from makeready.kernels.spec import TensorSpec


def stored_blocks(checkpoint: Checkpoint, *, packed: bool) -> StoredBlocks | StoredGroups | None:
    """The blocks of a checkpoint that there are products for; None where it has none. Warns of others.

    Args:
        packed: they become integers with scales by groups, for a GPU; else they stay as they are.
    """
    kinds = {name: info.dtype for name, info in checkpoint.tensors.items() if info.kind == BLOCKS}
    known = tuple(GROUPS) if packed else KINDS
    others = sorted(set(kinds.values()) - {*known})
    if others:
        warnings.warn(
            f"{checkpoint.path}: blocks of {', '.join(others)} are widened when they are loaded; only "
            f"{', '.join(known)} are multiplied as they are stored",
            CheckpointWarning,
            stacklevel=1,
        )
    found = {name: kind for name, kind in kinds.items() if kind in known}
    if not found:
        return None
    return StoredGroups(found) if packed else StoredBlocks(found)


@dataclass(frozen=True)
class StoredBlocks:
    """A quantization (graphs/quant/scheme.py): block types by the names of their tensors."""

    kinds: Mapping[str, str]

    @property
    def features(self) -> frozenset[str]:
        """Nothing that a GPU must have."""
        return frozenset()

    def rewrite(self, program: Program) -> Program:
        """``program`` with products over blocks wherever all of a weight is stored in them."""
        params: dict[str, Param] = {}
        calls = []
        for call in program.calls:
            change = _CHANGES.get(call.op)
            param = program.params.get(call.operands["weight"]) if change is not None else None
            made = self._blocks(param) if param is not None else None
            if change is not None and param is not None and made is not None:
                blocks, rows = made
                params[blocks.name] = blocks
                call = change(call, param, blocks.name, rows)
            calls.append(call)
        return program.with_calls(calls, params)

    def _blocks(self, param: Param) -> tuple[Param, str] | None:
        """The bytes of a matrix, and what they are; None where it is not put together of whole rows of blocks."""
        if len(param.spec.shape) != 2 or param.padding or param.largest or not param.pieces:
            return None
        width = int(param.spec.shape[1])
        pieces: list[Piece] = []
        parts: list[tuple[str, int]] = []
        row = at = 0
        for piece in param.pieces:
            kind = self.kinds.get(piece.source)
            if kind is None or piece.at != (row, 0) or not _of_whole_rows(piece, width):
                return None
            (start, stop), _ = piece.box
            size = row_bytes(kind, width)
            source = f"{piece.source}{AS_STORED}{kind}"
            pieces.append(Piece(source, ((start * size, stop * size),), (at,)))
            parts.append((kind, stop - start))
            row, at = row + stop - start, at + (stop - start) * size
        made = replace(
            param,
            name=f"{param.name}.blocks",
            spec=TensorSpec((at,), "uint8"),
            pieces=tuple(pieces),
            shard=(),
        )
        return made, rows_text(parts)


def _of_whole_rows(piece: Piece, width: int) -> bool:
    plain = not piece.each and not piece.axes and not piece.fills
    return plain and len(piece.box) == 2 and piece.box[1] == (0, width)


def _linear(call: Call, param: Param, blocks: str, rows: str) -> Call:
    operands = {"x": call.operands["x"], "blocks": blocks}
    operands |= {"bias": call.operands["bias"]} if "bias" in call.operands else {}
    attrs = {"rows": rows, "outputs": int(param.spec.shape[0]), "out_dtype": call.attrs["out_dtype"]}
    return Call("linear_gguf", operands, call.results, attrs)


def _embedding(call: Call, param: Param, blocks: str, rows: str) -> Call:
    operands = {"ids": call.operands["ids"], "blocks": blocks}
    attrs = {
        "rows": rows,
        "width": int(param.spec.shape[1]),
        "out_dtype": call.attrs["out_dtype"] or param.spec.dtype,
    }
    return Call("embedding_gguf", operands, call.results, attrs)


_CHANGES: Mapping[str, Callable[[Call, Param, str, str], Call]] = {"linear": _linear, "embedding": _embedding}
"""What an op over a weight becomes."""
