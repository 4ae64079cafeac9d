"""Products of latent attention that every head has of its own, on the GPU: queries to latents, latents to values.

``kv_b`` is read where it lies: of each head ``nope`` rows make keys, the ``value`` rows behind them values. Weights
are the left side of the product, as in linear_stream_triton.py: few tokens waste nothing. Blocks of the same weights
follow each other, so that they come from memory once, whatever the number of tokens.

# T tokens, N outputs of a head, K inputs of a head, L rank
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.mla import mla_absorb, mla_values
from makeready.kernels.attention.mla_write_triton import turned_halves
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.prefetch_triton import prefetch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_BEST = 4
_WIDEST = 256  # inputs of a head that a block of mla_absorb holds at most
# Estimates, timed nowhere: seconds of a launch, bytes under way that keep memory busy, what products reach of the
# matrix rate, and how much faster L2 is than memory.
_LAUNCH, _UNDER_WAY, _REACHED, _L2 = 2e-6, 3e6, 0.6, 2.5


@triton.jit
def absorb_queries(
    q,
    rows,
    kv_b,
    y,
    tokens,
    q_stride,
    rows_stride,
    kv_b_stride,
    y_stride,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block makes ``BN`` of a head's latents for ``BT`` tokens, or behind the last of them rotates its features.

    BK and HALF are NOPE and ROPE / 2 in powers of two. Weights are on their way before the wait.
    """
    COLUMNS: tl.constexpr = (RANK + BN - 1) // BN
    tiles = tl.cdiv(tokens, BT)
    column = tl.program_id(0) // tiles
    head, column = column // (COLUMNS + 1), column % (COLUMNS + 1)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_rows = kv_b + (head * (NOPE + VALUE) + k).to(tl.int64)[:, None] * kv_b_stride
    w_KN = tl.load(w_rows + n[None, :], mask=(k < NOPE)[:, None] & (n < RANK)[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) % tiles * BT + tl.arange(0, BT)
    token = t.to(tl.int64)[:, None]
    from_ = q + token * q_stride + head * (NOPE + ROPE)
    to = y + token * y_stride + head * (RANK + ROPE)
    there = (t < tokens)[:, None]
    if column < COLUMNS:
        q_TK = tl.load(from_ + k[None, :], mask=there & (k < NOPE)[None, :], other=0.0)
        y_NT = tl.dot(w_KN.T, q_TK.T, input_precision="ieee")
        tl.store(to + n[None, :], y_NT.T.to(y.dtype.element_ty), mask=there & (n < RANK)[None, :])
    else:
        i = tl.arange(0, HALF)[None, :]
        turned = there & (i < ROPE // 2)
        first, second = turned_halves(
            from_ + NOPE, rows + token * rows_stride, i, turned, ROPE, INTERLEAVED
        )  # fmt: skip
        tl.store(to + RANK + i, first.to(y.dtype.element_ty), mask=turned)
        tl.store(to + RANK + ROPE // 2 + i, second.to(y.dtype.element_ty), mask=turned)


@triton.jit
def value_heads(
    x,
    kv_b,
    y,
    tokens,
    x_stride,
    kv_b_stride,
    y_stride,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block makes ``BN`` values of a head for ``BT`` tokens.

    Args:
        AHEAD: bring the block's weights to L2 while the kernels before still run.
    """
    COLUMNS: tl.constexpr = (VALUE + BN - 1) // BN
    tiles = tl.cdiv(tokens, BT)
    column = tl.program_id(0) // tiles
    head, column = column // COLUMNS, column % COLUMNS
    n = column * BN + tl.arange(0, BN)
    w_rows = kv_b + (head * (NOPE + VALUE) + NOPE + n).to(tl.int64) * kv_b_stride
    if PDL:
        if AHEAD:
            # Past the last value for the head's last again, which is there.
            last = kv_b + (head * (NOPE + VALUE) + NOPE + VALUE - 1).to(tl.int64) * kv_b_stride
            prefetch(tl.where(n < VALUE, w_rows, last), RANK * kv_b.dtype.element_ty.primitive_bitwidth // 8)
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) % tiles * BT + tl.arange(0, BT)
    token = t.to(tl.int64)[:, None]
    k = tl.arange(0, BK)[None, :]
    x_rows = x + token * x_stride + head * RANK
    y_NT = tl.zeros((BN, BT), tl.float32)
    for start in range(0, RANK, BK):
        is_w, is_x = (n < VALUE)[:, None], (t < tokens)[:, None]
        if RANK % BK != 0:
            is_w &= start + k < RANK
            is_x &= start + k < RANK
        w_NK = tl.load(w_rows[:, None] + start + k, mask=is_w, other=0.0)
        x_TK = tl.load(x_rows + start + k, mask=is_x, other=0.0)
        y_NT = tl.dot(w_NK, x_TK.T, y_NT, input_precision="ieee")
    out = y + token * y_stride + head * VALUE + n[None, :]
    tl.store(out, y_NT.T.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (n < VALUE)[None, :])


@dataclass(frozen=True)
class Tile:
    """Sides over tokens, outputs and inputs, and compile options."""

    t: int
    n: int
    k: int
    warps: int
    stages: int = 3

    def columns(self, outputs: int) -> int:
        """Tiles of a head's outputs."""
        return -(-outputs // self.n)

    def seconds(self, call: OpCall, inputs: int, outputs: int) -> float:
        """What the call takes, whose heads make ``outputs`` of ``inputs``."""
        heads, tokens, element = call.attrs["heads"], call.dims["T"], DTYPE_BYTES[call.tensors["y"].dtype]
        tiles = -(-tokens // self.t)
        weights, x, y = (heads * element * n for n in (inputs * outputs, tokens * inputs, tokens * outputs))
        blocks = heads * tiles * self.columns(outputs)
        a_block = (min(self.t, tokens) + self.n) * min(inputs, 2 * self.k) * element
        under_way = min(blocks, 2 * call.multiprocessors) * a_block
        # Half of the multiprocessors ask for all that memory gives.
        busy = min(1.0, under_way / _UNDER_WAY, 2 * blocks / call.multiprocessors)
        moved = (weights + x + y) / (call.bandwidth * busy)
        moved += (tiles * weights + self.columns(outputs) * x) / (_L2 * call.bandwidth)
        places = blocks * self.t * self.n
        return _LAUNCH + max(moved, 2 * places * inputs / (_REACHED * call.flops["bfloat16"]))


def _best(call: OpCall, tiles: Sequence[Tile], inputs: int, outputs: int) -> list[tuple[Tile, float]]:
    """Tiles that suit the call and what they cost, best first; all of them where one is to serve all batches."""
    if DTYPE_BYTES[call.tensors["y"].dtype] == 4:
        tiles = [Tile(16, 32, min(64, power_of_two(inputs)), 4, 2)]
    narrow = power_of_two(outputs)
    tiles = [tile for tile in tiles if tile.n <= max(narrow, tiles[0].n)]
    priced = sorted(((tile, tile.seconds(call, inputs, outputs)) for tile in tiles), key=lambda one: one[1])
    return priced if call.invariant else priced[:_BEST]


@cuda_kernel(mla_absorb, "tiles", applies=lambda call: call.attrs["nope"] <= _WIDEST, invariant=True)
def mla_absorb_cuda(call: OpCall) -> Sequence[Candidate]:
    """See :func:`absorb_queries`."""
    nope, rope, rank = (call.attrs[name] for name in ("nope", "rope", "rank"))
    K = max(16, power_of_two(nope))
    sides = ((16, 32, 4), (16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4))
    tiles = [Tile(*side[:2], K, side[2]) for side in (*sides, (128, 64, 4), (128, 128, 8))]
    made = []
    for tile, seconds in _best(call, tiles, nope, rank):
        constants = {
            "ROPE": rope, "INTERLEAVED": call.attrs["interleaved"], "BK": K, "HALF": power_of_two(rope // 2),
        }  # fmt: skip
        columns = tile.columns(rank) + 1
        made.append(
            _candidate(call, "absorb_queries", ("q", "rows", "kv_b", "y"), tile, columns, constants, seconds)
        )
    return made


@cuda_kernel(mla_values, "tiles", invariant=True)
def mla_values_cuda(call: OpCall) -> Sequence[Candidate]:
    """See :func:`value_heads`."""
    rank, value, kv_b = call.attrs["rank"], call.attrs["value"], call.tensors["kv_b"]
    K = max(16, min(128, power_of_two(rank)))
    sides = ((16, 32, K, 4, 4), (16, 64, K, 4, 4), (16, 128, K, 4, 4), (32, 64, K, 4, 4), (32, 128, K, 4, 4))
    sides = (*sides, (64, 64, K, 4, 3), (64, 128, K, 4, 3), (128, 128, min(K, 64), 8, 4))
    element = DTYPE_BYTES[kv_b.dtype]
    # Bulk prefetch takes multiples of 16 bytes.
    sixteens = all(n % 16 == 0 for n in (kv_b.alignment, kv_b.row_stride * element, rank * element))
    made = []
    for tile, seconds in _best(call, [Tile(*side) for side in sides], rank, value):
        constants = {"BK": tile.k, "AHEAD": sixteens and "tma" in call.features}
        columns = tile.columns(value)
        made.append(_candidate(call, "value_heads", ("x", "kv_b", "y"), tile, columns, constants, seconds))
    return made


def _candidate(
    call: OpCall,
    function: str,
    names: Sequence[str],
    tile: Tile,
    columns: int,
    constants: dict[str, int],
    seconds: float,
) -> Candidate:
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"{__name__}:{function}",
        constants={
            "NOPE": call.attrs["nope"],
            "VALUE": call.attrs["value"],
            "RANK": call.attrs["rank"],
            "BT": tile.t,
            "BN": tile.n,
            "PDL": dependent,
            **constants,
        },
        arguments={
            **{name: Pointer(name) for name in names},
            **{f"{n}_stride": Scalar(call.tensors[n].row_stride, "int32") for n in names},
            "tokens": Scalar(call.dims["T"], "int32", specialize=False),
        },
        grid=(call.attrs["heads"] * columns * -(-call.dims["T"] // tile.t), 1, 1),
        num_warps=tile.warps,
        num_stages=tile.stages,
        dependent=dependent,
        early=("kv_b",),
    )
    name = f"{tile.t}x{tile.n}x{tile.k}_w{tile.warps}_s{tile.stages}"
    return Candidate(name, (launch,), seconds=seconds)
