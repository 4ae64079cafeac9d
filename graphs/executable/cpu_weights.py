"""Parameters into memory, by a plan's recipe, in the layouts that the CPU's kernels want."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.constants import GENERATORS
from makeready.graphs.plan import Plan, Weight
from makeready.graphs.recipe import Derived, Param, Piece
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm.linear_cpu import PACKED, pack

# Arrays of a mapped file are read-only; they are only copied from.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Progress = Callable[[int, int], None]

LAYOUTS: Mapping[str, Callable[[torch.Tensor], Any]] = {"rows": lambda x: x, PACKED: pack}


def load_weights(plan: Plan, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Every parameter by name, as the tensor or the packed object that kernels take.

    Parameters are converted side by side in a few threads: reading, dequantizing and packing release the
    interpreter, and none of them uses all cores by itself.
    """
    region = torch.empty(plan.memory.weights, dtype=torch.uint8)
    lock, done = threading.Lock(), 0

    def load(weight: Weight) -> Any:
        nonlocal done
        view = region[weight.offset : weight.offset + weight.nbytes]
        loaded = _load(weight, checkpoint, view)
        with lock:
            done += 1
            progress(done, len(plan.weights))
        return loaded

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip((w.param.name for w in plan.weights), pool.map(load, plan.weights), strict=True))


def _load(weight: Weight, checkpoint: Checkpoint, place: torch.Tensor) -> Any:
    param = weight.param
    shape, dtype = param.spec.at({}), getattr(torch, param.spec.dtype)
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


def _assemble(param: Param, checkpoint: Checkpoint, target: torch.Tensor) -> None:
    if param.columns is not None:
        target.view(torch.uint8).zero_()
        target = target[:, : param.columns]
    for piece in param.pieces:
        place = target[piece.at : piece.at + piece.stop - piece.start]
        if piece.repeated:
            place.fill_(_number(piece, checkpoint))
        else:
            place.copy_(_read(piece, checkpoint, slice(piece.start, piece.stop)).view(place.shape))


def _number(piece: Piece, checkpoint: Checkpoint) -> float:
    return _read(piece, checkpoint, None).float().item()


def _read(piece: Piece, checkpoint: Checkpoint, rows: slice | None) -> torch.Tensor:
    return as_tensor(checkpoint.read(piece.source, rows), checkpoint.tensors[piece.source].dtype)


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor over what :meth:`Checkpoint.read` gave, whose bits may be a float's that numpy lacks."""
    tensor = torch.from_numpy(array)
    return tensor.view(getattr(torch, dtype)) if dtype in ("bfloat16", "float8_e4m3fn") else tensor
