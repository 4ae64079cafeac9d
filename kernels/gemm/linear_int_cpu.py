"""Projections with weights of 4 or 8 bits on the CPU: they stay packed, and are widened a few outputs at a time.

Few rows go through the compiled op, which widens an output's weights into the cache and multiplies them there, on one
thread; for more rows some outputs are widened and PyTorch multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from makeready.kernels import mx, native
from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_cpu import in_blocks, prove_invariant
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.integers import SPAN, TILE, values
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear_int, Contract)

_FEW = 8  # rows up to which the compiled op multiplies
_PART = 512  # outputs that are widened at once, whole tiles
_SCALES = (torch.float16, torch.uint8, torch.int16)  # in the order of the compiled op's fields


@dataclass(frozen=True)
class IntMatrix:
    """One matrix as kernels/integers.py or kernels/mx.py says, with what its words mean.

    Attributes:
        weight, scale, zero: ``[N, W]`` int16, ``[ceil(N / 64), G, 64]`` fp16, the same of uint8 (of fp16 where it is
            offsets) or None. Scales of MXFP4 are uint8, those of NVFP4 int16.
        inputs: K.
        global_scale: fp32 ``[N]`` of NVFP4, else None.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group: int
    inputs: int
    global_scale: torch.Tensor | None = None

    @property
    def compiled(self) -> bool:
        """Whether the compiled op takes it."""
        offsets = self.zero is not None and self.zero.dtype != torch.uint8
        return native.available() and not offsets and (self.inputs <= self.group or self.group % 32 == 0)

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """First output, the one behind the last, and fp32 weights, part after part."""
        outputs = len(self.weight)
        space = torch.empty(min(outputs, _PART), -(-self.inputs // SPAN) * SPAN)
        for first in range(0, outputs, _PART):
            stop = min(first + _PART, outputs)
            widen = self.prepare(None, None, None, space, first, stop)
            if widen is None:
                yield first, stop, self._values(slice(first, stop), slice(first // TILE, -(-stop // TILE)))
                continue
            widen()
            yield first, stop, space[: stop - first, : self.inputs]

    def _values(self, rows: slice, tiles: slice) -> torch.Tensor:
        """fp32 weights of some outputs, whose tiles are these."""
        weight, scale = self.weight[rows], self.scale[tiles]
        if scale.dtype != torch.float16:
            whole = None if self.global_scale is None else self.global_scale[rows]
            return mx.values(weight, scale, whole, inputs=self.inputs, dtype=torch.float32)
        zero = None if self.zero is None else self.zero[tiles]
        form = {"bits": self.bits, "group": self.group, "inputs": self.inputs}
        return values(weight, scale, zero, **form, dtype=torch.float32)

    def prepare(
        self,
        x: torch.Tensor | None,
        bias: torch.Tensor | None,
        y: torch.Tensor | None,
        space: torch.Tensor,
        first: int,
        stop: int,
    ) -> Callable[[], None] | None:
        """A call of the compiled op for outputs ``first:stop``; see LinearInt in integers.c."""
        if not self.compiled:
            return None
        strides = (0 if one is None else one.stride(0) for one in (x, y))
        x_stride, y_stride = strides
        scales = (self.scale if self.scale.dtype == dtype else None for dtype in _SCALES)
        return native.prepare(
            "linear_int", x, x_stride, self.weight, *scales, self.global_scale, self.zero, bias, y, y_stride,
            0 if x is None else len(x), first, stop, self.inputs, self.bits, self.group, space,
        )  # fmt: skip

    def few(self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> Callable[[], None] | None:
        """A call that writes ``y[T, N] = x @ w.T + bias``, all fp32, row by row."""
        space = torch.empty(-(-self.inputs // SPAN) * SPAN)
        call = self.prepare(x, bias, y, space, 0, len(self.weight))
        return None if call is None else _keeping(call, space)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 ``x[T, K] @ w.T``."""
        y = torch.empty(len(x), len(self.weight))
        if len(x) <= _FEW and x.stride(1) == 1 and (call := self.few(x, y, None)) is not None:
            call()
            return y
        for first, stop, wide in self.parts():
            torch.mm(x, wide.T, out=y[:, first:stop])
        return y

    def multiply_alike(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`multiply`, the same for a row whatever the others are."""
        y = torch.empty(len(x), len(self.weight))
        x = x.contiguous()
        if (call := self.few(x, y, None)) is not None:
            call()
            return y
        for first, stop, wide in self.parts():
            y[:, first:stop] = in_blocks(wide, x)
        return y


def _keeping(call: Callable[[], None], *kept: torch.Tensor) -> Callable[[], None]:
    """``call`` with what it holds bare addresses of."""

    def made(kept: tuple[torch.Tensor, ...] = kept) -> None:
        call()

    return made


def _matrix(operands: Operands, attrs: Mapping[str, Any]) -> IntMatrix:
    x, weight, scale, zero, *_ = operands
    return IntMatrix(weight, scale, zero, attrs["bits"], attrs["group"], x.shape[1])


def floats(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    """Whether all that is no weight is fp32."""
    found = [specs[name].dtype for name in ("x", "bias") if name in specs]
    return set(found) == {"float32"} and attrs["out_dtype"] in ("", "float32")


def bind_few(
    matrix: IntMatrix, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[], None] | None:
    """A call of :meth:`IntMatrix.few` where there are so few rows that it is faster."""
    return matrix.few(x, y, bias) if len(x) <= _FEW else None


def bind_alike(
    matrix: IntMatrix, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[], None] | None:
    """A call of :meth:`IntMatrix.few`; where there is none, this machine's product is checked to be invariant."""
    if (call := matrix.few(x, y, bias)) is not None:
        return call
    prove_invariant(matrix.multiply_alike, *x.shape)
    return None


def _bind(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    x, *_, bias = operands
    return bind_few(_matrix(operands, attrs), x, results[0], bias)


@kernel(linear_int, "packed", target="cpu", applies=floats, bind=_bind)
def linear_int_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **attrs: Any,
) -> torch.Tensor:
    """fp32 activations times packed weights, accumulated in fp32."""
    y = _matrix((x, weight, weight_scale, weight_zero), attrs).multiply(x)
    return y if bias is None else y.add_(bias)


def _bind_alike(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    x, *_, bias = operands
    return bind_alike(_matrix(operands, attrs), x, results[0], bias)


@kernel(
    linear_int,
    "packed_rows",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=floats,
    bind=_bind_alike,
)
def linear_int_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **attrs: Any,
) -> torch.Tensor:
    """:func:`linear_int_packed`, the same for a row whatever the others are."""
    y = _matrix((x, weight, weight_scale, weight_zero), attrs).multiply_alike(x)
    return y if bias is None else y.add_(bias)
