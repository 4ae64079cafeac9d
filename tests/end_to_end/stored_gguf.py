"""GGUF files in blocks of every type, and the numbers that they stand for."""

from __future__ import annotations

import gguf
import numpy as np
from gguf_inputs import random_blocks

from makeready.kernels.gguf_dequantize import BLOCK_TYPES

Types = gguf.GGMLQuantizationType
# As Q4_K_M: some layers have Q6_K where others have Q4_K.
MIXED = {
    "blk.1.attn_v": Types.Q6_K,
    "blk.1.ffn_down": Types.Q6_K,
    "attn_q": Types.Q4_K,
    "attn_k": Types.Q4_K,
    "attn_v": Types.Q4_K,
    "attn_output": Types.Q5_K,
    "ffn_gate": Types.Q4_0,
    "ffn_up": Types.Q4_1,
    "ffn_down": Types.Q5_1,
    "token_embd": Types.Q4_K,
    "output": Types.Q6_K,
}

# Numbers out of a table.
IQ4 = {
    "attn_q": Types.IQ4_XS,
    "attn_k": Types.IQ4_XS,
    "attn_v": Types.IQ4_NL,
    "attn_output": Types.IQ4_NL,
    "ffn_gate": Types.IQ4_XS,
    "ffn_up": Types.IQ4_XS,
    "ffn_down": Types.IQ4_XS,
    "token_embd": Types.IQ4_NL,
    "output": Types.Q6_K,
}


class Writer:
    """A writer that stores weights in blocks, by the ends of their names; ``read`` holds what they stand for.

    The gguf library does not make blocks of K and IQ types: theirs are random bytes, whose scales give
    numbers a usual size.
    """

    def __init__(self, writer: gguf.GGUFWriter, kinds: dict[str, Types]) -> None:
        self.writer, self.kinds = writer, kinds
        self.read: dict[str, np.ndarray] = {}

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        kind = next((k for end, k in self.kinds.items() if name.endswith(f"{end}.weight")), None)
        if kind is None:
            self.writer.add_tensor(name, values)
            return
        made = kind.name.startswith("IQ") or "K" in kind.name
        blocks = self._random(values, kind) if made else gguf.quants.quantize(values, kind)
        self.read[name] = gguf.quants.dequantize(blocks, kind)
        self.writer.add_tensor(name, blocks, raw_dtype=kind)

    def _random(self, values: np.ndarray, kind: Types) -> np.ndarray:
        raw = random_blocks(kind.name.lower(), *values.shape, seed=len(self.read))
        size = values.std() / gguf.quants.dequantize(raw, kind).std()
        records = raw.reshape(-1, BLOCK_TYPES[kind.name.lower()].sizes[1]).view(
            BLOCK_TYPES[kind.name.lower()].layout
        )
        for field in {"d", "dmin"} & {*(records.dtype.names or ())}:
            records[field] = (records[field] * size).astype(np.float16)
        return raw
