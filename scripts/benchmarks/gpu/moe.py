"""A layer of experts of Qwen3-30B-A3B on the present GPU: its ops and all of it, beside floors and torch's products.

Routings are random ones of many, so that weights of few tokens come from memory. A floor counts the distinct experts
that are really hit: their bytes once, or all operations.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu import launcher, rates
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.moe import experts, experts_silu, grouped_cuda, route

for module in ("moe.route", "moe.combine", "moe.experts", "elementwise", "quantize"):
    importlib.import_module(f"makeready.kernels.{module}_triton")
assert experts
assert experts_silu
assert grouped_cuda
assert route

TOKENS = (1, 8, 16, 64, 256, 1024, 8192)
KINDS = {"bf16": "", "fp8_block": "block", "int8": "int8"}  # of weights, and of their scales
SUFFIX = {"": "", "channel": "_fp8", "block": "_fp8_block", "int8": "_int8"}  # of ops
SETS = 6  # routings that calls rotate over
MOST = 4  # ways of a kernel that are timed
WRONG = 8e-3  # relative error from which a result is no rounding

Tensors = dict[str, torch.Tensor]
F8 = torch.float8_e4m3fn


def eight_bits(x: torch.Tensor, scales: str) -> torch.Tensor:
    """``x`` as e4m3, or as integers where scales are theirs."""
    return x.round().clamp(-127, 127).to(torch.int8) if scales == "int8" else x.clamp(-448, 448).to(F8)


@dataclass(frozen=True)
class Shape:
    """Of a layer: experts, those of a token, width of the model and of an expert."""

    name: str
    experts: int
    top_k: int
    width: int
    inner: int

    def sizes(self, *, gate: bool) -> tuple[int, int]:
        """Outputs and inputs of an expert's first or second product."""
        return (2 * self.inner, self.width) if gate else (self.width, self.inner)

    def routing(self, tokens: int, seed: int = 0) -> Tensors:
        """``order`` and ``start`` of tokens whose experts are equally likely ones."""
        generator = torch.Generator("cuda").manual_seed(seed)
        chosen = torch.rand(tokens, self.experts, device="cuda", generator=generator).topk(self.top_k).indices
        flat = chosen.flatten()
        start = torch.zeros(self.experts + 1, dtype=torch.int32, device="cuda")
        start[1:] = torch.bincount(flat, minlength=self.experts).cumsum(0)
        return {"order": flat.sort(stable=True).indices.int(), "start": start}

    def weights(self, *, gate: bool, scales: str, seed: int = 0) -> Tensors:
        """Of all experts; "" bf16, "channel" or "block" e4m3, "int8" integers by channel."""
        torch.manual_seed(seed)
        outputs, inputs = self.sizes(gate=gate)
        if not scales:
            made = torch.empty(self.experts, outputs, inputs, dtype=torch.bfloat16, device="cuda")
            for e in range(self.experts):
                made[e] = torch.randn(outputs, inputs, device="cuda") / inputs**0.5
            return {"weight": made}
        dtype = torch.int8 if scales == "int8" else F8
        made = torch.empty(self.experts, outputs, inputs, dtype=dtype, device="cuda")
        for e in range(self.experts):
            made[e] = eight_bits(torch.randn(outputs, inputs, device="cuda") * 60, scales)
        groups = (-(-outputs // 128), inputs // 128) if scales == "block" else (outputs,)
        scale = (torch.rand(self.experts, *groups, device="cuda") + 0.5) / (60 * inputs**0.5)
        return {"weight": made, "weight_scale": scale}

    def activations(self, rows: int, *, gate: bool, scales: str, seed: int = 0) -> Tensors:
        """Of tokens, or of entries for the second product."""
        torch.manual_seed(seed)
        x = torch.randn(rows, self.sizes(gate=gate)[1], device="cuda")
        if not scales:
            return {"x": x.bfloat16()}
        groups = x.shape[1] // 128 if scales == "block" else 1
        return {
            "x": eight_bits(x * 60, scales),
            "x_scale": (torch.rand(rows, groups, device="cuda") + 0.5) / 60,
        }

    def product(
        self, tokens: int, *, gate: bool, scales: str, seed: int = 0
    ) -> tuple[str, Tensors, dict[str, Any]]:
        """Op, operands and attributes of the first product with its gate, or of the second."""
        op = ("grouped_silu_mul" if gate else "grouped_linear") + SUFFIX[scales]
        rows = tokens if gate else tokens * self.top_k
        tensors = {
            **self.activations(rows, gate=gate, scales=scales, seed=seed),
            **self.weights(gate=gate, scales=scales, seed=seed),
            **self.routing(tokens, seed),
        }
        attrs = {"top_k": self.top_k if gate else 0, "out_dtype": "bfloat16"}
        return op, tensors, attrs | ({"block": 128} if scales == "block" else {})


QWEN3 = Shape("qwen3_30b_a3b", 128, 8, 2048, 768)
SHAPES = (
    QWEN3,
    Shape("qwen2_moe_a2.7b", 60, 4, 2048, 1408),
    Shape("deepseek_v2_lite", 64, 6, 2048, 1408),
    Shape("mixtral_8x7b", 8, 2, 4096, 14336),
)


@dataclass(frozen=True)
class Step:
    """An op of a layer.

    Attributes:
        operands, results: names of the layer's values by the op's own.
    """

    op: str
    operands: Mapping[str, str]
    results: Mapping[str, str]
    attrs: Mapping[str, Any]

    def tensors(self, values: Mapping[str, torch.Tensor]) -> Tensors:
        """The op's operands."""
        return {name: values[value] for name, value in self.operands.items()}

    def ways(self, call: OpCall) -> list[Candidate]:
        """The best of every kernel; those of other kernels have its name before theirs."""
        return [way for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(call)[:MOST]]


def steps(shape: Shape, scales: str) -> list[Step]:
    """Of a layer, as plans have them."""
    suffix = SUFFIX[scales]
    attrs = {"out_dtype": "bfloat16", **({"block": 128} if scales == "block" else {})}
    places = {"order": "order", "start": "start"}

    def product(op: str, x: str, weight: str, y: str, top_k: int) -> Step:
        scaled = {"x_scale": f"{x}_scale", "weight_scale": f"{weight}_scale"} if scales else {}
        operands = {"x": x, "weight": weight, **scaled, **places}
        return Step(op + suffix, operands, {"y": y}, {**attrs, "top_k": top_k})

    k, experts = shape.top_k, shape.experts
    made = [
        Step(
            "route_and_sort",
            {"logits": "logits", "kv_slot": "kv_slot"},
            {**places, "place": "place", "weight": "share"},
            {"top_k": k, "experts": experts, "renormalise": True},
        ),
        product("grouped_silu_mul", "x", "gate_up", "h", k),
        Step("combine", {"x": "y", "place": "place", "share": "share"}, {"sum": "sum"}, {}),
    ]
    made.insert(2, product("grouped_linear", "q" if scales else "h", "down", "y", 0))
    if scales:
        group = {"group": 128 if scales == "block" else shape.inner}
        made.insert(
            2,
            Step(
                "quantize_int8" if scales == "int8" else "quantize_fp8",
                {"x": "h"},
                {"q": "q", "scale": "q_scale"},
                group,
            ),
        )
    return made


def values(shape: Shape, tokens: int, scales: str, weights: Tensors, seed: int) -> Tensors:
    """What a layer starts from."""
    made = shape.activations(tokens, gate=True, scales=scales, seed=seed)
    logits = torch.randn(tokens, shape.experts, device="cuda")
    slots = torch.ones(tokens, dtype=torch.int32, device="cuda")
    return {**weights, **made, "logits": logits, "kv_slot": slots}


def both_weights(shape: Shape, scales: str) -> Tensors:
    """Of all experts, by the layer's names."""
    made: Tensors = {}
    for name, gate in (("gate_up", True), ("down", False)):
        for own, tensor in shape.weights(gate=gate, scales=scales).items():
            made[own.replace("weight", name)] = tensor
    return made


def calls() -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run, without operands."""
    for scales in KINDS.values():
        for tokens in TOKENS:
            held = _shapes(QWEN3, tokens, scales)
            for step in steps(QWEN3, scales):
                tensors = step.tensors(held)
                call = launcher.op_call(CONTRACTS[step.op], tensors, step.attrs, tokens=tokens)
                yield call, step.ways(call)


def _shapes(shape: Shape, tokens: int, scales: str) -> Tensors:
    """All values of a layer, which hold nothing."""
    entries, integers = tokens * shape.top_k, scales == "int8"
    kind = torch.int8 if integers else F8 if scales else torch.bfloat16

    def made(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    held = {
        "logits": made(tokens, shape.experts),
        "kv_slot": made(tokens, dtype=torch.int32),
        "order": made(entries, dtype=torch.int32),
        "place": made(tokens, shape.top_k, dtype=torch.int32),
        "start": made(shape.experts + 1, dtype=torch.int32),
        "share": made(tokens, shape.top_k),
        "x": made(tokens, shape.width, dtype=kind),
        "h": made(entries, shape.inner, dtype=torch.bfloat16),
        "q": made(entries, shape.inner, dtype=kind),
        "y": made(entries, shape.width, dtype=torch.bfloat16),
    }
    for name, gate in (("gate_up", True), ("down", False)):
        outputs, inputs = shape.sizes(gate=gate)
        held[name] = made(shape.experts, outputs, inputs, dtype=kind)
        squares = (outputs,) if integers else (-(-outputs // 128), inputs // 128)
        held[f"{name}_scale"] = made(shape.experts, *squares)
    groups = (1, 1) if integers else (shape.width // 128, shape.inner // 128)
    return held | {"x_scale": made(tokens, groups[0]), "q_scale": made(entries, groups[1])}


def measure(note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Of each op of a layer, and of the layer: seconds of its ways, its floor, relative errors, torch's seconds."""
    launcher.prepare(calls())
    found: list[dict[str, Any]] = []
    for kind, scales in KINDS.items():
        weights = both_weights(QWEN3, scales)
        for tokens in TOKENS:
            note(f"{kind} {tokens}")
            sets = [values(QWEN3, tokens, scales, weights, seed) for seed in range(SETS)]
            rows = [{"kind": kind, "tokens": tokens, **row} for row in _layer(QWEN3, tokens, scales, sets)]
            found += rows
    return found


def _layer(shape: Shape, tokens: int, scales: str, sets: list[Tensors]) -> Iterator[dict[str, Any]]:
    """Rows of the table; ``sets`` get the values that each op makes."""
    chains: list[list[tuple[Candidate, OpCall, Tensors]]] = [[] for _ in sets]
    reps = 4 * len(sets) if tokens <= 1024 else len(sets)
    for step in steps(shape, scales):
        call = launcher.op_call(CONTRACTS[step.op], step.tensors(sets[0]), step.attrs, tokens=tokens)
        ways = [way for way in step.ways(call) if launcher.fits(way, call)]
        took = {
            way.name: launcher.time(way, call, [step.tensors(held) for held in sets], reps=reps)
            for way in ways
        }
        best = min(ways, key=lambda way: took[way.name])
        for held, chain in zip(sets, chains, strict=True):
            full = launcher.run(best, call, step.tensors(held))
            held |= {value: full[name] for name, value in step.results.items()}
            chain.append((best, call, full))
        yield {
            "op": step.op,
            "ways": took,
            "chosen": ways[0].name,
            "floor": sum(_floor(step, shape, held) for held in sets) / len(sets),
            "error": _error(step, sets[0]),
            "torch": _torch(step, sets),
        }
    yield {
        "op": "layer",
        "ways": {"best of each": launcher.time_chains(chains, reps=reps)},
        "chosen": "best of each",
        "floor": sum(_layer_floor(shape, scales, held) for held in sets) / len(sets),
        "error": 0.0,
        "torch": math.nan,
    }


def _hit(held: Tensors) -> int:
    return int((held["start"][1:] > held["start"][:-1]).sum())


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _floor(step: Step, shape: Shape, held: Tensors) -> float:
    """Seconds that no way to run an op beats."""
    present = rates.present()
    results = _nbytes(*(held[value] for value in step.results.values()))
    tensors = step.tensors(held)
    if "start" not in tensors:
        return present.floor(results + _nbytes(*tensors.values()))
    weights = _nbytes(*(t for name, t in tensors.items() if name.startswith("weight")))
    others = _nbytes(*(t for name, t in tensors.items() if not name.startswith("weight")))
    _, outputs, inputs = tensors["weight"].shape
    operations = 2.0 * len(held["order"]) * outputs * inputs
    moved = results + others + weights * _hit(held) / shape.experts
    return present.floor(moved, operations, "float8_e4m3fn" if "x_scale" in tensors else "bfloat16")


def _layer_floor(shape: Shape, scales: str, held: Tensors) -> float:
    """The same of a layer whose values between its ops cost nothing."""
    weights = _nbytes(*(t for name, t in held.items() if name.startswith(("gate_up", "down"))))
    moved = weights * _hit(held) / shape.experts + _nbytes(held["x"], held["sum"])
    operations = 6.0 * len(held["order"]) * shape.width * shape.inner
    return rates.present().floor(moved, operations, "float8_e4m3fn" if scales else "bfloat16")


def _error(step: Step, held: Tensors) -> float:
    """Of a product's result, relative to float64; 0 for other ops, which tests hold to their references."""
    if not step.op.startswith("grouped"):
        return 0.0
    want = exact(step.op, step.tensors(held), step.attrs)
    return float((held[step.results["y"]].double() - want).norm() / want.norm())


def _torch(step: Step, sets: Sequence[Tensors]) -> float:
    """Seconds of torch's grouped product over rows that lie in order, without a gate and, in 8 bits, with scales of
    rows; NaN where it has none.
    """
    if not step.op.startswith("grouped"):
        return math.nan

    def product(held: Mapping[str, torch.Tensor]) -> None:
        weight, ends = held["weight"].transpose(1, 2), held["start"][1:]
        if "x_scale" in held:
            torch._scaled_grouped_mm(  # pyright: ignore[reportPrivateImportUsage]
                held["rows"], weight, held["ones"], held["columns"], offs=ends, out_dtype=torch.bfloat16
            )
        else:
            torch._grouped_mm(held["rows"], weight, offs=ends)  # pyright: ignore[reportPrivateImportUsage]

    made = []
    for held in sets:
        tensors, top_k = step.tensors(held), step.attrs["top_k"]
        order = tensors["order"].long()
        experts, outputs = tensors["weight"].shape[:2]
        made.append(
            {
                **tensors,
                "rows": tensors["x"][order // top_k] if top_k else tensors["x"],
                "ones": torch.ones(len(order), device="cuda"),
                "columns": torch.ones(experts, outputs, device="cuda"),
            }
        )
    try:
        return launcher.time_each(product, made, len(made))
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return math.nan


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every wrong result; a line an op: the fastest way and the planner's first beside floor and torch."""
    lines = [
        f"WRONG {row['kind']} {row['op']} {row['tokens']} is off by {row['error']:.1e}"
        for row in found
        if not row["error"] < WRONG
    ]
    lines.append(
        "weights   tokens  op                             µs  floor/µs  torch µs  way, and the others"
    )
    for row in found:
        ways = sorted(row["ways"].items(), key=lambda item: item[1])
        others = "  ".join(f"{1e6 * took:.1f} {name}" for name, took in ways[1:5])
        mark = "" if ways[0][0] == row["chosen"] else f" (planner: {row['chosen']})"
        lines.append(
            f"{row['kind']:9} {row['tokens']:6}  {row['op']:26} {1e6 * ways[0][1]:7.1f}  "
            f"{row['floor'] / ways[0][1]:8.2f} {1e6 * row['torch']:9.1f}  {ways[0][0]}{mark}  {others}"
        )
    return lines


def exact(op: str, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
    """The contract's result in float64, made on the GPU, an expert at a time."""
    x, weight, order, start = (tensors[name] for name in ("x", "weight", "order", "start"))
    bounds, block = start.tolist(), attrs.get("block")
    rows = order.long() // attrs["top_k"] if attrs["top_k"] else torch.arange(len(order), device=x.device)
    parts = []
    for e in range(len(weight)):
        mine = rows[bounds[e] : bounds[e + 1]]
        a, w = x[mine].double(), weight[e].double()
        if block:
            a *= tensors["x_scale"][mine].double().repeat_interleave(block, 1)
            square = tensors["weight_scale"][e].double().repeat_interleave(block, 0)[: len(w)]
            w *= square.repeat_interleave(block, 1)
        elif "x_scale" in tensors:
            a *= tensors["x_scale"][mine].double()
            w *= tensors["weight_scale"][e].double()[:, None]
        parts.append(a @ w.T if len(mine) else a.new_zeros(0, len(w)))
    y = torch.cat([*parts, parts[0].new_zeros(len(order) - bounds[-1], parts[0].shape[1])])
    if op.startswith("grouped_silu_mul"):
        gate, up = y.chunk(2, -1)
        y = functional.silu(gate) * up
    return y
