"""Random valid inputs of ops around KV caches with scales: those of attention_inputs.py with other caches.

What nobody wrote has bytes of 0xFF, which are NaN where a number can say so: scales can.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attention_inputs import (
    decode_attention,
    extend_attention,
    kv_write,
    norm_rope_kv_write,
    verify_attention,
)
from case import Case, Random

from makeready.kernels.attention.formats import PER_TOKEN_HEAD, CacheFormat

FORMATS = tuple(PER_TOKEN_HEAD.values())


def unwritten(*shape: int, dtype: str) -> torch.Tensor:
    """Bytes of 0xFF."""
    kind = getattr(torch, dtype)
    return torch.full((*shape[:-1], shape[-1] * kind.itemsize), 0xFF, dtype=torch.uint8).view(kind)


def empty_caches(like: torch.Tensor, kind: CacheFormat) -> dict[str, torch.Tensor]:
    """Unwritten caches with as many slots and heads as ``like[P, S, G, D]``."""
    *slots, size = like.shape
    caches = {
        name: unwritten(*slots, kind.row_bytes(size), dtype=kind.dtype) for name in ("k_cache", "v_cache")
    }
    return caches | {"scales": unwritten(*slots, kind.scales, dtype="float16")}


def random_caches(random: Random, like: torch.Tensor, kind: CacheFormat) -> dict[str, torch.Tensor]:
    """Caches with random numbers in the slots where ``like`` is not NaN."""
    made = empty_caches(like, kind)
    there = ~like.isnan().any(-1)
    for name in ("k_cache", "v_cache"):
        shape = (int(there.sum()), made[name].shape[-1])
        if kind.dtype == "float8_e4m3fn":
            numbers = random.normal(*shape, scale=100).clamp(-448, 448).to(torch.float8_e4m3fn)
        elif kind.dtype == "int8":
            numbers = (random.integers(255, *shape) - 127).to(torch.int8)
        else:
            numbers = random.integers(256, *shape).to(torch.uint8)
        made[name].view(torch.uint8)[there] = numbers.view(torch.uint8)
    step = 2.0 / {"float8_e4m3fn": 200, "int8": 80, "uint8": 5}[kind.dtype]
    scales = random.uniform(int(there.sum()), kind.scales) * step
    if kind.bits == 4:
        scales[:, 1::2] = random.normal(len(scales), 2)
    made["scales"][there] = scales.half()
    return made


def _over(cases: Iterator[Case], op: str, *, written: bool) -> Iterator[Case]:
    """Each case in one format, in turns; those that an unscaled 8-bit cache is for are left out."""
    number = 0
    for case in cases:
        like = case.operands["k_cache"]
        if like.dtype == torch.float8_e4m3fn:
            continue
        kind = FORMATS[number % len(FORMATS)]
        random = Random(number)
        caches = empty_caches(like, kind) if written else random_caches(random, like, kind)
        label = f"{case.label}-{kind.dtype}"
        yield Case(op, label, case.operands | caches, {**case.attrs, "bits": kind.bits})
        number += 1


def kv_write_scaled(op: str) -> Iterator[Case]:
    return _over(kv_write("kv_write"), op, written=True)


def norm_rope_kv_write_scaled(op: str) -> Iterator[Case]:
    return _over(norm_rope_kv_write("norm_rope_kv_write"), op, written=True)


def decode_attention_scaled(op: str) -> Iterator[Case]:
    return _over(decode_attention("decode_attention"), op, written=False)


def extend_attention_scaled(op: str) -> Iterator[Case]:
    return _over(extend_attention("extend_attention"), op, written=False)


def verify_attention_scaled(op: str) -> Iterator[Case]:
    return _over(verify_attention("verify_attention"), op, written=False)
