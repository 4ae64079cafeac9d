"""One safetensors file: 8 bytes of little-endian header length, a JSON header, then the data.

Format: the README of huggingface/safetensors. The header maps each tensor's name to its dtype, shape and
`data_offsets` (begin, end) counted from the end of the header; the data may hold neither holes nor overlaps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from makeready.graphs.checkpoint.base import (
    NUMPY_DTYPES,
    CheckpointError,
    Ranges,
    TensorInfo,
    map_file,
    ranges,
)

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafetensorsFile:
    """The tensors of one safetensors file, mapped into memory.

    Args:
        path: the file.

    Attributes:
        format: what such files are called.
        infos: tensor table by name.
        data_start: bytes before the first tensor's.

    Raises:
        CheckpointError: not a safetensors file, truncated, or a header that contradicts the data.
    """

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._begins: dict[str, int] = {}
        self._bytes = map_file(path)
        header, data_start = _read_header(path, self._bytes)
        self.data_start = data_start
        spans = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            info, begin, end = _parse_entry(path, name, entry)
            self.infos[name] = info
            self._begins[name] = data_start + begin
            spans.append((begin, end, name))
        _check_spans(path, spans, len(self._bytes) - data_start)

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """Return a read-only view of a box of a tensor (a copy only where the file misaligns it)."""
        info = self.infos[name]
        dtype, begin = NUMPY_DTYPES[info.dtype], self._begins[name]
        data = self._bytes[begin : begin + math.prod(info.shape) * dtype.itemsize]
        array = data.view(dtype).reshape(info.shape)
        array = array[(*(slice(*part) for part in ranges(info, box)), ...)]
        return array if array.flags.aligned else array.copy()


def _read_header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file (a header of {length} bytes in a file "
            f"of {len(data)}); download it again"
        )
    text = data[8 : 8 + length].tobytes()
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has no valid safetensors header; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has no valid safetensors header; download it again")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that occurs twice: a tensor must have one meaning."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{path}: the header entry of tensor {name!r} is malformed; download the file again"
        )
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unsupported dtype {kind!r}; use one of {', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: tensor {name!r} has a malformed shape or data_offsets; download the file again"
        )
    info = TensorInfo(name, DTYPES[kind], tuple(shape))
    expected = math.prod(shape) * NUMPY_DTYPES[info.dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {info.shape} and dtype {kind} needs {expected} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}; download the file again"
        )
    return info, offsets[0], offsets[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Refuse overlapping, gapped or out-of-range tensors."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {begin} of the data where {position} was expected "
                "(an overlap or a hole); download the file again"
            )
        position = end
    if position != data_bytes:
        raise CheckpointError(
            f"{path} holds {data_bytes} bytes of data where its header says {position}; download it again"
        )
