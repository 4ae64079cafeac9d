"""What a step reads, as arrays; and what the device is told of a sequence when it is admitted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from makeready.engine.sampling import CHECKS
from makeready.engine.sequence import TokenSequence
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Bucket, Field, StepSpec


class Stage:
    """The fields of all kinds of step, in arrays of the largest size: those of a bucket are their beginnings.

    Beyond what was written last they hold the fields' defaults. An executable has copied them when its launch
    returns, so that every step is written over the last.

    Args:
        steps: of the plan. Kinds share an array for a field of one name.

    Attributes:
        generating: slots of the rows that were written last, if all of them run what the device sampled.
    """

    def __init__(self, steps: Mapping[str, StepSpec], null_slot: int) -> None:
        self.null_slot = null_slot
        self.generating: np.ndarray | None = None
        self._fields = {
            kind: tuple((f.name, str(f.spec.shape[0])) for f in step.staged) for kind, step in steps.items()
        }
        self._defaults: dict[str, float | int] = {}
        self._arrays: dict[str, np.ndarray] = {}
        for step in steps.values():
            for field in step.staged:
                self._add(field, field.spec.at(step.largest))
        self._live = dict.fromkeys(self._arrays, 0)

    def _add(self, field: Field, shape: tuple[int, ...]) -> None:
        known = self._arrays.get(field.name)
        assert known is None or known.shape[1:] == shape[1:], f"steps differ in the field {field.name}"
        if known is None or len(known) < shape[0]:
            self._arrays[field.name] = np.full(shape, field.default, field.spec.dtype)
            self._defaults[field.name] = field.default

    def width(self, name: str) -> int:
        """Entries of a row of the field."""
        return self._arrays[name].shape[1]

    def write(self, name: str, values: np.ndarray) -> None:
        """Set the field's first rows or tokens; those behind them are padding."""
        array, count, before = self._arrays[name], len(values), self._live[name]
        array[:count] = values
        if before > count:
            array[count:before] = self._defaults[name]
        self._live[name] = count

    def clear(self, *names: str) -> None:
        """Give all of these fields their defaults."""
        for name in names:
            if before := self._live[name]:
                self._arrays[name][:before] = self._defaults[name]
                self._live[name] = 0

    def filled(self, bucket: Bucket) -> dict[str, np.ndarray]:
        """The fields that the bucket's kind of step stages, in its shapes; good until the next write."""
        sizes = bucket.sizes
        return {name: self._arrays[name][: sizes[axis]] for name, axis in self._fields[bucket.phase]}


def slot_values(
    sequence: TokenSequence,
    computed: int,
    pages: Mapping[str, np.ndarray],
    plan: Plan,
    *,
    history: bool = False,
) -> dict[str, object]:
    """What the device's slot table is told of a sequence when it is admitted.

    A slot field that is called like a sampling parameter holds its value; the others are said here.

    Args:
        computed: how many of its tokens are in the prefix cache. No step records these in the slot's
            history, which penalties look at.
        pages: its page lists, by field.
        history: steps look at it, whatever the sampling parameters are.
    """
    sampling = sequence.sampling
    stop_ids = sorted(sequence.end_ids)[: plan.limits.max_stop_ids] if sampling.min_new_tokens else []
    values: dict[str, object] = {f.name: getattr(sampling, f.name) for f in plan.slots if f.name in CHECKS}
    values |= {
        **pages,
        "prompt_len": len(sequence.prompt),
        "seed": sequence.seed,
        "stop_ids": stop_ids,
        "bias_ids": list(sampling.logit_bias),
        "bias_values": list(sampling.logit_bias.values()),
        "masked": sequence.constraint is not None,
        "top_logprobs": sampling.top_logprobs_num if sampling.return_logprob else -1,
    }
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    if computed and (history or penalties):
        values["history"] = sequence.ids()[:computed]
    return values
