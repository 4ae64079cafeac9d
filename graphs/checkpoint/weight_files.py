"""The files of a folder that hold weights: which there are, and which tensor is in which."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from makeready.graphs.checkpoint.base import CheckpointError, Ranges, TensorInfo, read_json
from makeready.graphs.checkpoint.safetensors_file import SafetensorsFile
from makeready.graphs.checkpoint.torch_file import TorchFile

WEIGHTS = "model.safetensors"
SAFETENSORS, PICKLED = ".safetensors", (".bin", ".pt", ".pth")
# One file or, of several, the index, in the order in which they are looked for.
_NAMES = ((WEIGHTS, f"{WEIGHTS}.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
# What trainers leave beside weights.
_BESIDE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


class WeightFile(Protocol):
    """A file of tensors.

    Attributes:
        path: the file.
        format: what such files are called.
        infos: tensor table by name.
        data_start: bytes before the first tensor's.
    """

    path: Path
    format: str
    infos: dict[str, TensorInfo]
    data_start: int

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """A box of a tensor; see :meth:`makeready.graphs.checkpoint.base.Checkpoint.read`."""
        ...


def open_weights(path: Path) -> Mapping[str, WeightFile]:
    """Which file holds which tensor: one file, the shards of an index, or any files there are.

    Where a folder has weights in both formats, those in safetensors are read.

    Raises:
        CheckpointError: no weights, a shard that is missing, or a file that cannot be read.
    """
    found = sorted(path.glob(f"*{SAFETENSORS}"))
    (one, index), pickled = _NAMES
    if not found and not (path / index).is_file():
        one, index = pickled
        found = [
            file
            for file in sorted(path.iterdir())
            if file.suffix in PICKLED and not file.name.startswith(_BESIDE)
        ]
    if (path / one).is_file():
        return _merge([path / one], index)
    if (path / index).is_file():
        return _open_shards(path / index)
    if found:
        return _merge(found, index)
    raise CheckpointError(
        f"{path} has no weights; download {WEIGHTS} or {WEIGHTS}.index.json with its shards"
    )


def _open(path: Path) -> WeightFile:
    return SafetensorsFile(path) if path.suffix == SAFETENSORS else TorchFile(path)


def _merge(paths: Iterable[Path], index: str) -> dict[str, WeightFile]:
    sources: dict[str, WeightFile] = {}
    for file in map(_open, paths):
        for name in file.infos:
            if name in sources:
                raise CheckpointError(
                    f"tensor {name!r} is in both {sources[name].path} and {file.path}; "
                    f"remove one of them or add {index}"
                )
            sources[name] = file
    return sources


def _open_shards(index: Path) -> dict[str, WeightFile]:
    path = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    shards: dict[str, WeightFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} maps tensor {name!r} to {shard!r}, which is not a file name; download it again"
            )
        if shard not in shards:
            if not os.path.isfile(path / shard):  # False, too, for names that no file can have
                raise CheckpointError(
                    f"{path / shard} is missing, though {index.name} names it; download this shard"
                )
            shards[shard] = _open(path / shard)
        if name not in shards[shard].infos:
            raise CheckpointError(
                f"{path / shard} lacks tensor {name!r}, which {index.name} places there; download both again"
            )
    return {name: shards[shard] for name, shard in weight_map.items()}
