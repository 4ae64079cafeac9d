"""Seeded random weights at a config's shapes: for tests and measurements without a download."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import (
    NUMPY_DTYPES,
    Checkpoint,
    CheckpointError,
    Ranges,
    TensorInfo,
    ranges,
)
from makeready.graphs.checkpoint.config import DTYPES, normalise_config
from makeready.graphs.checkpoint.float8 import to_float8

SCALE = 0.02  # the usual initializer_range: activations neither vanish nor overflow over 100 layers

# 8-bit weights fill most of their range, and their scales bring them back to SCALE. The static scale of an
# activation covers normed values, which seldom leave ±8.
FLOAT8_SPREAD = 100.0
SCALES = {
    "weight_scale": SCALE / FLOAT8_SPREAD,
    "weight_scale_inv": SCALE / FLOAT8_SPREAD,
    "input_scale": 8 / 448,
    "weight_scale_2": SCALE / 2.9 / FLOAT8_SPREAD,  # of NVFP4: scales fill most of e4m3's range
    "weight_global_scale": 2.9 * FLOAT8_SPREAD / SCALE,  # which divides
    "scales": SCALE / 6.5,  # of 4 bits less a zero of 4 bits
}
PACKED = ("qweight", "qzeros", "weight_packed", "weight_zero_point")  # random bits: weights of 4 or 8 bits
BLOCKS, EXPONENTS = "weight_blocks", "weight_scales"  # of MXFP4
EXPONENT = 120  # 2^-7: random bits have a root mean square of 2.9

# Big tensors repeat one random block, each from a place of its own: a million normals take 30 ms, and there may be
# tens of thousands of such tensors. A prime length shares no factor with a row, so no two rows of a matrix with fewer
# rows than this are alike.
PERIOD = 2**20 - 3


class DummyCheckpoint(Checkpoint):
    """Random weights that depend on (seed, tensor name) only.

    Scales (tensors called as in :data:`SCALES`) are float32, and a weight beside which a scale is declared is
    made of 8-bit floats, unless its dtype is said, as quantized checkpoints have them.

    Args:
        config: a Hugging Face config in any accepted spelling.
        shapes: shape of each tensor by Hugging Face name, where already known; see `declare`.
        seed: any integer.
        dtype: `float32`, `float16` or `bfloat16`; None takes the config's.

    Raises:
        CheckpointError: an invalid config, dtype or shape.
    """

    format = "dummy"

    def __init__(
        self,
        config: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        seed: int = 0,
        dtype: str | None = None,
    ) -> None:
        self.path = Path("dummy")
        self.config = normalise_config(config, source="the dummy config")
        self.generation_config: dict[str, Any] = {}
        self.dtype = self.config["dtype"] if dtype is None else dtype
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"dummy weights cannot have dtype {self.dtype!r}; use one of {', '.join(DTYPES)}"
            )
        self._seed = seed
        self._tensors: dict[str, TensorInfo] = {}
        self._shared: dict[
            tuple[str, str], np.ndarray
        ] = {}  # what big tensors are taken from, by dtype and kind
        self.declare(shapes or {})

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors declared so far, by Hugging Face name."""
        return self._tensors

    def declare(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None = None) -> None:
        """Add tensors to the table; the planner knows them, the config does not list them.

        Args:
            dtypes: of those that have another than their names say.

        Raises:
            CheckpointError: a size below 1, or a tensor declared before with another shape.
        """
        for name, shape in shapes.items():
            dtype = (dtypes or {}).get(name) or self._dtype(name, shapes)
            info = TensorInfo(name, dtype, tuple(shape))
            if any(size < 1 for size in info.shape):
                raise CheckpointError(
                    f"dummy tensor {name!r} has shape {info.shape}; every size must be at least 1"
                )
            if self._tensors.setdefault(name, info) != info:
                raise CheckpointError(
                    f"dummy tensor {name!r} was declared with shape {self._tensors[name].shape} "
                    f"and again with {info.shape}; declare each tensor once"
                )

    def _dtype(self, name: str, beside: Collection[str]) -> str:
        module, _, kind = name.rpartition(".")
        if kind in SCALES:
            return "float32"
        if kind in PACKED:
            return "int32"
        if kind in (BLOCKS, EXPONENTS):
            return "uint8"
        scaled = kind == "weight" and any(f"{module}.{scale}" in beside for scale in SCALES)
        return "float8_e4m3fn" if scaled else self.dtype

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """Make one tensor, or a box of it; see `Checkpoint.read`."""
        info = self._find(name)
        (start, stop), *others = ranges(info, box) or ((0, 1),)
        row = math.prod(info.shape[1:])
        block, first = self._block(info)
        flat = np.empty((stop - start) * row, block.dtype)
        filled, source = 0, (first + start * row) % len(block)
        while filled < len(flat):
            part = block[source : source + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled, source = filled + len(part), 0
        made = flat.reshape((stop - start, *info.shape[1:]) if info.shape else ())
        return made[(..., *(slice(*part) for part in others))] if others else made

    def _block(self, info: TensorInfo) -> tuple[np.ndarray, int]:
        """What a tensor's elements are taken from, in turn, and where the first of them is."""
        key = hashlib.sha256(f"{self._seed}/{info.name}".encode()).digest()[:16]
        number, count = int.from_bytes(key, "little"), math.prod(info.shape)
        if count < PERIOD or len(info.shape) == 1:
            return _numbers(_normals(number, min(count, PERIOD)), info), 0
        kind = info.name.rpartition(".")[2]
        shared = (info.dtype, kind if kind in SCALES or kind == EXPONENTS else "")
        if shared not in self._shared:
            self._shared[shared] = _numbers(_normals(self._seed, PERIOD), info)
        return self._shared[shared], number % PERIOD


def _normals(key: int, count: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=key % 2**128))
    return generator.standard_normal(count, np.float32)


def _numbers(values: np.ndarray, info: TensorInfo) -> np.ndarray:
    """A tensor's elements, as its file would hold them, of normal ``values``, which are overwritten."""
    kind = info.name.rpartition(".")[2]
    if info.dtype == "int64":  # by how much ids of a smaller vocabulary are off: its tokens are the first
        return np.zeros(len(values), np.int64)
    if kind == EXPONENTS or (
        kind in SCALES and info.dtype == "uint8"
    ):  # half, once and twice as large as usual
        return (EXPONENT + np.rint(np.tanh(values))).astype(np.uint8)
    if kind in SCALES:  # between a half and one and a half of the usual
        spread = np.abs(np.tanh(values)) + np.float32(0.5)
        if info.dtype == "float8_e4m3fn":
            return to_float8(spread * np.float32(FLOAT8_SPREAD))
        return (spread * np.float32(SCALES[kind])).astype(np.float32)
    if info.dtype in ("int32", "uint8"):
        bits = values.view(np.int32) * np.int32(0x9E3779B1 - 2**32)
        return bits if info.dtype == "int32" else bits.view(np.uint8)[: len(values)]
    if info.dtype == "int8":
        return np.clip(np.rint(values * np.float32(FLOAT8_SPREAD)), -127, 127).astype(np.int8)
    if info.dtype == "float8_e4m3fn":
        return to_float8(values * np.float32(FLOAT8_SPREAD))
    values *= np.float32(SCALE)
    if len(info.shape) == 1 and "norm" in info.name and not info.name.endswith(".bias"):
        values += np.float32(1)
    if info.dtype == "bfloat16":
        return bfloat16_bits(values)
    return values.astype(NUMPY_DTYPES[info.dtype], copy=False)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to bfloat16, ties to even; returns the uint16 bits, same shape."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
