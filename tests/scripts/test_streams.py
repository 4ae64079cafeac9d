"""Standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from makeready.engine.entrypoints.streams import patient_stderr

PROGRAM = """
import os, sys
from makeready.engine.entrypoints.streams import open_streams, patient_stderr
open_streams()
assert os.open("first", os.O_RDWR | os.O_CREAT) > 2
with patient_stderr():
    print("to nobody", file=sys.stderr, flush=True)
    print("again", file=sys.stderr, flush=True)
print("out")
os.write(2, b"a library's")
os.write(1, b"a library's")
open("done", "w").close()
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_nothing_that_is_printed_gets_into_a_file_and_the_program_ends_well(closed):
    Path("program.py").write_text(PROGRAM)
    done = subprocess.run(
        f"{sys.executable} program.py {closed}", shell=True, capture_output=True, check=False, timeout=600
    )
    assert done.returncode == 0
    assert Path("done").exists()
    assert Path("first").read_bytes() == b""


def test_a_reader_that_goes_away_costs_nothing():
    Path("program.py").write_text(PROGRAM)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, check=False, timeout=600)
    os.close(write)
    assert done.returncode == 0
    assert b"out\n" in done.stdout


def test_what_can_be_written_is(capsys):
    before = sys.stderr
    with patient_stderr():
        print("a sentence", file=sys.stderr)
        assert not sys.stderr.isatty()
    assert sys.stderr is before
    assert capsys.readouterr().err == "a sentence\n"
