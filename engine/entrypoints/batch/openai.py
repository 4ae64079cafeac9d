"""OpenAI's batch format: rows of ``custom_id``, ``method``, ``url`` and ``body``, for chat and completions.

Source of the shapes: OpenAI's API reference, "Batch", "Chat" and "Completions". A field that we cannot serve
is refused by name, unless its value says what happens anyway (``stream: false``).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.entrypoints.batch.base import Ask, RowError
from makeready.engine.entrypoints.batch.openai_logprobs import chat_logprobs, completion_logprobs
from makeready.engine.entrypoints.batch.rows import ROUTING, check_template, kind_of, routing_of, text_of
from makeready.engine.output import Output
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.token_text import prompt_text
from makeready.engine.text.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ROW = ("custom_id", "method", "url", "body")

# Field of a body → ours; the same for both urls. The second group is SGLang's.
SAMPLING = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "n": "n",
    "stop": "stop",
    "seed": "sampling_seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_new_tokens",
    "repetition_penalty": "repetition_penalty",
    "stop_token_ids": "stop_token_ids",
    "stop_regex": "stop_regex",
    "ignore_eos": "ignore_eos",
    "no_stop_trim": "no_stop_trim",
    "skip_special_tokens": "skip_special_tokens",
}
CHAT_SAMPLING = SAMPLING | {"max_completion_tokens": "max_new_tokens", "top_logprobs": "top_logprobs_num"}
RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "sampling_seed",
    "min_tokens": "min_new_tokens",
    "top_logprobs": "top_logprobs_num",
    "logprobs": "top_logprobs_num",
    "echo": "logprob_start_len",
}
CHAT_FIELDS = ("model", "messages", "logprobs", "chat_template_kwargs", "chat_template", "add_special_tokens")
COMPLETION_FIELDS = ("model", "prompt", "logprobs", "echo", "add_special_tokens")

# Fields that ask for nothing by these values; by any other they are refused. null always asks for nothing.
IDLE: Mapping[str, Sequence[Any]] = {
    "stream": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Fields that change nothing in an answer, whatever they say: what the request is for, where it is to be kept, how
# it is to be billed, and how tools would be called, which are refused themselves.
WITHOUT_EFFECT: Mapping[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "service_tier": str,
    "metadata": dict,
    "store": bool,
    "parallel_tool_calls": bool,
}
# OpenAI's own limit of a completion; a chat's is the context.
COMPLETION_TOKENS = 16


class OpenAIFormat:
    """``{"custom_id": ..., "body": {...}}`` to ``{"custom_id": ..., "response": {...}, "error": null}``."""

    name = "openai"

    def read(self, fields: Mapping[str, Any]) -> Ask:
        """The request of a row.

        Raises:
            RowError: a field is missing, of the wrong type, unknown, or of something that is not served.
        """
        body = _body(fields)
        chat = fields["url"] == CHAT
        table = CHAT_SAMPLING if chat else SAMPLING
        known = (*(CHAT_FIELDS if chat else COMPLETION_FIELDS), *table, *ROUTING)
        for name in body:
            if name not in known:
                _check_idle(name, body[name], known)
        if not isinstance(body.get("model"), str):
            raise RowError("model must be a string; the answer repeats it", "model")
        sampling: dict[str, Any] = {}
        for name, ours in table.items():
            if name in body:
                if ours in sampling and not _same(sampling[ours], body[name]):
                    raise RowError("max_tokens and max_completion_tokens differ; give one of them", name)
                sampling[ours] = body[name]
        sampling |= _chat_logprobs(body) if chat else _completion_logprobs(body)
        if not chat:
            kind, prompts = _prompts(body.get("prompt"))
            text = text_of(body, kind)
            return Ask(kind, prompts, sampling, {}, routing_of(body), text, max_new_tokens=COMPLETION_TOKENS)
        if not isinstance(body.get("messages"), list):
            raise RowError(f"messages must be a list, not {kind_of(body.get('messages'))}", "messages")
        template = body.get("chat_template_kwargs", {})
        if not isinstance(template, dict):
            raise RowError("chat_template_kwargs must be an object", "chat_template_kwargs")
        check_template(template)
        text = text_of(body, "messages")
        return Ask("messages", (body["messages"],), sampling, template, routing_of(body), text)

    def answer(
        self,
        fields: Mapping[str, Any],
        outputs: Sequence[Output],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        number: int,
    ) -> dict[str, Any]:
        """A response of status 200 with a chat.completion or text_completion object."""
        chat = fields["url"] == CHAT
        identity = _identity(fields, number)
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": fields["body"]["model"],
            "choices": [
                _chat_choice(i, output, tokenizer)
                if chat
                else _completion_choice(i, output, tokenizer, _echo(fields["body"], i // params.n), params)
                for i, output in enumerate(outputs)
            ],
            "usage": _usage(outputs, params.n),
        }
        return _row(fields, identity, 200, body, None)

    def refusal(
        self, fields: Mapping[str, Any], message: str, field: str | None, number: int
    ) -> dict[str, Any]:
        """A response of status 400; the same reason stands under ``error`` for who looks only there."""
        body = fields.get("body")
        given = body if isinstance(body, dict) else {}
        for theirs, ours in RENAMED.items():  # in the words of the row
            if theirs in given:
                message = re.sub(rf"\b{ours}\b", theirs, message)
        begins = re.match(r"\w+", message)
        if field is None and begins is not None and begins[0] in given:
            field = begins[0]
        reason = {"message": message, "type": "invalid_request_error", "param": field, "code": None}
        error = {"code": "invalid_request_error", "message": message, "line": number}
        return _row(fields, _identity(fields, number), 400, {"error": reason}, error)


def _body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a row whose other fields are as they must be, without its nulls."""
    missing = [name for name in ROW if name not in fields]
    if missing:
        raise RowError(f"{missing[0]} is missing; a row has {', '.join(ROW)}", missing[0])
    unknown = [name for name in fields if name not in ROW]
    if unknown:
        raise RowError(f"there is no field {unknown[0]!r}; a row has {', '.join(ROW)}", unknown[0])
    if not isinstance(fields["custom_id"], str):
        raise RowError("custom_id must be a string", "custom_id")
    if fields["method"] != "POST":
        raise RowError(f"method is {fields['method']!r}; it must be POST", "method")
    if fields["url"] not in (CHAT, COMPLETIONS):
        raise RowError(f"url is {fields['url']!r}; it must be {CHAT} or {COMPLETIONS}", "url")
    if not isinstance(fields["body"], dict):
        raise RowError(f"body must be an object, not {kind_of(fields['body'])}", "body")
    return {name: value for name, value in fields["body"].items() if value is not None}


def _check_idle(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise :class:`RowError` for a field that is none of ours, unless it asks for nothing."""
    if name in WITHOUT_EFFECT:
        kind = WITHOUT_EFFECT[name]
        if not isinstance(value, kind):
            raise RowError(f"{name} must be {_KINDS[kind]}, not {kind_of(value)}", name)
    elif not any(_same(value, idle) for idle in IDLE.get(name, ())):
        raise RowError(f"{name} is not supported; leave it out (fields are {', '.join(known)})", name)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same; 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _prompts(prompt: Any) -> tuple[str, tuple[Any, ...]]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return "prompt", (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return "prompt", tuple(prompt)
        if not any(isinstance(item, str | list | dict | None.__class__) for item in prompt):
            return "token_ids", (prompt,)  # which of them are ids is checked with all others
        if all(isinstance(item, list) for item in prompt):
            return "token_ids", tuple(prompt)
    raise RowError(
        "prompt must be a string, a list of strings, token ids, or a list of lists of them", "prompt"
    )


def _chat_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = body.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise RowError(f"logprobs must be true or false, not {kind_of(wanted)}", "logprobs")
    if "top_logprobs" in body and not wanted:
        raise RowError("top_logprobs needs logprobs: true", "top_logprobs")
    return {"return_logprob": True} if wanted else {}


def _completion_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(body.get("echo", False), bool):
        raise RowError(f"echo must be true or false, not {kind_of(body['echo'])}", "echo")
    if "logprobs" not in body:
        return {}
    wanted = {"return_logprob": True, "top_logprobs_num": body["logprobs"]}
    return wanted | ({"logprob_start_len": 0} if body.get("echo") else {})


def _chat_choice(index: int, output: Output, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": chat_logprobs(output, tokenizer),
        "finish_reason": output.finish_reason,
    }


def _echo(body: Mapping[str, Any], index: int) -> str | Sequence[int]:
    """The prompt that an answer begins with; nothing where that was not asked for."""
    return _prompts(body["prompt"])[1][index] if body.get("echo") else ""


def _completion_choice(
    index: int, output: Output, tokenizer: Tokenizer | None, echo: str | Sequence[int], params: SamplingParams
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    begins = echo if isinstance(echo, str) else ""
    if tokenizer is None:
        made = {"token_ids": [*echo, *output.token_ids]}
    elif not isinstance(echo, str):
        begins = prompt_text(tokenizer, echo)
    return made | {
        "index": index,
        "text": f"{begins}{output.text}",
        "logprobs": completion_logprobs(
            output, tokenizer, echo=begins, prompt=echo, skip_special_tokens=params.skip_special_tokens
        ),
        "finish_reason": output.finish_reason,
    }


def _usage(outputs: Sequence[Output], samples: int) -> dict[str, Any]:
    """Tokens of a row: each prompt counts once, however many samples were drawn for it."""
    firsts = outputs[::samples]
    prompt = sum(output.prompt_tokens for output in firsts)
    completion = sum(output.completion_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.meta_info["cached_tokens"] for output in firsts)
        },
    }


def _row(
    fields: Mapping[str, Any], identity: str, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{identity}",
        "custom_id": fields.get("custom_id"),
        "response": {"status_code": status, "request_id": f"req_{identity}", "body": body},
        "error": error,
    }


def _identity(fields: Mapping[str, Any], number: int) -> str:
    """Of the row's place and name, so that a row that runs again has the same one."""
    return hashlib.sha256(f"{number} {fields.get('custom_id')!r}".encode(errors="replace")).hexdigest()[:24]


_KINDS = {str: "a string", dict: "an object", bool: "true or false"}
