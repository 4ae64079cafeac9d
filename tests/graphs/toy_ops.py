"""Ops that the packages do not know, with every trait that a contract can have, and a model of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from tiny_programs import LLAMA, dummy, traced
from torch import nn

from makeready.graphs.layers.dense import BY_OUTPUTS
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import parameter
from makeready.graphs.plan.reads import needs
from makeready.graphs.plan.spec import EXTEND
from makeready.graphs.planner.compile import Request, Traced
from makeready.graphs.planner.trace import trace
from makeready.graphs.planner.verify import verify
from makeready.graphs.quant.eight_bits import quantize_linears
from makeready.graphs.quant.scheme import ON_LOAD
from makeready.graphs.steps.base import step_kinds
from makeready.kernels import elementwise, embedding, quantize
from makeready.kernels.contract import ANY, CONTRACTS, Quantizes, Tolerance, contract

HIDDEN, INNER, VOCABULARY, SKIPPED = 24, 40, 61, 8
COPIES, BLOCK = 3, 4


@contextmanager
def toy_ops() -> Iterator[SimpleNamespace]:
    """The contracts by name, registered for as long as the context lasts."""
    try:
        yield SimpleNamespace(**_declared())
    finally:
        for name in [name for name in CONTRACTS if name.startswith("toy_")]:
            del CONTRACTS[name]


def _declared() -> dict[str, Any]:
    @contract(
        "x[T,K]:A weight[N,K]:W -> y[T,N]:out_dtype|A",
        rowwise="T",
        flops="2*T*N*K",
        rate="weight",
        merges="N",
        shares=("x",),
    )
    def toy_project(x, weight, *, out_dtype: str = ""):
        y = x.float() @ weight.float().T
        return y.to(getattr(torch, out_dtype)) if out_dtype else y.to(x.dtype)

    @contract(
        "x[T,K]:float8_e4m3fn weight_scale[N]:float32 weight[N,K]:float8_e4m3fn x_scale[T,1]:float32"
        " -> y[T,N]:out_dtype|float32",
        rowwise="T",
        flops="2*T*N*K",
        rate="weight",
        merges="N",
        shares=("x", "x_scale"),
        quantizes=Quantizes("toy_project", ("fp8_channel",)),
    )
    def toy_project_fp8(x, weight_scale, weight, x_scale, *, out_dtype: str):
        return (x.float() * x_scale) @ (weight.float() * weight_scale[:, None]).T

    @contract("x[T,C]:A weight[C]:W -> y[T,C]:A", rowwise="T", flops="3*T*C")
    def toy_scale(x, weight):
        return x * weight

    @contract(
        "x[T,C]:A weight[C]:W -> q[T,C]:float8_e4m3fn scale[T,C//group]:float32",
        rowwise="T",
        flops="5*T*C",
        fuses=("toy_scale", "quantize_fp8"),
    )
    def toy_scale_quantize(x, weight, *, group: int):
        return quantize.quantize_fp8.reference(x * weight, group=group)

    @contract("x[T,C]:A -> y[T,C-start]:A", rowwise="T", view="start", tolerance=Tolerance(exact=True))
    def toy_tail(x, *, start: int):
        return x[:, start:]

    @contract("x[T,C]:A query_start[R]:int32 -> y[R,C]:A", selects_rows="x", tolerance=Tolerance(exact=True))
    def toy_first(x, query_start):
        return x[query_start.long()]

    @contract(
        "x[T,C]:A -> copies[T*k,C]:A tokens[cdiv(T,block)]:int32",
        flops="min(T,C)*k",
        tolerance=Tolerance(exact=True),
    )
    def toy_repeat(x, *, k: int, block: int):
        tokens = torch.full((-(-len(x) // block),), block, dtype=torch.int32)
        tokens[-1] = len(x) - block * (len(tokens) - 1)
        return x.repeat(k, 1), tokens

    @contract(
        "x[T,C]:A copies[T*k,C]:A tokens[cdiv(T,block)]:int32 -> y[T,C]:A",
        flops="T*k*C",
        tolerance=Tolerance(exact=True),
    )
    def toy_fold(x, copies, tokens, *, k: int, block: int):
        assert tokens.sum() == len(x)
        return copies.unflatten(0, (k, -1))[1:].sum(0) + x

    @contract("x[T,C]:A -> y[T,C]:A", tolerance=Tolerance(exact=True))
    def toy_times(x, *, k: int):
        return x * k

    def in_decode(program, call):
        return [replace(call, op="toy_times", attrs={"k": call.attrs["k"]})]

    def elsewhere(program, call):
        (x,), y = call.operands.values(), call.result
        made = {"copies": f"{y}.copies", "tokens": f"{y}.tokens"}
        repeated = replace(call, op="toy_repeat", results=made)
        return [repeated, replace(call, op="toy_fold", operands={"x": x, **made})]

    @contract(
        "x[T,C]:A -> y[T,C]:A",
        tolerance=Tolerance(exact=True),
        expands={"decode": in_decode, ANY: elsewhere},
    )
    def toy_mix(x, *, k: int, block: int):
        return x * k

    return {name: op for name, op in locals().items() if name.startswith("toy_")}


class ToyModel(nn.Module):
    """``head(tail(mix(a(scale(x)) * b(scale(x)))))`` of embeddings ``x``."""

    def __init__(self, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        self.embedding = parameter((VOCABULARY, HIDDEN), "embed.weight")
        self.scale = parameter((HIDDEN,), "norm.weight")
        self.a = parameter((INNER, HIDDEN), "a.weight", shard=BY_OUTPUTS, quantizable=True)
        self.b = parameter((INNER, HIDDEN), "b.weight", shard=BY_OUTPUTS, quantizable=True)
        self.head = parameter((VOCABULARY, INNER - SKIPPED), "lm_head.weight", quantizable=True)

    def forward(self, ids: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        ops = self.ops
        x = ops.toy_scale(embedding.embedding(ids, self.embedding), self.scale)
        h = elementwise.multiply(ops.toy_project(x, self.a), ops.toy_project(x, self.b))
        h = ops.toy_mix(h, k=COPIES, block=BLOCK)
        return ops.toy_project(ops.toy_tail(h, start=SKIPPED), self.head, out_dtype="float32")


def toy_traced(toys: Any, quant: str | None, **request: Any) -> Traced:
    """The toy model, traced in the place of a decoder."""
    made = traced(LLAMA, **request)
    model: Any = ToyModel(toys)
    programs = {}
    for name, step in made.steps.items():
        program = trace(
            model,
            step_kinds()[name],
            step,
            made.limits,
            Request(**request),
            slots=made.slots,
            kv=made.kv,
            weight_dtype="float32",
            vector_dtype="float32",
        )
        program = verify(program, after="trace")
        if quant is not None:
            program = verify(quantize_linears(program, ON_LOAD[quant]), after="quantize_linears")
        programs[name] = program
    checkpoint = dummy(LLAMA)
    checkpoint.declare(  # type: ignore[attr-defined]
        {source: need.shape for source, need in needs(programs[EXTEND].params.values()).items()}
    )
    return replace(made, programs=programs, checkpoint=checkpoint)
