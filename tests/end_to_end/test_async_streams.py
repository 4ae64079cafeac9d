"""Very many streams of a tiny random model: left, cancelled and broken at any moment, none hangs or leaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from gate import Gate, until

from makeready.engine.async_llm import AsyncLLM, _Call
from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.base import open_checkpoint

STREAMS = 200
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
LONG = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAKEREADY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make(pages: int | None = None) -> LLM:
    """A model with room for so many pages."""
    checkpoint = open_checkpoint("dummy", config=CONFIG)
    plan = LLM(checkpoint, max_rows=8, max_tokens=32).plan
    gib = None if pages is None else pages * plan.kv.page_bytes / 2**30
    options = SchedulerOptions(new_token_ratio=0.0, min_new_token_ratio=0.0)
    made = LLM(checkpoint, plan, kv_memory_gib=gib, scheduler=options)
    made.engine._ahead = 1  # as if steps were under way after their launch
    return made


def asked(pick: random.Random) -> tuple[list[int], SamplingParams]:
    """A prompt and how to go on, some of which share their beginning."""
    length = pick.randrange(1, 30)
    prompt = [7] * length if pick.random() < 0.5 else [pick.randrange(97) for _ in range(length)]
    return prompt, SamplingParams(
        temperature=pick.choice((0.0, 1.0)),
        sampling_seed=pick.randrange(2**32),
        n=pick.choice((1, 1, 3)),
        max_new_tokens=pick.randrange(1, 30),
        ignore_eos=True,
        stop_token_ids=[96],  # so that nobody knows how long they will be
    )


async def read(
    served: AsyncLLM, prompt: list[int], params: SamplingParams, most: int = 9999
) -> list[list[int]]:
    """The tokens of each sample; left after so many pieces."""
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    pieces = served.generate(prompt, params)
    async for piece in pieces:
        tokens[piece.index] += piece.token_ids
        most -= 1
        if not most:
            await pieces.aclose()  # type: ignore[attr-defined]
            break
    return tokens


@pytest.mark.parametrize("pages", [None, 14])
def test_many_streams_of_which_some_are_cancelled_are_those_of_generate(pages: int | None) -> None:
    """With few pages, requests are sent back to wait all the time."""
    llm, pick = make(pages), random.Random(pages or 0)
    asks = [asked(pick) for _ in range(STREAMS)]
    fates = [pick.choice(("stays", "stays", "leaves", "cancelled", "never begins")) for _ in asks]
    retracted = 0

    def observe(record: Any) -> None:
        nonlocal retracted
        retracted += record.retractions

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as served:
            tasks = [
                asyncio.create_task(read(served, *ask, 9999 if fate != "leaves" else pick.randrange(1, 8)))
                for ask, fate in zip(asks, fates, strict=True)
            ]

            async def cancel(task: asyncio.Task[Any], after: float) -> None:
                await asyncio.sleep(after)
                task.cancel()

            wait = {"never begins": lambda: 0.0, "cancelled": pick.random}
            cancels = [
                cancel(task, wait[fate]()) for task, fate in zip(tasks, fates, strict=True) if fate in wait
            ]
            await asyncio.gather(*cancels)
            made = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 600)
            await until(lambda: not llm.engine.busy)
            assert not served._calls
            assert not served._feed.busy
            return made

    llm.engine.observer = observe
    made = asyncio.run(main())
    llm.engine.pool.check()
    assert llm.engine.pool.held == 0
    if pages is not None:
        assert retracted
    expected: list[list[int]] = []
    whole = []
    for ask, fate, tokens in zip(asks, fates, made, strict=True):
        if isinstance(tokens, asyncio.CancelledError):
            assert fate in ("cancelled", "never begins")
        elif fate != "leaves":
            whole.append(ask)
            expected += tokens
    assert len(whole) >= STREAMS // 5
    outputs = llm.generate(
        token_ids=[prompt for prompt, _ in whole], sampling=[params for _, params in whole]
    )
    assert [list(output.token_ids) for output in outputs] == expected


@pytest.mark.parametrize("where", ["submit", "abort", "step"])
def test_what_nobody_foresaw_reaches_every_reader(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those on their way in, and where ending the others fails as well."""
    llm = make()

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("nobody foresaw it")

    async def main() -> list[Any]:
        gate = Gate(llm, monkeypatch)
        served = AsyncLLM(llm)
        tasks = [asyncio.create_task(read(served, [i + 1], LONG)) for i in range(20)]
        gate.allow(3)  # of the 40 that each needs
        await until(lambda: len(llm.engine.scheduler.running) == 8)
        monkeypatch.setattr(llm.engine, where, broken)
        tasks += [asyncio.create_task(read(served, [i + 1], LONG)) for i in range(20)]
        if where == "abort":
            tasks[0].cancel()
        await asyncio.sleep(0)
        gate.open()
        made = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 600)
        served.close()
        with pytest.raises(RequestError, match="the engine is closed"):
            await read(served, [1], LONG)
        return made

    made = asyncio.run(main())
    kinds = (ZeroDivisionError, RequestError, asyncio.CancelledError)
    assert any(isinstance(each, ZeroDivisionError) for each in made)
    assert all(isinstance(each, kinds) or len(each[0]) == LONG.max_new_tokens for each in made)


def test_a_loop_that_is_closed_at_the_last_moment_does_not_stop_the_others() -> None:
    class Loop:
        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, *_: Any) -> None:
            raise RuntimeError("Event loop is closed")

    llm = make()
    served = AsyncLLM(llm)
    gone = _Call(llm.replies([5], LONG), Loop())  # type: ignore[arg-type]
    served._ask(partial(served._put, gone))
    (tokens,) = asyncio.run(read(served, [3], LONG))
    served.close()
    assert tokens == list(llm.generate(token_ids=[[3]], sampling=LONG)[0].token_ids)
    assert llm.engine.pool.held == 0
