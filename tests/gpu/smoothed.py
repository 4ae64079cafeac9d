"""A quantization whose load programs have two operands, two kernels and a value between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from makeready.graphs.plan.recipe import Derivation, Derived, LoadCall, Operand, Param, Piece
from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.spec import TensorSpec


@dataclass
class Smoothed:
    """``down_proj`` times a matrix that the checkpoint holds the other way round, then as 8-bit floats."""

    features: frozenset[str] = field(default_factory=lambda: frozenset({"fp8"}))

    def rewrite(self, program: Program) -> Program:
        calls: list[Call] = []
        params: dict[str, Param] = {}
        for call in program.calls:
            param = program.params.get(call.operands.get("weight", ""))
            if call.op != "linear" or param is None or "down_proj" not in param.pieces[0].source:
                calls.append(call)
                continue
            q, scale = _derived(param)
            params |= {q.name: q, scale.name: scale}
            x, width = call.operands["x"], int(param.spec.shape[1])
            made = {"q": f"{x}.q", "scale": f"{x}.s"}
            calls.append(Call("quantize_fp8", {"x": x}, made, {"group": width}))
            operands = {
                "x": made["q"],
                "x_scale": made["scale"],
                "weight": q.name,
                "weight_scale": scale.name,
            }
            calls.append(Call("linear_fp8", operands, call.results, {"out_dtype": program.spec(x).dtype}))
        return program.with_calls(calls, params)


def _derived(param: Param) -> tuple[Param, Param]:
    rows, width = param.spec.at({})
    smooth = param.pieces[0].source.removesuffix("weight") + "smooth"
    turned = Piece(smooth, ((0, width), (0, rows)), (0, 0), axes=(1, 0))
    by = Derivation(
        {"x": Operand(param.spec, param.pieces, unit=1), "y": Operand(param.spec, (turned,), unit=1)},
        (
            LoadCall("multiply", {"x": "x", "y": "y"}, {"z": "z"}),
            LoadCall("quantize_fp8", {"x": "z"}, {"q": "q", "scale": "s"}, {"group": width}),
        ),
    )
    q = replace(param, pieces=(), spec=TensorSpec((rows, width), "float8_e4m3fn"), derived=Derived(by, "q"))
    return q, Param(f"{param.name}_scale", TensorSpec((rows,), "float32"), derived=Derived(by, "s"))
