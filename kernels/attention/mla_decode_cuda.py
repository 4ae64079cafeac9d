"""Attention over a paged cache of latents on Hopper in CUDA C++ (csrc/mla_decode.cu, csrc/mla_combine.cu).

Keys are the long side of the matrix instructions, so that few heads cost no padding; the keys of all rows are cut
into equal shares, so that one long row occupies every multiprocessor. A second launch adds up what lies in several
shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from makeready.kernels.attention.mla import mla_decode_attention, mla_extend_attention
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
)
from makeready.kernels.registry import cuda_kernel

_KEYS, _BOX = 64, 16  # of a block, and of a copy where a row ends
_RANK, _ROPE, _WIDTH = 512, 64, 576
_COLUMNS = (8, 16, 32, 64)  # query vectors of a product
# Microseconds of both launches until and after keys stream, and the share of a copy's bandwidth at which they do: of
# 16 heads as a prototype ran on one H200 (64 to 256 rows of 4,096 tokens). Faster there than Triton's from 1 to 256
# rows of 1,024, in whole steps. Share of the matrix rate at 64 vectors: estimated.
_LAUNCH_US, _STREAMED, _MATRIX = 7.0, 0.88, 0.6


@dataclass(frozen=True)
class Cut:
    """How query vectors become columns of products; csrc/mla_shapes.h says the same.

    Attributes:
        columns: of a product.
        group: heads of a thread block.
        head_groups: groups of heads, which share a share's keys through L2.
        tokens: of a unit.
    """

    columns: int
    group: int
    head_groups: int
    tokens: int = 1


def cut(heads: int, *, extend: bool) -> Cut | None:
    """For ``heads``; None where they are no groups of one size."""
    most = _COLUMNS[-1]
    head_groups = max(1, heads // most)
    if heads % head_groups or heads // head_groups > most:
        return None
    group = heads // head_groups
    if extend:
        return Cut(most, group, head_groups, most // group)
    return Cut(next(n for n in _COLUMNS if n >= group), group, head_groups)


def _applies(call: OpCall) -> bool:
    q, y, cache = (call.tensors[name] for name in ("q", "y", "cache"))
    return (
        call.attrs["rank"] == _RANK
        and call.attrs["rope"] == _ROPE
        and not call.attrs.get("own", False)
        and cut(call.attrs["heads"], extend="own" in call.attrs) is not None
        and int(cache.shape[1]) % _KEYS == 0
        and q.dtype in ("bfloat16", "float16")
        and y.dtype == cache.dtype == q.dtype
        and all(x.alignment % 16 == 0 for x in (q, y, cache))
        and all(x.row_stride % 8 == 0 for x in (q, y))
        and call.attrs["scale"] > 0
    )


@cuda_kernel(mla_decode_attention, "wgmma", features=("tma", "wgmma"), applies=_applies)
@cuda_kernel(mla_extend_attention, "wgmma", features=("tma", "wgmma"), applies=_applies)
def mla_attention_wgmma(call: OpCall) -> Sequence[Candidate]:
    """One cut."""
    return [candidate(call)]


def candidate(call: OpCall, *, give_up: int = 0) -> Candidate:
    """The launches for ``call``.

    Args:
        give_up: polls after which a wait gives up, so that a fault gives wrong numbers instead of a hang; 0: never.
            For debugging; plans hold kernels that wait.
    """
    extend = "own" in call.attrs
    made = cut(call.attrs["heads"], extend=extend)
    assert made is not None
    q, cache, y, table = (call.tensors[name] for name in ("q", "cache", "y", "page_table"))
    page, rows, tokens = int(cache.shape[1]), int(table.shape[0]), int(q.shape[0])
    shares, dependent = max(1, call.multiprocessors // made.head_groups), "pdl" in call.features
    constants = {
        "COLUMNS": made.columns,
        "GROUP": made.group,
        "HEAD_GROUPS": made.head_groups,
        "TOKENS": made.tokens,
        "EXTEND": extend,
        "PAGE": page,
        "FP16": q.dtype == "float16",
        "PDL": dependent,
    }
    parts = 2 * shares * made.head_groups * made.columns  # vectors: two units of every thread block
    logs = -(-parts * 4 // 256) * 256
    lengths = (*(("query_start", "query_len") if extend else ()), "context_len")
    common: dict[str, Argument] = {
        "y": Pointer("y"),
        "logs": Scratch(0, "float32"),
        "parts": Scratch(logs, "float32"),
        **{name: Pointer(name) for name in lengths},
        "rows": Scalar(rows, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
    }
    if extend:
        common |= {"log_sum": Pointer("log_sum"), "tokens": Scalar(tokens, "int32")}

    def keys(count: int) -> Descriptor:
        # Columns of a token come in several copies: the first brings more of them.
        shape, strides = ("P", page, _WIDTH), (page * _WIDTH, _WIDTH, 1)
        return Descriptor("cache", shape, strides, (1, count, 64), swizzle=128, promotion=256)

    name = "mla_extend" if extend else "mla_decode"
    # Units reach beyond the last token; where the memory there is the plan's, copying is faster than zeros.
    q_tokens = tokens + made.tokens if q.spare else tokens
    q_shape, q_box = (q_tokens, call.attrs["heads"], _WIDTH), (made.tokens, made.group, 64)
    early = tuple(n for n in lengths if n != "query_start") if dependent else ()
    attention = DeviceLaunch(
        function=f"csrc/mla_decode.cu:{name}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments={
            "q_map": Descriptor("q", q_shape, (q.row_stride, _WIDTH, 1), q_box, swizzle=128, promotion=256),
            "k_map": keys(_KEYS),
            "k_box_map": keys(_BOX),
            "page_table": Pointer("page_table"),
            "table_stride": Scalar(table.row_stride, "int32"),
            "scale_log2": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
            **common,
        },
        grid=(shares * made.head_groups, 1, 1),
        dependent=dependent,
        early=early,
    )
    combine = DeviceLaunch(
        function=f"csrc/mla_combine.cu:{name}_combine",
        constants=constants,
        arguments={"shares": Scalar(shares, "int32"), **common},
        grid=(max(1, shares - 1) * max(1, made.columns // 16) * made.head_groups, 1, 1),
        dependent=dependent,
        early=early,
    )
    return Candidate(
        f"keys_64x{made.columns}",
        (attention, combine) if shares > 1 else (attention,),
        scratch=logs + parts * _RANK * 4,
        seconds=1e-6 * microseconds(call, made),
    )


def microseconds(call: OpCall, made: Cut) -> float:
    """What rows take that are as long as the plan expects."""
    rows, tokens = call.rows, int(call.tensors["q"].shape[0])
    blocks = rows * -(-call.context // _KEYS)
    units = made.head_groups * -(-tokens // (rows * made.tokens))
    memory = 2.0 * blocks * _KEYS * _WIDTH / (_STREAMED * call.bandwidth)
    flops = call.flops[call.tensors["q"].dtype]
    worked = 2.0 * blocks * units * _KEYS * max(made.columns, 16) * (_WIDTH + _RANK) / (_MATRIX * flops)
    return _LAUNCH_US + 1e6 * max(memory, worked)
