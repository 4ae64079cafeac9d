"""What the answers of a job depend on: two jobs with the same identity may share their rows."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.identity import checkpoint_identity
from makeready.graphs.plan.plan import Plan

if TYPE_CHECKING:
    from makeready.engine.entrypoints.generate_options import GenerateJob

# Every option is part of it but these, which say where things lie, how fast they go and how much fits: a job
# that ran out of memory goes on with fewer rows at once.
EXEMPT = frozenset(
    {
        "prompts",  # by content, see Input.identity
        "format",
        "output",
        "overwrite",
        "golden",
        "generation_config",  # by the values that it gives
        "metrics",
        "trace",
        "target",
        "device",
        "scale",
        "scheduler",
        "speculative",
        "kv.memory_gib",
        "kv.state_snapshots",
        "plan.path",  # by what the plan says of numbers
        "plan.max_rows",
        "plan.max_tokens",
        "plan.page_size",
        "plan.max_decode_buckets",
        "plan.max_extend_buckets",
        "plan.candidates",
        "plan.traffic",
        "plan.speculative",
    }
)


def identity(
    job: GenerateJob,
    checkpoint: Checkpoint,
    plan: Plan | None,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Name → value, as JSON reads it back.

    Args:
        job: the options.
        checkpoint: the one that they name; what its files hold counts, not only where they lie.
        plan: the plan that ``plan=`` names; its own options stand for those under ``plan`` and ``kv``.
        given: what tells the input from others.
        defaults: sampling values that the model states.
    """
    fields = dataclasses.asdict(job) | {"sampling": dataclasses.asdict(job.params(defaults))}
    if job.checkpoint != "dummy":
        fields["checkpoint"] = os.path.abspath(os.path.expanduser(job.checkpoint))
    if plan is not None:
        del fields["kv"]
        fields["plan"] = dataclasses.asdict(plan.options) | {"context_len": plan.limits.context_len}
    target = checkpoint.parts[""]  # what drafts changes no token
    files = checkpoint_identity(target, digest=job.weights_digest)
    made = dict(given) | dict(_flat(fields)) | {f"checkpoint's {name}": held for name, held in files.items()}
    return json.loads(json.dumps(made))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if prefix + name in EXEMPT:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
