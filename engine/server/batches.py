"""OpenAI's batches: jobs over files of requests, run beside what clients ask for, that go on after any interruption.

Rows that are done lie in the journal of ``engine/entrypoints/batch``: a server that is killed goes on from there when
it is started again with the same folder.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from makeready.engine.entrypoints.batch.base import Damaged, Done, JobError, RowError
from makeready.engine.entrypoints.batch.job import Input, open_input
from makeready.engine.entrypoints.batch.journal import Journal
from makeready.engine.entrypoints.batch.openai import OpenAIFormat
from makeready.engine.entrypoints.batch.output import Files, open_journal, publish
from makeready.engine.entrypoints.batch.rows import encode, parse
from makeready.engine.errors import reason_of
from makeready.engine.protocol.asked import AskError
from makeready.engine.remote.client import EngineGoneError, UnavailableError
from makeready.engine.server.files import Store, new_identity
from makeready.engine.server.problem import ServeError, problem_of
from makeready.engine.server.service import Service
from makeready.engine.server.work import Work

_LOG = logging.getLogger("makeready.server")
_FORMAT = OpenAIFormat()
ENDED = ("completed", "failed", "cancelled")
ROWS_A_ROW = 2  # requests of a batch that wait for each that the engine can run


class Batch(msgspec.Struct, kw_only=True):
    """OpenAI's batch object."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    metadata: dict[str, Any] | None = None
    object: str = "batch"
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: dict[str, int] = msgspec.field(
        default_factory=lambda: {"total": 0, "completed": 0, "failed": 0}
    )


class Batches:
    """The batches of a server, which run one after the other.

    Args:
        store: their files and descriptions.
    """

    def __init__(self, service: Service, store: Store) -> None:
        self._service, self._store = service, store
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._cancelled: set[str] = set()
        waiting = [batch for batch in self.all() if batch.status not in ENDED]
        for batch in sorted(waiting, key=lambda batch: batch.created_at):
            self._queue.put_nowait(batch.id)
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stop; what is not done goes on at the next start."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def get(self, identity: str) -> Batch | None:
        """A batch; None where there is none."""
        return self._store.kept(identity, Batch)

    def all(self) -> list[Batch]:
        """All batches, the latest first."""
        found = [self.get(path.stem) for path in self._store.folder.glob("batch-*.json")]
        return sorted((each for each in found if each), key=lambda each: -each.created_at)

    def create(self, endpoint: str, file: str, window: str, metadata: dict[str, Any] | None) -> Batch:
        """Queue a new batch."""
        batch = Batch(
            id=new_identity("batch"),
            endpoint=endpoint,
            input_file_id=file,
            completion_window=window,
            status="validating",
            created_at=int(time.time()),
            metadata=metadata,
        )
        self._keep(batch)
        self._queue.put_nowait(batch.id)
        return batch

    def cancel(self, batch: Batch) -> Batch:
        """End a batch when the rows that run are done; what is done can be fetched."""
        if batch.status not in ENDED:
            self._cancelled.add(batch.id)
            batch.status, batch.cancelling_at = "cancelling", int(time.time())
            self._keep(batch)
        return batch

    def _keep(self, batch: Batch) -> None:
        self._store.keep(batch.id, batch)

    async def _run(self) -> None:
        while True:
            batch = self.get(await self._queue.get())
            if batch is None:
                continue
            try:
                await self._answer(batch)
            except (JobError, OSError) as error:
                batch.status, batch.failed_at = "failed", int(time.time())
                said = {"code": "invalid_file", "message": str(error), "line": None, "param": None}
                batch.errors = {"object": "list", "data": [said]}
                self._keep(batch)
            except EngineGoneError:
                return

    async def _answer(self, batch: Batch) -> None:
        """Run all rows that are not done, then make the files."""
        source = self._store.path(batch.input_file_id)
        output = self._store.folder / f"{batch.id}.answers.jsonl"
        given = await asyncio.to_thread(open_input, source, output, _FORMAT.name)
        files, named = Files(output), {"batch": batch.id, "plan": self._service.loaded.plan, **given.identity}
        named = msgspec.json.decode(msgspec.json.encode(named))
        journal = await asyncio.to_thread(lambda: open_journal(files, named, given.survey, overwrite=False))
        if isinstance(journal, Journal):
            with journal:
                batch.status = "in_progress" if batch.status == "validating" else batch.status
                batch.in_progress_at = batch.in_progress_at or int(time.time())
                self._count(batch, given, journal)
                await self._rows(batch, given, journal)
                cancelled = journal.totals.rows < given.survey.count
                self._count(batch, given, journal)
                batch.status, batch.finalizing_at = "finalizing", int(time.time())
                if cancelled:
                    answers = list(journal.answers())
                else:
                    await asyncio.to_thread(lambda: publish(files, journal, named, names=None))
                    answers = output.read_bytes().splitlines()
        else:
            cancelled, answers = False, output.read_bytes().splitlines()
        self._finish(batch, answers, cancelled)

    async def _rows(self, batch: Batch, given: Input, journal: Journal) -> None:
        pending = (row for row in given.source.rows() if row[0] not in journal)
        most = ROWS_A_ROW * self._service.loaded.limits.max_rows
        running: set[asyncio.Task[Done]] = set()
        try:
            while True:
                if batch.id not in self._cancelled and not self._service.draining:
                    while len(running) < most and (row := next(pending, None)) is not None:
                        running.add(asyncio.ensure_future(self._row(batch, *row)))
                if not running:
                    if self._service.draining and batch.id not in self._cancelled:
                        await asyncio.Event().wait()  # the server ends; the next one goes on
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.to_thread(journal.append, [task.result() for task in done])
                self._count(batch, given, journal)
        finally:
            for task in running:
                task.cancel()

    async def _row(self, batch: Batch, number: int, given: bytes | dict[str, Any] | Damaged) -> Done:
        """Answer a row; what is wrong with it is its answer."""
        fields: Mapping[str, Any] = {}
        service = self._service
        work = Work(service, f"{batch.id}-{number}", {})
        try:
            assert isinstance(given, bytes)
            fields = parse(given)
            ask = _FORMAT.read(fields)
            if fields["url"] != batch.endpoint:
                raise RowError(f"url is {fields['url']!r}; it must be the batch's, {batch.endpoint}", "url")
            service.check_model(fields["body"]["model"])
            while True:
                try:
                    running = await work.start(ask)
                    break
                except UnavailableError as error:  # clients go first
                    await asyncio.sleep(error.retry_seconds)
            outputs = await running.all()
            tokenizer = service.front.tokenizer
            made = encode(_FORMAT.answer(fields, outputs, running.params, tokenizer, number))
        except (EngineGoneError, asyncio.CancelledError):
            raise
        except BaseException as error:
            if isinstance(error, ServeError) and error.status == 503:
                raise asyncio.CancelledError from None
            work.problem = problem_of(error)
            field = error.field if isinstance(error, AskError | ServeError) else None
            said = str(error) if isinstance(error, ServeError) else reason_of(error, "the row cannot be read")
            return Done(number, encode(_FORMAT.refusal(fields, said, field, number)), failed=True)
        finally:
            work.close({"makeready.batch": batch.id, "makeready.batch.row": number}, served=False)
        tokens = sum(output.completion_tokens for output in outputs)
        return Done(number, made, failed=False, output_tokens=tokens)

    def _count(self, batch: Batch, given: Input, journal: Journal) -> None:
        totals = journal.totals
        done = totals.rows - totals.failed
        batch.request_counts = {"total": given.survey.count, "completed": done, "failed": totals.failed}
        self._keep(batch)

    def _finish(self, batch: Batch, answers: list[bytes], cancelled: bool) -> None:
        """Hand answers and errors out as files of their own, as OpenAI does."""
        parts: dict[bool, list[bytes]] = {False: [], True: []}
        for line in answers:
            parts[msgspec.json.decode(line)["error"] is not None].append(line)
        for failed, lines in parts.items():
            if lines:
                name = f"{batch.id}_{'error' if failed else 'output'}.jsonl"
                record = self._store.put(b"\n".join([*lines, b""]), name, "batch_output")
                if failed:
                    batch.error_file_id = record.id
                else:
                    batch.output_file_id = record.id
        now = int(time.time())
        if cancelled:
            batch.status, batch.cancelled_at = "cancelled", now
        else:
            batch.status, batch.completed_at = "completed", now
        self._keep(batch)
        output = Files(Path(self._store.folder / f"{batch.id}.answers.jsonl"))
        for path in (output.final, output.manifest, output.journal):
            path.unlink(missing_ok=True)
