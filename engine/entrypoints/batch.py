"""A file of requests to a file of answers, with bounded memory however long the file is.

Rows are read as the engine has room for them and answered in their order, each line written whole as soon
as it and all rows before it are final: an interrupted job leaves the answers to a prefix of its rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from makeready.engine.entrypoints import rows
from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM
from makeready.engine.request import Output, Request
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.parts import TextError

# Rows that may be final or running behind one that is not: enough that a row of a full context beside
# short ones does not leave the engine idle, and a few MB of text at most.
READ_AHEAD = 4096


class Progress(Protocol):
    """Told after every step how many rows are final, and the tokens generated so far."""

    def __call__(self, rows: int, failed: int, tokens: int, share: float) -> None: ...


@dataclass
class Counts:
    """How far a job is."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    bytes_read: int = 0


@dataclass
class _Entry:
    """A row between being read and being written."""

    line: int
    nbytes: int
    names: dict[str, Any] = field(default_factory=dict)
    outputs: list[Output | None] = field(default_factory=list)
    sampled: bool = False
    error: str | None = None

    @property
    def final(self) -> bool:
        return self.error is not None or all(output is not None for output in self.outputs)


class Batch:
    """Runs lines of requests on a loaded model.

    Args:
        llm: what answers.
        lines: JSON lines; white space alone is skipped.
        write: takes each line of answers, whole.
        sampling: what rows that do not say otherwise ask for.
        template: variables of the chat template for rows of messages.
        size: bytes of all lines, for the share that is told to ``progress``; 0 where unknown.
    """

    def __init__(
        self,
        llm: LLM,
        lines: Iterable[bytes],
        write: Callable[[bytes], None],
        *,
        sampling: SamplingParams | None = None,
        template: Mapping[str, Any] | None = None,
        size: int = 0,
        progress: Progress = lambda rows, failed, tokens, share: None,
    ) -> None:
        self.counts = Counts()
        self._llm = llm
        self._lines = enumerate(lines, start=1)
        self._write = write
        params = sampling or SamplingParams()
        self._sampling = {name: getattr(params, name) for name in rows.SAMPLING}
        self._template = dict(template or {})
        self._size = size
        self._progress = progress
        self._entries: deque[_Entry] = deque()
        self._running: dict[int, tuple[Request, _Entry, int]] = {}  # id of a request → it and its place

    def run(self) -> Counts:
        """Answer every row.

        Returns:
            The totals; ``counts`` has them at any time before.
        """
        engine = self._llm.engine
        while self._feed() or self._entries:
            for request in engine.step():
                _, entry, place = self._running.pop(id(request))
                entry.outputs[place] = request.result()
                self.counts.tokens += len(request.output)
            self._drain()
            self._tell()
        return self.counts

    def _feed(self) -> bool:
        """Read rows until enough wait that no slot stays free; whether anything was read."""
        engine, read = self._llm.engine, False
        while len(engine.scheduler.waiting) < engine.limits.max_rows and len(self._entries) < READ_AHEAD:
            number, line = next(self._lines, (0, b""))
            if not number:
                break
            read = True
            if not line.strip():
                self.counts.bytes_read += len(line)
                continue
            entry = _Entry(number, len(line))
            self._entries.append(entry)
            try:
                self._submit(entry, line)
            except (rows.RowError, RequestError, TextError) as error:
                entry.error = str(error)
            except Exception as error:  # what nobody foresaw in one row must not cost the others their text
                entry.error = f"the row cannot be read ({type(error).__name__}: {error})"
        return read

    def _submit(self, entry: _Entry, line: bytes) -> None:
        fields = rows.parse(line)
        entry.names = rows.passed_through(fields)
        row = rows.read(fields)
        params = SamplingParams.from_mapping({**self._sampling, **row.sampling})
        prompt = row.prompt
        if row.kind == "messages":
            prompt = self._llm.render(prompt, **{**self._template, **row.template})
        requests = self._llm.requests(prompt, params)
        for request in requests:  # all alike but for their seeds: the first is refused or none
            self._llm.engine.submit(request)
        entry.outputs, entry.sampled = [None] * len(requests), params.temperature > 0
        self._running |= {id(request): (request, entry, i) for i, request in enumerate(requests)}

    def _drain(self) -> None:
        """Write the answers that nothing before them is missing for."""
        while self._entries and self._entries[0].final:
            entry = self._entries[0]
            if entry.error is not None:
                made = rows.error(entry.error, entry.line)
                self.counts.failed += 1
            else:
                outputs = [output for output in entry.outputs if output is not None]
                has_text = self._llm.tokenizer is not None
                made = rows.answer(outputs, with_text=has_text, with_seed=entry.sampled)
            self._write(rows.encode(entry.names | made))
            self._entries.popleft()
            self.counts.rows += 1
            self.counts.bytes_read += entry.nbytes

    def _tell(self) -> None:
        running = sum(len(request.output) for request, _, _ in self._running.values())
        share = self.counts.bytes_read / self._size if self._size else 0.0
        self._progress(self.counts.rows, self.counts.failed, self.counts.tokens + running, share)


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, one at a time."""
    with open(path, "rb") as file:
        yield from file


class LineWriter:
    """Writes whole lines to a file: one that cannot be written whole is taken back.

    Args:
        path: the file.
        overwrite: replace what is there; else the file must not exist.

    Raises:
        OSError: the file exists or cannot be made.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
        self._file = os.open(path, flags, 0o666)
        self._end = 0

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def write(self, line: bytes) -> None:
        """Append a line, in one call to the system where that takes it whole."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
                os.lseek(self._file, self._end, os.SEEK_SET)
            raise
        self._end += len(line)
