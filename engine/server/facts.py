"""What a server tells of itself: its model, its plan, how much there is to do. Names are SGLang's."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

from makeready.engine.server.service import Service


def load_of(service: Service) -> dict[str, Any]:
    """What there is to do, for routers that spread requests."""
    client, limits = service.client, service.loaded.limits
    pages, held = service.loaded.facts["kv_pages"], client.pages[2]
    return {
        "dp_rank": 0,
        "num_running_reqs": client.running,
        "num_waiting_reqs": client.waiting,
        "num_total_reqs": client.running + client.waiting,
        "num_used_tokens": held * limits.page_size,
        "max_total_num_tokens": pages * limits.page_size,
        "token_usage": held / max(pages, 1),
        "max_running_requests": limits.max_rows,
    }


def model_info(service: Service) -> dict[str, Any]:
    """What there is to know of the model."""
    loaded, path = service.loaded, str(service.front.checkpoint.path)
    return {
        "model_path": path,
        "tokenizer_path": path,
        "is_generation": True,
        "served_model_name": service.name,
        "architecture": loaded.facts["architecture"],
        "context_length": loaded.limits.context_len,
        "vocab_size": loaded.vocabulary,
        "preferred_sampling_params": dict(service.front.generation_defaults) or None,
        "weight_version": "default",
    }


def server_info(service: Service) -> dict[str, Any]:
    """What there is to know of the plan and of what it runs on."""
    loaded = service.loaded
    return {
        "version": version("makeready"),
        "status": "ready" if service.ready else "not ready",
        "served_model_name": service.name,
        "plan": loaded.plan,
        "steps": loaded.steps,
        **loaded.facts,
        **dataclasses.asdict(loaded.limits),
        "internal_states": [load_of(service)],
    }
