"""A job on the engine of this process, and what every job does before and after its rows run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from makeready.engine.entrypoints.batch.base import Done, JobError, Numbered
from makeready.engine.entrypoints.batch.journal import Journal
from makeready.engine.entrypoints.batch.output import Files
from makeready.engine.entrypoints.batch.parquet import arrow_module
from makeready.engine.entrypoints.batch.source import Source, Survey, TableSource, is_parquet, open_source
from makeready.engine.entrypoints.batch.worker import Worker
from makeready.engine.entrypoints.ending import whole
from makeready.engine.entrypoints.status import RowProgress, count_rows, duration

TOLD_SECONDS = 0.1  # between two figures on a terminal


@dataclass(frozen=True)
class Input:
    """The input of a job, surveyed.

    Attributes:
        format: how its rows are written; a key of :data:`worker.FORMATS`.
    """

    source: Source
    survey: Survey
    format: str

    @property
    def names(self) -> Mapping[str, Any] | None:
        """Arrow types of the columns that are handed through; None where it is no table."""
        return self.source.names if isinstance(self.source, TableSource) else None

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells it from other inputs."""
        return {"prompts": [self.survey.size, self.survey.sha256], "format": self.format}


def open_input(prompts: Path, output: Path, format: str, carry: bool = True) -> Input:
    """Survey a job's input.

    Args:
        carry: whether columns that are no fields are handed through.
        format: a key of :data:`worker.FORMATS`, or auto: as the first row that can be read is written.

    Raises:
        JobError: no row, or a format that the files cannot have.
    """
    source = open_source(prompts, carry)
    survey = source.survey()
    if not survey.count:
        raise JobError(
            f"prompts={prompts} has no rows; write a request a line, such as " + '{"prompt": "..."}'
        )
    if format == "auto":
        format = "openai" if survey.openai else "rows"
    if is_parquet(output):
        arrow_module("pyarrow.parquet")  # to be missed now, not after hours
    if format == "openai" and (is_parquet(output) or is_parquet(prompts)):
        raise JobError(
            "OpenAI's batch format is JSON lines; name a .jsonl file, or use format=rows for Parquet"
        )
    return Input(source, survey, format)


class Rows:
    """The rows that a journal does not have yet, and the figures of those that come in.

    Use as a context manager, which turns an interruption into a sentence that says how to go on.

    Attributes:
        left: rows that were not taken yet.
    """

    def __init__(self, given: Input, journal: Journal, files: Files) -> None:
        self.left = given.survey.count - journal.totals.rows
        self._given, self._journal, self._files = given, journal, files
        self._pending = (row for row in given.source.rows() if row[0] not in journal)
        self._progress: RowProgress | None = None
        self._told = 0.0
        self._prompt_tokens = self._cached_tokens = self._tokens = 0

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(self.state) from None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress meanwhile; its clock begins now, when the model is loaded."""
        with RowProgress(self._given.survey.count, self._journal.totals.rows) as self._progress:
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Say what is kept where a disk refuses to write."""
        try:
            yield
        except OSError as error:
            raise JobError(f"{error.strerror or error}; make room: {self.state}") from error

    @property
    def state(self) -> str:
        """What is kept, and how to go on."""
        kept, total = self._journal.totals.rows, self._given.survey.count
        if not kept:
            return "no row was done"
        kept_there = f"{kept:,} of {count_rows(total, 0)} are kept in {self._files.journal}"
        return f"{kept_there}; the same command goes on from there"

    def take(self, count: int) -> list[Numbered]:
        """The next rows to run, at most ``count``.

        Raises:
            JobError: the input was changed meanwhile, or cannot be read.
        """
        try:
            rows = list(islice(self._pending, count))
        except (JobError, OSError) as error:
            raise JobError(f"{error}; {self.state}") from error
        self.left -= len(rows)
        return rows

    def done(self, rows: list[Done]) -> None:
        """Keep rows that are final."""
        if rows:
            with self.kept():
                self._journal.append(rows)
            self._prompt_tokens += sum(row.prompt_tokens for row in rows)
            self._cached_tokens += sum(row.cached_tokens for row in rows)
            self._tokens += sum(row.output_tokens for row in rows)

    def say(self, sentence: str) -> None:
        """Print a line beside the figures."""
        if self._progress is not None:
            self._progress.say(sentence)

    def tell(self, running: Callable[[], int]) -> None:
        """Show how far the job is, if that is due; ``running`` counts tokens of rows that are not final."""
        if self._progress is not None and time.monotonic() - self._told > TOLD_SECONDS:
            self._told = time.monotonic()
            totals, hits = self._journal.totals, self._cached_tokens / max(self._prompt_tokens, 1)
            self._progress.update(totals.rows, totals.failed, self._tokens + running(), hits)

    def summary(self) -> str:
        """What was done, in words."""
        totals = self._journal.totals
        said = count_rows(totals.rows, totals.failed)
        if self._progress is None:
            return said
        seconds = self._progress.seconds
        said += f" in {duration(seconds)}, {self._tokens:,} tokens ({self._tokens / seconds:,.1f} tokens/s"
        hits = self._cached_tokens / max(self._prompt_tokens, 1)
        return said + (f", {hits:.0%} of prompt tokens cached)" if hits else ")")


def run_local(worker: Worker, rows: Rows) -> None:
    """Answer every row on one engine."""
    with rows.shown():
        while True:
            with whole():
                worker.put(rows.take(worker.room))
                if not worker.busy:
                    return
                done = worker.step()
            rows.done(done)
            rows.tell(lambda: worker.output_tokens)
