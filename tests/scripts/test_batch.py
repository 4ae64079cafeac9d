"""Files of requests on a real engine with a tiny model that has no tokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import yaml
from scripts_in_process import CONF, TINY

from makeready.engine.entrypoints.batch.worker import Worker
from makeready.engine.errors import RequestError
from makeready.engine.feed import MADE
from makeready.engine.llm import LLM
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.text.tokenizer import LONG
from makeready.graphs.checkpoint.base import open_checkpoint

GREEDY = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    config = yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text())
    config |= {option.removeprefix("model.").split("=")[0]: int(option.split("=")[1]) for option in TINY[2:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAKEREADY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield LLM(open_checkpoint("dummy", config=config), max_rows=4)


def test_an_interruption_amid_a_change_is_what_a_model_that_closes_raises(llm, monkeypatch):
    """Though the sequence that was being queued cannot be ended."""

    def interrupted(sequence: TokenSequence) -> Any:
        raise KeyboardInterrupt

    with LLM(llm.checkpoint, llm.plan) as other, monkeypatch.context() as patch:
        patch.setattr(TokenSequence, "ids", interrupted)
        with pytest.raises(KeyboardInterrupt), other:
            other.generate(token_ids=[[1, 2]], sampling=GREEDY)
        with pytest.raises(RequestError, match="closed"):
            other.generate(token_ids=[[1, 2]], sampling=GREEDY)


def answers(llm: LLM, lines: list[bytes], **options: Any) -> list[dict[str, Any]]:
    """Answers in the order of rows, which are given whenever the worker has room."""
    worker = Worker(llm, **({"format": "rows", "sampling": GREEDY} | options))
    rows = iter([(number, line) for number, line in enumerate(lines, start=1) if line.strip()])
    made: dict[int, bytes] = {}
    while True:
        worker.put(islice(rows, worker.room))
        if not worker.busy:
            break
        for done in worker.step():
            assert done.number not in made
            assert done.failed == bool(json.loads(done.answer).get("error"))
            made[done.number] = done.answer
    llm.engine.pool.check()
    return [json.loads(made[number]) for number in sorted(made)]


def encoded(*rows: dict[str, Any]) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def test_answers_come_in_the_order_of_rows_and_equal_those_alone(llm):
    """Rows end in another order than they begin: each generates another number of tokens."""
    lengths = [17, 1, 9, 2, 30, 1, 1, 5, 3, 12, 1, 8]
    rows = [{"id": i, "token_ids": [i + 1, 2, 3], "max_new_tokens": n} for i, n in enumerate(lengths)]
    made = answers(llm, encoded(*rows))
    assert [answer["id"] for answer in made] == list(range(len(rows)))
    for row, answer in zip(rows, made, strict=True):
        alone = llm.generate(
            token_ids=[row["token_ids"]],
            sampling=SamplingParams(temperature=0, max_new_tokens=row["max_new_tokens"], ignore_eos=True),
        )[0]
        assert tuple(answer["token_ids"]) == alone.token_ids


def test_bad_rows_get_errors_and_the_others_their_tokens(llm):
    lines = [*encoded({"token_ids": [1]}), b"\n", b"{\n", b"   \n"]
    lines += encoded(
        {"id": "a", "token_ids": [97]},
        {"token_ids": []},
        {"token_ids": [1, True]},
        {"token_ids": [1], "max_new_tokens": 64},
        {"custom_id": "c", "token_ids": [1] * 65},
        {"prompt": "no tokenizer"},
        {"messages": [{"role": "user", "content": "no template"}]},
        {"token_ids": [1], "temperature": -1},
        {"token_ids": [1], "stop": "x"},
        {"token_ids": [1], "stop_token_ids": "12"},
        {"token_ids": [2], "id": "z"},
    )
    made = answers(llm, lines)
    reasons = [answer.get("error", {}).get("message") for answer in made]
    assert reasons[0] is None
    assert reasons[-1] is None
    expected = [
        "not JSON",
        "token id 97",
        "prompt is empty",
        "token id True",
        "context of 64",
        "context of 64",
    ]
    expected += ["needs a tokenizer"] * 2 + [
        "temperature=-1 is out of range",
        "need a tokenizer",
        "stop_token_ids",
    ]
    assert len(reasons) == len(expected) + 2
    for reason, part in zip(reasons[1:-1], expected, strict=True):
        assert part in reason
    assert [answer["error"]["line"] for answer in made[1:-1]] == [3, *range(5, 15)]
    assert (made[2]["id"], made[6]["custom_id"], made[-1]["id"]) == ("a", "c", "z")
    assert made[0]["completion_tokens"] == made[-1]["completion_tokens"] == 4


def test_what_nobody_foresaw_in_a_row_costs_that_row_alone(llm, monkeypatch):
    replies = llm.front.replies

    def broken(prompt: Any, sampling: SamplingParams, **more: Any) -> Any:
        return replies(prompt, sampling, **more) if prompt != [13] else 1 / 0

    monkeypatch.setattr(llm.front, "replies", broken)
    made = answers(llm, encoded({"token_ids": [1]}, {"token_ids": [13]}, {"token_ids": [2]}))
    assert [("error" in answer) for answer in made] == [False, True, False]
    assert "ZeroDivisionError" in made[1]["error"]["message"]


def test_samples_of_a_row_stay_together_and_repeat_with_their_seed(llm):
    row = {"token_ids": [5, 6], "n": 3, "temperature": 1.0, "sampling_seed": 9}
    first, second = answers(llm, encoded(row, {"token_ids": [1]}))
    assert len(first["samples"]) == 3
    assert len({sample["seed"] for sample in first["samples"]}) == 3
    assert "samples" not in second
    for sample in first["samples"]:
        again = {"token_ids": [5, 6], "temperature": 1.0, "sampling_seed": sample["seed"]}
        assert answers(llm, encoded(again))[0]["token_ids"] == sample["token_ids"]


def test_rows_are_taken_as_there_is_room_for_them(llm):
    """Enough for every slot, and a few more a step; a long row holds nothing back."""
    worker = Worker(llm, "rows", GREEDY)
    rows = iter(
        enumerate(
            encoded(*({"token_ids": [i % 97], "max_new_tokens": 50 if not i else 1} for i in range(99)))
        )
    )
    assert worker.room == max(llm.engine.limits.max_rows, MADE)
    order, most = [], 0
    while True:
        given = list(islice(rows, worker.room))
        worker.put(given)
        if not worker.busy:
            break
        order += [done.number for done in worker.step()]
        most = max(most, len(given))
    assert sorted(order) == list(range(99))
    assert order.index(0) > 40
    assert most <= MADE


def test_a_queue_that_is_full_costs_rows_and_leaves_nothing_behind(llm, monkeypatch):
    """Where the engine refuses the second of a row's samples, the first is taken back."""
    submit, room = llm.engine.submit, 4

    def full(sequence: Any, reply: Any) -> None:
        nonlocal room
        if not room:
            raise RequestError("the queue is full")
        room -= 1
        submit(sequence, reply)

    monkeypatch.setattr(llm.engine, "submit", full)
    made = answers(llm, encoded({"token_ids": [1], "n": 3}, {"token_ids": [1], "n": 3}, {"token_ids": [1]}))
    assert [answer.get("error", {}).get("message") for answer in made] == [None] + ["the queue is full"] * 2
    assert not llm.engine.busy


def test_no_row_waits_while_a_long_one_is_tokenized(llm, monkeypatch):
    """A text keeps its thread until another row is answered; in one thread that would be never."""
    answered, replies = threading.Event(), llm.front.replies

    def slow(prompt: Any, *arguments: Any, **named: Any) -> Any:
        if len(prompt) > LONG:
            assert answered.wait(600), "the other row was not answered meanwhile"
        return replies([5], *arguments, **named)

    monkeypatch.setattr(llm.front, "replies", slow)
    worker = Worker(llm, "rows", GREEDY)
    texts = ["a" * (LONG + 1), "a", "b" * (LONG + 1)]
    worker.put([(i, line) for i, line in enumerate(encoded(*({"prompt": text} for text in texts)), 1)])
    worker.put([(4, b"{}")])
    numbers = []
    while worker.busy:
        assert worker.room <= 4 + MADE
        for done in worker.step():
            numbers.append(done.number)
            assert done.failed == (done.number == 4)
            if done.number == 2:
                answered.set()
    assert numbers[:2] == [4, 2]
    assert sorted(numbers[2:]) == [1, 3]


@pytest.mark.parametrize("length", [1, 10, 63])
def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(llm, monkeypatch, length):
    monkeypatch.setattr(llm.front, "rendered", lambda messages, **template: ([5] * length, None))
    chat = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "ignore_eos": True,
        "temperature": 0,
    }
    rows = encoded({**chat, "body": body}, {**chat, "body": {**body, "min_tokens": 64}})
    unlimited, impossible = answers(llm, rows, format="openai", sampling={})
    assert unlimited["response"]["body"]["usage"]["completion_tokens"] == 64 - length
    assert "min_tokens=64 is above" in impossible["error"]["message"]
    (limited,) = answers(llm, rows[:1], format="openai", sampling=SamplingParams(max_new_tokens=1))
    assert limited["response"]["body"]["usage"]["completion_tokens"] == 1
