"""The journal of a batch job: what a cut-off leaves of it, and that no row is lost or doubled."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from makeready.engine.entrypoints.batch.base import Done, JobError
from makeready.engine.entrypoints.batch.journal import Journal
from makeready.engine.entrypoints.batch.output import Files, open_journal, publish
from makeready.engine.entrypoints.batch.source import Survey

IDENTITY = {"prompts": [1, "ab"], "sampling.temperature": 0.0}


def done(number: int, text: str = "x") -> Done:
    return Done(number, json.dumps({"id": number, "text": text}).encode(), number % 3 == 0, 2, 1, number)


@pytest.fixture
def files() -> Files:
    return Files(Path("out.jsonl"))


def begun(files: Files, count: int, **changed: Any) -> Any:
    survey = Survey(1, "ab", count, count)
    return open_journal(files, {**IDENTITY, **changed}, survey, overwrite=False)


@hypothesis.given(
    rows=st.permutations(range(1, 9)),
    split=st.lists(st.integers(1, 3), min_size=8, max_size=8),
    cut=st.integers(0, 900),
    text=st.text(max_size=5),
)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
)
def test_whatever_is_left_of_the_file_its_whole_rows_count_and_the_rest_runs_again(
    rows, split, cut, text, files
):
    files.journal.unlink(missing_ok=True)
    with begun(files, 8) as journal:
        waiting = list(rows)
        for size in split:
            journal.append([done(number, text) for number in waiting[:size]])
            waiting = waiting[size:]
    whole = files.journal.read_bytes()
    files.journal.write_bytes(whole[:cut])
    lines = whole[:cut].split(b"\n")[:-1]
    with begun(files, 8) as journal:
        kept = {json.loads(line)["row"] for line in lines[1:]}
        assert {number for number in range(1, 9) if number in journal} == kept
        assert journal.totals.rows == len(kept)
        assert journal.totals.failed == len(kept & {3, 6})
        assert journal.totals.tokens == sum(kept)
        journal.append([done(number, text) for number in range(1, 9) if number not in journal])
        assert list(journal.answers()) == [done(number, text).answer for number in range(1, 9)]


def test_an_interruption_leaves_what_the_totals_say(files, monkeypatch):
    with begun(files, 8) as journal:
        journal.append([done(1)])
        before, totals = files.journal.read_bytes(), journal.totals
        write = os.pwrite

        def interrupted(file: int, data: bytes, at: int) -> int:
            write(file, data, at)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.append([done(2), done(3)])
        assert (files.journal.read_bytes(), journal.totals) == (before, totals)
        journal.append([done(3), done(2)])
        assert (journal.totals.rows, journal.totals.failed, journal.totals.tokens) == (3, 1, 6)
        with pytest.raises(AssertionError, match="answered twice"):
            journal.append([done(4), done(2)])
    with begun(files, 8) as journal:
        assert [number for number in range(1, 9) if number in journal] == [1, 2, 3]


def test_blocks_that_were_never_written_end_what_is_trusted(files):
    """After a loss of power a file may have its length but zeros in it."""
    with begun(files, 4) as journal:
        for number in (1, 2, 3):
            journal.append([done(number, "y" * 40)])
    held = files.journal.read_bytes()
    place = held.index(b'"row": 2') + 60
    files.journal.write_bytes(held[:place] + bytes(8) + held[place + 8 :])
    with begun(files, 4) as journal:
        assert [number in journal for number in (1, 2, 3, 4)] == [True, False, False, False]
    assert files.journal.read_bytes().count(b"\n") == 2


def test_a_record_that_is_there_twice_ends_what_is_trusted(files):
    """As two processes leave it on a file system without locks."""
    with begun(files, 4) as journal:
        journal.append([done(1), done(2)])
    held = files.journal.read_bytes()
    files.journal.write_bytes(held + held.splitlines(keepends=True)[2] + held.splitlines(keepends=True)[1])
    with begun(files, 4) as journal:
        assert [number in journal for number in (1, 2, 3, 4)] == [True, True, False, False]
        assert journal.totals.rows == 2
    assert files.journal.read_bytes() == held


@pytest.mark.parametrize("number", [b"9" * 5000, b"0", b"5", b"-1"])
def test_a_record_of_a_row_that_there_is_not_ends_what_is_trusted(number, files):
    with begun(files, 4) as journal:
        journal.append([done(1)])
    held = files.journal.read_bytes()
    line = b'{"row": ' + number + b', "failed": false, "tokens": 1, "answer": {}}\n'
    files.journal.write_bytes(held + line)
    with begun(files, 4) as journal:
        assert journal.totals.rows == 1
    assert files.journal.read_bytes() == held


def test_a_journal_that_somebody_removed_costs_no_output(files):
    with begun(files, 1) as journal:
        journal.append([done(1)])
        files.journal.unlink()
        publish(files, journal, IDENTITY, names=None)
    assert files.output.read_bytes() == done(1).answer + b"\n"


@pytest.mark.parametrize("call", [1, 2])
def test_an_output_that_cannot_be_made_leaves_the_journal_alone(call, files, monkeypatch):
    replace, left = os.replace, call

    def fails(*paths: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.EIO, "Input/output error")
        replace(*paths)

    with begun(files, 1) as journal:
        journal.append([done(1)])
        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="Input/output"):
            publish(files, journal, IDENTITY, names=None)
        assert files.journal.exists()
        assert not [path for path in Path().iterdir() if path.suffix == ".tmp"]
        publish(files, journal, IDENTITY, names=None)
    assert files.output.read_bytes() == done(1).answer + b"\n"


def test_rows_that_do_not_fit_on_the_disk_leave_the_file_as_it_was(files, monkeypatch):
    write, room = os.pwrite, 25

    def full_disk(file: int, data: Any, offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(file, bytes(data)[:room], offset)
        room -= taken
        return taken

    with begun(files, 9) as journal:
        journal.append([done(1)])
        before = files.journal.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full_disk)
            with pytest.raises(OSError, match="No space"):
                journal.append([done(2), done(3)])
        assert files.journal.read_bytes() == before
        assert 2 not in journal
        journal.append([done(4)])
        assert [json.loads(answer)["id"] for answer in journal.answers()] == [1, 4]


def test_one_process_has_a_job_at_a_time(files):
    with begun(files, 2), pytest.raises(JobError, match=r"another process is working on out.jsonl.partial"):
        begun(files, 2)
    with begun(files, 2):
        pass


def test_a_job_is_continued_kept_or_refused_by_what_its_files_say(files):
    def finish(journal: Journal) -> None:
        journal.append([done(number) for number in (1, 2) if number not in journal])
        publish(files, journal, IDENTITY, names=None)

    with begun(files, 2) as journal:
        journal.append([done(2)])
    with pytest.raises(JobError, match=r"sampling.temperature is 0.0 there and 1.0 here.*overwrite=true"):
        begun(files, 2, **{"sampling.temperature": 1.0})
    with pytest.raises(JobError, match="its prompts are not those of prompts="):
        begun(files, 2, prompts=[2, "cd"])
    with begun(files, 2, **{"an option of a later version": None}) as journal:
        assert (1 in journal, 2 in journal) == (False, True)
        finish(journal)
    assert files.output.read_bytes() == b"".join(done(number).answer + b"\n" for number in (1, 2))
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl", "out.jsonl.job.json"]

    totals = begun(files, 2)
    assert (totals.rows, totals.failed, totals.tokens) == (2, 0, 3)
    assert not files.journal.exists()
    with pytest.raises(JobError, match=r"output=out.jsonl is of another job \(sampling.temperature"):
        begun(files, 2, **{"sampling.temperature": 1.0})
    with open_journal(files, IDENTITY, Survey(1, "ab", 2, 2), overwrite=True) as journal:
        assert not journal.totals.rows
        assert files.output.exists(), "an output is there until another replaces it"
        journal.append([done(1)])
    with open_journal(files, IDENTITY, Survey(1, "ab", 2, 2), overwrite=True) as journal:
        assert journal.totals.rows == 1
        finish(journal)

    files.output.write_text("more\n")
    with pytest.raises(JobError, match="was changed since it was written"):
        begun(files, 2)
    files.manifest.unlink()
    with pytest.raises(JobError, match=r"output=out.jsonl exists; name another file"):
        begun(files, 2)
    assert files.output.read_text() == "more\n"


@pytest.mark.parametrize("step", ["replace", "fsync", "unlink"])
def test_an_end_while_the_output_is_made_loses_nothing(step, files, monkeypatch):
    """The process dies before each call that makes the output, in turn; the next start completes it."""
    original, deaths = getattr(os, step), 0

    class Killed(BaseException):
        pass

    for death in range(1, 9):
        left = death

        def dies(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            return original(*arguments, **named)

        opened = begun(files, 2)
        if not isinstance(opened, Journal):
            break
        with opened as journal, monkeypatch.context() as patch:
            journal.append([done(number) for number in (2, 1) if number not in journal])
            patch.setattr(os, step, dies)
            try:
                publish(files, journal, IDENTITY, names=None)
            except Killed:
                deaths += 1
    assert deaths
    assert not isinstance(begun(files, 2), Journal)
    assert files.output.read_bytes() == b"".join(done(number).answer + b"\n" for number in (1, 2))
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl", "out.jsonl.job.json"]


def test_a_link_stays_and_what_it_names_is_replaced():
    Path("elsewhere").mkdir()
    Path("out.jsonl").symlink_to("elsewhere/real.jsonl")
    files = Files(Path("out.jsonl"))
    with begun(files, 1) as journal:
        journal.append([done(1)])
        publish(files, journal, IDENTITY, names=None)
    assert Path("out.jsonl").is_symlink()
    assert Path("elsewhere/real.jsonl").read_bytes() == done(1).answer + b"\n"


@pytest.mark.parametrize(
    "text", ["dear diary\n", '{"makeready": 1, "identity": []}\n{}\n', '{"makeready": 1}\n{}\n']
)
def test_a_file_that_is_no_journal_is_left_alone(text, files):
    files.journal.write_text(text)
    with pytest.raises(JobError, match="no journal of a batch job"):
        begun(files, 1)
    assert files.journal.read_text() == text


def test_an_output_whose_manifest_is_not_ours_is_left_alone(files):
    files.output.write_text("mine\n")
    for held in ({"identity": [1], "bytes": 5, "rows": 1, "failed": 0, "tokens": 1}, [], {"identity": {}}):
        files.manifest.write_text(json.dumps(held))
        with pytest.raises(JobError, match=r"output=out.jsonl exists; name another file"):
            begun(files, 1)
    assert files.output.read_text() == "mine\n"


def test_no_changed_bit_reaches_the_output(files):
    """Each single bit of a journal in turn: what is kept is what was written, and the rest runs again."""
    whole = [done(number, "some text, as long as an answer") for number in range(1, 5)]
    with begun(files, 4) as journal:
        journal.append(whole)
    held = files.journal.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(held), 3):  # 3 has no factor in common with 8: all bits of a byte are met
        changed = bytearray(held)
        changed[bit // 8] ^= 1 << bit % 8
        files.journal.write_bytes(changed)
        try:
            opened = begun(files, 4)
        except JobError as error:
            assert bit // 8 <= held.index(b"\n"), f"bit {bit}"
            assert "away" in str(error)  # noqa: PT017
            refused += 1
            continue
        with opened as journal:
            kept = [row.answer for row in whole if row.number in journal]
            assert len(kept) < 4, f"bit {bit} went unnoticed"
            assert list(journal.answers()) == kept
            assert journal.totals.tokens == sum(row.output_tokens for row in whole[: len(kept)])
    assert refused


def test_a_record_that_changes_while_the_job_runs_does_not_reach_the_output(files):
    with begun(files, 2) as journal:
        journal.append([done(1, "first"), done(2, "second")])
        files.journal.write_bytes(files.journal.read_bytes().replace(b"second", b"sekond"))
        with pytest.raises(
            JobError, match=r"out.jsonl.partial was damaged at byte \d+ .* start the same command"
        ):
            publish(files, journal, IDENTITY, names=None)
    assert not files.output.exists()
    with begun(files, 2) as journal:
        assert [number in journal for number in (1, 2)] == [True, False]


def test_a_journal_of_another_version_says_so(files):
    files.journal.write_text('{"makeready": 1, "identity": {}}\n{"row": 1}\n')
    with pytest.raises(JobError, match=r"another version of makeready \(schema 1, this one reads 2\)"):
        begun(files, 1)
