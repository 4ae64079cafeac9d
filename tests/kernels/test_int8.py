"""8-bit integers: exact sums, rounding, saturation, what is not finite, and the numbers of compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from makeready.kernels import quantize_int8 as ops
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import linear_int8_cpu
from makeready.kernels.gemm.linear_int8_cpu import integer_sums, sums_of_parts

KINDS = ("quantize_int8", "quantize_int8_static")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Every int8, -128 included."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 7, 65, 300])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (33, 64), (131, 131), (65, 1040), (7, 1041), (63, 4099)]
)
def test_sums_are_exact(tokens: int, outputs: int, inputs: int) -> None:
    x, weight = numbers(tokens, inputs, seed=1), numbers(outputs, inputs, seed=2)
    x[0], weight[0] = -128, -128  # beyond 2^24 from 1,025 inputs on
    want = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    for product in (integer_sums, sums_of_parts):
        made = product(x, weight)
        assert made.dtype == torch.int32
        assert np.array_equal(made.numpy(), want), product.__name__


def test_a_product_that_saturates_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without VNNI, where two products with unsigned numbers are added up in 16 bits."""

    def saturating(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        odd = (0, x.shape[1] % 2)
        unsigned = torch.nn.functional.pad(x.int() + 128, odd).unflatten(1, (-1, 2))
        pairs = torch.nn.functional.pad(weight.T.int(), odd).unflatten(1, (-1, 2))
        sums = (unsigned[:, None] * pairs[None]).sum(-1).clamp(-(2**15), 2**15 - 1)
        return sums.sum(-1, dtype=torch.int32) - 128 * weight.T.sum(1, dtype=torch.int32)

    monkeypatch.setattr(linear_int8_cpu, "_INT_MM", saturating)
    linear_int8_cpu._product_is_exact.cache_clear()
    try:
        x, weight = torch.full((2, 64), 127, dtype=torch.int8), torch.full((3, 64), 127, dtype=torch.int8)
        assert (saturating(x, weight.T) != 64 * 127**2).all()
        assert (integer_sums(x, weight) == 64 * 127**2).all()
    finally:
        linear_int8_cpu._product_is_exact.cache_clear()


def test_values_round_to_even_and_stay_in_range() -> None:
    """By numpy, row by row; the row of zeros stays zero."""
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * 7
    x[3] = 0
    x[4] = torch.arange(96) / 2 - 24  # with 63.5 a scale of one half: all odd ones are ties
    x[4, 0] = 63.5
    x[5, 0] = -1000.0
    q, scale = ops.quantize_int8(x, group=96)
    for row, made, by in zip(x.numpy(), q.numpy(), scale[:, 0].numpy(), strict=True):
        want = max(np.float32(np.abs(row).max()) / np.float32(127), np.float32(1e-12))
        assert by == want
        assert np.array_equal(made, np.rint(row / want))
    assert q[5, 0] == -127
    assert (q[3] == 0).all()
    y = CONTRACTS["linear_int8"](q, scale, numbers(5, 96), torch.rand(5), out_dtype="float32")
    assert torch.equal(y[3], torch.zeros(5))


@pytest.mark.parametrize("scale", [1e-4, 0.05, 30.0])
def test_static_scales_saturate_below_minus_128(scale: float) -> None:
    x = torch.linspace(-200, 200, 4001)[None]
    q, by_row = ops.quantize_int8_static(x, torch.tensor([scale]))
    want = np.clip(np.rint(x.numpy() / np.float32(scale)), -127, 127)
    assert np.array_equal(q.numpy(), want)
    assert by_row.tolist() == [[np.float32(scale)]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", KINDS)
def test_what_is_not_finite_reaches_every_result_of_its_row_alone(op: str, bad: float) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[1, 17] = bad
    more, attrs = ((), {"group": 64}) if op == "quantize_int8" else ((torch.tensor([0.02]),), {})
    weight = numbers(9, 64)
    weight[4] = 0  # its sums are zeros
    made = CONTRACTS[op](x, *more, **attrs)
    for linear in (CONTRACTS["linear_int8"], linear_int8_cpu.linear_int8_cpu):
        y = linear(*made, weight, torch.ones(9), out_dtype="float32")
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


def test_numbers_are_those_of_the_library() -> None:
    """Quantized by its scales, and made wide again."""
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")  # type: ignore[arg-type]
    x = torch.randn(37, 50, generator=torch.Generator().manual_seed(3))
    scale = x.abs().amax(1, keepdim=True) / 127
    zero = torch.zeros_like(scale, dtype=torch.int8)
    theirs = quantize(x, scale, zero, args, dtype=torch.int8)
    ours, own = ops.quantize_int8(x, group=50)
    assert torch.equal(own, scale)
    assert torch.equal(ours, theirs)
    wide = dequantize(theirs, scale, zero, args)
    assert torch.equal(ops.dequantize_int8(ours, own[:, 0], out_dtype="float32"), wide)
