"""What a second checkpoint has to have in common with the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Limits


def check_second(method: str, config: Mapping[str, Any], limits: Limits) -> None:
    """Hold its normalised config against the plan.

    Raises:
        PlanError: another vocabulary.
    """
    if config["vocab_size"] != limits.vocabulary:
        raise PlanError(
            f"speculative.method={method} needs a checkpoint of the same vocabulary: it has {config['vocab_size']} "
            f"tokens, the model {limits.vocabulary}; choose one that was made for it"
        )
