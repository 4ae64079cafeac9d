"""Files of requests on a real engine with a tiny model that has no tokenizer."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts_in_process import CONF, TINY, script

from makeready.engine.entrypoints import batch as batch_module
from makeready.engine.entrypoints.batch import Batch, LineWriter
from makeready.engine.llm import LLM
from makeready.engine.sampling import SamplingParams
from makeready.graphs.checkpoint.base import open_checkpoint

GREEDY = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    config = yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text())
    config |= {option.removeprefix("model.").split("=")[0]: int(option.split("=")[1]) for option in TINY[2:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAKEREADY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield LLM(open_checkpoint("dummy", config=config), max_rows=4)


def answers(llm: LLM, lines: list[bytes], **options: Any) -> list[dict[str, Any]]:
    written: list[bytes] = []
    Batch(llm, lines, written.append, **({"sampling": GREEDY} | options)).run()
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in written)
    return [json.loads(line) for line in written]


def encoded(*rows: dict[str, Any]) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


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
    requests = llm.requests

    def broken(prompt: Any, sampling: SamplingParams) -> Any:
        return requests(prompt, sampling) if prompt != [13] else 1 / 0

    monkeypatch.setattr(llm, "requests", broken)
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


def test_rows_are_read_as_there_is_room_for_them(llm, monkeypatch):
    """Neither the requests nor the rows that wait for an earlier one grow with the file."""
    monkeypatch.setattr(batch_module, "READ_AHEAD", 20)
    read = written = 0
    most_ahead = most_waiting = 0

    def lines() -> Iterator[bytes]:
        nonlocal read, most_ahead, most_waiting
        for i in range(300):
            read += 1
            most_ahead = max(most_ahead, read - written)
            most_waiting = max(most_waiting, len(llm.engine.scheduler.waiting))
            yield encoded({"token_ids": [i % 97], "max_new_tokens": 40 if i % 100 == 0 else 1})[0]

    def write(line: bytes) -> None:
        nonlocal written
        written += 1

    shares: list[float] = []
    size = sum(map(len, lines()))
    read = most_ahead = 0
    batch = Batch(
        llm, lines(), write, sampling=GREEDY, size=size, progress=lambda *told: shares.append(told[-1])
    )
    assert batch.run().rows == written == 300
    assert batch.counts.tokens == 3 * 40 + 297
    assert 0 < most_ahead <= 20
    assert most_waiting < llm.engine.limits.max_rows
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    llm.engine.pool.check()


def test_a_line_that_cannot_be_written_whole_is_taken_back(tmp_path, monkeypatch):
    path, write, room = tmp_path / "out", os.write, 25

    def full_disk(file: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(file, bytes(data)[:room])
        room -= taken
        return taken

    with LineWriter(path) as writer:
        monkeypatch.setattr(os, "write", full_disk)
        writer.write(b"0123456789\n")
        writer.write(b"abcdefghij\n")
        with pytest.raises(OSError, match="No space"):
            writer.write(b"ABCDEFGHIJ\n")
        monkeypatch.undo()
        assert path.read_bytes() == b"0123456789\nabcdefghij\n"
        writer.write(b"next\n")
    assert path.read_bytes().endswith(b"ij\nnext\n")
    with pytest.raises(FileExistsError):
        LineWriter(path)


def test_an_interrupted_job_leaves_whole_answers_and_says_how_many(monkeypatch, capsys):
    rows = encoded(*({"id": i, "token_ids": [i + 1]} for i in range(9)))
    Path("in.jsonl").write_bytes(b"".join(rows))
    options = (*TINY, "prompts=in.jsonl", "output=out.jsonl", "sampling=greedy", "sampling.max_new_tokens=2")
    write = LineWriter.write

    def interrupted(self: LineWriter, line: bytes) -> None:
        if b'"id": 5' in line:
            raise KeyboardInterrupt
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(LineWriter, "write", interrupted)
        assert script("generate")(*options) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "interrupted; out.jsonl holds the answers to the first 5 rows"
    assert ids(Path("out.jsonl")) == list(range(5))

    assert script("generate")(*options) == 2  # not over what is there
    assert script("generate")(*options, "overwrite=true") == 0
    assert ids(Path("out.jsonl")) == list(range(9))
    assert "9 rows in" in capsys.readouterr().err


def test_without_a_plan_one_is_compiled_once_and_said(capsys, own_cache):
    Path("in.jsonl").write_text('{"token_ids": [1]}\n')
    options = (*TINY, "prompts=in.jsonl", "overwrite=true", "output=out.jsonl", "sampling.max_new_tokens=2")
    for said in ("compiled to", "found in"):
        assert script("generate")(*options) == 0
        assert f"plan {said} {own_cache}" in capsys.readouterr().err
