"""What callers give as prompts, ids and fields, made plain: texts, lists of Python's ints, sampling parameters.

Each function takes one thing and raises for that alone, so that one bad prompt of many costs no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.fields import plain, shown, whole
from makeready.engine.sampling import GRAMMARS, SamplingParams
from makeready.engine.text.tokenizer import LONG
from makeready.engine.tools import has_strict

Sampling = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True)
class Conversation:
    """Messages that are to be a prompt; ``template`` holds further arguments of ``LLM.render``."""

    messages: Any
    template: Mapping[str, Any]


def prompts_of(prompts: Any, token_ids: Any) -> list[Any]:
    """The prompts of a call, of which exactly one kind is given; a single one is a list of one.

    Raises:
        RequestError: none or both, or what is no list of prompts.
    """
    if (prompts is None) == (token_ids is None):
        raise RequestError("give either prompts or token_ids")
    name, given = ("prompts", prompts) if token_ids is None else ("token_ids", token_ids)
    given = plain(given)
    if token_ids is None and isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable) or isinstance(
        given, str | bytes | bytearray | Mapping | set | frozenset
    ):
        wanted = "a text or a list of texts" if token_ids is None else "a list of lists of token ids"
        raise RequestError(f"{name}={shown(given)} must be {wanted}")
    made = list(given)
    flat = made and all(isinstance(item := plain(each), int) and not isinstance(item, bool) for each in made)
    return [made] if flat and token_ids is not None else made


def is_long(prompt: Any) -> bool:
    """Whether a prompt's texts are so long that a step should not wait until they are tokenized."""
    return _characters(prompt) > LONG


def has_grammar(sampling: Any, template: Mapping[str, Any] | None = None) -> bool:
    """Whether an output is asked for that follows a grammar, which takes a while to compile.

    Args:
        template: of a conversation, what else its prompt and its answer are made with; a call may be forced there.
    """
    said = template or {}
    if said.get("tool_choice") not in (None, "auto", "none") or has_strict(said.get("tools")):
        return True
    if isinstance(sampling, SamplingParams):
        return sampling.grammar is not None
    return isinstance(sampling, Mapping) and any(
        sampling.get(name) not in (None, (), []) for name in GRAMMARS
    )


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Conversation):
        return _characters(value.messages)
    if isinstance(value, Mapping):
        return sum(_characters(item) for item in value.values())
    # Of lists, those of messages and of their parts; not a prompt's token ids, one by one.
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping | list | tuple):
        return sum(map(_characters, value))
    return 0


def ids_of(prompt: Any, vocabulary: int) -> list[int]:
    """Token ids of a prompt that is no text.

    Raises:
        RequestError: it is no list of ids from 0 to ``vocabulary`` - 1.
    """
    prompt = plain(prompt)
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray | Mapping | set | frozenset):
        raise RequestError(f"a prompt must be a text or a list of token ids, not {shown(prompt)}")
    ids = list(prompt)
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    for place, token in enumerate(ids):
        if type(token) is not int:
            token = plain(token)
            ids[place] = token = int(token) if isinstance(token, float) and token.is_integer() else token
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise RequestError(f"token id {shown(token)} of the prompt is not from 0 to {vocabulary - 1}")
    return ids


def conversations_of(messages: Any) -> list[Any]:
    """Several conversations, or the only one; what is wrong within one is its own error.

    Raises:
        RequestError: it is no list.
    """
    if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
        raise RequestError(f"messages={shown(messages)} must be a list of messages, or of such lists")
    given = list(messages)
    return given if not any(isinstance(message, Mapping) for message in given) else [given]


def params_of(sampling: Any, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Sampling parameters, which stand for themselves; or a mapping of their fields, or None.

    Args:
        defaults: fields that stand in for those that a mapping leaves out, and for all where there is none.

    Raises:
        RequestError: it is something else, or a field is wrong.
    """
    if isinstance(sampling, SamplingParams):
        return sampling
    if sampling is not None and not isinstance(sampling, Mapping):
        raise RequestError(f"sampling={shown(sampling)} must be SamplingParams, or a dict of its fields")
    asked = {name: value for name, value in (sampling or {}).items() if value is not None}
    return SamplingParams.from_mapping({**(defaults or {}), **asked})


def sampling_of(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are asked for, over those of a job; a grammar takes the place of any other."""
    own = any(asked.get(name) not in (None, (), []) for name in GRAMMARS)
    return {**{k: v for k, v in defaults.items() if not (own and k in GRAMMARS)}, **asked}


def limit_is_models(sampling: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether ``max_new_tokens`` is the model's own, which ends where the context does."""
    named = sampling.get("max_new_tokens") if isinstance(sampling, Mapping) else sampling
    return named is None and "max_new_tokens" in defaults


def samples_of(sampling: Any) -> int:
    """How many samples of each prompt are asked for, where the rest may be wrong."""
    try:
        n = sampling.get("n", 1) if isinstance(sampling, Mapping) else getattr(sampling, "n", 1)
        return whole(1, 1024)("n", n)
    except RequestError:
        return 1


def spread(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value for all prompts, or a list or array of one for each.

    Raises:
        RequestError: a list of another length.
    """
    value = plain(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{len(value)} values of {name} were given for {count} prompts; give one for each")
    return value
