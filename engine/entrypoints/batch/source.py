"""The rows of an input file, numbered from 1: lines of JSON, or rows of a Parquet table."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from makeready.engine.entrypoints.batch.base import JobError, Numbered, RowError
from makeready.engine.entrypoints.batch.lines import HEAD_BYTES, check_lines, open_lines
from makeready.engine.entrypoints.batch.parquet import ParquetSource
from makeready.engine.entrypoints.batch.rows import parse


@dataclass(frozen=True)
class Survey:
    """What one reading of the whole input found.

    Attributes:
        size: bytes of the file, decompressed.
        sha256: of these bytes.
        last: number of the last row; 0 where there is none.
        count: rows, blank lines left out.
        openai: whether its first row that can be read is of OpenAI's format.
    """

    size: int
    sha256: str
    last: int
    count: int
    openai: bool = False


class Source(Protocol):
    """An input file."""

    def survey(self) -> Survey:
        """Read the file once.

        Raises:
            JobError: it is another kind of file than its name says, or damaged.
        """
        ...

    def rows(self) -> Iterator[Numbered]:
        """Its rows, one after the other, as they were surveyed.

        Raises:
            JobError: the file was changed since, or is damaged.
        """
        ...


class _Watched:
    """A file that must stay as it is: by its size and time, since its bytes are read only once more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] = ()

    def note(self, file: IO[bytes]) -> None:
        """Take ``file`` as it is now."""
        self._stamp = _stamp(file)

    def check(self, file: IO[bytes]) -> None:
        """Raise :class:`JobError` if what was read of ``file`` may be something else by now."""
        if _stamp(file) != self._stamp:
            raise JobError(f"{self._path} was changed while the job ran; put it back as it was")


class LineSource:
    """JSON lines; one of white space is no row, but is counted in the numbers of those after it."""

    def __init__(self, path: Path) -> None:
        self._path, self._watched = path, _Watched(path)

    def survey(self) -> Survey:
        """See :meth:`Source.survey`."""
        digest, head = hashlib.sha256(), b""
        size = count = last = 0
        openai: bool | None = None
        with open_lines(self._path) as (file, lines):
            self._watched.note(file)
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                size += len(line)
                head += line[: HEAD_BYTES - len(head)]
                if _is_row(line):
                    count, last = count + 1, number
                    openai = _is_openai(line) if openai is None else openai
        check_lines(self._path, head, count)
        return Survey(size, digest.hexdigest(), last, count, bool(openai))

    def rows(self) -> Iterator[Numbered]:
        """See :meth:`Source.rows`."""
        with open_lines(self._path) as (file, lines):
            for number, line in enumerate(lines, start=1):
                if _is_row(line):
                    self._watched.check(file)
                    yield number, line


class TableSource:
    """A Parquet table."""

    def __init__(self, path: Path, carry: bool = True) -> None:
        self._path, self._watched, self._table = path, _Watched(path), ParquetSource(path, carry)
        self.names = self._table.names()  # Arrow types of the columns that are handed through

    def survey(self) -> Survey:
        """See :meth:`Source.survey`."""
        digest, size = hashlib.sha256(), 0
        with open(self._path, "rb") as file:
            self._watched.note(file)
            while piece := file.read(2**20):
                digest.update(piece)
                size += len(piece)
        return Survey(size, digest.hexdigest(), self._table.count, self._table.count)

    def rows(self) -> Iterator[Numbered]:
        """See :meth:`Source.rows`."""
        with open(self._path, "rb") as file:
            for number, row in enumerate(self._table.rows(file), start=1):
                self._watched.check(file)
                yield number, row


def is_parquet(path: Path) -> bool:
    """Whether a file is a Parquet table, by its name."""
    return path.suffix.lower() in (".parquet", ".pq")


def open_source(path: Path, carry: bool = True) -> Source:
    """The input file; ``carry`` as for :class:`ParquetSource`.

    Raises:
        JobError: a Parquet table that cannot be read or has unknown columns, or pyarrow is not installed.
    """
    return TableSource(path, carry) if is_parquet(path) else LineSource(path)


def _is_row(line: bytes) -> bool:
    """Whether a line is more than white space, or the mark at the beginning of a file without text."""
    return bool(line.strip().removeprefix(codecs.BOM_UTF8))


def _stamp(file: IO[bytes]) -> tuple[int, ...]:
    held = os.fstat(file.fileno())
    return held.st_dev, held.st_ino, held.st_size, held.st_mtime_ns


def _is_openai(line: bytes) -> bool | None:
    try:
        return not {"body", "url", "method"}.isdisjoint(parse(line))
    except RowError:
        return None
