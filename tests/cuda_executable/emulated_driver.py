"""A fake GPU that computes: nodes of plans.py's made-up kernels run by the op references, on the fake's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fake_objects import FakeNode

from makeready.graphs.executable.cuda import memory as cuda_memory
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.spec import Bucket
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.spec import DTYPE_BYTES, PAGES

Change = Callable[[Bucket, int, dict[str, torch.Tensor]], None]


class Emulator:
    """Runs nodes of an executable's graphs.

    Args:
        change: told bucket, place of the launch and its operands and results by name, after each launch.
    """

    def __init__(self, executable: CudaExecutable, change: Change = lambda bucket, at, named: None) -> None:
        self._executable, self._change = executable, change
        self._launches: dict[Any, tuple[Bucket, int, Launch]] = {}
        for bucket in executable.plan.buckets:
            addresses = self._addresses(bucket)
            program = executable.plan.programs[bucket.phase]
            for at, launch in enumerate(program.launches):
                values = (*launch.operands.values(), *launch.results.values())
                words = tuple(addresses[value] for value in values)
                self._launches[launch.op, (bucket.rows, bucket.tokens, 2), words] = bucket, at, launch

    def _addresses(self, bucket: Bucket) -> dict[str, int]:
        made = self._executable
        return cuda_memory.bucket_addresses(made.plan, made._regions, made._lasting, bucket)

    def __call__(self, nodes: list[FakeNode]) -> None:
        for node in nodes:
            op = node.function.name
            if not op.endswith("_maps"):  # of a call's nodes the first one takes every operand
                words = tuple(int.from_bytes(p, "little") for p in node.parameters[1:-3])
                self._run(*self._launches[op.rpartition("_")[0], node.grid, words])

    def _run(self, bucket: Bucket, at: int, launch: Launch) -> None:
        op, addresses = CONTRACTS[launch.op], self._addresses(bucket)
        values = {**launch.operands, **launch.results}
        named = {n: self._tensor(bucket, v, addresses[v]) for n, v in values.items()}
        made = op.reference(*(named.get(o.name) for o in op.inputs), **launch.attrs)
        for output, value in zip(op.outputs, made if isinstance(made, tuple) else (made,), strict=False):
            named[output.name].copy_(value)
        self._change(bucket, at, named)

    def _tensor(self, bucket: Bucket, value: str, address: int) -> torch.Tensor:
        plan = self._executable.plan
        spec, buffer = plan.spec(bucket.phase, value), plan.programs[bucket.phase].buffers.get(value)
        shape, size = spec.at({**bucket.sizes, PAGES: self._executable.pages}), DTYPE_BYTES[spec.dtype]
        row = int(np.prod(shape[1:]))
        stride = buffer.row_stride if buffer is not None and buffer.row_stride is not None else row
        region = (ctypes.c_uint8 * (((shape[0] - 1) * stride + row) * size)).from_address(address)
        flat = torch.frombuffer(region, dtype=getattr(torch, spec.dtype))
        return flat.as_strided(shape, (stride, 1)) if stride != row else flat.view(shape)
