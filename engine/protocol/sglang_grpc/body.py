"""What a ``GenerateRequest`` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from smg_grpc_proto.generated.sglang_scheduler_pb2 import GenerateRequest

from makeready.engine.protocol.asked import Ask, AskError
from makeready.engine.sampling import CHECKS

# Fields that ask for what is not served, and what to do.
UNSERVED: Mapping[str, str] = {
    "mm_inputs": "prompts are tokens of text alone",
    "token_ids_logprob": "top_logprobs_num gives the most probable ones",
    "return_hidden_states": "hidden states are not given out",
    "disaggregated_params": "prompts are run where they are answered",
    "custom_logit_processor": "logits are changed by sampling_params alone",
    "input_embeds": "send tokenized.input_ids",
    "lora_id": "there are no adapters",
    "require_reasoning": "reasoning is not told apart in tokens; the chat routes of HTTP do",
}
# proto3 cannot tell 0 from what was not said; a 0 of these leaves no token to choose, so they mean nothing then.
NEUTRAL: Mapping[str, Any] = {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "n": 1}
RENAMED = {"ebnf_grammar": "ebnf"}
# No parameters of sampling: about messages, about text of which there is none, and for a custom_logit_processor.
OTHERS = ("stream_interval", "spaces_between_special_tokens", "custom_params")


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        stream: tokens as they are generated.
        interval: tokens of a sample that are told of together.
    """

    ask: Ask
    stream: bool
    interval: int


def read(request: GenerateRequest) -> Asked:
    """What a request asks for.

    ``original_text``, ``timestamp`` and ``log_metrics`` ask for nothing, and ``spaces_between_special_tokens`` is
    about text, of which there is none.

    Raises:
        AskError: something is asked for that is not served, or missing.
    """
    for name, remedy in UNSERVED.items():
        value = getattr(request, name)
        if value.ByteSize() if isinstance(value, Message) else value:
            raise AskError(f"{name} is not served: {remedy}; leave it out", name)
    if request.HasField("data_parallel_rank") and request.data_parallel_rank != 0:
        raise AskError(
            f"data_parallel_rank={request.data_parallel_rank} is not here; there is one engine, 0",
            "data_parallel_rank",
        )
    if not request.tokenized.input_ids:
        raise AskError("tokenized.input_ids is empty; give at least one token", "tokenized")
    params = request.sampling_params
    ask = Ask("token_ids", (list(request.tokenized.input_ids),), _sampling(params) | _logprobs(request))
    interval = params.stream_interval if params.HasField("stream_interval") else 1
    if interval < 1:
        raise AskError(f"stream_interval={interval} must be at least 1", "stream_interval")
    return Asked(ask, request.stream, interval)


def _sampling(params: Any) -> dict[str, Any]:
    """All that ``SamplingParams`` has, under our names: what the model would like counts for none of it."""
    if params.custom_params.fields:
        raise AskError(
            "custom_params are for custom_logit_processor, which is not served; leave them out",
            "custom_params",
        )
    made: dict[str, Any] = {}
    for field in params.DESCRIPTOR.fields:
        theirs = str(field.name)
        name, value = RENAMED.get(theirs, theirs), _plain(getattr(params, theirs))
        if field.has_presence and not params.HasField(theirs):
            continue
        if name in CHECKS:
            made[name] = value or NEUTRAL.get(name, value)
        elif value and name not in OTHERS:
            raise AskError(f"{name} is not served; leave it out", name)
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _logprobs(request: GenerateRequest) -> dict[str, Any]:
    """Clients that want none send the other fields anyway."""
    if not request.return_logprob:
        return {}
    return {
        "return_logprob": True,
        "logprob_start_len": request.logprob_start_len,
        "top_logprobs_num": request.top_logprobs_num,
    }
