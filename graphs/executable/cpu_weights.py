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
from makeready.graphs.derivation import derived_groups
from makeready.graphs.plan import Plan, Weight
from makeready.graphs.reads import Read, fetch, reads
from makeready.graphs.recipe import Derivation, Operand, Param
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm.linear_cpu import PACKED, pack

# Arrays of a mapped file are read-only; they are only copied from.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Progress = Callable[[int, int], None]
Fill = Callable[[torch.Tensor], Any]  # writes a parameter into a tensor of its shape and dtype

LAYOUTS: Mapping[str, Callable[[torch.Tensor], Any]] = {"rows": lambda x: x, PACKED: pack}


def load_weights(plan: Plan, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Every parameter by name, as the tensor or the packed object that kernels take.

    Parameters are converted side by side in a few threads: reading, dequantizing and packing release the
    interpreter, and none of them uses all cores by itself.
    """
    region = torch.empty(plan.memory.weights, dtype=torch.uint8)
    lock, done = threading.Lock(), 0
    params = [weight.param for weight in plan.weights]
    groups = derived_groups(params)
    alone = set(range(len(params))).difference(*(results.values() for _, results in groups))

    def load(task: int | tuple[Derivation, dict[str, int]]) -> dict[int, Any]:
        nonlocal done
        made = (
            {task: _plain(params[task], checkpoint)} if isinstance(task, int) else _derived(*task, checkpoint)
        )
        loaded = {index: _stored(plan.weights[index], fill, region) for index, fill in made.items()}
        with lock:
            done += len(loaded)
            progress(done, len(params))
        return loaded

    tasks = sorted(
        [*alone, *groups], key=lambda task: task if isinstance(task, int) else min(task[1].values())
    )
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = {index: value for made in pool.map(load, tasks) for index, value in made.items()}
    return {param.name: found[index] for index, param in enumerate(params)}


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


def assemble(operand: Operand, checkpoint: Checkpoint, target: torch.Tensor) -> None:
    """Put ``operand`` together in ``target``."""
    if operand.largest:
        target.fill_(max(_fetch(read, checkpoint).float().item() for read in reads(operand)))
        return
    if operand.padding:
        target.view(torch.uint8).zero_()  # 8-bit floats cannot be filled
    for read in reads(operand):
        place = target[tuple(slice(start, stop) for start, stop in read.place)]
        if read.number:
            place.fill_(_fetch(read, checkpoint).float().item())
        else:
            place.copy_(_fetch(read, checkpoint))


def _fetch(read: Read, checkpoint: Checkpoint) -> torch.Tensor:
    return as_tensor(fetch(checkpoint, read), checkpoint.tensors[read.source].dtype)


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor over what :meth:`Checkpoint.read` gave, whose bits may be a float's that numpy lacks."""
    tensor = torch.from_numpy(array)
    return tensor.view(getattr(torch, dtype)) if dtype in ("bfloat16", "float8_e4m3fn") else tensor
