"""Rows on one engine: taken as there is room for them, handed back as they become final."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.entrypoints.batch.base import Ask, Damaged, Done, Format, Numbered, RowError
from makeready.engine.entrypoints.batch.openai import OpenAIFormat
from makeready.engine.entrypoints.batch.rows import SAMPLING, RowFormat, encode, parse
from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM
from makeready.engine.request import Output, Request
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.parts import TextError

FORMATS: dict[str, Format] = {format.name: format for format in (RowFormat(), OpenAIFormat())}

# Rows beyond those that can run: the scheduler chooses among so many, for shared prefixes and a full batch.
AHEAD = 1024
# Of these so many are read a step: a device that is running shall not wait for text to be tokenized.
READ = 16
# Characters of an error: one that repeats what a row says may be as long as the row.
TOLD = 1000


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
        sampling: what rows that do not say otherwise ask for.
        template: variables of the chat template for rows of messages.
        told: of every sample that is final and, once, of every row that is refused.
        add_special_tokens: put bos around texts where the tokenizer does; rows may say otherwise.
        fit: ``max_new_tokens`` of ``sampling`` was chosen by nobody, and ends where the context does.
    """

    def __init__(
        self,
        llm: LLM,
        format: str,
        sampling: SamplingParams,
        template: Mapping[str, Any] | None = None,
        told: Callable[[Output], None] = lambda output: None,
        *,
        add_special_tokens: bool = True,
        fit: bool = False,
    ) -> None:
        self._llm = llm
        self._format = FORMATS[format]
        self._sampling = {name: getattr(sampling, name) for name in SAMPLING}
        self._template = dict(template or {})
        self._told = told
        self._add_special_tokens = add_special_tokens
        self._fit = fit
        self._running: dict[int, tuple[_Entry, int]] = {}  # id of a request → its row and place
        self._refused: list[Done] = []

    @property
    def busy(self) -> bool:
        """Whether any row is not final or not handed back."""
        return bool(self._running or self._refused)

    @property
    def depth(self) -> int:
        """Requests that it takes before any is final."""
        return self._llm.engine.limits.max_rows + AHEAD

    @property
    def room(self) -> int:
        """Rows that it should be given before the next step."""
        rows = self._llm.engine.limits.max_rows
        return max(rows - len(self._running), min(READ, self.depth - len(self._running)), 0)

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
                self._submit(number, fields)
            except (RequestError, TextError) as error:
                self._refuse(number, fields, str(error))
            except RowError as error:
                self._refuse(number, fields, str(error), error.field)
            except Exception as error:  # what nobody foresaw in one row must not cost the others their text
                self._refuse(number, fields, f"the row cannot be read ({type(error).__name__}: {error})")

    def step(self) -> list[Done]:
        """Run one step of the engine; returns the rows that are final now."""
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

    def _submit(self, number: int, fields: Mapping[str, Any]) -> None:
        ask = self._format.read(fields)
        params = SamplingParams.from_mapping({**self._sampling, **ask.sampling})
        requests = [request for prompt in ask.prompts for request in self._requests(ask, prompt, params)]
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

    def _requests(self, ask: Ask, prompt: Any, params: SamplingParams) -> list[Request]:
        fit = self._fit and "max_new_tokens" not in ask.sampling
        special = ask.text.get("add_special_tokens", self._add_special_tokens)
        if ask.kind == "messages":
            prompt = self._llm.render(prompt, **{**self._template, **ask.template, **ask.text})
        return self._llm.requests(prompt, params, **ask.routing, add_special_tokens=special, fit=fit)

    def _answer(self, entry: _Entry) -> Done:
        outputs = [output for output in entry.outputs if output is not None]
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            return self._refused_row(entry.number, entry.fields, failed)
        made = self._format.answer(entry.fields, outputs, entry.params, self._llm.tokenizer, entry.number)
        return Done(
            entry.number,
            encode(made),
            failed=False,
            prompt_tokens=sum(output.prompt_tokens for output in outputs),
            cached_tokens=sum(output.meta_info["cached_tokens"] for output in outputs),
            output_tokens=sum(output.completion_tokens for output in outputs),
        )

    def _refuse(self, number: int, fields: Mapping[str, Any], message: str, name: str | None = None) -> None:
        self._refused.append(self._refused_row(number, fields, message, name))
        self._told(Output.refused(message))

    def _refused_row(
        self, number: int, fields: Mapping[str, Any], message: str, name: str | None = None
    ) -> Done:
        message = message if len(message) <= TOLD else f"{message[: TOLD // 2]} ... {message[-TOLD // 2 :]}"
        return Done(number, encode(self._format.refusal(fields, message, name, number)), failed=True)
