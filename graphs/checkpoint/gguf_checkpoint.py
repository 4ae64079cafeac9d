"""A GGUF file read as if it were a Hugging Face checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import (
    AS_STORED,
    NUMPY_DTYPES,
    Checkpoint,
    CheckpointError,
    Ranges,
    TensorInfo,
    ranges,
    tensor_of,
)
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.checkpoint.gguf import GGUFFile
from makeready.graphs.checkpoint.gguf_config import hugging_face_config, llama3_rope
from makeready.graphs.checkpoint.gguf_names import (
    EXPERT,
    ROPE_FACTORS,
    Fields,
    architecture_of,
    hugging_face_name,
    interleaved_heads,
    interleaved_rows,
    special_tokens,
)
from makeready.kernels.gguf_dequantize import BLOCK_TYPES, PLAIN_TYPES, dequantize

_PLAIN_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class GGUFCheckpoint(Checkpoint):
    """Tensors under Hugging Face names and in Hugging Face's row order; block types read as float32.

    Args:
        path: a `.gguf` file of a family of graphs/models/.

    Attributes:
        metadata: every metadata pair of the file, decoded on access (`tokenizer.ggml.tokens`, ...).

    Raises:
        CheckpointError: not a GGUF file, damaged, or not supported; the message says which.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.metadata: Mapping[str, Any] = self._file.metadata
        fields = Fields(self.metadata, str(path))
        self._family = architecture_of(fields, str(path))
        assert self._family.gguf is not None
        self._gguf = self._family.gguf
        self._gguf_names = self._translate()
        self._tensors = {name: self._info(name) for name in sorted(self._gguf_names)}
        self.config = self._build_config(fields)
        self.generation_config: dict[str, Any] = special_tokens(fields)
        self._check_interleaved()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensor table, by Hugging Face name."""
        return self._tensors

    def find(self, name: str) -> TensorInfo | None:
        """The tensor called ``name``, or the bytes of its blocks; see `Checkpoint.find`."""
        tensor, _, kind = name.partition(AS_STORED)
        info = self._tensors.get(tensor)
        if not kind or info is None:
            return info
        if info.dtype != kind or kind not in BLOCK_TYPES:
            return None
        elements, nbytes = BLOCK_TYPES[kind].sizes
        return TensorInfo(name, "uint8", (math.prod(info.shape) // elements * nbytes,))

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """Read one tensor or a box of it; see `Checkpoint.read`."""
        info = self._find(name)
        if AS_STORED in name:
            ((start, stop),) = ranges(info, box)
            whole = self._tensors[tensor_of(name)]
            row = info.shape[0] // whole.shape[0]
            first = start // row
            rows = self._stored(whole, first, -(-stop // row)).reshape(-1)
            return rows[start - first * row : stop - first * row]
        (start, stop), *others = ranges(info, box)
        cut = [slice(*part) for part in others]
        if info.dtype in NUMPY_DTYPES:
            stored = self._stored(info, start, stop).reshape(stop - start, *info.shape[1:])
            return stored[(slice(None), *cut)]
        if all(part == (0, n) for part, n in zip(others, info.shape[1:], strict=True)):
            out = np.empty((stop - start, *info.shape[1:]), np.float32)
            self.read_into(name, out, slice(start, stop))
            return out
        # Blocks run along the last axis: of each row those that hold the columns.
        elements, nbytes = BLOCK_TYPES[info.dtype].sizes
        columns = cut[-1]
        blocks = slice(columns.start // elements, -(-columns.stop // elements))
        shape = (stop - start, *info.shape[1:-1], info.shape[-1] // elements, nbytes)
        stored = self._stored(info, start, stop).reshape(shape)
        stored = np.ascontiguousarray(stored[(slice(None), *cut[:-1], blocks)])
        out = np.empty((*stored.shape[:-2], stored.shape[-2] * elements), np.float32)
        if out.size:
            dequantize(info.dtype, stored, out, self._pool)
        first = columns.start - blocks.start * elements
        return out[..., first : first + columns.stop - columns.start]

    def read_into(self, name: str, out: np.ndarray, rows: slice | None = None) -> None:
        """Dequantize into memory that is there already, which saves touching fresh pages.

        Args:
            name: a tensor of a block type.
            out: float32, contiguous, of the rows' shape; overwritten.
            rows: as in `read`.

        Raises:
            CheckpointError: not a block type, or `out` does not fit.
        """
        info = self._find(name)
        start, stop = ranges(info, rows)[0]
        shape = (stop - start, *info.shape[1:])
        if (
            info.dtype in NUMPY_DTYPES
            or out.shape != shape
            or out.dtype != np.float32
            or not out.flags.c_contiguous
        ):
            raise CheckpointError(
                f"tensor {name!r} ({info.dtype}) cannot be dequantized into {out.dtype} {out.shape}; "
                f"pass a contiguous float32 array of shape {shape} and a tensor of a block type"
            )
        if out.size:
            dequantize(info.dtype, self._stored(info, start, stop), out, self._pool)

    def weight_files(self) -> dict[str, tuple[Path, int]]:
        """The file itself."""
        return {self.path.name: (self.path, self._file.data_start)}

    def tokenizer_files(self) -> dict[str, Path]:
        """The file itself, which holds the tokenizer in its metadata."""
        return {"gguf": self.path}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return ThreadPoolExecutor(cores, thread_name_prefix="dequantize")

    def _translate(self) -> dict[str, tuple[str, int | None]]:
        """Map Hugging Face names to GGUF names and the expert that is meant; no counterpart is an error."""
        names: dict[str, tuple[str, int | None]] = {}
        for stored in self._file.tensors:
            if stored == ROPE_FACTORS:
                continue  # becomes rope_parameters
            name = hugging_face_name(stored, self._gguf.names)
            if name is None:
                raise CheckpointError(
                    f"{self.path}: tensor {stored!r} has no counterpart in {self._gguf.architecture} models; "
                    "use the Hugging Face folder of this model"
                )
            if EXPERT not in name:
                names[name] = (stored, None)
                continue
            shape = self._file.tensors[stored].shape
            if len(shape) != 3:
                raise CheckpointError(
                    f"{self.path}: tensor {stored!r} of shape {list(shape)} holds no experts' matrices; "
                    "convert the model again"
                )
            names |= {name.replace(EXPERT, str(e)): (stored, e) for e in range(shape[0])}
        return names

    def _info(self, name: str) -> TensorInfo:
        stored, expert = self._gguf_names[name]
        tensor = self._file.tensors[stored]
        shape = tensor.shape if expert is None else tensor.shape[1:]
        if name.endswith("shared_expert_gate.weight") and len(shape) == 1:  # a projection to one number
            shape = (1, *shape)
        return TensorInfo(name, _PLAIN_DTYPES.get(tensor.kind, tensor.kind), shape)

    def _build_config(self, fields: Fields) -> dict[str, Any]:
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} lacks tensor 'token_embd.weight'; download the file again")
        source = str(self.path)
        config = hugging_face_config(self._family, fields, self._tensors, embedding.shape[0], source)
        normal = normalise_config(config, source=source)
        factors = self._file.tensors.get(ROPE_FACTORS)
        if factors is None:
            return normal
        rope = normal["rope_parameters"]
        if (
            rope["rope_type"] != "default"
            or factors.kind != "f32"
            or factors.shape != (normal["head_dim"] // 2,)
        ):
            raise CheckpointError(
                f"{self.path}: {ROPE_FACTORS} must be float32, half the head size long and the only rotary "
                "scaling; convert the model again"
            )
        values = self._file.rows(ROPE_FACTORS).view("<f4")[0]
        normal["rope_parameters"] = llama3_rope(values, rope["rope_theta"], source)
        return normal

    def _check_interleaved(self) -> None:
        for name, info in self._tensors.items():
            heads = self._interleaved(name)
            if heads is not None and info.shape[0] != heads * self.config["head_dim"]:
                raise CheckpointError(
                    f"{self.path}: tensor {self._gguf_names[name][0]!r} has {info.shape[0]} rows where "
                    f"{heads} heads of {self.config['head_dim']} are described; download the file again"
                )

    def _interleaved(self, name: str) -> int | None:
        return interleaved_heads(name, self.config) if self._gguf.interleaved else None

    def _stored(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor in Hugging Face order: raw bytes of block types, values of plain ones."""
        stored, expert = self._gguf_names[info.name]
        tensor = self._file.tensors[stored]
        data = self._file.rows(tensor.name)
        if expert is not None:
            data = data.reshape(tensor.shape[0], -1)[expert]
        data = data.reshape(info.shape[0], -1)
        heads = self._interleaved(info.name)
        if heads is None:
            data = data[start:stop]
        else:
            data = data[interleaved_rows(self.config["head_dim"], start, stop)]
        return data.view(PLAIN_TYPES[tensor.kind]) if tensor.kind in PLAIN_TYPES else data
