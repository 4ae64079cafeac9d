"""Inputs that somebody made to break a job, or that broke by themselves: each costs its own row, or is said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripts_in_process import TINY, script

from makeready.engine.entrypoints.batch.base import Done, JobError, RowError
from makeready.engine.entrypoints.batch.job import Rows, open_input
from makeready.engine.entrypoints.batch.journal import Journal
from makeready.engine.entrypoints.batch.output import Files, open_journal
from makeready.engine.entrypoints.batch.rows import DEEPEST, RowFormat, encode, parse

OPTIONS = (*TINY, "sampling=greedy", "sampling.ignore_eos=true", "sampling.max_new_tokens=2")


def answers(lines: list[bytes]) -> list[dict[str, Any]]:
    """Answers to the lines of a file."""
    Path("in.jsonl").write_bytes(b"\n".join(lines))
    assert script("generate")(*OPTIONS, "prompts=in.jsonl", "output=out.jsonl") == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


@contextmanager
def opened(name: str, output: str = "out.jsonl") -> Iterator[tuple[Rows, Journal]]:
    """A job's rows, of which none was taken."""
    given, files = open_input(Path(name), Path(output), "rows"), Files(Path(output))
    journal = open_journal(files, given.identity, given.survey, overwrite=False)
    assert isinstance(journal, Journal)
    with journal, Rows(given, journal, files) as rows:
        yield rows, journal


def nested(levels: int, begin: bytes = b"[", end: bytes = b"]") -> bytes:
    """A row with ``levels`` objects and lists in one another."""
    return b'{"token_ids": [1], "id": ' + begin * (levels - 1) + b"1" + end * (levels - 1) + b"}"


@pytest.mark.parametrize(("begin", "end"), [(b"[", b"]"), (b'{"a": ', b"}")])
def test_what_is_read_can_be_read_again_from_the_journal(begin, end):
    """A name close to Python's limit would be written, and then keep the job from ever going on."""
    for levels in (2, DEEPEST, DEEPEST + 1, 985, 992, 993, 1000, 5000):
        if levels > DEEPEST:
            with pytest.raises(RowError, match="nested too deeply"):
                parse(nested(levels, begin, end))
            continue
        fields = parse(nested(levels, begin, end))
        journal = Journal(Path("j"))
        journal.begin({}, 1)
        journal.append([Done(1, encode({"id": fields["id"], "text": "a"}), failed=False)])
        journal.resume(1)
        assert 1 in journal
        journal.close()


def test_brackets_in_a_text_are_not_nesting():
    fields = {"prompt": "[{" * 5000, "id": [[]] * 200}
    assert parse(json.dumps(fields).encode()) == fields


def test_a_file_of_hostile_lines_costs_those_lines():
    bad = [
        nested(990),
        b'{"id": "long value", "token_ids": [1], "temperature": "' + b"z" * 100_000 + b'"}',
        b'{"id": "long name", "token_ids": [1], "sampling": {"' + b"z" * 100_000 + b'": 1}}',
        b'{"id": "digits", "token_ids": [1], "logit_bias": {"3": ' + b"9" * 4000 + b"}}",
        b"\xff\xfe\x00",
    ]
    good = b'{"id": "good", "token_ids": [1]}'
    made = answers([good, *bad, b"\xef\xbb\xbf", b"\xef\xbb\xbf" + good])
    assert [made[0], made[-1]] == [made[0]] * 2
    assert made[0]["completion_tokens"] == 2
    assert [answer["error"]["line"] for answer in made[1:-1]] == [2, 3, 4, 5, 6]
    assert [answer.get("id") for answer in made[1:-1]] == [None, "long value", "long name", "digits", None]
    for answer in made[1:-1]:
        assert len(answer["error"]["message"]) < 1100
    assert made[2]["error"]["message"].endswith("must be a number")


HOSTILE: dict[str, Any] = {
    "skip_special_tokens": "no",
    "ignore_eos": "false",
    "return_logprob": "false",
    "no_stop_trim": 0,
    "sampling_seed": True,
    "stop": {"a": 1},
    "stop_regex": "a{1000000000}",
    "logit_bias": {"5": 1, "05": -1},
    "stop_token_ids": [True],
    "temperature": True,
    "extra_key": ["a"],
    "priority": True,
    "token_ids": [1, {}],
}


@pytest.mark.parametrize("form", ["rows", "nested", "openai"])
def test_a_wrong_type_costs_its_row(form):
    """Each of the first is one that ended the whole job, or meant what nobody asked for."""
    lines = []
    for name, value in HOSTILE.items():
        given = {"token_ids": [1]} | {name: value}
        if form == "nested" and name not in ("extra_key", "priority", "token_ids"):
            given = {"token_ids": [1], "sampling": {name: value}}
        if form == "openai":
            given["prompt"] = given.pop("token_ids")
            for ours, theirs in {"sampling_seed": "seed", "return_logprob": "echo"}.items():
                if ours in given:
                    given[theirs] = given.pop(ours)
            given = {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "m", **given},
            }
        lines.append(json.dumps(given).encode())
    good = lines[0].replace(b'"no"', b"true")
    made = answers([good, *lines, good])
    assert [answer.get("error") is None for answer in made] == [True, *[False] * len(lines), True]
    for name, answer in zip(HOSTILE, made[1:-1], strict=True):
        message = answer["error"]["message"]
        names = {"sampling_seed": "seed", "return_logprob": "echo"} if form == "openai" else {}
        assert names.get(name, name) in message or name in ("token_ids", "stop_regex"), message


def test_a_null_or_a_float_of_a_table_is_what_was_meant():
    made = answers(
        [
            b'{"token_ids": [1], "max_new_tokens": 1.0, "skip_special_tokens": null, "label": "x"}',
            b'{"token_ids": [1], "max_new_tokens": null, "stop": null, "logit_bias": null, "messages": null}',
        ]
    )
    assert [answer["completion_tokens"] for answer in made] == [1, 2]
    assert (made[0]["label"], "label" in made[1]) == ("x", False)


@pytest.mark.parametrize(
    "error", [TypeError("odd"), ValueError("x" * 5000), RecursionError("deep"), MemoryError()]
)
def test_whatever_an_answer_raises_costs_its_row(monkeypatch, error):
    answer = RowFormat.answer

    def failing(format: Any, fields: Any, *arguments: Any) -> Any:
        if fields["id"] == 2:
            raise error
        return answer(format, fields, *arguments)

    monkeypatch.setattr(RowFormat, "answer", failing)
    made = answers([b'{"id": %d, "token_ids": [1]}' % i for i in (1, 2, 3)])
    assert ["error" in answer for answer in made] == [False, True, False]
    assert made[1]["id"] == 2
    assert f"the row's answer cannot be written ({type(error).__name__}: " in made[1]["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_rows_is_said(content, capsys):
    Path("in.jsonl").write_bytes(content)
    assert script("generate")(*OPTIONS, "prompts=in.jsonl", "output=out.jsonl") == 1
    assert "prompts=in.jsonl has no rows" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(path.read_bytes())


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other(path: Path) -> None:
    """Of the same length."""
    held = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns + 1))


def replaced(path: Path) -> None:
    Path("new").write_bytes(path.read_bytes()[::-1])
    os.replace("new", path)


@pytest.mark.parametrize("change", [longer, shorter, other, replaced])
@pytest.mark.parametrize("before", [0, 3])
def test_an_input_that_changes_while_it_is_read_ends_the_job(change, before):
    """The rows of two files in one output would be lost or doubled, and nobody could tell."""
    line = b'{"token_ids": [1], "extra_key": "%s"}\n' % (b"x" * 500)
    Path("in.jsonl").write_bytes(line * 300)
    with opened("in.jsonl") as (rows, journal):
        taken = rows.take(before)
        rows.done([Done(number, b"{}", failed=False) for number, _ in taken])
        change(Path("in.jsonl"))
        if change is replaced and before:  # what is open stays as it was
            assert [row for _, row in rows.take(300)] == [line] * 297
            return
        kept = "3 of 300 rows are kept in out.jsonl.partial" if before else "no row was done"
        with pytest.raises(JobError, match=f"in.jsonl was changed while the job ran; put it back .*; {kept}"):
            rows.take(300)
        assert journal.totals.rows == before


def test_a_disk_that_cannot_be_read_is_said_with_what_is_kept(monkeypatch):
    Path("in.jsonl").write_text('{"token_ids": [1]}\n' * 3)
    with opened("in.jsonl") as (rows, _):
        number, _ = rows.take(1)[0]
        rows.done([Done(number, b"{}", failed=False)])

        def broken(descriptor: int) -> Any:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", broken)
            with pytest.raises(
                JobError, match=r"Input/output error; 1 of 3 rows are kept in out.jsonl.partial"
            ):
                rows.take(1)
