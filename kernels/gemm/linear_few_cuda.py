"""Products of few tokens on Hopper in CUDA C++ (csrc/linear_few.cu): 16 bits, and 8 with any scales.

Weights are the long side of the matrix instructions and are asked for before the kernels ahead have ended. Where a
matrix has few outputs the blocks of a cluster share the inputs of a tile.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from makeready.kernels.contract import Contract
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
)
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_fp8 import linear_fp8, linear_fp8_block
from makeready.kernels.gemm.ways import addressable, best_of_each
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_MOST = 64  # tokens
_BOX = 128  # bytes of a row that a step copies
_WIDE = ("bfloat16", "float16")

# Reasoned, to be fitted: microseconds until the first weights are there and from the last ones to the end, of what a
# cluster's blocks tell each other, and of writing a tile; bytes/s that one multiprocessor takes at most.
_ENDS_US, _EXCHANGE_US, _TILE_US, _ONE = 2.0, 0.8, 0.3, 6.0e10


@dataclass(frozen=True)
class Way:
    """One way to cut a call.

    Attributes:
        tokens: columns of a product.
        warpgroups: 64 outputs of a tile each.
        split: blocks that share a tile.
        blocks: of the launch.
    """

    tokens: int
    warpgroups: int
    split: int
    blocks: int

    @property
    def name(self) -> str:
        """Such as ``few_16x64_c4_128``: a cluster of four, 128 blocks."""
        return f"few_{self.tokens}x{64 * self.warpgroups}_c{self.split}_{self.blocks}"


def applies(call: OpCall) -> bool:
    """Whether it has few tokens, and rows that tensor maps and copies of four results can address."""
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    eight = weight.dtype == "float8_e4m3fn"
    four = 4 * DTYPE_BYTES[y.dtype]
    alike = y.dtype if eight else x.dtype
    return (
        not call.invariant
        and int(x.shape[0]) <= _MOST
        and x.dtype == weight.dtype
        and (eight or x.dtype in _WIDE)
        and y.dtype in (_WIDE if eight else (x.dtype, "float32"))
        and ("bias" not in call.tensors or call.tensors["bias"].dtype == alike)
        and int(weight.shape[0]) % 4 == 0
        and addressable(x)
        and addressable(weight)
        and y.alignment % four == 0
        and y.row_stride % 4 == 0
        and (not eight or _plain_scales(call))
    )


def _plain_scales(call: OpCall) -> bool:
    """One a token and one an output, or of groups and squares of 128 in rows without gaps."""
    scale, inputs = call.tensors["x_scale"], call.dims["K"]
    if "block" not in call.attrs:
        return scale.row_stride == 1
    groups = inputs // 128
    dense = scale.row_stride == call.tensors["weight_scale"].row_stride == groups
    return call.attrs["block"] == 128 and inputs % 128 == 0 and dense


def ways(call: OpCall) -> list[Way]:
    """Every way to run ``call``, the cheapest first."""
    return sorted(_ways(call), key=lambda way: (microseconds(call, way), way.name))


def _ways(call: OpCall) -> Iterator[Way]:
    rows, (outputs, _) = int(call.tensors["x"].shape[0]), call.tensors["weight"].shape
    tokens = next(n for n in (8, 16, 32, 64) if n >= rows)
    for warpgroups, split, a_sm in product((1, 2), (1, 2, 4, 8), (1, 2)):
        tiles = -(-int(outputs) // (64 * warpgroups))
        room = a_sm * call.multiprocessors // split
        if _steps(call) >= 2 * split and room and (a_sm == 1 or tiles > room // 2):
            yield Way(tokens, warpgroups, split, min(tiles, room) * split)


def _steps(call: OpCall) -> int:
    weight = call.tensors["weight"]
    return -(-int(weight.shape[1]) * DTYPE_BYTES[weight.dtype] // _BOX)


def microseconds(call: OpCall, way: Way) -> float:
    """What the call takes."""
    outputs = int(call.tensors["weight"].shape[0])
    tiles, clusters = -(-outputs // (64 * way.warpgroups)), way.blocks // way.split
    turns = -(-tiles // clusters)
    steps = turns * -(-_steps(call) // way.split)
    on_one = -(-way.blocks // call.multiprocessors)
    weights = steps * 64 * way.warpgroups * _BOX
    everything = weights + steps * way.tokens * _BOX
    copies = max(weights * way.blocks / call.bandwidth, on_one * everything / _ONE)
    ends = turns * (_TILE_US + (_EXCHANGE_US if way.split > 1 else 0.0))
    return _ENDS_US + 1e6 * copies + ends


def candidate(call: OpCall, way: Way, *, give_up: int = 0) -> Candidate:
    """The launch of ``call`` cut in this ``way``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    eight, wide = weight.dtype == "float8_e4m3fn", y.dtype == "float32"
    constants = {
        "TOKENS": way.tokens,
        "WAYS": way.warpgroups,
        "SPLIT": way.split,
        "FP8": eight,
        "SCALES": (2 if "block" in call.attrs else 1) if eight else 0,
        "BIAS": "bias" in call.tensors,
        "WIDE": wide,
        "FP16": (y if eight else x).dtype == "float16",
    }
    step = _BOX // DTYPE_BYTES[weight.dtype]
    outputs, inputs = (int(n) for n in weight.shape)
    rows = way.tokens if x.spare else int(x.shape[0])  # the GPU is slow at making zeros (see linear_triton.py)
    arguments: dict[str, Argument] = {
        "x_map": Descriptor("x", (rows, inputs), (x.row_stride, 1), (way.tokens, step), swizzle=128),
        "w_map": Descriptor(
            "weight",
            (outputs, inputs),
            (weight.row_stride, 1),
            (64 * way.warpgroups, step),
            swizzle=128,
        ),
        **({n: Pointer(n) for n in ("x_scale", "weight_scale")} if eight else {}),
        "bias": Pointer("bias" if "bias" in call.tensors else ("x" if x.dtype in _WIDE else "y")),
        "y": Pointer("y"),
        "tokens": Scalar(int(x.shape[0]), "int32"),
        "outputs": Scalar(outputs, "int32"),
        "inputs": Scalar(inputs, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
    }
    launch = DeviceLaunch(
        function=f"csrc/linear_few.cu:{'linear_few_fp8' if eight else 'linear_few_wide' if wide else 'linear_few'}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments=arguments,
        grid=(way.blocks, 1, 1),
        dependent=True,
        early=("weight",),
    )
    return Candidate(way.name, (launch,), seconds=1e-6 * microseconds(call, way))


def _few(call: OpCall) -> Sequence[Candidate]:
    """The best few, the cheapest first."""
    found = best_of_each(ways(call), lambda way: (way.warpgroups, way.split))
    return [candidate(call, way) for way in found]


for _op in (linear, linear_fp8, linear_fp8_block):
    assert isinstance(_op, Contract)
    cuda_kernel(_op, "few", features=("tma", "wgmma", "pdl"), applies=applies)(_few)
