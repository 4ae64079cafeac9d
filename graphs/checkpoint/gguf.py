"""The GGUF container, versions 2 and 3: metadata, tensor table, aligned data.

Format: docs/gguf.md of ggml-org/ggml. Little-endian throughout: magic, version, tensor count, metadata
count, the metadata pairs, the tensor entries, then each tensor's data at an aligned offset. Long metadata
arrays (a vocabulary) are skipped on opening and decoded when asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from makeready.graphs.checkpoint.base import CheckpointError, map_file
from makeready.kernels.gguf_dequantize import BLOCK_TYPES, PLAIN_TYPES

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NESTING = 4  # of arrays in metadata; the format sets no limit, files in use have no nesting

# ggml type ids (ggml.h). Those that are not read get an error with their name.
TYPE_NAMES = (
    {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_k"}
    | {11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs"}
    | {18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16"}
    | {26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4"}
)

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MIN_BYTES = {**{kind: struct.calcsize(code) for kind, code in _SCALARS.items()}, _STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
        name: GGUF name, e.g. `blk.0.attn_q.weight`.
        kind: `f32`, `f16`, `bf16` or a block type such as `q4_1`.
        shape: row-major (the file lists axes innermost first).
        begin: byte offset of the data in the file.
        row_bytes: bytes of one row, that is of the innermost axis.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class Metadata(Mapping[str, Any]):
    """The metadata of a GGUF file; a value is decoded when it is first asked for."""

    def __init__(self, path: Path, data: np.ndarray, places: dict[str, tuple[int, int]]) -> None:
        self._path = path
        self._data = data
        self._places = places  # key -> (value type, byte offset)
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, offset = self._places[key]
            self._values[key] = _Reader(self._path, self._data).value(kind, offset, key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class GGUFFile:
    """A mapped GGUF file.

    Attributes:
        metadata: key to int, float, bool, str or list.
        tensors: tensor table by GGUF name.
        data_start: bytes before the first tensor's.

    Raises:
        CheckpointError: not a GGUF file, truncated, malformed, or holding a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = map_file(path)
        reader = _Reader(path, self._bytes)
        tensor_count, pair_count = _read_preamble(reader)
        self.metadata = Metadata(path, self._bytes, _scan_metadata(reader, pair_count))
        if self.metadata.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge"
            )
        entries = [_read_entry(reader) for _ in range(tensor_count)]
        self.tensors = self._place(entries, reader.position)

    def rows(self, name: str) -> np.ndarray:
        """Return a tensor's bytes as a read-only view, uint8 [product of the outer axes, row_bytes]."""
        tensor = self.tensors[name]
        data = self._bytes[tensor.begin : tensor.begin + tensor.nbytes]
        return data.reshape(-1, tensor.row_bytes)

    def _place(self, entries: list[GGUFTensor], header_end: int) -> dict[str, GGUFTensor]:
        """Turn offsets into file positions; refuse misaligned, overlapping and out-of-range tensors."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise CheckpointError(
                f"{self.path}: general.alignment must be a positive multiple of 8, not {alignment!r}; "
                "download the file again"
            )
        self.data_start = start = -(-header_end // alignment) * alignment
        placed: dict[str, GGUFTensor] = {}
        end = start
        for entry in sorted(entries, key=lambda entry: entry.begin):
            tensor = GGUFTensor(entry.name, entry.kind, entry.shape, start + entry.begin, entry.row_bytes)
            if entry.begin % alignment or tensor.begin < end or entry.name in placed:
                raise CheckpointError(
                    f"{self.path}: tensor {entry.name!r} is misaligned, overlaps another or is listed twice; "
                    "download the file again"
                )
            end = tensor.begin + tensor.nbytes
            if end > len(self._bytes):
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {entry.name!r} ends at byte {end} "
                    f"of {len(self._bytes)}; download it again"
                )
            placed[entry.name] = tensor
        return placed


class _Reader:
    """Bounds-checked little-endian reads; `position` advances with each."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self.data = data
        self._buffer = data.data
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is truncated or corrupt ({what}); download it again")

    def require(self, count: int, what: str) -> None:
        if count > len(self._buffer) - self.position:
            self.fail(f"{what} runs past the end")

    def take(self, code: str, what: str) -> Any:
        try:
            (value,) = struct.unpack_from(code, self._buffer, self.position)
        except struct.error:
            self.fail(f"{what} runs past the end")
        self.position += struct.calcsize(code)
        return value

    def text(self, what: str) -> str:
        length = self.take("<Q", what)
        self.require(length, what)
        begin = self.position
        self.position += length
        try:
            return str(self._buffer[begin : begin + length], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def skip(self, kind: int, key: str, depth: int = 0) -> None:
        """Step over a value of type `kind`."""
        if kind in _SCALARS:
            self.require(_MIN_BYTES[kind], key)
            self.position += _MIN_BYTES[kind]
        elif kind == _STRING:
            self._skip_strings(1, key)
        elif kind == _ARRAY:
            inner, count = self._array_head(key, depth)
            if inner in _SCALARS:
                self.position += count * _MIN_BYTES[inner]
            elif inner == _STRING:
                self._skip_strings(count, key)
            else:
                for _ in range(count):
                    self.skip(inner, key, depth + 1)
        else:
            self.fail(f"{key} has the unknown value type {kind}")

    def _skip_strings(self, count: int, key: str) -> None:
        # A vocabulary and its merges are 100,000 strings and more: this loop is most of the time to open.
        unpack, buffer, position = struct.Struct("<Q").unpack_from, self._buffer, self.position
        last = len(buffer) - 8
        for _ in range(count):
            if position > last:
                self.fail(f"{key} runs past the end")
            position += 8 + unpack(buffer, position)[0]
        self.position = position
        self.require(0, key)

    def _strings(self, count: int, key: str) -> list[str]:
        """Decode strings that `skip` has bounds-checked before."""
        unpack, buffer, position = struct.Struct("<Q").unpack_from, self._buffer, self.position
        found = []
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + unpack(buffer, position)[0]
                found.append(str(buffer[begin:position], "utf-8"))
        except UnicodeDecodeError:
            self.fail(f"{key} is not UTF-8")
        self.position = position
        return found

    def _array_head(self, key: str, depth: int) -> tuple[int, int]:
        inner, count = self.take("<I", key), self.take("<Q", key)
        if inner not in _MIN_BYTES or depth >= MAX_NESTING:
            self.fail(f"{key} is an array of the unknown type {inner} or nested too deeply")
        self.require(count * _MIN_BYTES[inner], key)
        return inner, count

    def value(self, kind: int, offset: int, key: str, depth: int = 0) -> Any:
        """Decode the value of type `kind` at `offset`."""
        self.position = offset
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            scalar = self.take(_SCALARS[kind], key)
            return bool(scalar) if kind == _BOOL else scalar
        inner, count = self._array_head(key, depth)
        if inner == _STRING:
            return self._strings(count, key)
        if inner == _ARRAY:
            return [self.value(inner, self.position, key, depth + 1) for _ in range(count)]
        begin, size = self.position, count * _MIN_BYTES[inner]
        self.position += size
        values = self.data[begin : begin + size].view("?" if inner == _BOOL else _SCALARS[inner])
        return values.tolist()


def _read_preamble(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; return (tensor count, metadata count)."""
    if reader.data[:4].tobytes() != b"GGUF":
        raise CheckpointError(
            f"{reader.path} is not a GGUF file; pass a .gguf file or a folder with config.json and weights"
        )
    reader.position = 4
    version = reader.take("<I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian, which is not read" if swapped in VERSIONS else f"GGUF version {version}"
        raise CheckpointError(f"{reader.path} is {what}; convert it to little-endian GGUF version 3")
    return reader.take("<Q", "the tensor count"), reader.take("<Q", "the metadata count")


def _scan_metadata(reader: _Reader, count: int) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        key = reader.text("a metadata key")
        kind = reader.take("<I", key)
        if key in places:
            reader.fail(f"metadata key {key!r} occurs twice")
        places[key] = (kind, reader.position)
        reader.skip(kind, key)
    return places


def _read_entry(reader: _Reader) -> GGUFTensor:
    """Read one tensor entry; `begin` is still relative to the start of the data."""
    name = reader.text("a tensor name")
    dims = reader.take("<I", name)
    if not 1 <= dims <= MAX_DIMS:
        reader.fail(f"tensor {name!r} has {dims} axes")
    shape = tuple(reader.take("<Q", name) for _ in range(dims))[::-1]
    type_id = reader.take("<I", name)
    kind = TYPE_NAMES.get(type_id, f"with id {type_id}")
    if kind not in PLAIN_TYPES and kind not in BLOCK_TYPES:
        supported = ", ".join([*PLAIN_TYPES, *BLOCK_TYPES])
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} has the unsupported type {kind}; use one of {supported}"
        )
    elements, size = (1, PLAIN_TYPES[kind].itemsize) if kind in PLAIN_TYPES else BLOCK_TYPES[kind].sizes
    if min(shape) < 1 or shape[-1] % elements or (elements > 1 and dims == 1):
        reader.fail(
            f"tensor {name!r} of type {kind} has shape {shape}, not rows that are multiples of {elements}"
        )
    begin = reader.take("<Q", name)
    return GGUFTensor(name, kind, shape, begin, shape[-1] // elements * size)
