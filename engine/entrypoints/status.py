"""What a script says on stderr while it works: live on a terminal, plain lines where it is piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status as Spinner
from rich.text import Text

QUIET_SECONDS = 10.0  # between two lines about a batch where no terminal shows a live one


class Stages:
    """Stages of a job with their times; use as a context manager, which ends the last one.

    Args:
        stream: where to write; a spinner shows the running stage if it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._name = ""
        self._began = 0.0
        self._spinner: Spinner | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(done=kind is None)

    def begin(self, name: str) -> None:
        """End the running stage and start another."""
        self._stop(done=True)
        self._name, self._began = name, time.perf_counter()
        if self._console.is_terminal:
            spinner = self._console.status(Text(name))
            spinner.start()
            self._spinner = spinner

    def end(self) -> None:
        """End the running stage."""
        self._stop(done=True)

    def note(self, detail: str) -> None:
        """Say how far the running stage is; a terminal only."""
        if self._spinner is not None:
            self._spinner.update(Text(f"{self._name}  {detail}"))

    def say(self, sentence: str) -> None:
        """Print a line of its own."""
        self._console.print(Text(sentence))

    def _stop(self, *, done: bool) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
        if self._name and done:
            self.say(f"{time.perf_counter() - self._began:6.2f} s  {self._name}")
        self._name = ""


class RowProgress:
    """Rows, tokens a second, cache hits and time left of a batch job; use as a context manager.

    Args:
        total: rows of the job.
        before: rows that were final when it began; they count as done, not as speed.
    """

    def __init__(self, total: int, before: int = 0, stream: TextIO | None = None) -> None:
        console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._console = console
        self._total, self._before = total, before
        self._began = self._said = time.perf_counter()
        self._bar: Progress | None = None
        if console.is_terminal:
            bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
            self._task = bar.add_task("", total=total, completed=before)
            self._bar = bar

    def __enter__(self) -> RowProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._began

    def update(self, rows: int, failed: int, tokens: int, hits: float) -> None:
        """Show figures.

        Args:
            rows, failed: that are final, those of an earlier start included.
            tokens: generated since this start.
            hits: part of the prompt tokens that was found in the prefix cache, 0 to 1.
        """
        if self._bar is None and time.perf_counter() - self._said < QUIET_SECONDS:
            return
        sentence = self._sentence(rows, failed, tokens, hits)
        if self._bar is not None:
            self._bar.update(self._task, completed=rows, description=sentence)
        else:
            self._said = time.perf_counter()
            self.say(sentence)

    def say(self, sentence: str) -> None:
        """Print a line of its own."""
        self._console.print(Text(sentence))

    def _sentence(self, rows: int, failed: int, tokens: int, hits: float) -> str:
        parts = [
            f"{rows:,} of {count_rows(self._total, failed)}",
            f"{tokens / max(self.seconds, 1e-9):,.1f} tokens/s",
        ]
        if hits:
            parts.append(f"{hits:.0%} of prompt tokens cached")
        now = rows - self._before
        if now > 0 and rows < self._total:
            parts.append(f"{duration(self.seconds * (self._total - rows) / now)} left")
        return ", ".join(parts)


def count_rows(rows: int, failed: int) -> str:
    """``1 row``, ``20 rows (3 with errors)``."""
    text = f"{rows:,} row" + ("" if rows == 1 else "s")
    return f"{text} ({failed:,} with errors)" if failed else text


def duration(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
