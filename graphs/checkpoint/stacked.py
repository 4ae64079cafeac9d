"""Experts that a checkpoint stores stacked in one tensor, presented one tensor an expert, as most files have them.

E experts, I features of an expert, C hidden
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from makeready.graphs.checkpoint.base import CheckpointError, TensorInfo
from makeready.graphs.checkpoint.weight_files import WeightFile
from makeready.graphs.models.family import ExpertNames

# transformers 5 holds ``gate_up_proj[E, 2I, C]`` and ``down_proj[E, C, I]``; scales of 8-bit floats are beside them.
# gpt-oss has ``gate_up_proj[E, C, 2I]`` and ``down_proj[E, I, C]``, biases ``[E, 2I]`` and ``[E, C]``, and, where its
# weights are MXFP4, in the place of the first ``..._blocks[E, 2I, C / 32, 16]`` and ``..._scales[E, 2I, C / 32]``.
_EXPERTS = re.compile(
    r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)(_scale_inv|_scale|_blocks|_scales|_bias|)(?:\.weight)?"
)
_ROUTER = re.compile(r"(.+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class Part:
    """A tensor of one expert within a stacked one: ``stored[expert, start:stop:step]``.

    Attributes:
        transposed: whether outputs are the last axis there, ``stored[expert, :, start:stop:step].T``.
    """

    info: TensorInfo
    stored: str
    expert: int
    start: int
    stop: int
    step: int = 1
    transposed: bool = False

    def read(self, file: WeightFile, box: Sequence[tuple[int, int]]) -> np.ndarray:
        """A box of the part, of which further axes are one."""
        (first, stop), *others = box
        rows = slice(self.start + first * self.step, min(self.start + stop * self.step, self.stop))
        expert = slice(self.expert, self.expert + 1)
        if self.transposed:
            (columns,) = (slice(*part) for part in others)
            return file.read(self.stored, (expert, columns, rows))[0].T[:: self.step]
        whole = file.read(self.stored, (expert, rows))[0][:: self.step]
        whole = whole.reshape(len(whole), *self.info.shape[1:])
        return whole[(slice(None), *(slice(*part) for part in others))]


def split_experts(
    tensors: Mapping[str, TensorInfo], names: ExpertNames, source: str
) -> tuple[dict[str, Part], dict[str, str]]:
    """The tensors of single experts by name, and routers by name where stacked files call them otherwise.

    Raises:
        CheckpointError: a stacked tensor has another number of axes, or gate and up are no equal halves.
    """
    parts: dict[str, Part] = {}
    routers: dict[str, str] = {}
    for stored, info in tensors.items():
        match = _EXPERTS.fullmatch(stored)
        if match is not None:
            layer, which, kind = match.groups()
            transposed = names.interleaved and not kind
            axes = {"_bias": 2, "_blocks": 4}.get(kind, 3)
            outputs = info.shape[-1 if transposed else 1] if len(info.shape) == axes else 1
            if len(info.shape) != axes or (which == "gate_up_proj" and outputs % 2):
                raise CheckpointError(
                    f"{source}: tensor {stored!r} of shape {list(info.shape)} holds no experts' matrices; "
                    "download it again"
                )
            leaf = "bias" if kind == "_bias" else f"weight{kind}"
            for part in _parts(info, f"{layer}.{names.module}.experts", which, leaf, names, transposed):
                parts[part.info.name] = part
        elif (found := _ROUTER.fullmatch(stored)) is not None:
            routers[f"{found[1]}.{names.module}.{names.router}.weight"] = stored
    return parts, {name: stored for name, stored in routers.items() if parts and name != stored}


def _parts(
    info: TensorInfo, module: str, which: str, leaf: str, names: ExpertNames, transposed: bool
) -> Iterator[Part]:
    experts, *matrix = info.shape
    rows, *others = reversed(matrix) if transposed else matrix
    # Two numbers of 4 bits in a byte of a block: bytes of an output's blocks lie one behind the other.
    others = [math.prod(others)] if leaf == "weight_blocks" else others
    half = rows // 2
    if which == "down_proj":
        cuts = ((names.down, 0, rows, 1),)
    elif names.interleaved:
        cuts = ((names.gate, 0, rows, 2), (names.up, 1, rows, 2))
    else:
        cuts = ((names.gate, 0, half, 1), (names.up, half, rows, 1))
    for expert in range(experts):
        for name, start, stop, step in cuts:
            shape = ((stop - start + step - 1) // step, *others)
            made = TensorInfo(f"{module}.{expert}.{name}.{leaf}", info.dtype, shape)
            yield Part(made, info.name, expert, start, stop, step, transposed)
