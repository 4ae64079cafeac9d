"""Products of tokens with their experts' weights on Hopper in CUDA C++ (csrc/grouped_few.cu, csrc/grouped.cu).

The first has weights as the long side of the matrix instructions and entries as the short one: few entries an
expert, where memory sets the pace. The second has tiles of 64 or 128 entries. Both find their tiles on the device,
gather rows of x while they copy weights, and apply the gate where the op has one.

# M entries, E experts, N outputs of an expert, K inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Tensor,
)
from makeready.kernels.moe.experts import (
    grouped_linear,
    grouped_linear_fp8,
    grouped_linear_fp8_block,
    grouped_linear_int8,
)
from makeready.kernels.moe.experts_silu import (
    grouped_silu_mul,
    grouped_silu_mul_fp8,
    grouped_silu_mul_fp8_block,
    grouped_silu_mul_int8,
)
from makeready.kernels.moe.grouped_tiling import Grouped, describe
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_SQUARE = 128  # side of a square of weights that shares a scale
_MOST_EXPERTS = 512  # a lane of a warp keeps 16
_HALVES = ("bfloat16", "float16")
_FP8, _INT8 = _EIGHT = ("float8_e4m3fn", "int8")


@dataclass(frozen=True)
class Tile:
    """One way: which kernel, and how high its tiles are.

    Attributes:
        few: weights are the long side.
        entries, outputs: of a tile.
        ways: warpgroups that share a tile's outputs (1) or entries (2); 0 where ``few``.
    """

    few: bool
    entries: int
    outputs: int
    ways: int = 0

    @property
    def name(self) -> str:
        """Such as ``few_16`` or ``128x256``."""
        return f"few_{self.entries}" if self.few else f"{self.entries}x{self.outputs}"


FEW = tuple(Tile(True, entries, 64) for entries in (8, 16, 32, 64))
MANY = (Tile(False, 64, 256, 1), Tile(False, 128, 128, 2), Tile(False, 128, 256, 2))

# Fitted to one H200 at 1 to 8,192 tokens with the shapes of Qwen3-30B-A3B, rows in order and no gate: microseconds
# of a launch until all blocks stream, share of a copy's bandwidth that streaming weights reaches, and by the tile's
# sides the share of the matrix rate for 16-bit and 8-bit operands; padding of tiles is counted apart. Few entries'
# shares are reasoned, as is what all blocks together take from L2.
_LAUNCH_US, _STREAMED, _L2 = 4.0, 0.97, 8.0e12
_MATRIX = {
    (8, 64): (0.20, 0.15), (16, 64): (0.30, 0.22), (32, 64): (0.40, 0.30), (64, 64): (0.50, 0.40),
    (64, 256): (0.71, 0.64), (128, 128): (0.78, 0.62), (128, 256): (0.88, 0.70),
}  # fmt: skip


def _applies(call: OpCall) -> bool:
    """Rows and scales lie as copies of 16 bytes and tensor maps need them, and no tile is cut off along K."""
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    outputs, inputs, eight = int(weight.shape[1]), call.dims["K"], x.dtype in _EIGHT
    gate = int(y.shape[1]) != outputs
    return (
        x.dtype == weight.dtype
        and "bias" not in call.tensors
        and (eight or x.dtype == y.dtype)
        and y.dtype in _HALVES
        and call.dims["E"] <= _MOST_EXPERTS
        and inputs % (128 // DTYPE_BYTES[x.dtype]) == 0
        and outputs % (128 if gate else 64) == 0
        and weight.row_stride == outputs * inputs
        and all(_aligned(t) for t in (x, weight, y))
        and (not eight or _dense_scales(call))
    )


def _aligned(tensor: Tensor) -> bool:
    return tensor.alignment % 16 == 0 and tensor.row_stride * DTYPE_BYTES[tensor.dtype] % 16 == 0


def _dense_scales(call: OpCall) -> bool:
    scale = call.tensors["x_scale"]
    return call.dims.get("block", _SQUARE) == _SQUARE and scale.row_stride == int(scale.shape[1])


def _register(op: object) -> None:
    @cuda_kernel(op, "wgmma", features=("tma", "wgmma"), applies=_applies, invariant=True)  # type: ignore[arg-type]
    def launches(call: OpCall) -> Sequence[Candidate]:
        return sorted((candidate(call, tile) for tile in tiles(call)), key=lambda way: way.seconds)


for _op in (grouped_linear, grouped_linear_fp8, grouped_linear_fp8_block, grouped_linear_int8):
    _register(_op)
for _op in (grouped_silu_mul, grouped_silu_mul_fp8, grouped_silu_mul_fp8_block, grouped_silu_mul_int8):
    _register(_op)


def tiles(call: OpCall) -> list[Tile]:
    """Those that suit the call; all where one of them is to serve every batch shape."""
    # Sums of 128 inputs of 8-bit floats stand beside as many others, scales beside those of integers: the widest tile
    # has no registers for both.
    eight = call.tensors["weight"].dtype in _EIGHT
    fitting = [tile for tile in (*FEW, *MANY) if not (eight and tile.ways == 2 and tile.outputs == 256)]
    if call.invariant:
        return fitting
    grouped = describe(call)
    each = grouped.entries / max(grouped.hit, 1.0)
    return [
        tile
        for tile in fitting
        if tile.entries >= min(each, 64) / 2 and (tile.entries <= 8 * each or tile.entries == 8)
    ]


def candidate(call: OpCall, tile: Tile, *, give_up: int = 0) -> Candidate:
    """The launch for ``call`` in tiles of this kind.

    Args:
        give_up: polls after which a wait gives up, so that a fault gives wrong numbers instead of a hang; 0: never.
            For debugging; plans hold kernels that wait.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    eight, dependent = x.dtype in _EIGHT, "pdl" in call.features
    outputs, grouped = int(weight.shape[1]), describe(call)
    gate = int(y.shape[1]) != outputs
    constants = {
        "FP8": x.dtype == _FP8,
        **({"INT8": True} if x.dtype == _INT8 else {}),
        "FP16": y.dtype == "float16",
        "SCALES": (2 if "block" in call.dims else 1) if eight else 0,
        "TOP_K": call.attrs["top_k"],
        "SILU": gate,
        "EXPERTS": -(-call.dims["E"] // 32) * 32,
        "PDL": dependent,
        **(
            {"TOKENS": tile.entries}
            if tile.few
            else {"WAYS": tile.ways, "WIDE": tile.ways == 2 and tile.outputs == 256}
        ),
        **({"GIVE_UP": give_up} if give_up else {}),
    }
    name = "grouped_few" if tile.few else "grouped"
    most = grouped.most_tiles(tile.entries) * -(-outputs // tile.outputs)
    launch = DeviceLaunch(
        function=f"csrc/{name}.cu:{name}{'_scaled' if eight else ''}",
        constants=constants,
        arguments=_arguments(call, tile, gate=gate),
        grid=(max(1, min(most, call.multiprocessors * (2 if tile.few else 1))), 1, 1),
        dependent=dependent,
    )
    return Candidate(tile.name, (launch,), seconds=1e-6 * microseconds(call, tile, grouped))


def _arguments(call: OpCall, tile: Tile, *, gate: bool) -> dict[str, Argument]:
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    outputs, inputs, step = int(weight.shape[1]), call.dims["K"], 128 // DTYPE_BYTES[x.dtype]
    rows = int(x.shape[0]) + (tile.entries if x.spare else 0)  # tiles reach beyond the last entry
    # A gate's rows and those that they multiply come in two copies for each warpgroup that has outputs of its own.
    width = tile.outputs // ((2 if tile.ways != 1 else 4) if gate else 1)
    names = ("x", "y", "order", "start", *(("x_scale", "weight_scale") if "x_scale" in call.tensors else ()))
    return {
        "x_map": Descriptor("x", (rows, inputs), (x.row_stride, 1), (tile.entries, step), swizzle=128),
        "w_map": Descriptor(
            "weight",
            (call.dims["E"], outputs, inputs),
            (outputs * inputs, inputs, 1),
            (1, width, step),
            swizzle=128,
        ),
        **{name: Pointer(name) for name in names},
        "entries": Scalar(call.dims["M"], "int32"),
        "experts": Scalar(call.dims["E"], "int32"),
        "outputs": Scalar(outputs, "int32"),
        "inputs": Scalar(inputs, "int32"),
        "x_stride": Scalar(x.row_stride, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
    }


def microseconds(call: OpCall, tile: Tile, grouped: Grouped) -> float:
    """What the call takes where entries are spread evenly over experts."""
    dtype = call.tensors["weight"].dtype
    across = -(-grouped.outputs // tile.outputs)
    many = grouped.tiles(tile.entries) * across
    memory = grouped.moved / (_STREAMED * call.bandwidth)
    from_l2 = many * (tile.entries + tile.outputs) * grouped.inputs * grouped.weight_bytes / _L2
    worked = 2.0 * many * tile.entries * tile.outputs * grouped.inputs
    matrix = worked / (_MATRIX[tile.entries, tile.outputs][grouped.weight_bytes == 1] * call.flops[dtype])
    return _LAUNCH_US + 1e6 * max(memory, from_l2, matrix)
