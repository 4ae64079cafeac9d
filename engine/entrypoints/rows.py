"""Rows of batch files: a JSON object a line, in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.request import ERROR, Output
from makeready.engine.sampling import SamplingParams

PROMPTS = ("prompt", "messages", "token_ids")
PASSED_THROUGH = ("id", "custom_id")
OTHERS = ("chat_template_kwargs", "sampling")
RESERVED = {"self", "template", "messages", "bos_token", "eos_token"}
SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams))


class RowError(ValueError):
    """One row cannot be read; the message names the field and the remedy."""


@dataclass(frozen=True)
class Row:
    """What a line asks for.

    Attributes:
        kind: which of :data:`PROMPTS` it has.
        prompt: the text, the messages or the token ids, not yet checked.
        sampling: sampling fields that it sets.
        template: variables of the chat template that it sets.
    """

    kind: str
    prompt: Any
    sampling: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        RowError: it is not UTF-8, not JSON, no object, or has a field twice.
    """
    try:
        fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_number)
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
    return fields


def read(fields: Mapping[str, Any]) -> Row:
    """The request that a row's fields make.

    Raises:
        RowError: an unknown field, none or several of prompt, messages and token_ids, or a sampling
            field both bare and under sampling.
    """
    known = (*PROMPTS, *PASSED_THROUGH, *OTHERS, *SAMPLING)
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise RowError(f"there is no field {unknown[0]!r}; fields are {', '.join(known)}")
    kinds = [name for name in PROMPTS if name in fields]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise RowError(f"a row has one of {', '.join(PROMPTS)}; this one has {found}")
    prompt = fields[kinds[0]]
    wanted = str if kinds[0] == "prompt" else list
    if not isinstance(prompt, wanted):
        raise RowError(f"{kinds[0]} must be a {_KINDS[wanted]}, not {_kind(prompt)}")
    nested, template = (_object(fields, name) for name in ("sampling", "chat_template_kwargs"))
    if template and kinds[0] != "messages":
        raise RowError(f"chat_template_kwargs is for messages; {kinds[0]} need no template")
    check_template(template)
    bare = {name: fields[name] for name in SAMPLING if name in fields}
    twice = sorted(bare.keys() & nested.keys())
    if twice:
        raise RowError(f"{twice[0]} is given both in the row and under sampling; give it once")
    return Row(kinds[0], prompt, bare | nested, template)


def check_template(variables: Mapping[str, Any]) -> None:
    """Keep a user's variables of the chat template apart from those that are the model's and the row's.

    Raises:
        RowError: naming the variable.
    """
    taken = sorted(variables.keys() & RESERVED)
    if taken:
        raise RowError(f"chat_template_kwargs cannot set {taken[0]}; leave it out")
    if not isinstance(variables.get("tools", []), list):
        raise RowError("tools in chat_template_kwargs must be a list of function schemas")


def passed_through(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own names, as they were."""
    return {name: fields[name] for name in PASSED_THROUGH if name in fields}


def answer(outputs: list[Output], *, with_text: bool, with_seed: bool) -> dict[str, Any]:
    """What a row's samples came to: the fields of the only one, or several under ``samples``.

    Args:
        outputs: the samples.
        with_text: give the text, else token ids.
        with_seed: give the seed, without which a sampled text cannot be had again.
    """
    samples = [_sample(output, with_text, with_seed) for output in outputs]
    made = samples[0] if len(samples) == 1 else {"samples": samples}
    return made | {"prompt_tokens": outputs[0].prompt_tokens}


def error(message: str, line: int) -> dict[str, Any]:
    """What a row that cannot be served comes to; ``line`` counts from 1."""
    return {"error": {"message": message, "line": line}}


def encode(fields: Mapping[str, Any]) -> bytes:
    """A line. Text stays readable; a lone surrogate, which UTF-8 does not have, is written as an escape."""
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(fields).encode() + b"\n"


def _sample(output: Output, with_text: bool, with_seed: bool) -> dict[str, Any]:
    assert output.finish_reason != ERROR, "a refused request has no samples"
    made: dict[str, Any] = {"text": output.text} if with_text else {"token_ids": list(output.token_ids)}
    made |= {"finish_reason": output.finish_reason, "completion_tokens": output.completion_tokens}
    if with_seed:
        made["seed"] = output.meta_info["seed"]
    if output.logprobs is not None:
        made["logprobs"] = [
            {
                "token_id": t.token_id,
                "logprob": _finite(t.logprob),
                "top": [[i, _finite(v)] for i, v in t.top],
            }
            for t in output.logprobs
        ]
    return made


def _finite(value: float) -> float | None:
    """JSON has no infinities; null stands for the probability 0."""
    return value if math.isfinite(value) else None


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise RowError(f"{name} must be an object, not {_kind(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"{twice} is given twice; give it once")
    return made


def _no_number(text: str) -> Any:
    raise RowError(f"the row is not JSON: {text} is no number there")


_KINDS = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "number")
