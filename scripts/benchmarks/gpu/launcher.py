"""Runs and times candidates of CUDA implementations on the present GPU, compiled as the planner does.

call = op_call(rms_norm, {"x": x, "weight": w}, {"eps": 1e-6})
y = run(candidate, call, {"x": x, "weight": w})["y"]          # one launch after the other
seconds = time(candidate, call, [tensors, tensors2, ...])     # a CUDA graph that rotates over the sets
check(rms_norm, emit, tensors, attrs)                         # every candidate against float64
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import kernel_call
from benchmarks.gpu.kernel_call import dtype_name
from makeready.graphs.plan.devices import Device, device_named, find_device
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.cuda.aot import Compiled, Kernel, kernel_of
from makeready.graphs.planner.cuda.pool import compile_each
from makeready.graphs.planner.plan_cache import cache_folder
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall, Tensor
from makeready.kernels.spec import TensorSpec

Emit = Callable[[OpCall], Sequence[Candidate]]

_PREPARED: dict[Kernel, Compiled] = {}
_REFUSED: set[Kernel] = set()


def op_call(
    contract: Contract,
    tensors: Mapping[str, torch.Tensor],
    attrs: Mapping[str, Any] | None = None,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    context: int = 1024,
    pages: bool = True,
    spare: bool = False,
) -> OpCall:
    """The call of ``contract`` on ``tensors``; results are dense, addresses multiples of 256.

    Args:
        rows, tokens: of the bucket; by default what axes R and T are.
        pages: whether axis P of caches is left as the symbol, as it is in a plan.
        spare: whether maps of operands may reach beyond the last row; there must be memory.
    """
    attrs = {**contract.attrs, **(attrs or {})}
    specs = {k: TensorSpec(tuple(v.shape), dtype_name(v.dtype)) for k, v in tensors.items()}
    specs = {k: v for k, v in specs.items() if k in {o.name for o in contract.inputs}}
    results = contract.infer(specs, attrs)
    dims = dict(contract.dims(specs, attrs))
    made = {k: Tensor(v.shape, v.dtype, _row(v.shape), 256) for k, v in results.items()}
    for operand in contract.inputs:
        if operand.name not in tensors:
            continue
        tensor = tensors[operand.name]
        shape: tuple[Any, ...] = tuple(tensor.shape)
        if pages and operand.axes[:1] == ("P",):
            shape = ("P", *shape[1:])
        address = tensor.data_ptr()
        made[operand.name] = Tensor(
            shape, dtype_name(tensor.dtype), tensor.stride(0), math.gcd(address, 256), spare
        )
    row_count = int(dims.get("R", dims.get("T", 1))) if rows is None else rows
    token_count = int(dims.get("T", row_count)) if tokens is None else tokens
    if pages and "P" in dims:
        dims["P"] = "P"
    features = frozenset({"tma", "wgmma", "pdl", "fp8"})
    figures = _figures()
    return OpCall(
        contract.name,
        made,
        attrs,
        dims,
        row_count,
        token_count,
        context,
        multiprocessors=figures.multiprocessors,
        bandwidth=figures.bandwidth,
        flops=figures.flops,
        features=features,
    )


def prepare(work: Iterable[tuple[OpCall, Sequence[Candidate]]]) -> None:
    """Compile what :func:`run` and :func:`time` are about to need at once, on all cores.

    What does not compile is remembered; see :func:`fits`.
    """
    kernels = [
        kernel_of(launch, call, _arch()) for call, ways in work for way in ways for launch in way.launches
    ]
    made = compile_each(kernels, _kernels())
    _PREPARED.update({k: compiled for k, compiled in made.items() if isinstance(compiled, Compiled)})
    _REFUSED.update(k for k, compiled in made.items() if not isinstance(compiled, Compiled))


def fits(candidate: Candidate, call: OpCall) -> bool:
    """Whether the kernels of ``candidate`` compile and find the resources that they need, as a plan asks for."""
    for launch in candidate.launches:
        kernel = kernel_of(launch, call, _arch())
        if kernel in _REFUSED:
            return False
        try:
            compiled = _compiled(kernel)
        except PlanError:
            _REFUSED.add(kernel)
            return False
        if compiled.spill_bytes > launch.local_bytes or compiled.shared > call.shared_bytes:
            return False
    return True


def run(
    candidate: Candidate,
    call: OpCall,
    tensors: Mapping[str, torch.Tensor],
    *,
    scratch: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Run ``candidate`` once and wait; gives ``tensors`` and the results.

    Results that ``tensors`` lacks are allocated and poisoned with NaN (integers: the most negative value).
    Scratch, unless given, holds garbage behind its zeroed counters, which must be zero again afterwards.
    """
    full = {**results(call, tensors), **tensors}
    if scratch is None:
        scratch = new_scratch(candidate)
    launch_all(candidate, call, full, scratch, torch.cuda.current_stream())
    torch.cuda.synchronize()
    left = scratch[: candidate.zeroed].count_nonzero().item()
    assert left == 0, f"{candidate.name}: {left} bytes of its counters are not zero after the call"
    return full


def time(
    candidate: Candidate,
    call: OpCall,
    tensors_list: Sequence[Mapping[str, torch.Tensor]],
    reps: int = 20,
) -> float:
    """Median seconds of one call in a CUDA graph of ``reps`` or more calls that rotate over ``tensors_list``.

    Give enough sets to exceed the 50 MiB of L2 where the operands would be read from memory in a model.
    """
    sets = [{**results(call, tensors), **tensors} for tensors in tensors_list]
    scratch = new_scratch(candidate)

    def calls() -> None:
        for i in range(count):
            stream = torch.cuda.current_stream()
            launch_all(candidate, call, sets[i % len(sets)], scratch, stream)

    count = -(-max(reps, len(sets)) // len(sets)) * len(sets)
    return time_graph(calls) / count


def time_chains(
    chains: Sequence[Sequence[tuple[Candidate, OpCall, Mapping[str, torch.Tensor]]]], reps: int = 20
) -> float:
    """Median seconds of one chain of calls, in a CUDA graph that rotates over ``chains``; tensors hold results."""
    rounds = -(-max(reps, len(chains)) // len(chains))
    links = [[(*link, new_scratch(link[0])) for link in chain] for chain in chains]

    def calls() -> None:
        stream = torch.cuda.current_stream()
        for _ in range(rounds):
            for way, call, tensors, scratch in (link for chain in links for link in chain):
                launch_all(way, call, tensors, scratch, stream)

    return time_graph(calls) / (rounds * len(chains))


def time_each(
    run_one: Callable[[Mapping[str, torch.Tensor]], object],
    sets: Sequence[Mapping[str, torch.Tensor]],
    reps: int = 20,
) -> float:
    """Median seconds of ``run_one`` on one set, what PyTorch launches for it, timed as :func:`time` does."""
    rounds = -(-max(reps, len(sets)) // len(sets))

    def calls() -> None:
        for _ in range(rounds):
            for tensors in sets:
                run_one(tensors)

    return time_graph(calls) / (rounds * len(sets))


def time_graph(calls: Callable[[], None], repeats: int = 7) -> float:
    """Median seconds of ``calls`` (launches on the current stream), captured as a graph and replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    seconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def check(
    contract: Contract,
    emit: Emit,
    tensors: Mapping[str, torch.Tensor],
    attrs: Mapping[str, Any] | None = None,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    context: int = 1024,
    allowed: Mapping[str, float] | None = None,
) -> None:
    """Hold every candidate to the contract's reference, run in float64 on the CPU; and to itself, run twice.

    Results and operands that the op writes are compared by Frobenius norm under the contract's tolerance
    (integers and infinities exactly); a NaN never passes.

    Args:
        allowed: relative errors of results that the tolerance of their dtype does not fit.
    """
    call = op_call(contract, tensors, attrs, rows=rows, tokens=tokens, context=context)
    names = {o.name for o in contract.inputs}
    wide = {k: _widened(v) for k, v in tensors.items() if k in names}
    operands = [wide.get(o.name) for o in contract.inputs]
    expected = contract.reference(*operands, **call.attrs)
    outputs = (expected,) if len(contract.outputs) == 1 else (expected or ())
    wanted = {o.name: v for o, v in zip(contract.outputs, outputs, strict=True)}
    wanted |= {name: wide[name] for name in contract.writes if name in wide}
    candidates = emit(call)
    assert candidates, f"{contract.name}: no candidate for {call}"
    for candidate in candidates:
        first, second = (
            run(candidate, call, {k: _copy(v) if k in contract.writes else v for k, v in tensors.items()})
            for _ in range(2)
        )
        for name, want in wanted.items():
            where = f"{contract.name}/{candidate.name}: {name} of {_sizes(call)}"
            assert torch.equal(_bits(first[name]), _bits(second[name])), f"{where} differs between two runs"
            _compare(first[name], want, contract, where, (allowed or {}).get(name))


def _compare(
    got: torch.Tensor, want: torch.Tensor, contract: Contract, where: str, allowed: float | None
) -> None:
    got_cpu = got.cpu()
    if contract.tolerance.exact or not got.dtype.is_floating_point:
        assert torch.equal(got_cpu.double(), want.double()), f"{where} is not equal"
        return
    of_dtype: float = getattr(contract.tolerance, dtype_name(got.dtype), 8e-2)  # fp8 keeps 3 bits of mantissa
    limit = of_dtype if allowed is None else allowed
    infinite = want.double().isinf()
    assert torch.equal(got_cpu.double()[infinite], want.double()[infinite]), f"{where}: infinities elsewhere"
    mine, other = (x.double()[~infinite] for x in (got_cpu, want))
    error = (mine - other).norm() / other.norm().clamp_min(1e-30)
    assert error.item() <= limit, f"{where} is off by {error.item():.2e}, allowed are {limit:.0e}"


def new_scratch(candidate: Candidate) -> torch.Tensor:
    """Scratch as a call may find it: counters at zero, garbage behind them."""
    scratch = torch.full((max(candidate.scratch, candidate.zeroed, 1),), 0xFF, dtype=torch.uint8).cuda()
    scratch[: candidate.zeroed] = 0
    return scratch


def launch_all(
    candidate: Candidate,
    call: OpCall,
    tensors: Mapping[str, torch.Tensor],
    scratch: torch.Tensor,
    stream: torch.cuda.Stream,
) -> None:
    """Launch ``candidate`` on ``stream`` and return at once; ``tensors`` hold the results, too."""
    for launch in candidate.launches:
        compiled, function = _loaded(kernel_of(launch, call, _arch()))
        spilled = compiled.spill_bytes
        assert spilled <= launch.local_bytes, f"{launch.function}: {spilled} bytes spilled ({launch})"
        kernel_call.start(function, launch, compiled, tensors, scratch, stream)


@cache
def _compiled(kernel: Kernel) -> Compiled:
    made = _PREPARED.get(kernel) or compile_each([kernel], _kernels())[kernel]
    if isinstance(made, PlanError):
        raise made
    return made


def _kernels() -> Path:
    """The folder that plans take kernels from, so that what was compiled once, by whatever process, is there."""
    return cache_folder() / "kernels"


@cache
def _loaded(kernel: Kernel) -> tuple[Compiled, Any]:
    compiled = _compiled(kernel)
    return compiled, kernel_call.load(compiled)


@cache
def _figures() -> Device:
    """Of the present GPU, or where its figures are not known of the default one, by which plans are chosen then."""
    found = device_named(torch.cuda.get_device_name()) if torch.cuda.device_count() else None
    return found or find_device("sm_90a", None)


@cache
def _arch() -> int:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the context
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def results(call: OpCall, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Results of ``call`` that ``tensors`` lack, poisoned as :func:`run` says."""
    made = {}
    for name, tensor in call.tensors.items():
        if name in tensors:
            continue
        dtype = getattr(torch, tensor.dtype)
        sizes = tuple(int(d) for d in tensor.shape)
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        made[name] = torch.full(sizes, poison, dtype=torch.float32 if dtype.itemsize == 1 else dtype).to(
            device="cuda", dtype=dtype
        )
    return made


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().double() if tensor.dtype.is_floating_point else tensor.cpu().clone()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _row(shape: Sequence[Any]) -> int:
    return math.prod(int(d) for d in shape[1:])


def _sizes(call: OpCall) -> str:
    return ", ".join(f"{k}={v}" for k, v in call.dims.items())
