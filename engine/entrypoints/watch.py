"""What a job leaves in files about its engine: figures for Prometheus, and a time line of its steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from makeready.engine.entrypoints.batch.output import aside
from makeready.engine.loop import Engine
from makeready.engine.metrics import Metrics
from makeready.engine.output import Output
from makeready.engine.step_record import StepRecord
from makeready.engine.trace import StepTrace

SECONDS = 5.0  # between two figures in the file; scrapers look every 15 to 60 s


class MetricsFile:
    """An engine's metrics in a file that is whole at any moment: each text replaces the one before.

    Args:
        path: of the file; one beside it, with ``.tmp`` behind its name, is in use meanwhile.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.metrics = Metrics()
        # A link stays, and what it names is replaced.
        self._path = Path(os.path.realpath(path)) if path.is_symlink() else path
        self._staging = aside(self._path)
        self.write()

    def step(self, record: StepRecord) -> None:
        """Count a step, and write if that is due."""
        self.metrics.step(record)
        if record.commit_end - self._written > SECONDS:
            self.write()

    def finish(self, output: Output) -> None:
        """Count a request that ended."""
        self.metrics.finish(output)

    def write(self) -> None:
        """Write what is known now."""
        self._written = time.perf_counter()
        try:
            self._staging.write_bytes(self.metrics.render()[0])
            os.replace(self._staging, self._path)
        except BaseException:
            self._staging.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Write what has become of it all."""
        self.write()


class Watch:
    """Writes the files of ``metrics=`` and ``trace=``; use as a context manager, which completes them.

    A disk that fills up ends the file, not the job: what it has to say is on the way, its answers are not.

    Args:
        metrics, trace: paths of the files, which are replaced; None for those that nobody wants.
        say: told in a sentence that a file is given up.

    Raises:
        OSError: a file cannot be written to begin with.
    """

    def __init__(self, metrics: str | None, trace: str | None, say: Callable[[str], None]) -> None:
        self._say = say
        self._files: dict[str, MetricsFile | StepTrace] = {}
        for name, path, kind in (("metrics", metrics, MetricsFile), ("trace", trace, StepTrace)):
            if path is not None:
                place = Path(path).expanduser()
                try:
                    self._files[name] = kind(place)
                except OSError as error:  # a write that fails does not say of which file
                    raise OSError(error.errno, error.strerror, error.filename or str(place)) from None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._each(lambda file: file.close())

    def attach(self, engine: Engine) -> None:
        """Be told of the engine's steps; where there is no file it has no observer."""
        if self._files:
            engine.observer = lambda record: self._each(lambda file: file.step(record))

    def finish(self, output: Output) -> None:
        """Count a sample that is final, or a request that was refused."""
        self._each(lambda file: file.finish(output))

    def _each(self, act: Callable[[MetricsFile | StepTrace], None]) -> None:
        for name, file in list(self._files.items()):
            try:
                act(file)
            except OSError as error:
                del self._files[name]
                self._say(f"{name}= is given up ({error.strerror or error}); the job goes on without it")
