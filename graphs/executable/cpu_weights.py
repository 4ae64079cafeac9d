"""Parameters into memory, by a plan's recipe, in the layouts that the CPU's kernels want."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from makeready.graphs.checkpoint.base import Checkpoint, CheckpointError
from makeready.graphs.checkpoint.gguf_dequantize import PIECE
from makeready.graphs.constants import GENERATORS
from makeready.graphs.plan import Plan, Weight
from makeready.graphs.recipe import Derived, Param, Piece
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm.linear_cpu import PACKED, ProductError, join, pack, pack_rows, packs, part_rows

# Arrays of a mapped file are read-only; they are only copied from.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Progress = Callable[[int, int], None]

LAYOUTS: Mapping[str, Callable[[torch.Tensor], Any]] = {"rows": lambda x: x, PACKED: pack}


def load_weights(plan: Plan, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Every parameter by name, as the tensor or the packed object that kernels take.

    Ranges of rows are converted side by side in as many threads as PyTorch may use, the largest first: a
    vocabulary's projection, alone at the end, would keep one thread busy while the others wait. Reading,
    dequantizing and packing release the interpreter, and within a thread PyTorch uses no further ones.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    region = torch.empty(plan.memory.weights, dtype=torch.uint8)
    ranges = [(w, at, stop) for w in plan.weights for at, stop in _ranges(w.param)]
    left = {w.param.name: 0 for w in plan.weights}
    for weight, _, _ in ranges:
        left[weight.param.name] += 1
    lock = threading.Lock()

    def load(weight: Weight, start: int, stop: int) -> Any:
        view = region[weight.offset : weight.offset + weight.nbytes]
        loaded = _load(weight, checkpoint, view, start, stop)
        with lock:
            left[weight.param.name] -= 1
            progress(sum(not n for n in left.values()), len(left))
        return loaded

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        by_size = sorted(ranges, key=lambda r: -_numbers(r[0].param, r[1], r[2]))
        waiting = {(w.param.name, start): pool.submit(load, w, start, stop) for w, start, stop in by_size}
        found: dict[str, list[Any]] = {name: [] for name in left}
        for weight, start, _ in ranges:
            found[weight.param.name].append(waiting[weight.param.name, start].result())
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number that threads of later days begin with
    return {name: parts[0] if len(parts) == 1 else join(parts) for name, parts in found.items()}


def _packed_by_range(param: Param) -> bool:
    made = param.generated is not None or param.largest or param.derived is not None
    return param.layout == PACKED and packs() and not made


def _ranges(param: Param) -> list[tuple[int, int]]:
    """Rows of a parameter that are loaded as one piece of work."""
    rows, *rest = param.spec.at({}) or (1,)
    step = part_rows(math.prod(rest)) if _packed_by_range(param) else max(rows, 1)
    return [(at, min(at + step, rows)) for at in range(0, max(rows, 1), step)]


def _numbers(param: Param, start: int, stop: int) -> int:
    return (stop - start) * math.prod(param.spec.at({})[1:])


def _load(weight: Weight, checkpoint: Checkpoint, place: torch.Tensor, start: int, stop: int) -> Any:
    param = weight.param
    shape, dtype = param.spec.at({}), getattr(torch, param.spec.dtype)
    if _packed_by_range(param):
        # FBGEMM rounds fp32 to fp16 as PyTorch does; what a file holds in more bits goes there directly.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        _assemble(param, checkpoint, rows, start)
        try:
            return pack_rows(rows)
        except ProductError as error:
            sources = ", ".join(sorted({piece.source for piece in param.pieces}))
            raise CheckpointError(
                f"{checkpoint.path}: {sources} cannot be multiplied with: {error}; download or convert it again"
            ) from None
    # A packed parameter passes through memory of its own; its place in the region stays untouched.
    target = place.view(dtype).view(shape) if param.layout == "rows" else torch.empty(shape, dtype=dtype)
    if param.generated is not None:
        target.copy_(torch.from_numpy(GENERATORS[param.generated.function](**param.generated.arguments)))
    elif param.largest:
        target.fill_(max(_number(piece, checkpoint) for piece in param.pieces))
    elif param.derived is not None:
        target.copy_(_derive(param, param.derived, checkpoint).view(shape))
    else:
        _assemble(param, checkpoint, target)
    return LAYOUTS[param.layout](target)


def _derive(param: Param, derived: Derived, checkpoint: Checkpoint) -> torch.Tensor:
    """The result of the op over the assembled rows."""
    spec, op = derived.operand, CONTRACTS[derived.op]
    operand = torch.empty(spec.at({}), dtype=getattr(torch, spec.dtype))
    _assemble(param, checkpoint, operand)
    made = op.reference(operand, **derived.attrs)
    return dict(zip((o.name for o in op.outputs), made, strict=True))[derived.result]


def _assemble(param: Param, checkpoint: Checkpoint, target: torch.Tensor, first: int = 0) -> None:
    """Rows from ``first`` on, as many as ``target`` has."""
    if param.columns is not None:
        target.view(torch.uint8).zero_()
        target = target[:, : param.columns]
    for piece in param.pieces:
        start, stop = max(piece.at, first), min(piece.at + piece.stop - piece.start, first + len(target))
        if start >= stop:
            continue
        place = target[start - first : stop - first]
        if piece.repeated:
            place.fill_(_number(piece, checkpoint))
            continue
        # Little by little: what is dequantized and then rounded stays in the cache, in memory that is there.
        begin, step = piece.start + start - piece.at, max(1, PIECE // max(1, place[0].numel()))
        for at in range(0, len(place), step):
            part = place[at : at + step]
            read = _read(piece, checkpoint, slice(begin + at, begin + at + len(part)))
            part.copy_(read.view(part.shape))


def _number(piece: Piece, checkpoint: Checkpoint) -> float:
    return _read(piece, checkpoint, None).float().item()


def _read(piece: Piece, checkpoint: Checkpoint, rows: slice | None) -> torch.Tensor:
    return as_tensor(checkpoint.read(piece.source, rows), checkpoint.tensors[piece.source].dtype)


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor over what :meth:`Checkpoint.read` gave, whose bits may be a float's that numpy lacks."""
    tensor = torch.from_numpy(array)
    return tensor.view(getattr(torch, dtype)) if dtype in ("bfloat16", "float8_e4m3fn") else tensor
