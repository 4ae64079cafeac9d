"""Batches of attention that are timed: rows, heads and caches, and their random operands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu import rates
from benchmarks.gpu.shapes import HEAD_DIM, HEADS, KV_HEADS
from makeready.kernels.attention import paged
from makeready.kernels.contract import Contract

PAGE = 64
B16, F8 = torch.bfloat16, torch.float8_e4m3fn

Tensors = dict[str, torch.Tensor]
Row = tuple[int, int]  # queries, context


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, and their size."""

    heads: int = HEADS
    kv_heads: int = KV_HEADS
    size: int = HEAD_DIM

    @property
    def attrs(self) -> dict[str, float]:
        """What the contracts take."""
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.size,
            "scale": self.size**-0.5,
            "window": 0,
        }


QWEN3_8B = Heads()  # Llama 3.1 8B has the same
LLAMA_3_2_1B = Heads(32, 8, 64)
GEMMA_3_12B = Heads(16, 8, 256)

MIXED_LENGTHS = [(1, 64 * (i + 1)) for i in range(64)]
DECODES = (
    *([(1, 1024)] * n for n in (1, 4, 16, 64, 256)),
    *([(1, 4096)] * n for n in (1, 16, 32, 100)),
    [(1, 32_768)],
    MIXED_LENGTHS,
)
DECODES_F8 = (*([(1, 1024)] * n for n in (1, 16, 64, 256)), [(1, 32_768)])
PADDING = [(0, 0)] * 255
PROMPTS = ([(1024, 1024)], [(1024, 1024)] * 8, [(4096, 4096)], [(8192, 8192)])
SHORT = [(8, 1032)] * 256
EXTENDS = (
    [(64, 1024)],
    [(256, 1024)],
    *PROMPTS,
    [(16_384, 16_384)],
    [(1024, 1024), *PADDING],
    [(1, 1024)] * 64 + [(2000, 2000)],
    [(1, 32_768), (2000, 2000)],
    [(512, 8192)],
    [(16, 8192)],
    [(2048, 10_240)],
    SHORT,
)
EXTENDS_F8 = (*PROMPTS, [(1, 1024)] * 64 + [(2000, 2000)], [(512, 8192)], SHORT)
EXTENDS_OTHER = ([(1024, 1024)] * 8, [(8192, 8192)], SHORT)  # of heads of other sizes
UNSWEPT = (
    [(1, 1024)] * 4,
    *([(1, 4096)] * n for n in (1, 16, 32, 100)),
    [(1024, 1024)],
    [(1024, 1024)] * 8,
    [(1, 32_768), (2000, 2000)],
)
CHECKED = [(5, 700), (1, 3000), (130, 130), (0, 0), (300, 400)]


@dataclass(frozen=True)
class Batch:
    """Rows for one of the two attentions, the dtype of their cache, and heads."""

    contract: Contract
    rows: Sequence[Row]
    kind: torch.dtype
    heads: Heads = QWEN3_8B

    @property
    def decode(self) -> bool:
        """Whether every row has one query."""
        return self.contract.name == "decode_attention"

    @property
    def nbytes(self) -> int:
        """Of all keys and values."""
        return kv_bytes(self.kind, self.heads) * sum(context for _, context in self.rows)

    @property
    def operations(self) -> float:
        """Multiplications and additions over visible pairs."""
        pairs = sum(queries * context - queries * (queries - 1) // 2 for queries, context in self.rows)
        return 4.0 * pairs * self.heads.heads * self.heads.size

    @property
    def floor(self) -> float:
        """Seconds that no kernel beats: all keys and values once, or all operations."""
        queries = sum(queries for queries, _ in self.rows)
        return rates.present().floor(
            self.nbytes + 4 * queries * self.heads.heads * self.heads.size, self.operations
        )

    @property
    def label(self) -> str:
        """Such as ``bf16 64 x (1, 1024)``, and the size of heads where it is not 128."""
        some = [row for row in self.rows if row != (0, 0)]
        text = f"{len(some)} x {some[0]}" if some[0] == some[-1] else f"{len(some)}: {some[0]}..{some[-1]}"
        padded = f" of {len(self.rows)}" if len(some) < len(self.rows) else ""
        size = f" d{self.heads.size}" if self.heads.size != HEAD_DIM else ""
        return f"{'f8' if self.kind == F8 else 'bf16'}{size} {text}{padded}"

    def operands(self, device: str) -> Tensors:
        """Random ones; on device meta without memory."""
        count = torch.tensor([queries for queries, _ in self.rows], dtype=torch.int32)
        tokens = len(self.rows) if self.decode else int(count.sum())
        width = self.heads.heads * self.heads.size
        q = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
        tensors = {**_paged(self.rows, self.kind, self.heads, device), "q": q}
        if not self.decode:
            start = (count.cumsum(0) - count).to(torch.int32)
            tensors |= {"query_start": start.to(device), "query_len": count.to(device)}
        return tensors


def batches(*, sweep: bool) -> list[Batch]:
    """What is timed."""
    decode, extend = paged.decode_attention, paged.extend_attention
    assert isinstance(decode, Contract)
    assert isinstance(extend, Contract)
    made = [Batch(decode, rows, B16) for rows in DECODES] + [Batch(decode, rows, F8) for rows in DECODES_F8]
    made += [Batch(extend, rows, B16) for rows in EXTENDS] + [Batch(extend, rows, F8) for rows in EXTENDS_F8]
    made += [Batch(extend, rows, kind, heads) for heads, rows, kind in _others()]
    return [batch for batch in made if not sweep or batch.rows not in UNSWEPT]


def checked() -> list[Batch]:
    """What is held to the references."""
    decode, extend = paged.decode_attention, paged.extend_attention
    assert isinstance(decode, Contract)
    assert isinstance(extend, Contract)
    single = [(min(queries, 1), context) for queries, context in CHECKED]
    made = [Batch(c, rows, kind) for kind in (B16, F8) for c, rows in ((decode, single), (extend, CHECKED))]
    return made + [
        Batch(extend, CHECKED, kind, heads) for heads in (LLAMA_3_2_1B, GEMMA_3_12B) for kind in (B16, F8)
    ]


def kv_bytes(kind: torch.dtype, heads: Heads = QWEN3_8B) -> int:
    """Of a token's keys and values."""
    return 2 * kind.itemsize * heads.kv_heads * heads.size


def _others() -> Iterator[tuple[Heads, Sequence[Row], torch.dtype]]:
    for heads in (LLAMA_3_2_1B, GEMMA_3_12B):
        for kind in (B16, F8):
            for rows in EXTENDS_OTHER:
                yield heads, rows, kind


def _paged(rows: Sequence[Row], kind: torch.dtype, heads: Heads, device: str) -> Tensors:
    pages = [-(-context // PAGE) for _, context in rows]
    order = (1 + torch.randperm(sum(pages))).to(torch.int32)
    table = torch.zeros(len(rows), max(pages), dtype=torch.int32)
    for r, count in enumerate(pages):
        table[r, :count] = order[sum(pages[:r]) :][:count]
    shape = (1 + sum(pages), PAGE, heads.kv_heads, heads.size)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device).to(kind) for _ in "kv")
    context = torch.tensor([context for _, context in rows], dtype=torch.int32, device=device)
    return {"k_cache": k, "v_cache": v, "page_table": table.to(device), "context_len": context}
