"""What a ``GenerateRequest`` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from smg_grpc_proto.generated.sglang_scheduler_pb2 import GenerateRequest, SamplingParams

from makeready.engine.protocol.asked import Ask, AskError

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
# Taken as they stand, but where proto3 cannot tell 0 from what was not said: 0 would leave no token to choose.
SCALARS = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    ),
    *("skip_special_tokens", "n", "min_new_tokens", "ignore_eos", "no_stop_trim"),
)
UNSAID = ("top_p", "top_k", "repetition_penalty", "n")
CONSTRAINTS = {
    "regex": "regex",
    "json_schema": "json_schema",
    "ebnf_grammar": "ebnf",
    "structural_tag": "structural_tag",
}


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


def _sampling(params: SamplingParams) -> dict[str, Any]:
    if params.custom_params.fields:
        raise AskError(
            "custom_params are for custom_logit_processor, which is not served; leave them out",
            "custom_params",
        )
    made = {name: getattr(params, name) for name in SCALARS if name not in UNSAID or getattr(params, name)}
    if params.HasField("max_new_tokens"):
        made["max_new_tokens"] = params.max_new_tokens
    for name in ("stop", "stop_token_ids"):
        made[name] = list(getattr(params, name))
    made["logit_bias"] = dict(params.logit_bias)
    constraint = params.WhichOneof("constraint")
    if constraint is not None:
        made[CONSTRAINTS[constraint]] = getattr(params, constraint)
    return made


def _logprobs(request: GenerateRequest) -> dict[str, Any]:
    """Clients that want none send the other fields anyway."""
    if not request.return_logprob:
        return {}
    return {
        "return_logprob": True,
        "logprob_start_len": request.logprob_start_len,
        "top_logprobs_num": request.top_logprobs_num,
    }
