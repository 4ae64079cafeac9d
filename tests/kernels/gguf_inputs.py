"""Operands of ops over GGUF's blocks: random bytes with sane scales, which reach every value that a type has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from case import Case, Random, in_columns, int32

from makeready.kernels.gguf import KINDS, row_bytes
from makeready.kernels.gguf_dequantize import BLOCK_TYPES
from makeready.kernels.gguf_groups import GROUPS


def random_blocks(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 ``[rows, bytes]``."""
    elements, nbytes = BLOCK_TYPES[kind].sizes
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows * width // elements, nbytes), dtype=np.uint8)
    records = raw.view(BLOCK_TYPES[kind].layout)[:, 0]
    for name in ("d", "m", "dmin"):
        if name in (BLOCK_TYPES[kind].layout.names or ()):
            records[name] = (random.standard_normal(len(records)) * 0.01).astype(np.float16)
    return raw.reshape(rows, -1)


def _tensor(*parts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))


def linear_gguf(op: str) -> Iterator[Case]:
    for kind in KINDS:
        shapes = [(3, 512, 37), (1, 256, 33), (9, 768, 20)]
        shapes += [(1, 32, 3), (5, 96, 1), (13, 64, 65)] if BLOCK_TYPES[kind].elements == 32 else []
        for seed, (tokens, width, outputs) in enumerate(shapes):
            random = Random(seed)
            blocks = _tensor(random_blocks(kind, outputs, width, seed))
            attrs = {"rows": f"{kind}*{outputs}", "outputs": outputs, "out_dtype": ""}
            operands = {"x": random.normal(tokens, width), "blocks": blocks}
            label = f"{kind}-{tokens}x{width}x{outputs}"
            yield Case(op, label, operands, attrs)
            more = {"x": in_columns(operands["x"]), "bias": random.normal(outputs)}
            yield Case(op, f"{label}-bias", operands | more, attrs | {"out_dtype": "float32"})
    blocks = _tensor(
        random_blocks("q4_k", 40, 512), random_blocks("q8_0", 7, 512), random_blocks("q5_0", 33, 512)
    )
    attrs = {"rows": "q4_k*40+q8_0*7+q5_0*33", "outputs": 80, "out_dtype": ""}
    x = Random(1).normal(4, 512)
    x[1] = 0
    x[2, 100:] *= 1e-30
    yield Case(op, "mixed", {"x": x, "blocks": blocks}, attrs)
    x = Random(1).normal(11, 512)
    x[3, 5], x[7, 500] = float("nan"), float("inf")
    yield Case(op, "not-finite", {"x": x, "blocks": blocks}, attrs)
    yield Case(op, "half", {"x": Random(1).normal(2, 512, dtype="bfloat16"), "blocks": blocks}, attrs)


def embedding_gguf(op: str) -> Iterator[Case]:
    for kind, (width, out) in itertools.product(KINDS, ((512, "float32"), (256, "bfloat16"))):
        blocks = _tensor(random_blocks(kind, 11, width))
        attrs = {"rows": f"{kind}*11", "width": width, "out_dtype": out}
        yield Case(op, f"{kind}-{out}", {"ids": int32([10, 0, 3, 3]), "blocks": blocks}, attrs)
    blocks = _tensor(random_blocks("q4_1", 3, 32), random_blocks("q8_0", 2, 32))
    attrs = {"rows": "q4_1*3+q8_0*2", "width": 32, "out_dtype": "float32"}
    yield Case(op, "mixed", {"ids": int32([4, 1, 2]), "blocks": blocks}, attrs)


def _made(op: str, kinds: Iterable[str], names: tuple[str, ...]) -> Iterator[Case]:
    for kind in kinds:
        elements, _ = BLOCK_TYPES[kind].sizes
        for outputs, inputs in ((70, 768), (1, elements), (64, 3 * elements), (131, 1280)):
            form = GROUPS[kind]
            attrs = {"kind": kind, "row": row_bytes(kind, inputs), "inputs": inputs}
            attrs |= {name: getattr(form, name) for name in names}
            blocks = {"blocks": _tensor(random_blocks(kind, outputs, inputs, outputs))}
            yield Case(op, f"{kind}-{outputs}x{inputs}", blocks, attrs)


def repack_gguf(op: str) -> Iterator[Case]:
    yield from _made(op, GROUPS, ("bits",))


def scales_gguf(op: str) -> Iterator[Case]:
    yield from _made(op, GROUPS, ("group",))


def offsets_gguf(op: str) -> Iterator[Case]:
    yield from _made(op, (kind for kind, form in GROUPS.items() if form.offsets), ("group",))
