"""From a conversation to a prompt, and to how its answers are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.text.chat import choose_template, read_template, render_chat
from makeready.engine.text.formats.base import AUTO, NONE, check_parsers, format_of
from makeready.engine.text.formats.rules import tool_of
from makeready.engine.text.formats.scan import Reading
from makeready.engine.text.message_grammar import MessageGrammar
from makeready.engine.text.response.reader import format_by
from makeready.engine.text.tokenizer import Tokenizer
from makeready.engine.tools import check_tools, forced_tools


@dataclass(frozen=True)
class Parsers:
    """How a model writes reasoning and tool calls: what the options say.

    Attributes:
        tool_call_parser, reasoning_parser: a name of :mod:`makeready.engine.text.formats`; ``auto`` for what the chat
            template tells, ``none`` to leave them in the text.

    Raises:
        TextError: there is no such format.
    """

    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO

    def __post_init__(self) -> None:
        check_parsers(self.tool_call_parser, self.reasoning_parser)

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | Path | None = None,
        tools: Any = None,
        tool_choice: Any = None,
        parallel_tool_calls: Any = None,
        **template: Any,
    ) -> tuple[str, Reading | None]:
        """The text of a conversation, and how an answer is to be read; None where there is nothing but text.

        Args:
            chat_template, template: as for :meth:`makeready.engine.llm.LLM.chat`.
            tools, tool_choice, parallel_tool_calls: see :func:`check_tools`.

        Raises:
            RequestError, TextError: it cannot be rendered, or nobody knows how the model would call tools.
        """
        calls = check_tools(tools, tool_choice, parallel_tool_calls)
        source = tokenizer.chat_template
        if chat_template is not None:
            source = read_template(chat_template, source)
        seen = None if tool_choice == "none" else tools
        text = render_chat(source, messages, tools=seen, **{**tokenizer.special_tokens, **template})
        stated = tokenizer.response_template
        own = None if stated is None else format_by(stated)
        form = format_of(choose_template(source, seen), self.tool_call_parser, self.reasoning_parser, own)
        if calls and form.calls is None and self.tool_call_parser != NONE:
            raise RequestError(
                "tools: the chat template is of no known family, so calls could not be told from text; name one with "
                "tool_call_parser, or none to leave calls in the text"
            )
        must = forced_tools(tools, tool_choice)
        form = form if calls else form.without_calls()
        opened, parallel = form.opened(text), parallel_tool_calls is not False
        usable = tuple(map(tool_of, must or (tools if calls else None) or ()))
        several = parallel and (tool_choice == "required" or not must)
        grammar = MessageGrammar(form, opened, usable, bool(must), several)
        if grammar.binds and (form.calls is None or not form.has_rules):
            name, asked = (
                "none" if form.calls is None else form.calls.name,
                "tool_choice" if must else "strict",
            )
            raise RequestError(
                f"{asked}: calls of the format {name} follow no grammar; leave it out, or name another "
                "tool_call_parser"
            )
        if not (form.reasoning or form.calls or form.whole):
            return text, None
        return text, Reading(form, tuple(tools or ()), opened, parallel, grammar)
