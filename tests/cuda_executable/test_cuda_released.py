"""Leaving a model gives everything back: device memory, pinned memory, registered files, streams, the context."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
from fake_driver import FakeBindings, real
from plans import dummy, tiny

from makeready.engine.llm import LLM, RequestError, SamplingParams
from makeready.graphs.executable.cuda import driver as cuda_driver
from makeready.graphs.executable.cuda.driver import Driver, DriverError
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import typical_step
from makeready.graphs.plan.plan import PlanError


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    made = FakeBindings()
    monkeypatch.setattr(cuda_driver, "load_bindings", lambda: made)
    return made


def test_models_in_turn_find_all_memory_free_again(bindings):
    """The second takes all that is free as the first did: with anything left behind it would have fewer pages."""
    other = replace(tiny(), device="")
    pages = set()
    for turn in range(10):
        with LLM(dummy(), (tiny(), other)[turn % 2]) as llm:
            pages.add(llm.engine.executable.pages)
            llm.generate(token_ids=[[1, 2, 3]], sampling=SamplingParams(max_new_tokens=2, ignore_eos=True))
            assert bindings.used > 0
            assert bindings.pinned
        bindings.check_released()
    assert len(pages) == 1
    assert bindings.calls.count("cuMemAlloc") == bindings.calls.count("cuMemFree")


def test_leaving_by_an_error_in_the_middle_of_a_request_gives_everything_back(bindings):
    left: list[Any] = []

    def interrupted() -> None:
        with LLM(dummy(), tiny(), kv_memory_gib=0.001) as llm:
            (reply,) = llm.replies([1, 2, 3], SamplingParams(max_new_tokens=20, ignore_eos=True))
            llm.engine.submit(reply.sequence, reply)
            llm.engine.step()  # is under way and has not been read
            left.extend((reply, llm))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    bindings.check_released()
    request, llm = left
    assert request.done
    assert not llm.engine.busy


def test_a_closed_model_says_so(bindings):
    llm = LLM(dummy(), tiny(), kv_memory_gib=0.001)
    (reply,) = llm.replies([1, 2, 3], SamplingParams(max_new_tokens=2))
    executable: Any = llm.engine.executable
    bucket = min(tiny().buckets)
    step = typical_step(executable, bucket)
    pending = executable.launch(bucket, step)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate(token_ids=[[1, 2]]),
        lambda: next(llm.stream([1, 2])),
        lambda: llm.engine.submit(reply.sequence, reply),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(RequestError, match=r"closed; load it again|needs a tokenizer"):
            use()
    with pytest.raises(PlanError, match="closed; load it again"):
        executable.launch(bucket, step)
    with pytest.raises(PlanError, match="closed before this step"):
        pending.wait()
    bindings.check_released()


@pytest.mark.parametrize(
    "call", ["cuMemFree", "cuStreamSynchronize", "cuGraphExecDestroy", "cuMemFreeHost", "cuLibraryUnload"]
)
def test_what_the_driver_refuses_to_take_back_keeps_nothing_else(call):
    bindings = FakeBindings()
    executable = CudaExecutable(tiny(), dummy(), driver=Driver(bindings), kv_bytes=2**20)
    freed = bindings.calls.count("cuDevicePrimaryCtxRelease")
    bindings.refuse[call] = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DriverError, match=f"{call} failed"):
        executable.close()
    assert bindings.calls.count("cuDevicePrimaryCtxRelease") == freed + 1  # which frees the rest on a GPU
    assert bindings.retained == 0
    if call != "cuMemFree":
        assert not bindings.allocations
    if call != "cuMemFreeHost":
        assert not bindings.pinned


def test_a_model_that_is_dropped_gives_everything_back(bindings):
    llm = LLM(dummy(), tiny(), kv_memory_gib=0.001)
    del llm
    gc.collect()
    bindings.check_released()


def test_on_the_cpu_the_memory_goes_too():
    with LLM(dummy(), target="cpu", max_rows=2, context_len=64) as llm:
        llm.generate(token_ids=[[1, 2, 3]], sampling=SamplingParams(max_new_tokens=2))
        executable: Any = llm.engine.executable
        kept = [weakref.ref(tensor) for tensor in executable._tensors.values()]
        assert kept
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    with pytest.raises(RequestError, match="closed"):
        llm.generate(token_ids=[[1]])
