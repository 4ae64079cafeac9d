"""What the ways to run a projection have in common, whatever its weights are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import islice
from typing import TypeVar

from makeready.kernels.device import Tensor
from makeready.kernels.spec import DTYPE_BYTES

_MOST = 6
Way = TypeVar("Way")


def best_of_each(ways: Iterable[Way], kind: Callable[[Way], Hashable]) -> list[Way]:
    """The first of ``ways`` of each ``kind``, few of them, so that one of them is right where a cost model is not."""
    first: dict[Hashable, Way] = {}
    for way in ways:
        first.setdefault(kind(way), way)
    return list(islice(first.values(), _MOST))


def addressable(tensor: Tensor) -> bool:
    """Whether a tensor map can describe it: address and row stride are multiples of 16 bytes."""
    return tensor.alignment % 16 == 0 and tensor.row_stride * DTYPE_BYTES[tensor.dtype] % 16 == 0
