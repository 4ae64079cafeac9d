"""Products with GGUF's blocks on the CPU, as they lie in the mapped file: csrc/gguf.c.

Without the compiled library blocks are widened when a plan is bound, and multiplied by PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_gguf import embedding_gguf, linear_gguf
from makeready.kernels.gguf import KINDS, nbytes_of, row_bytes, rows_of, to_8_bits, widened
from makeready.kernels.registry import Bind, Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear_gguf, Contract)
assert isinstance(embedding_gguf, Contract)

MAPPED = "mapped"
VARIANTS = (
    "",
    "scalar",
    "avx2",
    "avx512",
    "panel",
)  # instructions; the first is the best that the processor has


class Mapped:
    """Bytes that stay where they are, in one or several places.

    Args:
        places: uint8, contiguous, one after the other.
    """

    def __init__(self, places: Sequence[np.ndarray]) -> None:
        self.places = tuple(places)
        self._wide: dict[tuple[str, int], torch.Tensor] = {}

    def parts(self, rows: str, width: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """Type, number of rows and bytes of every part.

        Raises:
            ValueError: a part lies in two places.
        """
        left, place = list(self.places), np.empty(0, np.uint8)
        for kind, count in rows_of(rows):
            nbytes = count * row_bytes(kind, width)
            place = place if len(place) else left.pop(0)
            if nbytes > len(place):
                raise ValueError(f"{count} rows of {kind} lie in several places")
            yield kind, count, place[:nbytes]
            place = place[nbytes:]

    def table(self, rows: str, width: int) -> torch.Tensor:
        """int64 ``[parts, 4]``: address, number of the type, rows, first row."""
        made, first = [], 0
        for kind, count, place in self.parts(rows, width):
            made.append((place.ctypes.data, KINDS.index(kind), count, first))
            first += count
        return torch.tensor(made)

    def wide(self, rows: str, width: int) -> torch.Tensor:
        """fp32 ``[N, width]``, made once."""
        if (rows, width) not in self._wide:
            self._wide[rows, width] = widened(torch.from_numpy(np.concatenate(self.places)), rows, width)
        return self._wide[rows, width]


def mapped(blocks: torch.Tensor) -> Mapped:
    """A tensor's bytes, where they are."""
    return Mapped([blocks.numpy()])


def has(variant: str) -> bool:
    """Whether the compiled library is there and the processor has the instructions of a variant."""
    answer = torch.zeros(1, dtype=torch.int64)
    call = native.prepare("gguf_has", VARIANTS.index(variant), answer)
    if call is not None:
        call()
    return bool(answer)


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    x = specs["x"]
    if x.dtype != "float32" or attrs["out_dtype"] not in ("", "float32"):
        return False
    if "bias" in specs and specs["bias"].dtype != "float32":
        return False
    width, outputs = x.shape[1], attrs["outputs"]
    return isinstance(width, int) and _fits(specs["blocks"], attrs["rows"], width, outputs)


def _fits(blocks: TensorSpec, rows: str, width: int, outputs: int) -> bool:
    """Whether there are as many bytes as the rows take."""
    try:
        return (nbytes_of(rows, width),) == blocks.shape and sum(n for _, n in rows_of(rows)) == outputs
    except ValueError:
        return False


def product(
    x: torch.Tensor,
    blocks: Mapped,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    rows: str,
    *,
    variant: str = "",
    by_rows: bool = False,
    threads: int | None = None,
) -> Callable[[], None] | None:
    """A call that writes ``x @ weight.T + bias`` into y; None without the compiled library.

    The caller keeps all operands.
    """
    table = blocks.table(rows, x.shape[1])
    call = native.prepare(
        "linear_gguf", x, x.stride(0), table, len(table), bias, y, y.stride(0), *x.shape,
        VARIANTS.index(variant), by_rows, long=x.numel() * y.shape[1] > native.LONG, threads=threads,
    )  # fmt: skip
    return call and native.keeping(call, table)


def _binding(by_rows: bool) -> Bind:
    def bind(
        operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        (x, blocks, bias), (y,) = operands, results
        return product(x, blocks, bias, y, attrs["rows"], by_rows=by_rows)

    return bind


_STORED = {"blocks": MAPPED}


@kernel(linear_gguf, "blocks", target="cpu", layouts=_STORED, applies=_applies, bind=_binding(by_rows=False))
@kernel(
    linear_gguf,
    "blocks_by_rows",
    target="cpu",
    layouts=_STORED,
    invariant=True,
    ordinary=False,
    applies=_applies,
    bind=_binding(by_rows=True),
)
def linear_gguf_cpu(
    x: torch.Tensor,
    blocks: Mapped,
    bias: torch.Tensor | None = None,
    *,
    rows: str,
    outputs: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """The reference over widened rows, each token by itself."""
    wide = blocks.wide(rows, x.shape[1])
    y = torch.cat([one.clone() @ wide.T for one in to_8_bits(x, torch.float32).split(1)])
    return y if bias is None else y + bias


def _embedding_applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    try:
        return (
            attrs["out_dtype"] == "float32"
            and (nbytes_of(attrs["rows"], attrs["width"]),) == specs["blocks"].shape
        )
    except ValueError:
        return False


def _bind_embedding(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (ids, blocks), (x,) = operands, results
    table = blocks.table(attrs["rows"], attrs["width"])
    if len(table) > 1:
        return None
    call = native.prepare("embedding_gguf", ids, table, x, x.stride(0), *x.shape)
    return call and native.keeping(call, table)


@kernel(
    embedding_gguf,
    "blocks",
    target="cpu",
    layouts=_STORED,
    invariant=True,
    applies=_embedding_applies,
    bind=_bind_embedding,
)
def embedding_gguf_cpu(
    ids: torch.Tensor, blocks: Mapped, *, rows: str, width: int, out_dtype: str = "float32"
) -> torch.Tensor:
    """The reference, widened once."""
    return blocks.wide(rows, width)[ids.long()]
