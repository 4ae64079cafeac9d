"""Grammars of whole messages that have to call a tool, in llguidance's Lark.

A family's file says how its calls are written, in one place for the scanner and for this: what comes out is what the
scanner reads. Reasoning may come before, where the family has any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from makeready.engine.text.formats.base import Format
from makeready.engine.text.formats.rules import Spell, Tool
from makeready.engine.text.tokenizer import Tokenizer


def message_grammar(form: Format, opened: str, tools: Sequence[Tool], parallel: bool, spell: Spell) -> str:
    """The grammar of a message that calls one of ``tools``, or several where calls may be ``parallel``.

    Args:
        form: with calls that have rules.
        opened: what of the message the prompt has already opened.
    """
    assert form.calls is not None
    assert form.calls.rules is not None
    rules = form.calls.rules(tools, parallel, spell)
    if form.reasoning is None:
        return "\n".join(["start: calls", *rules])
    closing = spell(form.reasoning.closing)
    # A marker that is text ends the first time that it stands there.
    thought = (
        f"thought[suffix={closing}]: /(.|\\n)*/" if closing.startswith('"') else f"thought: TEXT {closing}"
    )
    texts = [] if closing.startswith('"') else ["TEXT: /(.|\\n)*/"]
    begun = "thought GAP" if opened else f"({spell(form.reasoning.opening)} thought GAP)?"
    return "\n".join([f"start: {begun} calls", thought, *texts, "GAP: /\\n{0,2}/", *rules])


def spelling(tokenizer: Tokenizer) -> Spell:
    """How a tokenizer's markers are spelled in grammars."""
    added = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
    return lambda marker: f"<[{added[marker]}]>" if marker in added else json.dumps(marker)
