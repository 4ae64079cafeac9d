"""What the scheduler service says of model, server and load."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from smg_grpc_proto.generated import sglang_scheduler_pb2

from makeready.engine.server.facts import load_of, model_info, server_info
from makeready.engine.server.problem import ServeError
from makeready.engine.server.service import Service

POLL_SECONDS = 0.05
LONGEST_SECONDS = 3600.0  # that a flush waits
SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")


def model(service: Service) -> Any:
    """GetModelInfoResponse; ids that the model has not are 0."""
    front, limits, said = service.front, service.loaded.limits, model_info(service)
    config, tokenizer = front.checkpoint.config, front.tokenizer
    defaults = json.dumps(dict(front.generation_defaults)) if front.generation_defaults else ""
    bos = config.get("bos_token_id") if tokenizer is None else tokenizer.bos_id
    return sglang_scheduler_pb2.GetModelInfoResponse(
        model_path=said["model_path"],
        tokenizer_path=said["tokenizer_path"],
        is_generation=True,
        preferred_sampling_params=defaults,
        default_sampling_params_json=defaults,
        weight_version=said["weight_version"],
        served_model_name=service.name,
        max_context_length=limits.context_len,
        vocab_size=service.loaded.vocabulary,
        supports_vision=False,
        model_type=config.get("model_type") or "",
        architectures=config.get("architectures") or [],
        eos_token_ids=front.end_ids,
        pad_token_id=config.get("pad_token_id") or 0,
        bos_token_id=bos or 0,
        max_req_input_len=limits.context_len,
    )


def server(service: Service) -> Any:
    """GetServerInfoResponse."""
    said, load = server_info(service), load_of(service)
    silent = time.monotonic() - service.client.beat
    made = sglang_scheduler_pb2.GetServerInfoResponse(
        active_requests=len(service.running),
        is_paused=False,
        last_receive_timestamp=time.time() - silent,
        uptime_seconds=time.time() - service.began,
        sglang_version=f"makeready {version('makeready')}",
        server_type="grpc",
        max_total_num_tokens=load["max_total_num_tokens"],
    )
    made.start_time.FromSeconds(service.began)
    made.server_args.update({**model_info(service), "tp_size": 1, "dp_size": 1})
    made.scheduler_info.update(
        {
            **{name: value for name, value in said.items() if name != "internal_states"},
            **load,
            "max_req_input_len": service.loaded.limits.context_len,
        }
    )
    return made


def loads(service: Service, include: Sequence[str]) -> Any:
    """GetLoadsResponse; what is not known is 0, and sections of what is not here are left out.

    Raises:
        ServeError: there is no section of that name.
    """
    for name in include:
        if name not in SECTIONS:
            raise ServeError(
                400, f"there is no section {name[:100]!r}; they are {', '.join(SECTIONS)}", "include"
            )
    said = load_of(service)
    usage = said["num_running_reqs"] / said["max_running_requests"]
    load = sglang_scheduler_pb2.SchedulerLoad(**said, utilization=usage)
    if {"queues", "all"} & set(include):
        load.queues.waiting = said["num_waiting_reqs"]
    return sglang_scheduler_pb2.GetLoadsResponse(
        timestamp=datetime.now(timezone.utc).isoformat(),
        version=version("makeready"),
        dp_rank_count=1,
        loads=[load],
        aggregate=sglang_scheduler_pb2.AggregateMetrics(
            total_running_reqs=said["num_running_reqs"],
            total_waiting_reqs=said["num_waiting_reqs"],
            total_reqs=said["num_total_reqs"],
            avg_token_usage=said["token_usage"],
            avg_utilization=usage,
        ),
    )
