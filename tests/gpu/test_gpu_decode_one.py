"""One row's head norms, rotation, cache write and attention in one launch on the GPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("the kernel is for Hopper and later", allow_module_level=True)

from benchmarks.gpu import launcher
from test_decode_one_emulated import OP, is_right, make

from makeready.kernels.attention.decode_one_cuda import candidate
from makeready.kernels.contract import CONTRACTS

QWEN = {"kv_heads": 8}
OTHERS: tuple[dict[str, Any], ...] = (
    {"kv_heads": 8, "group": 2},
    {"kv_heads": 2, "group": 1},
    {"kv_heads": 3, "D": 64, "group": 4},
    {"kv_heads": 8, "window": 300},
    {"kv_heads": 8, "norm": False, "page": 16},
    {"kv_heads": 8, "dtype": torch.float16, "offset": 1.0},
)


def _run(tensors: dict[str, torch.Tensor], attrs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Operands and result, back on the CPU; twice, with the same bits."""
    found = []
    for _ in range(2):
        moved = {name: x.cuda() for name, x in tensors.items()}
        call = launcher.op_call(CONTRACTS[OP], moved, attrs)
        found.append(launcher.run(candidate(call), call, moved))
    assert torch.equal(found[0]["y"], found[1]["y"])
    return {name: x.cpu() for name, x in found[0].items()}


@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 100, 1000, 1024, 1025, 2047, 9000])
def test_lengths(length: int) -> None:
    case = make(length, **QWEN)
    assert is_right(*case, _run(*case), 6e-3)


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_geometries(options: dict[str, Any]) -> None:
    for length in (1, 130, 777, 3000):
        case = make(length, **options)
        assert is_right(*case, _run(*case), 6e-3)


def test_a_row_without_a_token_gives_zeros() -> None:
    case = make(0, **QWEN)
    assert is_right(*case, _run(*case), 0)
