"""Layers of experts on the present GPU, beside their floors and torch's grouped products.

Routings are random, and every call rotates over sets of operands whose weights are other ones, so that they come from
memory. A floor counts the distinct experts that are really hit.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from makeready.kernels.moe import experts, experts_silu, grouped_cuda, route

for module in ("moe.route", "moe.combine", "moe.experts", "elementwise", "quantize"):
    importlib.import_module(f"makeready.kernels.{module}_triton")
assert experts
assert experts_silu
assert grouped_cuda
assert route

Tensors = dict[str, torch.Tensor]
F8 = torch.float8_e4m3fn


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
        """Of all experts; "" bf16, "channel" or "block" e4m3."""
        torch.manual_seed(seed)
        outputs, inputs = self.sizes(gate=gate)
        if not scales:
            made = torch.empty(self.experts, outputs, inputs, dtype=torch.bfloat16, device="cuda")
            for e in range(self.experts):
                made[e] = torch.randn(outputs, inputs, device="cuda") / inputs**0.5
            return {"weight": made}
        made = torch.empty(self.experts, outputs, inputs, dtype=F8, device="cuda")
        for e in range(self.experts):
            made[e] = (torch.randn(outputs, inputs, device="cuda") * 60).clamp(-448, 448).to(F8)
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
            "x": (x * 60).clamp(-448, 448).to(F8),
            "x_scale": (torch.rand(rows, groups, device="cuda") + 0.5) / 60,
        }

    def product(
        self, tokens: int, *, gate: bool, scales: str, seed: int = 0
    ) -> tuple[str, Tensors, dict[str, Any]]:
        """Op, operands and attributes of the first product with its gate, or of the second."""
        op = ("grouped_silu_mul" if gate else "grouped_linear") + {
            "": "",
            "channel": "_fp8",
            "block": "_fp8_block",
        }[scales]
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
