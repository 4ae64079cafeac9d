"""What a second checkpoint has to have in common with the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Limits
from makeready.graphs.quant.stored import stored_scheme


def check_second(method: str, config: Mapping[str, Any], limits: Limits) -> None:
    """Hold its normalised config against the plan.

    Raises:
        PlanError: another vocabulary, or quantized weights.
    """
    if config["vocab_size"] != limits.vocabulary:
        raise PlanError(
            f"speculative.method={method} needs a checkpoint of the same vocabulary: it has {config['vocab_size']} "
            f"tokens, the model {limits.vocabulary}; choose one that was made for it"
        )
    if config.get("quantization_config") is not None or stored_scheme(config) is not None:
        raise PlanError(
            f"speculative.method={method} reads weights of 16 or 32 bits or GGUF, and speculative.checkpoint is "
            "quantized; choose it as it was before"
        )
