"""Answers to requests for chat and completions, and errors.

Source of the shapes: OpenAI's API reference, "The chat completion object" and "The completion object"
(https://platform.openai.com/docs/api-reference/chat/object, .../completions/object); of errors, its libraries'
``APIError``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.output import Output
from makeready.engine.protocol.openai.body import CHAT, prompts_of
from makeready.engine.protocol.openai.logprobs import chat_logprobs, completion_logprobs
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import STOP
from makeready.engine.text.token_text import prompt_text
from makeready.engine.text.tokenizer import Tokenizer

# Our name of a field that an error may begin with or name → theirs.
RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "sampling_seed",
    "min_tokens": "min_new_tokens",
    "top_logprobs": "top_logprobs_num",
    "logprobs": "top_logprobs_num",
    "echo": "logprob_start_len",
}


def answer(
    url: str,
    body: Mapping[str, Any],
    outputs: Sequence[Output],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    identity: str,
) -> dict[str, Any]:
    """A ``chat.completion`` or ``text_completion`` object.

    Args:
        url, body: of the request.
        outputs: its samples: those of the first prompt, then those of the next.
        params: what they were generated with.
        identity: of the request; no other has it.
    """
    chat = url == CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [
            _chat_choice(i, output, tokenizer, params)
            if chat
            else _completion_choice(i, output, tokenizer, body, params)
            for i, output in enumerate(outputs)
        ],
        "usage": usage_of(outputs, params.n),
    }


def refusal(body: Mapping[str, Any], message: str, field: str | None) -> dict[str, Any]:
    """An ``error`` object, in the words of the request.

    Args:
        body: of the request; empty where there is none that can be read.
        message: why it is not served, in our words.
        field: that it is about, if it is known.
    """
    for theirs, ours in RENAMED.items():
        if theirs in body:
            message = re.sub(rf"\b{ours}\b", theirs, message)
    begins = re.match(r"\w+", message)
    if field is None and begins is not None and begins[0] in body:
        field = begins[0]
    return error_object(message, "invalid_request_error", field)


def error_object(
    message: str, kind: str, field: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An ``error`` object of a type, perhaps with a code for programs."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def stop_of(output: Output, sampling: SamplingParams) -> dict[str, Any]:
    """What ended an answer, in SGLang's field and in vLLM's, who does not tell of the model's own end tokens."""
    matched = output.meta_info["finish_reason"].get("matched") if output.finish_reason == STOP else None
    own = isinstance(matched, int) and matched not in sampling.stop_token_ids
    return {"matched_stop": matched, "stop_reason": None if own else matched}


def _chat_choice(
    index: int, output: Output, tokenizer: Tokenizer | None, params: SamplingParams
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": output.content, "refusal": None}
    if output.reasoning_content is not None:  # clients look under one name or the other
        message |= dict.fromkeys(("reasoning_content", "reasoning"), output.reasoning_content)
    if output.tool_calls:
        message["tool_calls"] = [call.as_dict() for call in output.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(output, tokenizer),
        "finish_reason": output.finish_reason,
        **stop_of(output, params),
    }


def echo_of(
    body: Mapping[str, Any], index: int, tokenizer: Tokenizer | None
) -> tuple[str | Sequence[int], str]:
    """The prompt of this number that an answer begins with, and its text; nothing where that was not asked for."""
    echo = prompts_of(body["prompt"])[1][index] if body.get("echo") else ""
    if isinstance(echo, str):
        return echo, echo
    return echo, "" if tokenizer is None else prompt_text(tokenizer, echo)


def _completion_choice(
    index: int, output: Output, tokenizer: Tokenizer | None, body: Mapping[str, Any], params: SamplingParams
) -> dict[str, Any]:
    echo, begins = echo_of(body, index // params.n, tokenizer)
    made = {} if tokenizer is not None else {"token_ids": [*echo, *output.token_ids]}
    return made | {
        "index": index,
        "text": f"{begins}{output.text}",
        "logprobs": completion_logprobs(
            output, tokenizer, echo=begins, prompt=echo, skip_special_tokens=params.skip_special_tokens
        ),
        "finish_reason": output.finish_reason,
        **stop_of(output, params),
    }


def usage_of(outputs: Sequence[Output], samples: int) -> dict[str, Any]:
    """Tokens of a request: each prompt counts once, however many samples were drawn for it."""
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
