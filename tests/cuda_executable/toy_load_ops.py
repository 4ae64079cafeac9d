"""Ops of load programs that the packages do not have, and a quantization made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from makeready.graphs.plan.recipe import Derivation, Derived, LoadCall, Operand, Param, whole
from makeready.graphs.planner.ir import Call, Program
from makeready.kernels import contract as contracts
from makeready.kernels.contract import CONTRACTS, contract
from makeready.kernels.spec import TensorSpec

FP8 = "float8_e4m3fn"


def toy_rescale(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Row n times ``gain[n]``."""
    return (x.float() * gain[:, None]).to(x.dtype)


def toy_dequantize(
    q: torch.Tensor, scale: torch.Tensor, *, block: int, out_dtype: str = "float32"
) -> torch.Tensor:
    """``q * scale`` with a scale for every square of ``block`` rows and columns."""
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (q.float() * wide[: q.shape[0], : q.shape[1]]).to(getattr(torch, out_dtype))


def toy_split_heads(w: torch.Tensor, *, rows: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each head, which has ``rows``, the first ``key``, and the others transposed."""
    by_head = w.unflatten(0, (-1, rows))
    return by_head[:, :key].contiguous(), by_head[:, key:].transpose(1, 2).contiguous()


SIGNATURES = {
    toy_rescale: "x[N,K]:A gain[N]:float32 -> y[N,K]:A",
    toy_dequantize: "q[N,K]:float8_e4m3fn scale[(N+block-1)//block,(K+block-1)//block]:float32 "
    "-> y[N,K]:out_dtype|float32",
    toy_split_heads: "w[N,C]:A -> k[N//rows,key,C]:A v[N//rows,C,rows-key]:A",
}


@contextmanager
def registered() -> Iterator[None]:
    """The ops are contracts."""
    for reference, signature in SIGNATURES.items():
        contract(signature)(reference)
    try:
        yield
    finally:
        for reference in SIGNATURES:
            del contracts.CONTRACTS[reference.__name__]


@dataclass
class Toy:
    """8-bit weights of a weight and a gain for each of its rows, which the checkpoint holds beside it.

    Two operands, two calls with a value between them, two results.
    """

    features: frozenset[str] = field(default_factory=lambda: frozenset({"fp8"}))

    def rewrite(self, program: Program) -> Program:
        calls: list[Call] = []
        params: dict[str, Param] = {}
        known: set[str] = set()
        for call in program.calls:
            param = program.params.get(call.operands.get("weight", ""))
            if (
                call.op != "linear"
                or param is None
                or not param.quantizable
                or "lm_head" in param.pieces[0].source
            ):
                calls.append(call)
                continue
            q, scale = self._made(param)
            params |= {q.name: q, scale.name: scale}
            x = call.operands["x"]
            width = int(param.spec.shape[1])
            made = {"q": f"{x}.q", "scale": f"{x}.s"}
            if x not in known:
                calls.append(Call("quantize_fp8", {"x": x}, made, {"group": width}))
                known.add(x)
            operands = {
                "x": made["q"],
                "x_scale": made["scale"],
                "weight": q.name,
                "weight_scale": scale.name,
            }
            calls.append(Call("linear_fp8", operands, call.results, {"out_dtype": program.spec(x).dtype}))
        return program.with_calls(calls, params)

    def _made(self, param: Param) -> tuple[Param, Param]:
        rows, width = param.spec.at({})
        gain = param.pieces[0].source.removesuffix("weight") + "gain"
        by = Derivation(
            {
                "x": Operand(param.spec, param.pieces, unit=1),
                "gain": Operand(TensorSpec((rows,), "float32"), (whole(gain, (rows,)),), unit=1),
            },
            (
                LoadCall("toy_rescale", {"x": "x", "gain": "gain"}, {"y": "y"}),
                LoadCall("quantize_fp8", {"x": "y"}, {"q": "q", "scale": "s"}, {"group": width}),
            ),
        )
        q = replace(param, pieces=(), spec=TensorSpec((rows, width), FP8), derived=Derived(by, "q"))
        scale = Param(f"{param.name}_scale", TensorSpec((rows,), "float32"), derived=Derived(by, "s"))
        return q, scale


assert not any(reference.__name__ in CONTRACTS for reference in SIGNATURES)
