"""What benches of single kernels agree on: Qwen3-8B's sizes, operands that rotate."""

from __future__ import annotations

HIDDEN, INNER, VOCABULARY = 4096, 12288, 151936
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
SPARE = 256  # rows beyond the last one of activations that maps may reach, as in a plan


def copies(nbytes: float, *, over: float, most: int = 1000) -> int:
    """Sets of operands of ``nbytes`` for calls to rotate over, so that each comes from memory again.

    Args:
        over: bytes of all sets together; L2 has 50 MiB on Hopper.
        most: sets at the most.
    """
    return max(2, min(most, round(over / nbytes + 0.5)))
