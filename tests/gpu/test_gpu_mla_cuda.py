"""Latent attention in CUDA C++ on the GPU at the sizes of DeepSeek's models, against float64.

Cases whose waits give up come first (``-k guarded``): a fault gives wrong numbers instead of a hang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the kernels are for Hopper", allow_module_level=True)

import test_mla_decode_emulated as latents
import test_mla_own_emulated as own
from benchmarks.gpu import launcher
from prepared import prepare

from makeready.kernels.attention import mla, mla_decode_cuda, mla_own_cuda
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall

B16, F16 = torch.bfloat16, torch.float16
assert isinstance(mla.mla_own_attention, Contract)

_LENGTHS = (
    (1,),
    latents.EDGES,
    (1000,) * 64,
    (1024,) * 64,
    (9000, 0, 5, 300),
    (40_000,),
    tuple(64 * (r % 7) + r for r in range(200)),
)
_ROWS = (((1, 65),), ((5, 200), (3, 3), (0, 0), (1, 65), (300, 1000)), ((70, 9000), (1, 2)))
_OWN: tuple[tuple[int, ...], ...] = ((1,), (1, 63, 0, 64, 65, 129, 700), (2000,), (512,) * 4, (3,) * 100)


def _own(rows: Sequence[int], heads: int, dtype: torch.dtype) -> latents.Case:
    assert isinstance(mla.mla_own_attention, Contract)
    return mla.mla_own_attention, *own.make(rows, heads, dtype)


Make = Callable[[], latents.Case]
_GUARDED: dict[str, Make] = {
    **{f"decode {heads}": partial(latents.decode, (65, 0, 300), heads) for heads in (8, 16, 32, 64, 128)},
    "one row": partial(latents.decode, (9000,), 16),
    "extend": partial(latents.extend, _ROWS[1], 16),
    **{f"own {rows}": partial(_own, rows, 2, B16) for rows in _OWN[:2]},
}
_PLAIN: dict[str, Make] = {
    f"decode {heads} {dtype} {len(lengths)}x{lengths[0]}": partial(
        latents.decode, lengths, heads, page, dtype
    )
    for heads, page, dtype in (
        (16, 64, B16),
        (16, 128, F16),
        (5, 64, B16),
        (8, 64, B16),
        (32, 256, B16),
        (64, 64, F16),
        (128, 64, B16),
    )
    for lengths in _LENGTHS
    if heads * max(lengths) < 1_300_000  # the reference holds 512 float64 for each
}
_PLAIN |= {
    f"extend {heads} {dtype} {rows}": partial(latents.extend, rows, heads, 64, dtype)
    for heads, dtype in ((16, B16), (20, F16), (128, B16))
    for rows in _ROWS
}
_PLAIN |= {
    f"own {heads} {dtype} {len(rows)}x{rows[0]}": partial(_own, rows, heads, dtype)
    for heads, dtype in ((16, B16), (3, F16))
    for rows in _OWN
}
_CASES: dict[str, Make] = {f"guarded {name}": make for name, make in _GUARDED.items()} | _PLAIN
SMALL = tuple(_GUARDED.values())  # for sanitize.py


def candidate(call: OpCall, *, guarded: bool = False) -> Candidate:
    """The way to run ``call``; waits give up where ``guarded``."""
    module = mla_own_cuda if call.op == "mla_own_attention" else mla_decode_cuda
    return module.candidate(call, give_up=200_000 if guarded else 0)


def _meta(make: Make) -> OpCall:
    contract, tensors, attrs = make()
    return launcher.op_call(contract, {name: x.cuda() for name, x in tensors.items()}, attrs)


@pytest.fixture(scope="module")
def kernels() -> None:
    """Everything compiled on all cores."""
    calls = [(_meta(make), name.startswith("guarded")) for name, make in _CASES.items()]
    prepare((call, [candidate(call, guarded=guarded)]) for call, guarded in calls)


def check(make: Make, *, guarded: bool = False) -> None:
    """Twice in a row, with the same bits whatever scratch held, and right."""
    contract, tensors, attrs = make()
    moved = {key: x.cuda() for key, x in tensors.items()}
    call = launcher.op_call(contract, moved, attrs)
    runs = [launcher.run(candidate(call, guarded=guarded), call, moved) for _ in range(2)]
    first, second = ({k: x.cpu() for k, x in run.items() if k not in tensors} for run in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)
    if call.op == "mla_own_attention":
        found = own.error((tensors, attrs), first)
    else:
        found = latents.error((contract, tensors, attrs), first)
    assert found < (6e-3 if tensors["q"].dtype == B16 else 2e-3)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.usefixtures("kernels")
def test_against_the_reference(name: str) -> None:
    check(_CASES[name], guarded=name.startswith("guarded"))
