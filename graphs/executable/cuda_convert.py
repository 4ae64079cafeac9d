"""Stored weights to the dtype that kernels want, in numpy, rounding to nearest even."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from makeready.graphs.checkpoint.base import NUMPY_DTYPES, Checkpoint
from makeready.graphs.plan import PlanError

_QUIET_NAN = np.uint16(0x7FC0)


def convert(source: np.ndarray, stored: str, wanted: str) -> np.ndarray:
    """``source`` in another dtype; the same array where it is that already.

    Args:
        source: as a checkpoint gives it: bfloat16 and 8-bit floats as their bits.
        stored: its dtype, a name of kernels/spec.py or numpy's float64.
        wanted: the dtype to convert to.

    Raises:
        PlanError: no such conversion.
    """
    if stored == wanted:
        return source
    if stored not in _TO_FLOAT32 or wanted not in _FROM_FLOAT32:
        raise PlanError(
            f"weights are stored as {stored} and the plan wants {wanted}, which loading does not convert; "
            "compile the plan with plan.weight_dtype as stored"
        )
    return _FROM_FLOAT32[wanted](_TO_FLOAT32[stored](source))


def reader(checkpoint: Checkpoint, source: str, rows: slice | None, wanted: str) -> Callable[[], np.ndarray]:
    """What reads rows of a tensor (None: all of it) in the dtype ``wanted`` when it is called."""

    def read() -> np.ndarray:
        array = checkpoint.read(source, rows)
        return convert(array, stored_dtype(array, checkpoint.tensors[source].dtype), wanted)

    return read


def stored_dtype(array: np.ndarray, declared: str) -> str:
    """Dtype of what a checkpoint gave: as declared, or numpy's where a block type was dequantized."""
    return declared if declared in NUMPY_DTYPES else array.dtype.name


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits  # wraps for some NaNs alone, which are replaced
    rounded >>= np.uint32(16)
    made = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        made[nan] = _QUIET_NAN
    return made


def _float32_to_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large becomes infinite, as in PyTorch
        return values.astype(np.float16)


_TO_FLOAT32: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda x: x,
    "float16": lambda x: x.astype(np.float32),
    "bfloat16": _bfloat16_to_float32,
    "float64": lambda x: x.astype(np.float32),
}
_FROM_FLOAT32: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda x: x,
    "float16": _float32_to_float16,
    "bfloat16": _float32_to_bfloat16,
}
