"""Jobs that are cut off, in processes of their own, and what the same command makes of it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import job_processes
import pytest
from scripts_in_process import TINY, script

from makeready.engine.sequence import TokenSequence

ROWS, KILLS = 240, 6
HANG = 600  # seconds: no machine is so busy
OPTIONS = (
    *TINY,
    "sampling=greedy",
    "sampling.ignore_eos=true",
    "plan.max_rows=4",
    "plan.weight_dtype=float32",
)
JOB = (*OPTIONS, "prompts=in.jsonl", "output=out.jsonl")
OUTPUT, JOURNAL = Path("out.jsonl"), Path("out.jsonl.partial")


def write_rows(path: Path) -> None:
    """Rows of very different lengths, and some that cannot be served."""
    pick = random.Random(7)
    rows: list[Any] = [
        {
            "id": i,
            "token_ids": [pick.randrange(97) for _ in range(1 + i % 5)],
            "max_new_tokens": pick.choice((1, 3, 50)),
        }
        for i in range(ROWS)
    ]
    rows[5] |= {"token_ids": [1] * 99}  # over the limit
    rows[11] |= {"temperature": -1}
    rows[17] |= {"sampling": {"max_new_tokens": 2}}  # contradicts what the row says itself
    lines = [json.dumps(row).encode() for row in rows]
    lines[23], lines[29] = b'{"token_ids": [1', b""
    path.write_bytes(b"\n".join(lines))  # the last line has no end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of a run that nothing cuts off."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MAKEREADY_CACHE", str(folder / "cache"))
        write_rows(Path("in.jsonl"))
        assert script("generate")(*JOB) == 0
        answers = list(map(json.loads, OUTPUT.read_text().splitlines()))
    assert len(answers) == ROWS - 1
    assert [answer["error"]["line"] for answer in answers if "error" in answer] == [6, 12, 18, 24]
    assert [answer["id"] for answer in answers if "id" in answer] == [
        i for i in range(ROWS) if i not in (23, 29)
    ]
    return (folder / "out.jsonl").read_bytes()


@pytest.fixture
def job(own_cache: Path, whole: bytes, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """A folder with the input, and the plan of the whole run in the cache."""
    cache = next(tmp_path_factory.getbasetemp().glob("whole*")) / "cache"
    monkeypatch.setenv("MAKEREADY_CACHE", str(cache))
    write_rows(Path("in.jsonl"))


def journal() -> bytes:
    """What the journal holds: nothing before the job has begun, nor once it has ended and taken it away."""
    try:
        return JOURNAL.read_bytes()
    except FileNotFoundError:
        return b""


def kept() -> list[int]:
    """Numbers of the rows in the journal, but for a line that is not whole."""
    return [json.loads(line)["row"] for line in journal().split(b"\n")[1:-1]]


def run_until(rows: int, number: int, pause: float = 0) -> int:
    """Start the job and send a signal when the journal has ``rows`` rows, or none if these are all; the exit code."""
    last = ROWS - 1
    process = job_processes.start(Path.cwd(), JOB, most_rows=min(rows + 20, last) if rows < last else None)
    while process.is_alive() and (rows >= last or journal().count(b"\n") <= rows):
        time.sleep(0.001)
    time.sleep(pause)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(HANG)
    assert process.exitcode is not None
    return process.exitcode


def kill_until_done(kills: int, pick: random.Random) -> int:
    """Kill the job at random moments, then let it run to its end; how many kills found it running."""
    landed = 0
    for _ in range(kills):
        before = kept()
        code = run_until(
            len(before) + pick.randrange(2 * ROWS // kills), signal.SIGKILL, pick.random() * 0.01
        )
        after = kept()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert after[: len(before)] == before, "a row that was kept is gone"
        assert len(set(after)) == len(after), "a row was answered twice"
        assert not OUTPUT.exists()
        landed += 0 < len(after) < ROWS - 1
    if not OUTPUT.exists():
        assert run_until(ROWS, signal.SIGKILL) == 0
    return landed


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_random_moments_a_job_loses_no_row_and_has_none_twice(rounds, job, whole):
    for seed in range(rounds):
        for path in Path().glob("out*"):
            path.unlink()
        assert kill_until_done(KILLS, random.Random(seed)) >= KILLS // 3
        assert OUTPUT.read_bytes() == whole
        assert sorted(path.name for path in Path().glob("out*")) == ["out.jsonl", "out.jsonl.job.json"]


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_ctrl_c_and_sigterm_say_what_is_kept_and_how_to_go_on(number, word, code, job, whole, capsys):
    assert run_until(9, number) == code
    count = len(kept())
    assert 9 <= count < ROWS - 1
    said = Path("said").read_text().splitlines()[-1]
    assert said == (
        f"{word}; {count} of {ROWS - 1} rows are kept in out.jsonl.partial; the same command goes on from there"
    )
    assert (
        script("generate")(*JOB, "plan.max_rows=2", "kv.memory_gib=0.001") == 0
    )  # what fits is no part of the job
    said = capsys.readouterr().err
    assert f"going on with out.jsonl.partial: {count} of {ROWS - 1} rows are done\n" in said
    assert f"{ROWS - 1} rows (4 with errors) in" in said
    assert OUTPUT.read_bytes() == whole

    assert script("generate")(*JOB) == 0
    assert f"out.jsonl is complete: {ROWS - 1} rows (4 with errors)" in capsys.readouterr().err
    assert script("generate")(*JOB, "sampling.top_k=3") == 1
    assert "out.jsonl is of another job (sampling.top_k is -1 there and 3 here)" in capsys.readouterr().err
    assert OUTPUT.read_bytes() == whole


@pytest.mark.parametrize("pause", [0, 0.001, 0.005, 0.02])
def test_a_second_ctrl_c_does_not_cut_the_sentence_short(pause, job):
    """Launchers pass on what the terminal sent to all of its processes as well."""
    process = job_processes.start(Path.cwd(), JOB, most_rows=20)
    while process.is_alive() and journal().count(b"\n") < 9:
        time.sleep(0.001)
    assert process.pid is not None
    for _ in range(3):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        time.sleep(pause)
    process.join(HANG)
    (said,) = [line for line in Path("said").read_text().splitlines() if "interrupted" in line]
    assert said == (
        f"interrupted; {len(kept())} of {ROWS - 1} rows are kept in out.jsonl.partial; "
        "the same command goes on from there"
    )
    assert "Traceback" not in Path("said").read_text()


@pytest.fixture
def handlers() -> Iterator[None]:
    """A job that a signal ended leaves its handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_amid_a_change_of_the_queue_waits_until_it_is_done(job, whole, handlers, monkeypatch, capsys):
    """Cut off there, the sequence could be neither run nor ended."""
    ids, calls = TokenSequence.ids, 0

    def interrupted(sequence: TokenSequence) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            signal.raise_signal(signal.SIGINT)
        return ids(sequence)

    with monkeypatch.context() as patch:
        patch.setattr(TokenSequence, "ids", interrupted)
        assert script("generate")(*JOB) == 130
    count = len(kept())
    assert capsys.readouterr().err.endswith(
        f"interrupted; {count} of {ROWS - 1} rows are kept in out.jsonl.partial; "
        "the same command goes on from there\n"
    )
    assert script("generate")(*JOB) == 0
    assert OUTPUT.read_bytes() == whole


def test_a_full_disk_ends_a_job_with_what_it_has(job, whole):
    process = job_processes.start(Path.cwd(), JOB, file_bytes=9000)
    process.join(HANG)
    assert process.exitcode == 1
    count = len(kept())
    assert count > 9
    assert JOURNAL.read_bytes().endswith(b"}\n")
    said = Path("said").read_text().splitlines()[-1]
    assert said == (
        f"error: File too large; make room: {count} of {ROWS - 1} rows are kept in out.jsonl.partial; "
        "the same command goes on from there"
    )
    assert not OUTPUT.exists()
    assert run_until(ROWS, signal.SIGKILL) == 0
    assert OUTPUT.read_bytes() == whole


def test_a_job_that_never_began_leaves_nothing(job, capsys):
    assert script("generate")(*JOB, "plan.context_len=65") == 1
    assert "plan.context_len=65" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


def test_a_sweep_writes_an_output_for_each_point(job):
    options = (*OPTIONS, "prompts=in.jsonl", "output=out_${sampling.top_k}_${hydra:job.num}.jsonl")
    assert script("generate")("--multirun", *options, "sampling.max_new_tokens=2", "sampling.top_k=1,5") == 0
    assert sorted(path.name for path in Path().glob("out*.jsonl")) == ["out_1_0.jsonl", "out_5_1.jsonl"]
