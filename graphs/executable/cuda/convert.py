"""What a recipe reads, as runs of bytes on the GPU: fetched, converted and put together in numpy.

Conversions round to nearest even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from makeready.graphs.checkpoint.base import NUMPY_DTYPES, Checkpoint
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import Read, fetch, reads
from makeready.graphs.plan.recipe import Operand
from makeready.kernels.spec import DTYPE_BYTES

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


@dataclass(frozen=True)
class Run:
    """Bytes of an operand that follow each other.

    Attributes:
        offset: bytes before them.
        make: gives them when it is called, as an array of any shape.
        read: the one box that they are, as the checkpoint may have it; None where they are put together.
    """

    offset: int
    make: Callable[[], np.ndarray]
    read: Read | None = None


def runs(
    checkpoint: Checkpoint, operand: Operand, most: int, rows: tuple[int, int] | None = None
) -> Iterator[Run]:
    """What an operand, or ``rows`` of it, consists of.

    Boxes come one by one where each is a run, else rows are put together on the host.

    Args:
        most: bytes of rows that are put together at once.
    """
    wanted, size = operand.spec.dtype, DTYPE_BYTES[operand.spec.dtype]
    first, stop = rows or (0, int(operand.spec.shape[0]))
    if operand.largest:
        numbers = list(reads(operand))
        yield Run(0, lambda: np.stack([converted(checkpoint, read, wanted).max() for read in numbers]).max())
        return
    shape = (stop - first, *operand.spec.at({})[1:])
    boxes = [(read, read.offset(shape)) for read in reads(operand, rows)]
    if not operand.padding and all(offset is not None for _, offset in boxes):
        for read, offset in boxes:
            yield Run(size * (offset or 0), partial(converted, checkpoint, read, wanted), read)
        return
    row = size * math.prod(shape[1:])
    step = max(1, most // row)
    for at in range(first, stop, step):
        some = (at, min(at + step, stop))
        yield Run((at - first) * row, partial(_put_together, checkpoint, operand, some))


def _put_together(checkpoint: Checkpoint, operand: Operand, rows: tuple[int, int]) -> np.ndarray:
    dtype = NUMPY_DTYPES[operand.spec.dtype]
    fresh = np.zeros if operand.padding else np.empty
    made = fresh((rows[1] - rows[0], *operand.spec.at({})[1:]), dtype)
    for read in reads(operand, rows):
        place = tuple(slice(start, stop) for start, stop in read.place)
        made[place] = converted(checkpoint, read, operand.spec.dtype)
    return made


def converted(checkpoint: Checkpoint, read: Read, wanted: str) -> np.ndarray:
    """What ``read`` says in the dtype ``wanted``, in the shape of its place."""
    array = fetch(checkpoint, read)
    made = convert(array, stored_dtype(array, checkpoint.dtype_of(read.source)), wanted)
    return np.broadcast_to(made, read.shape) if read.number else made


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
