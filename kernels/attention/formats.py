"""Caches of few bits with scales: what ``kv.dtype`` calls them and how they lie. Imports no tensor library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheFormat:
    """Numbers with a scale for each token and KV head, of keys and of values apart.

    Attributes:
        dtype: of the tensors that hold the numbers; two numbers of 4 bits are a uint8.
        bits: of a number.
    """

    dtype: str
    bits: int

    @property
    def scales(self) -> int:
        """16-bit floats that a token and head has: two scales, and with 4 bits an offset behind each."""
        return 16 // self.bits

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of a token and head in one of the two caches, without scales."""
        return -(-head_dim * self.bits // 8)


PER_TOKEN_HEAD: Mapping[str, CacheFormat] = {
    "int8_per_token_head": CacheFormat("int8", 8),
    "fp8_per_token_head": CacheFormat("float8_e4m3fn", 8),
    "int4_per_token_head": CacheFormat("uint8", 4),
}
ALIASES: Mapping[str, str] = {"int8": "int8_per_token_head", "int4": "int4_per_token_head"}
