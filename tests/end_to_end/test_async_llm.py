"""Generation under asyncio on SmolLM2: many at once, cancelled, refused, and after the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from gate import Gate, until
from smollm2 import smollm2

from makeready.engine.async_llm import AsyncLLM, Piece
from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.sequence import ABORT

GREEDY = SamplingParams(temperature=0, max_new_tokens=10)
PROMPTS = [f"Here is a list of {n} animals:" for n in ("two", "three", "four", "five", "six", "seven")]


@pytest.fixture(scope="module")
def llm() -> LLM:
    made = LLM(smollm2(), max_rows=4, max_tokens=64, context_len=256)
    made.engine._ahead = 1  # as if steps were under way after their launch
    return made


@pytest.fixture(autouse=True)
def nothing_left(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.busy
    assert llm.engine.pool.held == 0
    llm.engine.pool.check()


async def read(served: AsyncLLM, prompt: str, sampling: SamplingParams = GREEDY) -> list[Piece]:
    return [piece async for piece in served.generate(prompt, sampling)]


def test_many_at_once_give_what_each_gives_alone(llm: LLM) -> None:
    async def main() -> list[list[Piece]]:
        async with AsyncLLM(llm) as served:
            return await asyncio.gather(*(read(served, prompt) for prompt in PROMPTS))

    for prompt, pieces in zip(PROMPTS, asyncio.run(main()), strict=True):
        (expected,) = llm.generate([prompt], GREEDY)
        assert "".join(piece.text for piece in pieces) == expected.text
        assert sum((piece.token_ids for piece in pieces), ()) == expected.token_ids
        assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        assert pieces[-1].output is not None
        assert (pieces[-1].output.text, pieces[-1].output.token_ids) == (expected.text, expected.token_ids)


def test_pieces_come_while_others_are_still_to_be_made(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> int:
        async with AsyncLLM(llm) as served:
            gate.allow(4)  # of the ten and more that it needs
            count = 0
            async for _ in served.generate(PROMPTS[0], GREEDY):
                gate.allow()
                count += 1
            gate.open()
            return count

    assert asyncio.run(main()) >= 6


def test_samples_come_under_their_numbers(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, n=3, sampling_seed=4, max_new_tokens=6)

    async def main() -> list[Piece]:
        async with AsyncLLM(llm) as served:
            return await read(served, PROMPTS[0], params)

    pieces = asyncio.run(main())
    for index, expected in enumerate(llm.generate([PROMPTS[0]], params)):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == expected.text


def test_a_stop_string_is_never_shown(llm: LLM) -> None:
    full = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_new_tokens=30))[0].text
    stop = full[14:20]
    params = SamplingParams(temperature=0, max_new_tokens=30, stop=[stop])

    async def main() -> list[Piece]:
        async with AsyncLLM(llm) as served:
            return await read(served, PROMPTS[0], params)

    pieces = asyncio.run(main())
    assert "".join(piece.text for piece in pieces) == full[: full.index(stop)]
    assert pieces[-1].output is not None
    assert pieces[-1].output.meta_info["finish_reason"] == {"type": "stop", "matched": stop}


def test_leaving_and_cancelling_abort_and_leave_the_others_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(llm, monkeypatch)
    long = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)

    async def leave(served: AsyncLLM) -> int:
        seen, pieces = 0, served.generate(PROMPTS[1], long)
        async for _ in pieces:
            gate.allow()
            seen += 1
            if seen == 3:
                break
        await pieces.aclose()  # type: ignore[attr-defined]
        return seen

    async def main() -> Any:
        async with AsyncLLM(llm) as served:
            cancelled = asyncio.create_task(read(served, PROMPTS[2], long))
            gate.allow(100)  # enough for the others
            stays, left = await asyncio.gather(read(served, PROMPTS[0]), leave(served))
            cancelled.cancel()
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await until(lambda: not llm.engine.busy)
            return stays, left

    stays, left = asyncio.run(main())
    assert left == 3
    assert stays[-1].output.text == llm.generate([PROMPTS[0]], GREEDY)[0].text


def test_what_cannot_be_served_raises_where_it_is_read(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as served:
            with pytest.raises(RequestError, match="exceed the context of 256"):
                await read(served, PROMPTS[0], SamplingParams(max_new_tokens=300))
            with pytest.raises(RequestError, match="the prompt is empty"):
                await read(served, [])  # type: ignore[arg-type]
            assert len(await read(served, PROMPTS[0])) > 3
        with pytest.raises(RequestError, match="the engine is closed"):
            await read(served, PROMPTS[0])

    asyncio.run(main())


def test_closing_ends_what_runs(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)

    async def main() -> list[Piece]:
        async with AsyncLLM(llm) as served:
            pieces = served.generate(PROMPTS[0], long)
            first = await anext(pieces)  # it runs, and has 199 tokens to go
        return [first, *[piece async for piece in pieces]]

    output = asyncio.run(main())[-1].output
    assert output is not None
    assert output.finish_reason == ABORT


def test_a_failure_of_the_device_reaches_every_reader(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **cut: object) -> None:
        raise RuntimeError("the device is gone")

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as served:
            monkeypatch.setattr(llm.engine.executable, "launch", broken)
            made = await asyncio.gather(*(read(served, p) for p in PROMPTS), return_exceptions=True)
            with pytest.raises(RequestError, match="the engine is closed"):
                await read(served, PROMPTS[0])
            return made

    made = asyncio.run(main())
    # Those that were on their way in when it happened are told that the engine is closed.
    assert all(isinstance(each, RuntimeError | RequestError) for each in made)
    assert any(isinstance(each, RuntimeError) for each in made)
