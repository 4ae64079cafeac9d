"""Latent attention at the sizes of DeepSeek's models: what ``attention`` times of it. Operands are random.

Decode steps and what is cached before a prompt in the absorbed form, a prompt's own tokens with keys of every head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import launcher, rates
from benchmarks.gpu.shapes import copies
from makeready.kernels import registry
from makeready.kernels.attention import mla, mla_decode_cuda, mla_own_cuda
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall

assert mla_decode_cuda  # imported, so that they are registered
assert mla_own_cuda
assert isinstance(mla.mla_decode_attention, Contract)
assert isinstance(mla.mla_extend_attention, Contract)
assert isinstance(mla.mla_own_attention, Contract)

PAGE, RANK, ROPE, NOPE, VALUE = 64, 512, 64, 128, 128
WIDTH, KEY = RANK + ROPE, NOPE + ROPE
ROTATED = 400e6  # bytes that calls rotate over

# Heads, rows, tokens of a row, tokens before them that are cached.
DECODES = (
    *((16, 1, 1, context) for context in (1024, 32_768, 131_072)),
    *((heads, 64, 1, context) for heads in (8, 16, 32, 64, 128) for context in (1024, 4096)),
    (16, 256, 1, 4096),
)
PROMPTS = ((16, 1, 1024, 0), (16, 8, 1024, 0), (16, 1, 4096, 0), (16, 1, 8192, 0), (128, 1, 4096, 0))
PREFIXES = ((16, 1, 2048, 8192), (16, 64, 8, 1024), (128, 1, 512, 4096))
CHECKED = ((16, 3, 1, 300), (128, 2, 1, 100), (16, 2, 150, 0), (16, 2, 5, 200))

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Equal rows: the op is by what they have, tokens, a cache, or one token and its cache.

    Attributes:
        before: cached tokens that a row's see; its own is among them where it has one.
    """

    heads: int
    rows: int
    tokens: int
    before: int

    @property
    def contract(self) -> Contract:
        """The op's."""
        if not self.before:
            return mla.mla_own_attention  # type: ignore[return-value]
        return mla.mla_decode_attention if self.tokens == 1 else mla.mla_extend_attention  # type: ignore[return-value]

    @property
    def label(self) -> str:
        """Such as ``mla h16 64 x 1 over 4096``."""
        what = f"{self.tokens} over {self.before}" if self.before else f"{self.tokens}"
        return f"mla h{self.heads} {self.rows} x {what}"

    @property
    def nbytes(self) -> float:
        """Of latents, or of queries, keys and values, read once, and of results."""
        total = self.rows * self.tokens
        if self.before:
            return 2.0 * (self.rows * self.before * WIDTH + total * self.heads * (WIDTH + RANK))
        return 2.0 * total * self.heads * (KEY + NOPE + 2 * VALUE)

    @property
    def operations(self) -> float:
        """Multiplications and additions over visible pairs."""
        if self.before:
            return 2.0 * self.rows * self.tokens * self.before * self.heads * (WIDTH + RANK)
        return self.rows * self.tokens * (self.tokens + 1.0) * self.heads * (KEY + VALUE)

    @property
    def attrs(self) -> dict[str, Any]:
        """What the contract takes."""
        made = {"heads": self.heads, "rank": RANK, "rope": ROPE, "scale": KEY**-0.5}
        if not self.before:
            return made | {"nope": NOPE, "value": VALUE}
        return made if self.tokens == 1 else made | {"own": False}

    def operands(self, device: str) -> Tensors:
        """Random ones; on device meta without memory."""

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        def numbers(values: Sequence[int] | torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32).to(device)

        total = self.rows * self.tokens
        spans = {
            "query_start": numbers(range(0, total, self.tokens)),
            "query_len": numbers([self.tokens] * self.rows),
        }
        if not self.before:
            widths = {"q": self.heads * KEY, "kv": self.heads * (NOPE + VALUE), "latent": WIDTH}
            return {name: normal(total, width) for name, width in widths.items()} | spans
        pages, own = -(-self.before // PAGE), 0 if self.tokens == 1 else self.tokens
        table = 1 + torch.randperm(self.rows * pages).view(self.rows, pages)
        made = {
            "q": normal(total, self.heads * WIDTH),
            "cache": normal(1 + self.rows * pages, PAGE, WIDTH),
            "page_table": numbers(table),
            "context_len": numbers([self.before + own] * self.rows),
        }
        return made if self.tokens == 1 else made | spans


def batches() -> list[Batch]:
    """What is timed."""
    return [Batch(*sizes) for sizes in (*DECODES, *PROMPTS, *PREFIXES)]


def ways_of(call: OpCall) -> Sequence[Candidate]:
    """Of all implementations, the one that should be the fastest first."""
    ways = [way for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(call)]
    return sorted(ways, key=lambda way: way.seconds)


def calls() -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run, without operands."""
    for batch in (*(Batch(*sizes) for sizes in CHECKED), *batches()):
        call = _call(batch, batch.operands("meta"))
        yield call, ways_of(call)


def check() -> None:
    """Hold all ways to the references."""
    for batch in (Batch(*sizes) for sizes in CHECKED):
        launcher.check(batch.contract, ways_of, batch.operands("cuda"), batch.attrs)


def measure(batch: Batch) -> dict[str, Any]:
    """A row of the table of ``attention``."""
    sets = [batch.operands("cuda") for _ in range(copies(batch.nbytes, over=ROTATED, most=8))]
    call = _call(batch, sets[0])
    return {
        "rows": batch.label,
        "op": call.op,
        "nbytes": batch.nbytes,
        "operations": batch.operations,
        "floor": rates.present().floor(batch.nbytes, batch.operations),
        "sdpa": None,
        "backend": "",
        "seconds": {
            way.name: launcher.time(way, call, sets) for way in ways_of(call) if launcher.fits(way, call)
        },
    }


def _call(batch: Batch, tensors: Tensors) -> OpCall:
    return launcher.op_call(batch.contract, tensors, batch.attrs, context=max(batch.before, batch.tokens))
