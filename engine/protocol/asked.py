"""What a body asks for, in whatever protocol it is written, and the fields that protocols share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.fields import Checker, whole
from makeready.engine.fields import text as checked_text
from makeready.engine.text.chat import is_template
from makeready.engine.tools import FIELDS as TOOLS
from makeready.engine.tools import check_tools

ROUTING = ("priority", "extra_key")  # what the scheduler is told
TEXT = ("chat_template", "add_special_tokens")  # how text becomes tokens
RESERVED = {
    "self",
    "template",
    "messages",
    "bos_token",
    "eos_token",
    *TEXT,
    *TOOLS[1:],
    *ROUTING,
    "sampling",
    "fit",
}


class AskError(ValueError):
    """What is asked for cannot be understood or is not served; the message names the field and the remedy.

    Attributes:
        field: the field, where it is one; a user's tools may look for it.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Ask:
    """What a body asks for.

    Attributes:
        kind: what its prompts are: prompt (text), messages or token_ids.
        prompts: one, or several that are answered together; not yet checked.
        sampling: sampling fields that it sets.
        template: variables of the chat template that it sets.
        routing: what it tells the scheduler: ``priority`` and ``extra_key``.
        text: how its text becomes tokens: ``chat_template`` and ``add_special_tokens``.
        tools: what it says of tools: ``tools``, ``tool_choice`` and ``parallel_tool_calls``.
        max_new_tokens: most tokens where neither it nor the job says how many; None for as many as fit.
        fit: the answer ends where the context does, however many tokens ``sampling`` asks for.
    """

    kind: str
    prompts: tuple[Any, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    routing: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    fit: bool = False


def check_template(variables: Mapping[str, Any]) -> None:
    """Keep a user's variables of the chat template apart from those that are the model's and the body's.

    Raises:
        AskError: naming the variable.
    """
    taken = sorted(variables.keys() & RESERVED)
    if taken:
        raise AskError(f"chat_template_kwargs cannot set {taken[0]}; leave it out", "chat_template_kwargs")
    if not isinstance(variables.get("tools", []), list):
        raise AskError(
            "tools in chat_template_kwargs must be a list of function schemas", "chat_template_kwargs"
        )


def text_of(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Those fields that say how its text becomes tokens.

    A template is given as text, as the name of one of the model's, or as the path of a ``.jinja`` file: a body is
    data, and other files are not for it to read.

    Args:
        kind: what its prompts are.

    Raises:
        AskError: one is of the wrong type, or of no use for that kind of prompt.
    """
    made = {name: fields[name] for name in TEXT if fields.get(name) is not None}
    template, special = made.get("chat_template", ""), made.get("add_special_tokens", True)
    if not isinstance(template, str):
        raise AskError(f"chat_template must be a string, not {kind_of(template)}", "chat_template")
    if template and kind != "messages":
        raise AskError(f"chat_template is for messages; {kind} need no template", "chat_template")
    if not (is_template(template) or re.fullmatch(r"[\w-]*|.*\.jinja", template)):
        raise AskError(
            f"chat_template={template[:80]!r} is neither a template's text nor the path of a .jinja file; give one",
            "chat_template",
        )
    if not isinstance(special, bool):
        raise AskError(
            f"add_special_tokens must be true or false, not {kind_of(special)}", "add_special_tokens"
        )
    if "add_special_tokens" in made and kind == "token_ids":
        raise AskError(
            "add_special_tokens is for texts; token_ids are taken as they are", "add_special_tokens"
        )
    return made


def tools_of(fields: Mapping[str, Any], kind: str, template: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields that speak of tools.

    Args:
        kind: what its prompts are.
        template: variables of the chat template that it sets, of which ``tools`` may be one.

    Raises:
        AskError: one is of the wrong type, of no use for that kind of prompt, or given twice.
    """
    made = {name: fields[name] for name in TOOLS if fields.get(name) is not None}
    if made and kind != "messages":
        name = next(iter(made))
        raise AskError(f"{name} is for messages; {kind} are continued as they are", name)
    if "tools" in made and "tools" in template:
        raise AskError(
            "tools are given both by themselves and in chat_template_kwargs; give them once", "tools"
        )
    try:
        check_tools(*({"tools": template.get("tools"), **made}.get(name) for name in TOOLS))
    except RequestError as error:
        named = re.search("|".join(rf"\b{name}\b" for name in TOOLS), str(error))
        raise AskError(str(error), named[0] if named else None) from None
    return made


def routing_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields that are for the scheduler.

    Raises:
        AskError: one is of the wrong type.
    """
    return {
        name: _checked(check, name, fields[name])
        for name, check in _ROUTING.items()
        if fields.get(name) is not None
    }


def _checked(check: Checker, name: str, value: Any) -> Any:
    try:
        return check(name, value)
    except RequestError as error:
        raise AskError(str(error), name) from None


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    return "number" if type(value) in (int, float) else _KINDS.get(type(value), type(value).__name__)


_ROUTING: Mapping[str, Checker] = {"priority": whole(-(2**63)), "extra_key": checked_text}
_KINDS = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
