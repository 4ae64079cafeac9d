"""Finished rows, kept as they come: an append-only file that knows which rows it holds.

    {"makeready": 2, "crc32": "0a1b2c3d", "identity": {...}}                       what the job is
    {"row": 7, "failed": false, "tokens": 12, "crc32": "...", "answer": {...}}     one finished row a line

A record is written in one call as soon as its row is final, so a killed process loses none; every few
seconds the file is synced, so a machine that loses power loses those seconds. A last line that is not
whole was being written when the end came: it is cut off, and its row runs again. A line whose checksum does
not fit was changed since: it and what follows it runs again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makeready.engine.entrypoints.batch.base import Done, JobError
from makeready.engine.entrypoints.batch.rows import encode

SCHEMA = 2
SYNC_SECONDS = 5.0  # of work lost with the machine's power; a sync waits for the disk
RECORD = re.compile(
    rb'\{"row": (\d{1,18}), "failed": (true|false), "tokens": (\d{1,18}), "crc32": "([0-9a-f]{8})", "answer": '
)
HEAD = b'{"makeready"'
NOWHERE = -1


@dataclass(frozen=True)
class Totals:
    """What a journal holds: rows, those of them with errors, tokens generated for them."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0

    def after(self, rows: int, failed: int, tokens: int) -> Totals:
        """With so many more."""
        return Totals(self.rows + rows, self.failed + failed, self.tokens + tokens)


class Journal:
    """The finished rows of one job; one process at a time has it.

    Args:
        path: the file; made where there is none.

    Raises:
        JobError: another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.totals = Totals()
        self._file = _locked(path)
        self._end = 0
        self._begun = False
        self._offsets = array("q")
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; one without rows, which this process began, is not kept."""
        if self._begun and not self.totals.rows:
            self.remove()
        os.close(self._file)

    def identity(self) -> Mapping[str, Any] | None:
        """What job the file is of; None where it holds no row."""
        with open(self.path, "rb") as file:
            line, row = file.readline(), file.readline()
        if not row and line[: len(HEAD)] == HEAD[: len(line)]:
            return None
        try:
            header = json.loads(line)
        except ValueError:
            header = {}
        header = header if isinstance(header, dict) else {}
        made, schema = header.get("identity"), header.get("makeready")
        if not isinstance(made, dict) or not isinstance(schema, int):
            raise JobError(f"{self.path} is no journal of a batch job; move it away")
        if schema != SCHEMA:
            raise JobError(
                f"{self.path} is of another version of makeready (schema {schema}, this one reads {SCHEMA}); "
                "finish the job with that version, or move the file away"
            )
        if header.get("crc32") != _crc(encode(made)):
            raise JobError(
                f"{self.path} is damaged in its first line, which says what job it is; move it away"
            )
        return made

    def begin(self, identity: Mapping[str, Any], last: int) -> None:
        """Empty the file, for rows from 1 to ``last``."""
        os.ftruncate(self._file, 0)
        self._end, self._begun, self.totals = 0, True, Totals()
        self._offsets = array("q", [NOWHERE]) * (last + 1)
        header = {"makeready": SCHEMA, "crc32": _crc(encode(identity)), "identity": identity}
        self._write(encode(header) + b"\n", self.totals)

    def resume(self, last: int) -> None:
        """Find what the file holds, for rows from 1 to ``last``, and cut off what is not whole."""
        self._offsets = array("q", [NOWHERE]) * (last + 1)
        with open(self.path, "rb") as file:
            self._end = len(file.readline())
            for line in file:
                record = RECORD.match(line)
                if (
                    record is None
                    or not _is_whole(line, record)
                    or not 0 < (number := int(record[1])) <= last
                ):
                    break
                if number in self:  # two processes wrote, on a file system without locks
                    break
                self._offsets[number] = self._end
                self._end += len(line)
                self.totals = self.totals.after(1, record[2] == b"true", int(record[3]))
        os.ftruncate(self._file, self._end)

    def append(self, rows: Sequence[Done]) -> None:
        """Add rows; where they cannot be written whole, none is and the file stays as it was.

        An interruption leaves all of them or none, and ``totals`` that say which.
        """
        assert all(row.number not in self for row in rows), "a row was answered twice"
        lines = [_record(row) for row in rows]
        failed, tokens = sum(row.failed for row in rows), sum(row.output_tokens for row in rows)
        offset = self._end
        self._write(b"".join(lines), self.totals.after(len(rows), failed, tokens))
        for row, line in zip(rows, lines, strict=True):
            self._offsets[row.number] = offset
            offset += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fdatasync(self._file)
        self._synced = time.monotonic()

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] != NOWHERE

    def answers(self) -> Iterator[bytes]:
        """The answers in the order of their rows, each a JSON object without an end of line.

        Raises:
            JobError: a record was changed since it was written or found.
        """
        if not self.totals.rows:
            return
        with mmap.mmap(self._file, self._end, prot=mmap.PROT_READ) as held:
            for offset in self._offsets:
                if offset != NOWHERE:
                    line = held[offset : held.find(b"\n", offset) + 1]
                    record = RECORD.match(line)
                    if record is None or not _is_whole(line, record):
                        raise JobError(
                            f"{self.path} was damaged at byte {offset} while the job ran; check the disk, and start "
                            "the same command again, which runs what is lost again"
                        )
                    yield line[record.end() : -2]

    def remove(self) -> None:
        """Delete the file."""
        self._begun = False
        with suppress(FileNotFoundError):  # somebody was before us
            os.unlink(self.path)

    def _write(self, data: bytes, totals: Totals) -> None:
        """Write at the end, after which the file holds ``totals``."""
        left, at, before = memoryview(data), self._end, self.totals
        end = at
        try:
            while left:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
            self._end, self.totals = at, totals
        except BaseException:
            self._end, self.totals = end, before
            with suppress(OSError):
                os.ftruncate(self._file, end)
            raise


def _record(row: Done) -> bytes:
    """A row's line; the checksum is of all that it says."""
    said = (row.number, b"true" if row.failed else b"false", row.output_tokens)
    crc = _crc(b"%d %s %d %s" % (*said, row.answer)).encode()
    return b'{"row": %d, "failed": %s, "tokens": %d, "crc32": "%s", "answer": %s}\n' % (
        *said,
        crc,
        row.answer,
    )


def _is_whole(line: bytes, record: re.Match[bytes]) -> bool:
    """Whether a record was written to its end and is what was written."""
    if not line.endswith(b"}\n"):
        return False
    number, failed, tokens, crc = record.groups()
    return _crc(b"%s %s %s %s" % (number, failed, tokens, line[record.end() : -2])) == crc.decode()


def _crc(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _locked(path: Path) -> int:
    """Open a file for this process alone. The lock ends with the process, however that ends."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                os.close(file)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise JobError(
                        f"another process is working on {path.name}; wait for it, or name another output"
                    ) from None
                raise
        # Whoever had it before may have finished and removed it in between.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        os.close(file)
