"""Plans that need more memory than there is: a sentence with the arithmetic, before anything is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_programs import LLAMA, dummy, traced

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cpu.memory import check_memory, free_bytes
from makeready.graphs.plan.plan import PlanError


def test_a_context_of_a_billion_is_refused_with_its_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path))
    config = LLAMA | {"max_position_embeddings": 10**9, "head_dim": 64}
    # 10**9 positions of 64 cosines and sines in fp32 are 238.4 GiB.
    message = (
        r"not enough memory: .* tables of 1,000,000,000 positions 238.42 GiB, .*; lower plan.context_len"
    )
    with pytest.raises(PlanError, match=message):
        LLM(open_checkpoint("dummy", config=config), max_rows=2, max_tokens=8)


def test_weights_beyond_what_is_free_are_refused():
    plan = traced(LLAMA).lower().compile()
    tables = max(w.nbytes for w in plan.weights if w.param.generated is not None)
    check_memory(plan, plan.memory.weights + 3 * tables)
    with pytest.raises(PlanError, match=r"not enough memory: .* this machine has 0.00 GiB free"):
        check_memory(plan, plan.memory.weights + 3 * tables - 1)
    found = free_bytes()
    assert found is not None
    assert 2**20 < found < 2**50


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_memory_that_the_system_does_not_give_is_said(library, monkeypatch):
    plan = traced(LLAMA).lower().compile()

    def refuses(*arguments: object, **named: object) -> None:
        if library == "numpy":
            raise MemoryError
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(*((np, "zeros") if library == "numpy" else (torch, "empty")), refuses)
    with pytest.raises(PlanError, match=r"not enough memory: .* the system does not give so much"):
        CpuExecutable(plan, dummy(LLAMA), pages=4)
