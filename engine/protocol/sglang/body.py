"""Bodies of ``/generate``: what they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from makeready.engine.protocol.asked import ROUTING, Ask, AskError, kind_of, routing_of
from makeready.engine.protocol.schema import BOOLEAN, IDS, STRING, body_schema
from makeready.engine.sampling import SamplingParams

PROMPTS = {"text": "prompt", "input_ids": "token_ids"}
LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num")
OTHERS = ("sampling_params", "stream", "rid", "return_text_in_logprobs")
FIELDS = (*PROMPTS, *LOGPROBS, *OTHERS, *ROUTING)
SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - frozenset(LOGPROBS)


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        asks: one a prompt.
        rids: what the client calls each; empty where it does not.
        several: whether the answer is a list.
        stream: as it is generated.
        texts: tokens of log-probabilities come with their text.
        ignored: fields that mean nothing here.
    """

    asks: Sequence[Ask]
    rids: Sequence[str]
    several: bool
    stream: bool
    texts: bool
    ignored: Sequence[str]


def read(body: Mapping[str, Any]) -> Asked:
    """What a body asks for; a null is a field that is not there.

    Raises:
        AskError: a field is missing or of the wrong type.
    """
    body = {name: value for name, value in body.items() if value is not None}
    kinds = [name for name in PROMPTS if name in body]
    if len(kinds) != 1:
        raise AskError("give either text or input_ids")
    prompts, several = _prompts(kinds[0], body[kinds[0]])
    count = len(prompts)
    ignored = [name for name in body if name not in FIELDS]
    stream, texts = (_switch(body, name) for name in ("stream", "return_text_in_logprobs"))
    params = _spread(body, "sampling_params", {}, count)
    logprobs = {name: _spread(body, name, None, count) for name in LOGPROBS}
    asks = []
    for place, prompt in enumerate(prompts):
        given = params[place]
        if not isinstance(given, Mapping):
            raise AskError(f"sampling_params must be an object, not {kind_of(given)}", "sampling_params")
        ignored += [name for name in given if name not in SAMPLING and name not in ignored]
        own = {name: values[place] for name, values in logprobs.items() if values[place] is not None}
        if not own.get("return_logprob"):  # SGLang's clients send the others anyway
            own = {}
        sampling = {name: value for name, value in given.items() if name in SAMPLING}
        asks.append(
            Ask(
                PROMPTS[kinds[0]],
                (prompt,),
                sampling | own,
                routing=routing_of(body),
                max_new_tokens=SamplingParams().max_new_tokens,
            )
        )
    return Asked(asks, _rids(body.get("rid"), count), several, stream, texts, ignored)


def schema() -> dict[str, Any]:
    """The JSON Schema of a body."""
    several = {"type": "array", "items": STRING}
    params = body_schema(sorted(SAMPLING))
    return body_schema(
        FIELDS,
        text={"anyOf": [STRING, several]},
        input_ids={"anyOf": [IDS, {"type": "array", "items": IDS}]},
        sampling_params={"anyOf": [params, {"type": "array", "items": params}]},
        rid={"anyOf": [STRING, several]},
        return_text_in_logprobs=BOOLEAN,
    )


def _prompts(name: str, value: Any) -> tuple[list[Any], bool]:
    if name == "text":
        if isinstance(value, str):
            return [value], False
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            return value, True
        raise AskError(f"text must be a string or a list of them, not {kind_of(value)}", name)
    if not isinstance(value, list) or not value:
        raise AskError("input_ids must be a list of token ids, or a list of such lists", name)
    return (value, True) if all(isinstance(each, list) for each in value) else ([value], False)


def _spread(body: Mapping[str, Any], name: str, default: Any, count: int) -> list[Any]:
    value = body.get(name, default)
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise AskError(f"{name} has {len(value)} entries for {count} prompts; give one for each", name)
    return value


def _rids(value: Any, count: int) -> list[str]:
    rids = [value] if isinstance(value, str) else value
    if rids is None:
        return []
    if not isinstance(rids, list) or len(rids) != count or not all(isinstance(rid, str) for rid in rids):
        raise AskError("rid must be a string, or a list of one for each prompt", "rid")
    return rids


def _switch(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise AskError(f"{name} must be true or false, not {kind_of(value)}", name)
    return value
