"""Our own format of batch files: a JSON object a row, in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.entrypoints.batch.base import RowError
from makeready.engine.fields import MEANT, meant, shown
from makeready.engine.output import Output
from makeready.engine.protocol.asked import (
    ROUTING,
    TEXT,
    TOOLS,
    Ask,
    check_template,
    kind_of,
    routing_of,
    text_of,
    tools_of,
)
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ERROR
from makeready.engine.text.tokenizer import Tokenizer

PROMPTS = ("prompt", "messages", "token_ids")
PASSED_THROUGH: tuple[str, ...] = ("id", "custom_id")
OTHERS = ("chat_template_kwargs", "sampling")
DEEPEST = 100  # levels of a row: it must be read again from deeper ones, where Python's limit is closer
SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams))
FIELDS = (*PROMPTS, *PASSED_THROUGH, *ROUTING, *TEXT, *TOOLS, *OTHERS, *SAMPLING)
MESSAGE = ("content", "reasoning_content", "tool_calls")  # of an answer whose message was read
CONSUMED = frozenset(FIELDS) - frozenset(PASSED_THROUGH)
# Fields of an answer, which no column that is handed through may have.
ANSWER = frozenset(
    {
        "text",
        "token_ids",
        "finish_reason",
        "completion_tokens",
        "seed",
        "input_logprobs",
        "logprobs",
        "samples",
    }
    | {"prompt_tokens", "error", *MESSAGE}
)


class RowFormat:
    """``{"prompt": ..., "max_new_tokens": ...}`` to ``{"text": ..., "finish_reason": ...}``.

    A null is a field that is not there.

    Args:
        carry: hand columns that are no fields through to the answer; else they are refused.
    """

    name = "rows"

    def __init__(self, carry: bool = True) -> None:
        self._carry = carry

    def read(self, fields: Mapping[str, Any]) -> Ask:
        """The request that a row's fields make.

        Raises:
            AskError: none or several of prompt, messages and token_ids, a sampling field both bare and under
                sampling, a field of the wrong type, or a column that is not handed through.
        """
        for name in fields:
            check_column(name, carry=self._carry)
        fields = _given(fields)
        kinds = [name for name in PROMPTS if name in fields]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none of them"
            raise RowError(f"a row has one of {', '.join(PROMPTS)}; this one has {found}")
        prompt = fields[kinds[0]]
        wanted = str if kinds[0] == "prompt" else list
        if not isinstance(prompt, wanted):
            raise RowError(f"{kinds[0]} must be a {kind_of(wanted())}, not {kind_of(prompt)}")
        nested, template = (_object(fields, name) for name in ("sampling", "chat_template_kwargs"))
        if template and kinds[0] != "messages":
            raise RowError(f"chat_template_kwargs is for messages; {kinds[0]} need no template")
        check_template(template)
        nested = _given(nested)
        bare = {name: fields[name] for name in SAMPLING if name in fields}
        twice = sorted(bare.keys() & nested.keys())
        if twice:
            raise RowError(f"{twice[0]} is given both in the row and under sampling; give it once")
        return Ask(
            kinds[0],
            (prompt,),
            bare | nested,
            template,
            routing_of(fields),
            text_of(fields, kinds[0]),
            tools_of(fields, kinds[0], template),
        )

    def answer(
        self,
        fields: Mapping[str, Any],
        outputs: Sequence[Output],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        number: int,
    ) -> dict[str, Any]:
        """The fields of the only sample, or several under ``samples``; token ids where there is no text."""
        samples = [_sample(output, params, tokenizer is not None) for output in outputs]
        made = samples[0] if len(samples) == 1 else {"samples": samples}
        return _own_names(fields) | made | {"prompt_tokens": outputs[0].prompt_tokens}

    def refusal(
        self, fields: Mapping[str, Any], message: str, field: str | None, number: int
    ) -> dict[str, Any]:
        """The reason, and the line that it is about."""
        return _own_names(fields) | {"error": {"message": message, "line": number}}


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        RowError: it is not UTF-8, not JSON, no object, or has a field twice.
    """
    try:
        fields = json.loads(
            line.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_float=_float,
            parse_constant=_no_number,
        )
    except RowError:
        raise
    except UnicodeDecodeError as error:
        raise RowError(f"the row is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise RowError(f"the row is not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError:  # all that is left: more digits than Python turns into a number
        raise RowError("the row has a number of thousands of digits; shorten it") from None
    except RecursionError:
        raise RowError("the row is nested too deeply; a request is a flat object") from None
    if not isinstance(fields, dict):
        raise RowError('the row is no object; write {"prompt": "..."}')
    if line.count(b"{") + line.count(b"[") > DEEPEST and _depth(fields) > DEEPEST:
        raise RowError("the row is nested too deeply; a request is a flat object")
    return fields


def encode(fields: Mapping[str, Any]) -> bytes:
    """A line without its end, valid JSON whatever it holds.

    Text stays readable; a lone surrogate, which UTF-8 has not, is an escape. What JSON has not, such as an
    infinity in a table's column, is null.
    """
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_infinities(fields), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(text)).encode()


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {name: _without_infinities(item) for name, item in value.items()}
    return [_without_infinities(item) for item in value] if isinstance(value, list | tuple) else value


def check_column(name: str, *, carry: bool) -> None:
    """Whether a column is a field, or one that is handed through.

    Raises:
        RowError: it is neither; it seems to be meant for a field; or a field of the answer has its name.
    """
    if name in FIELDS:
        return
    # A column may be called what it likes, but not almost like a field, or as another program calls one.
    close = meant(name, SAMPLING) if name in MEANT else meant(name, FIELDS, cutoff=0.9)
    if close is not None:
        raise RowError(f"there is no field {shown(name)}; did you mean {close} (rename the column if not)")
    if not carry:
        raise RowError(f"there is no field {shown(name)}; fields are {', '.join(FIELDS)}")
    if name in ANSWER:
        raise RowError(f"the answer has a field {shown(name)} of its own; rename the column")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _own_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is handed through."""
    return {name: value for name, value in fields.items() if name not in CONSUMED and name not in ANSWER}


def _sample(output: Output, params: SamplingParams, with_text: bool) -> dict[str, Any]:
    assert output.finish_reason != ERROR, "a refused request has no samples"
    made: dict[str, Any] = {"text": output.text} if with_text else {"token_ids": list(output.token_ids)}
    if output.message is not None:
        calls = [call.as_dict() for call in output.tool_calls]
        made |= {
            "content": output.content,
            "reasoning_content": output.reasoning_content,
            "tool_calls": calls or None,
        }
    made |= {"finish_reason": output.finish_reason, "completion_tokens": output.completion_tokens}
    if params.temperature > 0:  # without its seed a sampled text cannot be had again
        made["seed"] = output.meta_info["seed"]
    for name, tokens in (("input_logprobs", output.input_logprobs), ("logprobs", output.logprobs)):
        if tokens is not None:
            made[name] = [
                {
                    "token_id": t.token_id,
                    "logprob": _finite(t.logprob),
                    "top": [[i, _finite(v)] for i, v in t.top],
                }
                for t in tokens
            ]
    return made


def _finite(value: float | None) -> float | None:
    """JSON has no infinities; null stands for the probability 0, and for the first token's, which has none."""
    return value if value is not None and math.isfinite(value) else None


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise RowError(f"{name} must be an object, not {kind_of(value)}")
    return value


def _depth(fields: Mapping[str, Any]) -> int:
    """Levels of objects and lists in one another."""
    levels, inner = 0, [fields]
    while inner:
        levels += 1
        items = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        inner = [item for item in items if isinstance(item, dict | list)]
    return levels


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"{twice} is given twice; give it once")
    return made


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise RowError(
            f"the row has the number {text[:20]}, which is beyond those of 64-bit floats; write it as text"
        )
    return value


def _no_number(text: str) -> Any:
    raise RowError(f"the row is not JSON: {text} is no number there")
