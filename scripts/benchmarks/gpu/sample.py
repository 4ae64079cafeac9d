"""Sampling and log-probabilities over Qwen3-8B's vocabulary on the present GPU, by what the rows ask for.

Sampling is held to the reference first. The floor is one read of the logits at the device-copy rate; logits
rotate, so that they come from memory. What PyTorch does beside it is the least that any sampler must:
argmax, softmax, or the largest of a log-softmax.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu import launcher, ops
from benchmarks.gpu.ops import Case, Operands, Tensors
from benchmarks.gpu.sample_rows import MARGIN, margin, requests
from benchmarks.gpu.shapes import VOCABULARY
from makeready.kernels.contract import Contract
from makeready.kernels.sample.sample import sample

for module in ("sample", "logprobs"):
    importlib.import_module(f"makeready.kernels.sample.{module}_triton")

assert isinstance(sample, Contract)

ROWS = (1, 16, 64, 256)
PEAKED, FLAT = 3.0, 0.3  # standard deviations of logits
KNOBS: tuple[tuple[str, float, dict[str, float]], ...] = (
    ("greedy", PEAKED, {}),
    ("temperature", PEAKED, {"temperature": 0.8}),
    ("top-k 20, top-p 0.95", PEAKED, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
    ("top-k 20, top-p 0.95, flat", FLAT, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
    ("top-k 50", PEAKED, {"temperature": 0.8, "top_k": 50}),
    ("top-p 0.9", PEAKED, {"temperature": 0.8, "top_p": 0.9}),
    ("top-p 0.9, flat", FLAT, {"temperature": 0.8, "top_p": 0.9}),
    ("top-p 0.5, flat", FLAT, {"temperature": 0.8, "top_p": 0.5}),
    ("top-p 0.05, flat", FLAT, {"temperature": 0.8, "top_p": 0.05}),
    ("top-p 0.9, min-p 0.05, flat", FLAT, {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05}),
    ("min-p 0.05", PEAKED, {"temperature": 0.8, "min_p": 0.05}),
    ("penalties", PEAKED, {"repetition_penalty": 1.1}),
)
REPORTED = (-1, 0, 20)  # alternatives that rows ask for; -1: no log-probability at all


def operands(rows: int) -> Tensors:
    """Rows of 1,024 tokens that ask for nothing."""
    return requests(rows, VOCABULARY, padding=0, greedy=True, context=1024, spread=1.0)


def asked(base: Tensors, spread: float, knobs: Mapping[str, float]) -> Tensors:
    """The same rows with other logits and these knobs, each row with its own seed."""
    made = {name: torch.full_like(base[name], value) for name, value in knobs.items()}
    logits = torch.randn_like(base["logits"]) * spread
    return {**base, **made, "logits": logits, "history": base["history"].clone()}


def cases(device: str, sizes: Iterable[int]) -> Iterator[Case]:
    """Every knob at these numbers of rows, then log-probabilities."""
    for rows in sizes:
        base = {name: tensor.to(device) for name, tensor in operands(rows).items()}
        nbytes = 4.0 * rows * VOCABULARY
        for label, spread, knobs in KNOBS:

            def make(
                base: Tensors = base, spread: float = spread, knobs: Mapping[str, float] = knobs
            ) -> Tensors:
                return asked(base, spread, knobs)

            eager = _softmax if "temperature" in knobs else _argmax
            yield Case("sample", label, rows, make, {}, nbytes, eager, most=8)
        for top in REPORTED:

            def ask(rows: int = rows, top: int = top) -> Tensors:
                return {
                    "logits": torch.randn(rows, VOCABULARY, device=device),
                    "tokens": torch.randint(0, VOCABULARY, (rows,), device=device).int(),
                    "row_slot": torch.arange(rows, device=device).int(),
                    "top_logprobs": torch.full((rows + 1,), top, dtype=torch.int32, device=device),
                }

            best = _best if top > 0 else None
            yield Case("token_logprobs", str(top), rows, ask, {"max_top": 20}, nbytes, best)


def check() -> int:
    """Tokens of all sorts of rows against the reference; gives how many were compared."""
    compared = 0
    for spread in (PEAKED, FLAT):
        op = requests(24, VOCABULARY, seed=3, spread=spread)
        want = sample.reference(**{**op, "history": op["history"].clone()})
        on_device = {name: tensor.cuda() for name, tensor in op.items()}
        call = launcher.op_call(sample, on_device)
        clear = [r for r in range(24) if margin(op, r) > MARGIN]
        for way in ops.candidates(call):
            made = launcher.run(way, call, {**on_device, "history": on_device["history"].clone()})
            assert made["tokens"].cpu()[clear].equal(want[clear]), f"{way.name} differs from the reference"
        compared += len(clear)
    return compared


def measure(note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Check, then seconds of every way of every case; see :func:`benchmarks.gpu.ops.measure`."""
    torch.manual_seed(0)
    launcher.prepare(ops.calls(cases("meta", ROWS)))
    note(f"{check()} rows equal the reference")
    return ops.measure(cases("cuda", ROWS), note)


def _argmax(t: Operands) -> torch.Tensor:
    return t["logits"].argmax(-1)


def _softmax(t: Operands) -> torch.Tensor:
    return t["logits"].softmax(-1)


def _best(t: Operands) -> object:
    return t["logits"].log_softmax(-1).topk(20)
