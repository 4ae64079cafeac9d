"""Rows on one engine: taken as there is room for them, handed back as they become final."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from makeready.engine.entrypoints.batch.base import Damaged, Done, Format, Numbered, RowError
from makeready.engine.entrypoints.batch.openai import OpenAIFormat
from makeready.engine.entrypoints.batch.rows import SAMPLING, RowFormat, encode, parse
from makeready.engine.errors import reason_of
from makeready.engine.feed import Feed, Refused
from makeready.engine.front import Defaults
from makeready.engine.given import has_grammar, is_long, sampling_of
from makeready.engine.llm import LLM
from makeready.engine.output import Output
from makeready.engine.protocol.asked import Ask, AskError
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams

FORMATS: dict[str, Format] = {format.name: format for format in (RowFormat(), OpenAIFormat())}

# Characters of an error: one that repeats what a row says may be as long as the row.
TOLD = 1000


@dataclass(eq=False)
class _Row:
    """A row that is being answered; its parameters are known once its replies are made."""

    number: int
    fields: Mapping[str, Any]
    params: SamplingParams | None = None
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
        self._defaults = Defaults(dict(sampling), dict(template or {}), add_special_tokens, fit)
        self._told = told
        self._feed = Feed[_Row](llm.engine)
        self._refused: list[Done] = []

    @property
    def busy(self) -> bool:
        """Whether any row is not final or not handed back."""
        return bool(self._refused) or self._feed.busy

    @property
    def depth(self) -> int:
        """Samples that it takes before any is final."""
        return self._feed.depth

    @property
    def room(self) -> int:
        """Rows that it should be given before the next step."""
        return self._feed.room

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far for rows that are not final."""
        return self._feed.output_tokens

    def put(self, rows: Iterable[Numbered]) -> None:
        """Take rows; one that cannot be served becomes final at once."""
        for number, given in rows:
            row = _Row(number, {})
            try:
                if isinstance(given, Damaged):
                    row.fields = given.fields
                    raise RowError(given.reason)
                row.fields = parse(given) if isinstance(given, bytes) else given
                ask = self._format.read(row.fields)
            except (
                BaseException
            ) as error:  # what nobody foresaw in one row must not cost the others their text
                self._refuse(row, error)
            else:
                self._feed.put(
                    row,
                    partial(self._make, row, ask),
                    long=any(map(is_long, ask.prompts)),
                    grammar=has_grammar(sampling_of(self._defaults.sampling, ask.sampling), ask.tools),
                )

    def step(self) -> list[Done]:
        """Run one step of the engine; returns the rows that are final now."""
        done: list[Done] = []
        if self._feed.busy:
            for handed in self._feed.step():
                row = handed.key
                if isinstance(handed, Refused):
                    self._refuse(row, handed.error)
                    continue
                row.outputs[handed.sample] = output = handed.reply.result()
                self._told(output)
                row.left -= 1
                if not row.left:
                    done.append(self._answer(row))
        refused, self._refused = self._refused, []
        return [*refused, *done]

    def _make(self, row: _Row, ask: Ask) -> list[Reply]:
        """The replies to a row; may run in a thread."""
        row.params, replies = self._llm.front.asked(ask, self._defaults)
        row.left, row.outputs = len(replies), [None] * len(replies)
        return replies

    def _answer(self, row: _Row) -> Done:
        assert row.params is not None, "a row is answered that was not made"
        outputs = [output for output in row.outputs if output is not None]
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            return self._refused_row(row.number, row.fields, failed)
        try:
            made = self._format.answer(row.fields, outputs, row.params, self._llm.tokenizer, row.number)
            answer = encode(made)
        except BaseException as error:
            reason = reason_of(error, "the row's answer cannot be written")
            return self._refused_row(row.number, row.fields, reason)
        return Done(
            row.number,
            answer,
            failed=False,
            prompt_tokens=sum(output.prompt_tokens for output in outputs),
            cached_tokens=sum(output.meta_info["cached_tokens"] for output in outputs),
            output_tokens=sum(output.completion_tokens for output in outputs),
        )

    def _refuse(self, row: _Row, error: BaseException) -> None:
        message = reason_of(error, "the row cannot be read")
        name = error.field if isinstance(error, AskError) else None
        self._refused.append(self._refused_row(row.number, row.fields, message, name))
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
