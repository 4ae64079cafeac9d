"""The files of a job: whether it is new, to be continued or complete; and its output, made from the journal.

Decisions, each made while this process holds the journal:

    output   journal            without overwrite=true               with it
    none     none               begin                                begin
    none     of this job        continue                             continue
    none     of another job     refuse                               begin
    of this  none               it is complete                       begin
    of this  of this job        it is complete (cut off at the end)  continue
    other    any                refuse                               begin, or continue what is of this job
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from makeready.engine.entrypoints.batch.base import JobError
from makeready.engine.entrypoints.batch.journal import SCHEMA, Journal, Totals
from makeready.engine.entrypoints.batch.parquet import further_columns, write_table
from makeready.engine.entrypoints.batch.source import Survey, is_parquet


@dataclass(frozen=True)
class Files:
    """Where a job writes.

    Attributes:
        output: the answers, as the user named the file.
    """

    output: Path

    @property
    def final(self) -> Path:
        """The output, behind a link where it is one: that stays and what it names is replaced."""
        return Path(os.path.realpath(self.output)) if self.output.is_symlink() else self.output

    @property
    def journal(self) -> Path:
        """Finished rows of a job that is not complete."""
        return self.final.with_name(self.final.name + ".partial")

    @property
    def manifest(self) -> Path:
        """Which job the output is of."""
        return self.final.with_name(self.final.name + ".job.json")

    @property
    def staging(self) -> Path:
        """The output while it is being made."""
        return aside(self.final)

    @property
    def own(self) -> tuple[Path, ...]:
        """All that are written or replaced without a question."""
        return self.final, self.journal, self.manifest, self.staging, aside(self.manifest)


def check_output(files: Files, *, overwrite: bool) -> None:
    """Refuse an output that no job made before anything large is read.

    Raises:
        JobError: there is such a file, and it is not to be replaced.
    """
    if not overwrite:
        _manifest(files)


def open_journal(
    files: Files, identity: Mapping[str, Any], survey: Survey, *, overwrite: bool
) -> Journal | Totals:
    """The journal to write to, new or continued; or the totals of a job that is complete.

    Args:
        identity: what the answers depend on, by option.
        overwrite: replace a finished output, and drop a journal of another job.

    Raises:
        JobError: the output or the journal is of another job, or another process works on it.
    """
    journal = Journal(files.journal)
    try:
        held = journal.identity()
        finished = None if overwrite else _finished(files, identity)
        if finished is None:
            different = None if held is None else _difference(held, identity)
            if held is not None and different is None:
                journal.resume(survey.last)
                return journal
            if different is not None and not overwrite:
                raise JobError(
                    f"{files.journal} holds rows of another job ({different}); start that one again, name another "
                    "output, or add overwrite=true to drop them"
                )
            _begin(journal, identity, survey)
            return journal
        if held is None or _difference(held, identity) is None:
            journal.remove()
    except BaseException:
        if not files.journal.stat().st_size:
            journal.remove()
        journal.close()
        raise
    journal.close()
    return finished


def publish(
    files: Files, journal: Journal, identity: Mapping[str, Any], *, names: Mapping[str, Any] | None
) -> None:
    """Make the output of a complete journal: whole under its name, or not there at all.

    Args:
        names: Arrow types of what a table hands through; see :func:`write_table`.
    """
    staging, manifest = files.staging, aside(files.manifest)
    try:
        if is_parquet(files.output):
            lines = further_columns(journal.answers()) if names is None else None
            write_table(staging, journal.answers(), names, lines)
        else:
            with open(staging, "wb", buffering=2**20) as file:
                for answer in journal.answers():
                    file.write(answer + b"\n")
        _synced(staging)
        totals = {"bytes": staging.stat().st_size, **asdict(journal.totals)}
        made = {"makeready": SCHEMA, "identity": identity, **totals}
        # Before the output: a job that ends in between is continued by its journal.
        manifest.write_text(json.dumps(made, indent=1) + "\n")
        _synced(manifest)
        os.replace(manifest, files.manifest)
        os.replace(staging, files.final)
    except BaseException:
        for path in (staging, manifest):
            path.unlink(missing_ok=True)
        raise
    _synced(files.final.parent)
    journal.remove()


def aside(path: Path) -> Path:
    """Where a file is made before it gets its name."""
    return path.with_name(path.name + ".tmp")


def _begin(journal: Journal, identity: Mapping[str, Any], survey: Survey) -> None:
    try:
        journal.begin(identity, survey.last)
    except OSError as error:
        raise JobError(
            f"{journal.path} cannot be written: {error.strerror}; make room and start again"
        ) from None


_REPLACE = "name another file, or add overwrite=true to replace it"


def _finished(files: Files, identity: Mapping[str, Any]) -> Totals | None:
    """Totals of the output, None where there is none."""
    found = _manifest(files)
    if found is None:
        return None
    made, size, totals = found
    if (different := _difference(made, identity)) is not None:
        raise JobError(f"output={files.output} is of another job ({different}); {_REPLACE}")
    if size != files.final.stat().st_size:
        raise JobError(f"output={files.output} was changed since it was written; {_REPLACE}")
    return totals


def _manifest(files: Files) -> tuple[dict[str, Any], int, Totals] | None:
    """Identity, bytes and totals of the job that made the output; None where there is no output."""
    if not files.final.exists():
        return None
    try:
        manifest = json.loads(files.manifest.read_bytes())
        made, size = dict(manifest["identity"]), manifest["bytes"]
        return made, size, Totals(manifest["rows"], manifest["failed"], manifest["tokens"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise JobError(f"output={files.output} exists; {_REPLACE}") from None


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first thing in which two jobs differ; an option that one version does not have yet is null."""
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            if name == "prompts":
                return "its prompts are not those of prompts="
            return f"{name} is {json.dumps(theirs.get(name))} there and {json.dumps(ours.get(name))} here"
    return None


def _synced(path: Path) -> None:
    """Wait until the disk has a file, or a folder's names."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
