"""Parameters into memory, by a plan's recipe, in the layouts that the CPU's kernels want."""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from makeready.graphs.checkpoint.base import Checkpoint, CheckpointError
from makeready.graphs.plan.constants import GENERATORS
from makeready.graphs.plan.plan import Plan, Weight
from makeready.graphs.plan.reads import Read, fetch, reads
from makeready.graphs.plan.recipe import Derivation, Operand, Param
from makeready.graphs.planner.derivation import derived_groups
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm.linear_cpu import PACKED, ProductError, join, pack, pack_rows, packs, part_rows
from makeready.kernels.gemm.linear_gguf_cpu import MAPPED, Mapped, mapped
from makeready.kernels.gguf_dequantize import PIECE
from makeready.kernels.moe.experts_cpu import PACKED_EXPERTS, pack_experts

# Arrays of a mapped file are read-only; they are only copied from.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Progress = Callable[[int, int], None]
Fill = Callable[[torch.Tensor], Any]  # writes a parameter into a tensor of its shape and dtype

LAYOUTS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "rows": lambda x: x,
    PACKED: pack,
    PACKED_EXPERTS: pack_experts,
    MAPPED: mapped,
}


def load_weights(plan: Plan, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Every parameter by name, as the tensor or the packed object that kernels take.

    Ranges of rows are converted side by side in as many threads as PyTorch may use, the largest first: a
    vocabulary's projection, alone at the end, would keep one thread busy while the others wait. Reading,
    dequantizing and packing release the interpreter, and within a thread PyTorch uses no further ones.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    region = torch.empty(plan.memory.weights, dtype=torch.uint8)
    lock = threading.Lock()
    params = [weight.param for weight in plan.weights]
    groups = derived_groups(params)
    alone = set(range(len(params))).difference(*(results.values() for _, results in groups))
    ranges = [(index, start, stop) for index in sorted(alone) for start, stop in _ranges(params[index])]
    left = dict.fromkeys(range(len(params)), 1) | Counter(index for index, _, _ in ranges)

    def count(index: int) -> None:
        with lock:
            left[index] -= 1
            progress(sum(not n for n in left.values()), len(left))

    def load_range(index: int, start: int, stop: int) -> Any:
        made = _load(plan.weights[index], checkpoint, region, start, stop)
        count(index)
        return made

    def load_derived(by: Derivation, results: dict[str, int]) -> dict[int, Any]:
        made = _derived(by, results, checkpoint)
        loaded = {index: _stored(plan.weights[index], fill, region) for index, fill in made.items()}
        for index in loaded:
            count(index)
        return loaded

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        derived = [pool.submit(load_derived, *group) for group in groups]
        by_size = sorted(ranges, key=lambda r: -_numbers(params[r[0]], r[1], r[2]))
        waiting = {
            (index, start): pool.submit(load_range, index, start, stop) for index, start, stop in by_size
        }
        parts: dict[int, list[Any]] = defaultdict(list)
        for index, start, _ in ranges:
            parts[index].append(waiting[index, start].result())
        found = {index: made[0] if len(made) == 1 else join(made) for index, made in parts.items()}
        for group in derived:
            found |= group.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number that threads of later days begin with
    return {param.name: found[index] for index, param in enumerate(params)}


def _packed_by_range(param: Param) -> bool:
    plain = param.generated is None and param.derived is None and not any(o.largest for o in param.operands)
    return param.layout == PACKED and packs() and plain


def _ranges(param: Param) -> list[tuple[int, int]]:
    """Rows of a parameter that are loaded as one piece of work."""
    rows, *rest = param.spec.at({}) or (1,)
    step = part_rows(math.prod(rest)) if _packed_by_range(param) else max(rows, 1)
    return [(at, min(at + step, rows)) for at in range(0, max(rows, 1), step)]


def _numbers(param: Param, start: int, stop: int) -> int:
    return (stop - start) * math.prod(param.spec.at({})[1:])


def _load(weight: Weight, checkpoint: Checkpoint, region: torch.Tensor, start: int, stop: int) -> Any:
    param = weight.param
    if param.layout == MAPPED and param.operands:
        return _mapped(param, checkpoint)
    if not _packed_by_range(param):
        return _stored(weight, _plain(param, checkpoint), region)
    shape, dtype = param.spec.at({}), getattr(torch, param.spec.dtype)
    # FBGEMM rounds fp32 to fp16 as PyTorch does; what a file holds in more bits goes there directly.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    (operand,) = param.operands
    assemble(operand, checkpoint, rows, (start, stop))
    try:
        return pack_rows(rows)
    except ProductError as error:
        sources = ", ".join(sorted({read.source for read in reads(operand)}))
        raise CheckpointError(
            f"{checkpoint.path}: {sources} cannot be multiplied with: {error}; download or convert it again"
        ) from None


PAGE = 4096  # bytes; the system maps several at once


def _mapped(param: Param, checkpoint: Checkpoint) -> Mapped:
    """A parameter where the checkpoint has it, as far as it lies there in this order."""
    (operand,) = param.operands
    places = [np.ascontiguousarray(fetch(checkpoint, read)) for read in reads(operand)]
    for place in places:
        place[::PAGE].max()  # so that no step waits for pages of the file
    return Mapped(places)


def _stored(weight: Weight, fill: Fill, region: torch.Tensor) -> Any:
    """A parameter at its place in ``region``, or packed."""
    param = weight.param
    shape, dtype = param.spec.at({}), getattr(torch, param.spec.dtype)
    if param.layout == "rows":
        target = region[weight.offset : weight.offset + weight.nbytes].view(dtype).view(shape)
    else:  # passes through memory of its own; its place in the region stays untouched
        target = torch.empty(shape, dtype=dtype)
    fill(target)
    return LAYOUTS[param.layout](target)


def _plain(param: Param, checkpoint: Checkpoint) -> Fill:
    made = param.generated
    if made is not None:
        return lambda target: target.copy_(torch.from_numpy(GENERATORS[made.function](**made.arguments)))
    (operand,) = param.operands
    return lambda target: assemble(operand, checkpoint, target)


def _derived(by: Derivation, results: dict[str, int], checkpoint: Checkpoint) -> dict[int, Fill]:
    """The parameters that a derivation makes, by the contracts' references."""
    values: dict[str, torch.Tensor] = {}
    for name, operand in by.operands.items():
        values[name] = torch.empty(operand.spec.at({}), dtype=getattr(torch, operand.spec.dtype))
        assemble(operand, checkpoint, values[name])
    for call in by.calls:
        op = CONTRACTS[call.op]
        given = [values[call.operands[o.name]] if o.name in call.operands else None for o in op.inputs]
        made = op.reference(*given, **call.attrs)
        made = made if isinstance(made, tuple) else (made,)
        values |= {call.results[o.name]: value for o, value in zip(op.outputs, made, strict=True)}
    return {
        index: lambda target, value=values[result]: target.copy_(value.reshape(target.shape))
        for result, index in results.items()
    }


def assemble(
    operand: Operand, checkpoint: Checkpoint, target: torch.Tensor, rows: tuple[int, int] | None = None
) -> None:
    """Put ``operand``, or some of its rows, together in ``target``."""
    if operand.largest:
        target.fill_(max(_fetch(read, checkpoint).float().item() for read in reads(operand)))
        return
    if operand.padding:
        target.view(torch.uint8).zero_()  # 8-bit floats cannot be filled
    for read in reads(operand, rows):
        # Little by little: what is dequantized and then rounded stays in the cache, in memory that is there.
        for part in (read,) if read.number else read.cut(PIECE):
            place = target[tuple(slice(start, stop) for start, stop in part.place)]
            if part.number:
                place.fill_(_fetch(part, checkpoint).float().item())
            else:
                place.copy_(_fetch(part, checkpoint))


def _fetch(read: Read, checkpoint: Checkpoint) -> torch.Tensor:
    return as_tensor(fetch(checkpoint, read), checkpoint.dtype_of(read.source))


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor over what :meth:`Checkpoint.read` gave, whose bits may be a float's that numpy lacks."""
    tensor = torch.from_numpy(array)
    return tensor.view(getattr(torch, dtype)) if dtype in ("bfloat16", "float8_e4m3fn") else tensor
