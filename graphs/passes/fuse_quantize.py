"""Quantizing what a norm or an activation function just made becomes part of it."""

from __future__ import annotations

from makeready.graphs.ir import Call, Program

FUSED = {
    "rms_norm": "rms_norm_quantize_fp8",
    "add_rms_norm": "add_rms_norm_quantize_fp8",
    "silu_mul": "silu_mul_quantize_fp8",
}


def fuse_quantize(program: Program) -> Program:
    """``quantize_fp8(f(x))`` → ``f_quantize_fp8(x)`` for the ops of :data:`FUSED`.

    The wide value never leaves the chip. Applies where nobody else reads it.
    """
    producers, uses = program.producers(), program.uses()
    fused: dict[int, Call] = {}  # identity of the producer → what takes its place
    gone: set[int] = set()
    for call in program.calls:
        if call.op != "quantize_fp8":
            continue
        y = call.operands["x"]
        made = producers.get(y)
        if made is None or made.op not in FUSED or len(uses[y]) > 1 or y in program.results.values():
            continue
        if made.results["y"] != y:
            continue
        kept = {k: v for k, v in made.results.items() if k != "y"}
        fused[id(made)] = Call(
            FUSED[made.op], made.operands, {**call.results, **kept}, {**made.attrs, **call.attrs}
        )
        gone.add(id(call))
    return program.with_calls([fused.get(id(c), c) for c in program.calls if id(c) not in gone])
