"""A checkpoint and beside it one that drafts: what a plan reads that guesses with a second model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import (
    Checkpoint,
    CheckpointError,
    Ranges,
    TensorInfo,
    counted,
    open_checkpoint,
)

DRAFT = "draft."  # before the names of the second checkpoint's tensors
FIELD = "draft"  # of the config: the second checkpoint's


@dataclass(frozen=True)
class Beside:
    """Where the checkpoint is that drafts; None for none.

    Attributes:
        checkpoint: a folder, a GGUF file, or ``dummy``.
        model: the config of dummy weights.
    """

    checkpoint: str | None = None
    model: Mapping[str, Any] | None = None

    def open(self, target: Checkpoint) -> Checkpoint:
        """``target``, with the one that drafts beside it.

        Raises:
            CheckpointError: nothing usable there, or a config without dummy weights.
        """
        if (self.checkpoint == "dummy") != (self.model is not None):
            raise CheckpointError(
                "speculative.checkpoint=dummy needs the model that drafts; add speculative.model=qwen3_0_6b or "
                "another of conf/model"
                if self.model is None
                else "speculative.model= is for speculative.checkpoint=dummy; drop it, or add that"
            )
        if self.checkpoint is None:
            return target
        config = None if self.model is None else dict(self.model)
        return PairedCheckpoint(target, open_checkpoint(self.checkpoint, config=config))


class PairedCheckpoint(Checkpoint):
    """Both under one table: the tensors of ``draft`` begin with :data:`DRAFT`, its config is a field of the other's.

    Paths, tokenizer and defaults of generation are those of ``target``.
    """

    def __init__(self, target: Checkpoint, draft: Checkpoint) -> None:
        self.target, self.draft = target, draft
        self.path, self.format = target.path, target.format
        self.config = {**target.config, FIELD: counted(draft.config)}
        self.generation_config = target.generation_config

    @property
    def parts(self) -> Mapping[str, Checkpoint]:
        return {"": self.target, DRAFT: self.draft}

    @property
    def metadata(self) -> Any:
        """What the target's GGUF file says besides tensors, its tokenizer above all."""
        target: Any = self.target
        return target.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        drafting = (_named(info) for info in self.draft.tensors.values())
        return {**self.target.tensors, **{info.name: info for info in drafting}}

    def find(self, name: str) -> TensorInfo | None:
        if not name.startswith(DRAFT):
            return self.target.find(name)
        found = self.draft.find(name.removeprefix(DRAFT))
        return found and _named(found)

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """See :meth:`Checkpoint.read`."""
        if name.startswith(DRAFT):
            return self.draft.read(name.removeprefix(DRAFT), box)
        return self.target.read(name, box)

    def tokenizer_files(self) -> dict[str, Path]:
        return self.target.tokenizer_files()

    def weight_files(self) -> dict[str, tuple[Path, int]]:
        drafting = {DRAFT + name: file for name, file in self.draft.weight_files().items()}
        return {**self.target.weight_files(), **drafting}


def _named(info: TensorInfo) -> TensorInfo:
    return replace(info, name=DRAFT + info.name)
