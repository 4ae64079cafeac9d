"""Rows on one engine: taken as there is room for them, handed back as they become final."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.entrypoints.batch.base import Ask, Damaged, Done, Format, Numbered, RowError
from makeready.engine.entrypoints.batch.openai import OpenAIFormat
from makeready.engine.entrypoints.batch.rows import SAMPLING, RowFormat, encode, parse
from makeready.engine.errors import reason_of
from makeready.engine.given import is_long
from makeready.engine.llm import LLM
from makeready.engine.request import Output, Request
from makeready.engine.sampling import SamplingParams

FORMATS: dict[str, Format] = {format.name: format for format in (RowFormat(), OpenAIFormat())}

# Rows beyond those that can run: the scheduler chooses among so many, for shared prefixes and a full batch.
AHEAD = 1024
# Of these so many are read a step: a device that is running shall not wait for text to be tokenized.
READ = 16
# Between two looks at long texts, where nothing runs.
IDLE_SECONDS = 0.1
# Characters of an error: one that repeats what a row says may be as long as the row.
TOLD = 1000


_Prepared = tuple[SamplingParams, list[Request]]


@dataclass
class _Entry:
    """A row that is being answered."""

    number: int
    fields: Mapping[str, Any]
    params: SamplingParams
    requests: list[Request]
    left: int = 0
    outputs: list[Output | None] = field(default_factory=list)


class Worker:
    """Answers rows on a loaded model.

    Args:
        llm: what answers.
        format: how rows are written, a key of :data:`FORMATS`.
        sampling: what rows that do not say otherwise ask for; parameters, or those of their fields that the job
            sets. Without ``max_new_tokens`` among them each format has a limit of its own, and ends where the
            context does.
        template: variables of the chat template for rows of messages.
        carry: hand further columns of rows through to their answers; else such rows are refused.
        told: of every sample that is final and, once, of every row that is refused.
        add_special_tokens: put bos around texts where the tokenizer does; rows may say otherwise.
        fit: ``max_new_tokens`` of ``sampling`` was chosen by nobody, and ends where the context does.
    """

    def __init__(
        self,
        llm: LLM,
        format: str,
        sampling: SamplingParams | Mapping[str, Any],
        template: Mapping[str, Any] | None = None,
        told: Callable[[Output], None] = lambda output: None,
        *,
        carry: bool = True,
        add_special_tokens: bool = True,
        fit: bool = False,
    ) -> None:
        self._llm = llm
        self._format = FORMATS[format] if carry or format != RowFormat.name else RowFormat(carry=False)
        if isinstance(sampling, SamplingParams):
            sampling = {name: getattr(sampling, name) for name in SAMPLING}
        self._sampling = dict(sampling)
        self._template = dict(template or {})
        self._told = told
        self._add_special_tokens = add_special_tokens
        self._fit = fit
        self._running: dict[int, tuple[_Entry, int]] = {}  # id of a request → its row and place
        self._refused: list[Done] = []
        self._reading: dict[Future[_Prepared], tuple[int, Mapping[str, Any]]] = {}  # rows with long texts
        # One thread: texts that are long enough for it take memory, 300 bytes a byte of text.
        self._reader = ThreadPoolExecutor(1, "makeready reader")

    @property
    def busy(self) -> bool:
        """Whether any row is not final or not handed back."""
        return bool(self._running or self._refused or self._reading)

    @property
    def depth(self) -> int:
        """Requests that it takes before any is final."""
        return self._llm.engine.limits.max_rows + AHEAD

    @property
    def room(self) -> int:
        """Rows that it should be given before the next step."""
        rows, taken = self._llm.engine.limits.max_rows, len(self._running) + len(self._reading)
        return max(rows - taken, min(READ, self.depth - taken), 0)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far for rows that are not final."""
        return sum(len(entry.requests[place].output) for entry, place in self._running.values())

    def put(self, rows: Iterable[Numbered]) -> None:
        """Take rows; one that cannot be served becomes final at once."""
        for number, row in rows:
            fields: Mapping[str, Any] = {}
            try:
                if isinstance(row, Damaged):
                    fields = row.fields
                    raise RowError(row.reason)
                fields = parse(row) if isinstance(row, bytes) else row
                ask = self._format.read(fields)
                if any(map(is_long, ask.prompts)):
                    self._reading[self._reader.submit(self._prepare, ask)] = number, fields
                else:
                    self._submit(number, fields, *self._prepare(ask))
            except (
                BaseException
            ) as error:  # what nobody foresaw in one row must not cost the others their text
                self._refuse(number, fields, error)

    def step(self) -> list[Done]:
        """Run one step of the engine; returns the rows that are final now."""
        if self._reading and not (self._running or self._refused):
            wait(self._reading, IDLE_SECONDS, FIRST_COMPLETED)
        for future in [future for future in self._reading if future.done()]:
            number, fields = self._reading.pop(future)
            try:
                self._submit(number, fields, *future.result())
            except BaseException as error:
                self._refuse(number, fields, error)
        done, self._refused = self._refused, []
        if self._running:
            for request in self._llm.engine.step():
                entry, place = self._running.pop(id(request))
                entry.outputs[place] = output = request.result()
                self._told(output)
                entry.left -= 1
                if not entry.left:
                    done.append(self._answer(entry))
        return done

    def _prepare(self, ask: Ask) -> _Prepared:
        """The requests of a row; may run in a thread."""
        asked = {**self._sampling, **ask.sampling}
        chosen = "max_new_tokens" in (ask.sampling if self._fit else asked)
        if not chosen:
            own = (ask.max_new_tokens, self._sampling.get("max_new_tokens"))  # the format's and the model's
            context = self._llm.plan.limits.context_len
            asked["max_new_tokens"] = min((most for most in own if most is not None), default=context)
        params = SamplingParams.from_mapping(asked)
        special = ask.text.get("add_special_tokens", self._add_special_tokens)
        requests: list[Request] = []
        for prompt in ask.prompts:
            if ask.kind == "messages":
                prompt = self._llm.render(prompt, **{**self._template, **ask.template, **ask.text})
            requests += self._llm.requests(
                prompt, params, **ask.routing, add_special_tokens=special, fit=not chosen
            )
        return params, requests

    def _submit(
        self, number: int, fields: Mapping[str, Any], params: SamplingParams, requests: list[Request]
    ) -> None:
        entry = _Entry(number, fields, params, requests, len(requests), [None] * len(requests))
        submitted: list[Request] = []
        try:
            for request in requests:
                self._llm.engine.submit(request)
                submitted.append(request)
        except BaseException:
            for request in submitted:
                self._llm.engine.abort(request)
            raise
        self._running |= {id(request): (entry, place) for place, request in enumerate(requests)}

    def _answer(self, entry: _Entry) -> Done:
        outputs = [output for output in entry.outputs if output is not None]
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            return self._refused_row(entry.number, entry.fields, failed)
        try:
            made = self._format.answer(entry.fields, outputs, entry.params, self._llm.tokenizer, entry.number)
            answer = encode(made)
        except BaseException as error:
            reason = reason_of(error, "the row's answer cannot be written")
            return self._refused_row(entry.number, entry.fields, reason)
        return Done(
            entry.number,
            answer,
            failed=False,
            prompt_tokens=sum(output.prompt_tokens for output in outputs),
            cached_tokens=sum(output.meta_info["cached_tokens"] for output in outputs),
            output_tokens=sum(output.completion_tokens for output in outputs),
        )

    def _refuse(self, number: int, fields: Mapping[str, Any], error: BaseException) -> None:
        message = reason_of(error, "the row cannot be read")
        name = error.field if isinstance(error, RowError) else None
        self._refused.append(self._refused_row(number, fields, message, name))
        self._told(Output.refused(message))

    def _refused_row(
        self, number: int, fields: Mapping[str, Any], message: str, name: str | None = None
    ) -> Done:
        message = message if len(message) <= TOLD else f"{message[: TOLD // 2]} ... {message[-TOLD // 2 :]}"
        try:
            answer = encode(self._format.refusal(fields, message, name, number))
        except BaseException as error:  # a name that cannot be written; the row is known by its line
            message = f"{message}; {reason_of(error, 'its columns cannot be handed through')}"
            answer = encode(self._format.refusal({}, message, name, number))
        return Done(number, answer, failed=True)
