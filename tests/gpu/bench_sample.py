"""Sampling over Qwen3-8B's vocabulary on the present GPU, by what the rows ask for.

    python tests/gpu/bench_sample.py

Held to the reference first. The floor is one read of the logits at the device-copy rate; logits rotate, so
that they come from memory. Results go as JSON to the folder $OUT, or the present one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import launcher
from sample_rows import MARGIN, margin, requests

from makeready.kernels.contract import Contract
from makeready.kernels.device import OpCall
from makeready.kernels.sample.sample import sample
from makeready.kernels.sample.sample_triton import sample_launches

assert isinstance(sample, Contract)

BANDWIDTH = 3.0e12  # bytes/s of a device copy, read and written, on an H100
ROTATED = 150e6  # bytes that calls rotate over; L2 has 50 MiB
VOCABULARY = 151936
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

Tensors = dict[str, torch.Tensor]


def operands(rows: int) -> Tensors:
    """Rows of 1,024 tokens that ask for nothing."""
    made = requests(rows, VOCABULARY, padding=0, greedy=True, context=1024, spread=1.0)
    return {name: tensor.cuda() for name, tensor in made.items()}


def asked(base: Tensors, spread: float, knobs: dict[str, float]) -> Tensors:
    """The same rows with other logits and these knobs, each row with its own seed."""
    made = {name: torch.full_like(base[name], value) for name, value in knobs.items()}
    logits = torch.randn_like(base["logits"]) * spread
    return {**base, **made, "logits": logits, "history": base["history"].clone()}


def check() -> int:
    """Tokens of all sorts of rows against the reference; gives how many were compared."""
    compared = 0
    for spread in (PEAKED, FLAT):
        op = requests(24, VOCABULARY, seed=3, spread=spread)
        want = sample.reference(**{**op, "history": op["history"].clone()})
        on_device = {name: tensor.cuda() for name, tensor in op.items()}
        call = launcher.op_call(sample, on_device)
        clear = [r for r in range(24) if margin(op, r) > MARGIN]
        for way in sample_launches(call):
            got = launcher.run(way, call, {**on_device, "history": on_device["history"].clone()})[
                "tokens"
            ].cpu()
            assert got[clear].equal(want[clear]), f"{way.name} differs from the reference"
        compared += len(clear)
    return compared


def _prepare(calls: list[OpCall]) -> None:
    launcher.prepare((call, sample_launches(call)) for call in calls)


def bench() -> None:
    """Check, then print µs and the share of the floor."""
    torch.manual_seed(0)
    bases = {rows: operands(rows) for rows in ROWS}
    calls = {rows: launcher.op_call(sample, base) for rows, base in bases.items()}
    _prepare(list(calls.values()))
    print(f"{check()} rows equal the reference")
    results = []
    print(f"{'asked for':30}" + "".join(f"{rows:6} rows µs  floor" for rows in ROWS))
    for label, spread, knobs in KNOBS:
        line = f"{label:30}"
        for rows, base in bases.items():
            nbytes = 4.0 * rows * VOCABULARY
            sets = [asked(base, spread, knobs) for _ in range(max(2, min(8, round(ROTATED / nbytes + 0.5))))]
            (way,) = sample_launches(calls[rows])
            took = launcher.time(way, calls[rows], sets)
            line += f"{took * 1e6:14.1f} {nbytes / BANDWIDTH / took:6.2f}"
            results.append({"asked": label, "rows": rows, "us": took * 1e6})
        print(line, flush=True)
    path = Path(os.environ.get("OUT", ".")) / "bench_sample.json"
    path.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1))


if __name__ == "__main__":
    bench()
