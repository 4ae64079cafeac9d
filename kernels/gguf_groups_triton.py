"""GGUF's blocks made integers with scales by groups on the GPU, while weights are loaded; see kernels/gguf_groups.py.

A block of threads has the words of one span of 64 outputs, or what 64 outputs have for some groups. Blocks lie as
gguf_dequantize.py and ggml-common.h have them.

# N outputs, K inputs, G groups
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.gguf_dequantize import BLOCK_TYPES, IQ4_VALUES
from makeready.kernels.gguf_groups import GROUPS, offsets_gguf, repack_gguf, scales_gguf
from makeready.kernels.integers import SPAN, TILE
from makeready.kernels.registry import cuda_kernel

_TILE = tl.constexpr(TILE)
_GROUPS = 16  # of a block of threads

# Numbers 0 to 7 and 8 to 15 of IQ4's table, each 128 more, in a word's bytes.
_TABLE = tuple(
    int.from_bytes((IQ4_VALUES.view("u1") ^ 128)[at : at + 8].tobytes(), "little", signed=True)
    for at in (0, 8)
)
_FIRST, _SECOND = map(tl.constexpr, _TABLE)


@dataclass(frozen=True)
class Places:
    """Where in a block numbers are, in bytes and inputs.

    Attributes:
        low: first byte of the lower four bits; 8: of whole bytes.
        run: inputs whose lower bits are side by side in the lower halves of bytes, before as many in the upper ones;
            0: inputs have whole bytes.
        high: first byte of further bits; -1: there are none.
        count: further bits of a number.
        cycle: inputs whose further bits share 32 bytes; 0: they lie one after the other.
        table: whether numbers are places in IQ4's table.
    """

    low: int
    run: int = 16
    high: int = -1
    count: int = 0
    cycle: int = 0
    table: bool = False


_PLACES = {
    "q4_0": Places(2),
    "q4_1": Places(4),
    "q5_0": Places(6, high=2, count=1),
    "q5_1": Places(8, high=4, count=1),
    "q8_0": Places(2, run=0),
    "q4_k": Places(16, run=32),
    "q5_k": Places(48, run=32, high=16, count=1, cycle=256),
    "q6_k": Places(0, run=64, high=128, count=2, cycle=128),
    "iq4_nl": Places(2, table=True),
    "iq4_xs": Places(8, table=True),
}


@triton.jit
def repack_blocks(
    blocks, weight, N, K: tl.constexpr, BITS: tl.constexpr, LIFT: tl.constexpr, ELEMENTS: tl.constexpr,
    NBYTES: tl.constexpr, LOW: tl.constexpr, RUN: tl.constexpr, HIGH: tl.constexpr, COUNT: tl.constexpr,
    CYCLE: tl.constexpr, TABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Words of one span; ``LIFT`` is added to numbers. For the others see :class:`Places`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    WORDS: tl.constexpr = 8 * BITS
    spans: tl.constexpr = (K + 127) // 128
    row: tl.constexpr = K // ELEMENTS * NBYTES
    span = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * _TILE + tl.arange(0, _TILE)[:, None]
    j = tl.arange(0, WORDS)[None, :]
    made = tl.zeros((_TILE, WORDS), tl.int32)
    for field in tl.static_range(16 // BITS):
        k = span * 128 + field * WORDS + j
        inside = (n < N) & (k < K)
        block = blocks + n * row + k // ELEMENTS * NBYTES
        i = k % ELEMENTS
        if RUN == 0:
            q = tl.load(block + LOW + i, mask=inside, other=0).to(tl.int32)
        else:
            byte = tl.load(block + LOW + i // (2 * RUN) * RUN + i % RUN, mask=inside, other=0).to(tl.int32)
            q = (byte >> (i // RUN % 2 * 4)) & 15
        if COUNT > 0:
            if CYCLE == 0:
                more = tl.load(block + HIGH + i // 8, mask=inside, other=0).to(tl.int32) >> (i % 8)
            else:
                more = tl.load(block + HIGH + i // CYCLE * 32 + i % 32, mask=inside, other=0).to(tl.int32)
                more = more >> (i % CYCLE // 32 * COUNT)
            q |= (more & (2**COUNT - 1)) << 4
        if TABLE:
            q = (tl.where(q < 8, _FIRST, _SECOND) >> (q % 8 * 8).to(tl.int64)).to(tl.int32)
        q = (q + LIFT) & (2**BITS - 1)
        made |= tl.where(k < K, q, 0) << (BITS * field)
    tl.store(weight + n * (spans * WORDS) + span * WORDS + j, made.to(tl.int16), mask=n < N)


@triton.jit
def _half(place, mask):
    """The fp16 number whose two bytes are there, as fp32."""
    low = tl.load(place, mask=mask, other=0).to(tl.int32)
    high = tl.load(place + 1, mask=mask, other=0).to(tl.int32)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def tile_groups(
    blocks, made, N, K: tl.constexpr, GROUP: tl.constexpr, ELEMENTS: tl.constexpr, NBYTES: tl.constexpr,
    SIX: tl.constexpr, EIGHT: tl.constexpr, PAIRS: tl.constexpr, MIDDLE: tl.constexpr, GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Scales of 64 outputs and some groups; their offsets where ``MIDDLE``.

    Args:
        SIX: a block has scales and minima of 6 bits in the 12 bytes behind its two numbers.
        EIGHT: it has scales of 8 bits behind its 192nd byte, and its number behind those.
        PAIRS: it has scales of 6 bits less 32, the upper two in the two bytes behind its number, the others in
            nibbles behind those.
        MIDDLE: of numbers in the file, or 0.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    G: tl.constexpr = K // GROUP
    PARTS: tl.constexpr = ELEMENTS // GROUP
    row: tl.constexpr = K // ELEMENTS * NBYTES
    i = tl.arange(0, _TILE)[None, :]
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    tile = tl.program_id(1).to(tl.int64)
    n = tile * _TILE + i
    inside = (n < N) & (g < G)
    block = blocks + n * row + g // PARTS * NBYTES
    part = g % PARTS
    if EIGHT:
        own = tl.load(block + 192 + part, mask=inside, other=0).to(tl.int8).to(tl.float32)
        scale = _half(block + 208, inside) * own
    else:
        scale = _half(block, inside)
    if PAIRS:
        low = tl.load(block + 4 + part // 2, mask=inside, other=0).to(tl.int32) >> (part % 2 * 4)
        high = tl.load(block + 2 + part // 4, mask=inside, other=0).to(tl.int32) >> (part % 4 * 2)
        scale *= (((low & 15) | (high & 3) << 4) - 32).to(tl.float32)
    if SIX:
        at = block + 4 + part
        behind = part >= 4
        first = tl.load(at, mask=inside, other=0).to(tl.int32)
        second = tl.load(at + 4, mask=inside, other=0).to(tl.int32)
        before = tl.load(at - 4, mask=inside & behind, other=0).to(tl.int32)
        size = tl.where(behind, (second & 15) | (before >> 6 << 4), first & 63)
        least = tl.where(behind, (second >> 4) | (first >> 6 << 4), second & 63)
        scale *= size.to(tl.float32)
        if MIDDLE > 0:
            minimum = _half(block + 2, inside) * least.to(tl.float32)
            scale = scale * MIDDLE - minimum
    elif MIDDLE > 0:
        scale = scale * MIDDLE + _half(block + 2, inside)
    tl.store(made + (tile * G + g) * _TILE + i, tl.where(n < N, scale, 0.0).to(tl.float16), mask=g < G)


def _launch(call: OpCall, function: str, columns: int, result: str, **constants: Any) -> Sequence[Candidate]:
    dependent = "pdl" in call.features
    outputs, inputs = call.dims["Z"] // call.attrs["row"], call.attrs["inputs"]
    elements, nbytes = BLOCK_TYPES[call.attrs["kind"]].sizes
    launch = DeviceLaunch(
        function=f"makeready.kernels.gguf_groups_triton:{function}",
        constants={"K": inputs, "ELEMENTS": elements, "NBYTES": nbytes, **constants, "PDL": dependent},
        arguments={
            "blocks": Pointer("blocks"),
            "weight" if result == "weight" else "made": Pointer(result),
            "N": Scalar(outputs, "int32", specialize=False),
        },
        grid=(columns, -(-outputs // TILE), 1),
        num_warps=4,
        dependent=dependent,
    )
    return (Candidate(function, (launch,)),)


@cuda_kernel(repack_gguf, "spans", invariant=True)
def repack_gguf_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`repack_blocks`."""
    kind, inputs = call.attrs["kind"], call.attrs["inputs"]
    form = GROUPS[kind]
    # Whole bytes have a sign: their least number is taken to 0.
    places, lift = _PLACES[kind], form.lift if _PLACES[kind].run else 2 ** (form.bits - 1)
    constants = {name.upper(): value for name, value in asdict(places).items()}
    return _launch(
        call, "repack_blocks", -(-inputs // SPAN), "weight", BITS=form.bits, LIFT=lift, **constants
    )


def _tile_groups(call: OpCall, result: str, middle: int) -> Sequence[Candidate]:
    kind, inputs, group = (call.attrs[name] for name in ("kind", "inputs", "group"))
    constants = {"GROUP": group, "SIX": kind in ("q4_k", "q5_k"), "EIGHT": kind == "q6_k"}
    constants["PAIRS"] = kind == "iq4_xs"
    columns = -(-inputs // (group * _GROUPS))
    return _launch(call, "tile_groups", columns, result, **constants, MIDDLE=middle, GROUPS=_GROUPS)


@cuda_kernel(scales_gguf, "tiles", invariant=True)
def scales_gguf_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`tile_groups`."""
    return _tile_groups(call, "scale", 0)


@cuda_kernel(offsets_gguf, "tiles", invariant=True)
def offsets_gguf_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`tile_groups`."""
    return _tile_groups(call, "offset", 2 ** (GROUPS[call.attrs["kind"]].own - 1))
