"""Sampling on GPUs in two launches: chunks of rows, then rows.

An all-greedy batch costs one read of the logits; drawing without filters too. Filters add work for their
own rows, mostly in the second launch. See chunks_triton.py, finish_triton.py and select_triton.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.sample.sample import sample
from makeready.kernels.size import Dim

CHUNK = 2048  # tokens a block of the first launch looks at, the same in every bucket
_PART = 128  # of them at once, where more than the largest is asked for
_MIN_GROUP, _MAX_GROUPS = 16, 8192  # tokens a group has at least; groups that a block holds in registers
_SWEEP = 2048  # tokens that a block of the second launch looks at together, and that it can hold

_KNOBS = (
    "row_slot", "context_len", "history", "prompt_len", "temperature", "top_k", "top_p", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "min_new_tokens", "bias_ids", "masked",
)  # fmt: skip


@cuda_kernel(sample, "chunks", invariant=True)
def sample_launches(call: OpCall) -> Sequence[Candidate]:
    """See the module's docstring. Scratch is mostly one fp32 a logit, for rows whose logits are adjusted."""
    tensors = call.tensors
    rows, vocabulary = _sizes(tensors["logits"].shape)
    slots, biases = _sizes(tensors["bias_ids"].shape)
    stops = _sizes(tensors["stop_ids"].shape)[1]
    chunks = -(-vocabulary // CHUNK)
    group = max(_MIN_GROUP, power_of_two(-(-chunks * CHUNK // _MAX_GROUPS)))
    groups = chunks * CHUNK // group
    places, scratch = _scratch(
        rows,
        best=(chunks, "int64"),
        mass=(chunks, "int64"),
        drawn=(chunks, "int32"),
        peaks=(groups, "float32"),
        groups=(groups, "int32"),
        kept=(_SWEEP, "int32"),
        adjusted=(chunks * CHUNK, "float32"),
    )
    stride = tensors["logits"].row_stride
    pdl = "pdl" in call.features
    deep = _sizes(tensors["path"].shape)[1] if "path" in tensors else 0
    branch: dict[str, Argument] = {name: Pointer(name) for name in ("path", "path_len") if deep}
    constants = {
        "B_WIDTH": power_of_two(biases),
        "CHUNK": CHUNK,
        "GROUP": group,
        "PDL": pdl,
    }
    sizes: dict[str, Argument] = {
        "L": Scalar(tensors["history"].row_stride, "int32"),
        "B": Scalar(biases, "int32"),
        "null_slot": Scalar(slots - 1, "int32"),
        "chunks": Scalar(chunks, "int32"),
    }
    operands: dict[str, Argument] = {name: Pointer(name) for name in ("logits", *_KNOBS)}
    left: dict[str, Argument] = {k: places[k] for k in ("best", "mass", "drawn", "peaks", "adjusted")}
    first = DeviceLaunch(
        function="makeready.kernels.sample.chunks_triton:look_at_chunks",
        constants={
            **constants,
            "V": vocabulary,
            "LOGITS_STRIDE": stride,
            "PART": _PART,
            "E_WIDTH": power_of_two(stops),
            "DEEP": deep,
            "D_WIDTH": power_of_two(deep) if deep else 0,
            **({} if deep else {"path": None, "path_len": None}),
        },
        arguments={
            **operands,
            **left,
            **sizes,
            **branch,
            "E": Scalar(stops, "int32"),
            "stop_ids": Pointer("stop_ids"),
            "bias_values": Pointer("bias_values"),
            "allowed": Pointer("allowed"),
            "W": Scalar(tensors["allowed"].row_stride, "int32"),
            "counts": Scratch(places["adjusted"].offset, "int32"),
        },
        grid=(rows * chunks, 1, 1),
        num_warps=4,
        local_bytes=16,  # 8 at some odd vocabularies
        dependent=pdl,
    )
    second = DeviceLaunch(
        function="makeready.kernels.sample.finish_triton:draw_tokens",
        constants={
            **constants,
            "CHUNKS_WIDTH": power_of_two(chunks),
            "GROUPS_WIDTH": power_of_two(groups),
            "TILE": _SWEEP // group,
            "KEPT": _SWEEP,
            "BRANCHES": deep > 0,
        },
        arguments={
            **operands,
            **left,
            **sizes,
            "V": Scalar(vocabulary, "int32"),
            "logits_stride": Scalar(stride, "int32"),
            "tokens": Pointer("tokens"),
            "groups": places["groups"],
            "kept": places["kept"],
        },
        grid=(rows, 1, 1),
        num_warps=16,
        local_bytes=64,  # a few scalars, spilled outside the loops
        dependent=pdl,
    )
    return (Candidate("chunks", (first, second), scratch=scratch),)


def _scratch(rows: int, **parts: tuple[int, str]) -> tuple[dict[str, Scratch], int]:
    """Places of parts with so many elements a row, and the bytes of all."""
    places, end = {}, 0
    for name, (elements, dtype) in parts.items():
        places[name] = Scratch(end, dtype)
        nbytes = rows * elements * (8 if dtype == "int64" else 4)
        end += -(-nbytes // 256) * 256
    return places, end


def _sizes(shape: Sequence[Dim]) -> tuple[int, int]:
    rows, columns = shape
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns
