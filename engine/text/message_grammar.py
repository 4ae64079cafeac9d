"""Grammars of whole messages, reasoning first, in llguidance's Lark.

A family's file says how its calls are written, in one place for the scanner and for this: what comes out is what the
scanner reads. As one grammar has reasoning, text and calls, nothing can be out of step with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from makeready.engine.text.formats.base import Format
from makeready.engine.text.formats.rules import Tool, Written
from makeready.engine.text.lark import Lark, Markers

_BLANKS, _GAP = r"/[ \t\r\n]*/", r"/\n{0,2}/"


@dataclass(frozen=True)
class MessageGrammar:
    """What a message has to be.

    Attributes:
        form: how it is written; with rules.
        opened: what of it the prompt has already opened.
        tools: that may be called.
        forced: one of them has to be.
        parallel: there may be several calls.
    """

    form: Format
    opened: str = ""
    tools: Sequence[Tool] = ()
    forced: bool = False
    parallel: bool = True

    @property
    def binds(self) -> bool:
        """Whether it demands anything of a message whose answer may be any text."""
        return self.forced or any(tool.strict for tool in self.tools)

    def lark(self, markers: Markers, content: bool = False) -> str:
        """The grammar; "" for a message that is nothing but content, or of a family that has no rules.

        Args:
            markers: of the tokenizer.
            content: the answer follows the grammar ``@content``, unless it calls a tool.
        """
        form, tools = self.form, self.tools
        if not (form.reasoning or form.whole or tools) or (form.whole and not form.has_rules):
            return ""
        lark = Lark(markers, form.markers)
        if not (self.forced or content):  # any arguments do for functions that are not strict
            tools = [each if each.strict else replace(each, arguments={"type": "object"}) for each in tools]
        if form.whole is not None:
            assert form.whole.message_rules is not None
            return lark.source(form.whole.message_rules(tools, self.forced, content, self.opened, lark))
        written = None
        if form.calls is not None and form.calls.rules is not None and tools:
            written = form.calls.rules(tools, self.parallel, lark)
        if written is not None and not (self.forced or content):
            return lark.source(self._free(lark, written))
        choices = [] if written is None else [written.calls]
        if content and not self.forced:
            choices.append("@content")
        return lark.source(self._reasoned(lark, f"({' | '.join(choices)})"))

    def _reasoned(self, lark: Lark, answer: str) -> str:
        """An answer behind reasoning, if there is any."""
        if self.form.reasoning is None:
            return answer
        thought = f"{lark.until({self.form.reasoning.closing: ''})} {lark.terminal(_GAP)}"
        return f"{thought} {answer}" if self.opened else f"({self._opening(lark)} {thought})? {answer}"

    def _free(self, lark: Lark, written: Written) -> str:
        """Any message, whose calls are as they should be; it may end within reasoning."""
        text = lark.free(written.behind, first=written.others)
        answer = lark.rule(
            f"{lark.terminal(_BLANKS)} {written.unmarked} | {text}" if written.unmarked else text
        )
        if self.form.reasoning is None:
            return answer
        thought = f"({lark.until({self.form.reasoning.closing: ''})} {answer} | {lark.free()})"
        return thought if self.opened else f"{self._opening(lark)} {thought} | {answer}"

    def _opening(self, lark: Lark) -> str:
        """The marker before reasoning, which counts as such at the beginning alone."""
        assert self.form.reasoning is not None
        return lark.up_to(self.form.reasoning.opening, _GAP)
