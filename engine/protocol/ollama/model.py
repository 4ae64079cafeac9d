"""What ``/api/tags``, ``/api/ps`` and ``/api/show`` say of a model.

Source: Ollama's API reference, "List models", "List running models", "Show model details"
(https://docs.ollama.com/api).
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from makeready.engine.protocol.ollama.answer import timestamp
from makeready.engine.protocol.ollama.body import SAMPLING
from makeready.engine.text.formats.scan import Reading
from makeready.graphs.checkpoint.base import Checkpoint

# The first version that has all fields of ours; clients ask for it to know which they may use.
API_VERSION = "0.12.11"
TOOL = {"type": "function", "function": {"name": "x", "parameters": {"type": "object", "properties": {}}}}

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A name behind the family's in ``model_info`` → a field of Hugging Face's config.
_INFO = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
FOREVER = "9999-12-31T23:59:59Z"


def details_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Family, size and format of a checkpoint."""
    counts = Counter[str]()
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    family = checkpoint.config.get("model_type", "")
    most = max(counts, key=lambda dtype: counts[dtype], default="")
    return {
        "parent_model": "",
        "format": checkpoint.format,
        "family": family,
        "families": [family],
        "parameter_size": _size(counts.total()),
        "quantization_level": _DTYPES.get(most, most.upper()),
    }


def entry_of(checkpoint: Checkpoint, size: int, changed: float) -> dict[str, Any]:
    """One of the models that there are, without its name.

    Args:
        size: bytes of its files.
        changed: when they last were, in seconds since 1970.
    """
    return {
        "modified_at": _moment(changed),
        "size": size,
        "digest": checkpoint.fingerprint(),
        "details": details_of(checkpoint),
    }


def running_of(checkpoint: Checkpoint, size: int, context_length: int) -> dict[str, Any]:
    """One of the models that are loaded, without its name."""
    return {
        "size": size,
        "digest": checkpoint.fingerprint(),
        "details": details_of(checkpoint),
        "expires_at": FOREVER,
        "context_length": context_length,
    }


def shown_of(checkpoint: Checkpoint, context_length: int, changed: float) -> dict[str, Any]:
    """Details and the config's figures."""
    details, config = details_of(checkpoint), checkpoint.config
    family = details["family"]
    info: dict[str, Any] = {
        "general.architecture": family,
        "general.parameter_count": sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        f"{family}.context_length": context_length,
    }
    info |= {f"{family}.{ours}": config[theirs] for ours, theirs in _INFO.items() if theirs in config}
    return {"details": details, "model_info": info, "modified_at": _moment(changed)}


def parameters_of(defaults: Mapping[str, Any]) -> str:
    """Sampling values that the model states, as lines of a Modelfile."""
    return "\n".join(f"{name:<30} {defaults[ours]}" for name, ours in SAMPLING.items() if ours in defaults)


def capabilities_of(plain: Reading | None, with_tools: Reading | None) -> list[str]:
    """What may be asked of a model, by how its answers to a conversation are read, without tools and with them."""
    thinks = plain is not None and plain.format.reasoning is not None
    calls = with_tools is not None and with_tools.format.calls is not None
    return ["completion", *(["tools"] if calls else []), *(["thinking"] if thinks else [])]


def _size(count: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return str(count)


def _moment(seconds: float) -> str:
    return timestamp(datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc))
