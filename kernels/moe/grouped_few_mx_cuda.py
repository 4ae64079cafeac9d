"""Products of tokens with their experts' weights in MXFP4 on Hopper in CUDA C++ (csrc/grouped_few_mx.cu).

For few entries an expert, as the first of grouped_cuda.py; weights are widened in registers. Costs are fitted to
gpt-oss-20b's products at 1, 16 and 64 tokens on one H200 (bench/results/h200_gpt_oss_20b.json), to a tenth.

# M entries, E experts, N outputs of an expert, K inputs
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from makeready.kernels.device import Argument, Candidate, Descriptor, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.moe.experts_mx import (
    grouped_clamped_swiglu_mx,
    grouped_linear_mx,
    grouped_silu_mul_mx,
)
from makeready.kernels.moe.grouped_tiling import Grouped, describe
from makeready.kernels.mx import BLOCK
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

TILES = (8, 16, 32, 64)  # entries
_ROWS, _WIDE = 64, 128  # outputs of a warpgroup, of a tile
_DEPTH, _BOX = 256, 64  # inputs of a step, of 128 bytes
_PAIRED = 16  # entries of a tile with which two blocks share a multiprocessor
_MOST_EXPERTS = 512  # a lane of a warp keeps 16
_GATES = {"grouped_linear_mx": 0, "grouped_silu_mul_mx": 1, "grouped_clamped_swiglu_mx": 2}
# Microseconds of a launch until blocks stream, of a step of a tile, and on top for each column of its products. The
# share of the bandwidth at which weights stream at best, and bytes/s of all blocks from L2, are reasoned.
_LAUNCH_US, _STEP_US, _COLUMN_US = 4.0, 1.2, 0.04
_STREAMED, _L2 = 0.9, 8.0e12


def applies(call: OpCall) -> bool:
    """Rows lie as copies of 16 bytes and tensor maps need them, and no half of a tile is cut off."""
    x, weight, scale, y = (call.tensors[name] for name in ("x", "weight", "weight_scale", "y"))
    outputs = int(weight.shape[1])
    return (
        x.dtype == y.dtype == "bfloat16"
        and scale.dtype == "uint8"
        and call.tensors.get("bias", x).dtype == x.dtype
        and call.dims["E"] <= _MOST_EXPERTS
        and call.dims["K"] % _BOX == 0
        and outputs % (_WIDE if _GATES[call.op] else _ROWS) == 0
        and weight.alignment % 16 == 0
        and scale.alignment % 16 == 0
        and all(t.alignment % 16 == 0 and t.row_stride * DTYPE_BYTES[t.dtype] % 16 == 0 for t in (x, y))
    )


def _register(op: object) -> None:
    @cuda_kernel(
        op,  # type: ignore[arg-type]
        "few",
        features=("tma", "wgmma"),
        applies=applies,
        invariant=True,
    )
    def launches(call: OpCall) -> Sequence[Candidate]:
        return sorted((candidate(call, tile) for tile in tiles(call)), key=lambda way: way.seconds)


for _op in (grouped_linear_mx, grouped_silu_mul_mx, grouped_clamped_swiglu_mx):
    _register(_op)


def tiles(call: OpCall) -> list[int]:
    """Entries of a tile that suit the call; all where one of them is to serve every batch shape."""
    if call.invariant:
        return list(TILES)
    grouped = describe(call)
    each = grouped.entries / max(grouped.hit, 1.0)
    fitting = [tile for tile in TILES if min(each, 64) / 2 <= tile <= 8 * each]
    return fitting or [TILES[0]]


def candidate(call: OpCall, tile: int, *, give_up: int = 0) -> Candidate:
    """The launch for ``call`` in tiles of so many entries.

    Args:
        give_up: as in :func:`makeready.kernels.moe.grouped_cuda.candidate`.
    """
    grouped, dependent = describe(call), "pdl" in call.features
    constants = {
        "FP8": False,
        "FP16": False,
        "SCALES": 0,
        "TOKENS": tile,
        "TOP_K": call.attrs["top_k"],
        "GATE": _GATES[call.op],
        "BIAS": "bias" in call.tensors,
        "EXPERTS": -(-call.dims["E"] // 32) * 32,
        "PDL": dependent,
        **({"GIVE_UP": give_up} if give_up else {}),
    }
    most = grouped.most_tiles(tile) * -(-grouped.outputs // _WIDE)
    launch = DeviceLaunch(
        function="csrc/grouped_few_mx.cu:grouped_few_mx",
        constants=constants,
        arguments=_arguments(call, tile),
        grid=(max(1, min(most, _blocks(call, tile))), 1, 1),
        dependent=dependent,
    )
    return Candidate(f"few_{tile}", (launch,), seconds=1e-6 * microseconds(call, tile, grouped))


def _arguments(call: OpCall, tile: int) -> dict[str, Argument]:
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    experts, outputs, words = (int(n) for n in weight.shape)
    inputs = call.dims["K"]
    rows = int(x.shape[0]) + (tile if x.spare else 0)  # tiles reach beyond the last entry
    return {
        "x_map": Descriptor(
            "x",
            (inputs // _BOX, rows, _BOX),
            (_BOX, x.row_stride, 1),
            (_DEPTH // _BOX, tile, _BOX),
            swizzle=128,
        ),
        "w_map": Descriptor(
            "weight",
            (experts, outputs, words),
            (outputs * words, words, 1),
            (1, _ROWS, _DEPTH // 4),
            swizzle=128,
        ),
        **{name: Pointer(name) for name in ("x", "weight_scale", "y", "order", "start")},
        "bias": Pointer("bias" if "bias" in call.tensors else "x"),
        "entries": Scalar(call.dims["M"], "int32"),
        "experts": Scalar(experts, "int32"),
        "outputs": Scalar(outputs, "int32"),
        "inputs": Scalar(inputs, "int32"),
        "x_stride": Scalar(x.row_stride, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
        "alpha": Scalar(call.attrs.get("alpha", 0.0), "float32"),
        "limit": Scalar(call.attrs.get("limit", 0.0), "float32"),
    }


def microseconds(call: OpCall, tile: int, grouped: Grouped) -> float:
    """What the call takes where entries are spread evenly over experts."""
    packed = (4 + 8 / BLOCK) / 8  # bytes of a weight and its share of a scale
    rest = grouped.rows_read * grouped.inputs * 2 + grouped.entries * grouped.columns * 2
    many = grouped.tiles(tile) * -(-grouped.outputs // _WIDE)
    turns = math.ceil(many / _blocks(call, tile))
    weights = many * _WIDE * grouped.inputs * packed
    memory = (grouped.hit * grouped.outputs * grouped.inputs * packed + rest) / (_STREAMED * call.bandwidth)
    from_l2 = (weights + 2 * many * tile * grouped.inputs) / _L2
    steps = turns * -(-grouped.inputs // _DEPTH) * (_STEP_US + _COLUMN_US * tile)
    return _LAUNCH_US + max(1e6 * memory, 1e6 * from_l2, steps)


def _blocks(call: OpCall, tile: int) -> int:
    """Blocks that are on the device at once."""
    return call.multiprocessors * (2 if tile <= _PAIRED else 1)
