"""Experts that a checkpoint stores stacked in one tensor, presented one tensor an expert, as most files have them.

E experts, I features of an expert, C hidden
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from makeready.graphs.checkpoint.base import CheckpointError, TensorInfo
from makeready.graphs.models.family import ExpertNames

# transformers 5 holds ``gate_up_proj[E, 2I, C]`` and ``down_proj[E, C, I]``; scales of 8-bit floats are beside them.
_EXPERTS = re.compile(r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)(_scale_inv|_scale|)(?:\.weight)?")
_ROUTER = re.compile(r"(.+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class Part:
    """A tensor of one expert within a stacked one: ``stored[expert, start:stop]``."""

    info: TensorInfo
    stored: str
    expert: int
    start: int
    stop: int


def split_experts(
    tensors: Mapping[str, TensorInfo], names: ExpertNames, source: str
) -> tuple[dict[str, Part], dict[str, str]]:
    """The tensors of single experts by name, and routers by name where stacked files call them otherwise.

    Raises:
        CheckpointError: a stacked tensor has no three axes, or gate and up are no equal halves.
    """
    parts: dict[str, Part] = {}
    routers: dict[str, str] = {}
    for stored, info in tensors.items():
        match = _EXPERTS.fullmatch(stored)
        if match is not None:
            layer, which, scale = match.groups()
            if len(info.shape) != 3 or (which == "gate_up_proj" and info.shape[1] % 2):
                raise CheckpointError(
                    f"{source}: tensor {stored!r} of shape {list(info.shape)} holds no experts' matrices; "
                    "download it again"
                )
            for part in _parts(info, f"{layer}.{names.module}.experts", which, f"weight{scale}", names):
                parts[part.info.name] = part
        elif (found := _ROUTER.fullmatch(stored)) is not None:
            routers[f"{found[1]}.{names.module}.{names.router}.weight"] = stored
    return parts, {name: stored for name, stored in routers.items() if parts and name != stored}


def _parts(info: TensorInfo, module: str, which: str, leaf: str, names: ExpertNames) -> Iterator[Part]:
    experts, rows, columns = info.shape
    cuts = (
        ((names.gate, 0, rows // 2), (names.up, rows // 2, rows))
        if which == "gate_up_proj"
        else ((names.down, 0, rows),)
    )
    for expert in range(experts):
        for name, start, stop in cuts:
            made = TensorInfo(f"{module}.{expert}.{name}.{leaf}", info.dtype, (stop - start, columns))
            yield Part(made, info.name, expert, start, stop)
