"""Steps in every bucket whose answers may depend on nothing that belongs to nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from bucket_steps import Case, cases

from makeready.graphs.checkpoint.paired import DRAFT
from makeready.graphs.executable.unowned import Held
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import INPUT_LOGPROBS
from makeready.kernels.spec import ROWS, TOKENS

NOBODYS_ID = 0  # token id that padding tokens have, and no others here
# What rows ask for in turn: every reader of the slot table is among it.
SAMPLING: tuple[dict[str, Any], ...] = (
    {"top_logprobs": 3},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 7, "top_logprobs": 0},
    {
        "temperature": 0.7,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "top_logprobs": 2,
    },
    {
        "bias_ids": [3, 5],
        "bias_values": [2.0, -1.0],
        "min_new_tokens": 9,
        "stop_ids": [4, 6],
        "top_logprobs": 1,
    },
)


def poisoned_cases(plan: Plan) -> Iterator[Case]:
    """The cases of ``bucket_steps`` without the id of padding tokens; prompts ask for their log-probabilities."""
    for case in cases(plan, least_id=NOBODYS_ID + 1):
        if case.bucket.phase == INPUT_LOGPROBS:
            arrays, at = dict(case.step.arrays), 0
            arrays["target_slot"] = arrays["target_slot"].copy()
            for row in case.step.rows:
                end = at + len(row.ids)
                arrays["target_ids"][at:end] = np.roll(row.ids, -1)
                arrays["target_slot"][at:end] = row.slot
                at = end
            case = replace(case, step=replace(case.step, arrays=arrays))
        yield case


@dataclass(frozen=True)
class Sequences:
    """Which pages and how much sampling each row's slot has; pages lie apart, in falling order."""

    plan: Plan

    def pages(self, slot: int, tokens: int) -> list[int]:
        limits = self.plan.limits
        count = -(-tokens // limits.page_size)
        last = 1 + (slot + 1) * limits.pages_per_row  # one more page than slots need stays nobody's
        return list(range(last, last - count, -1))

    @property
    def needed(self) -> int:
        """Pages of an executable."""
        return 2 + self.plan.limits.max_rows * self.plan.limits.pages_per_row


def answers(
    executable: Any, case: Case, poison: Callable[[Any, Case, list[Held]], None] | None = None
) -> dict[str, np.ndarray]:
    """All that a case's last step leaves for its rows, as bits: results, logits, sequences and their cache.

    Args:
        poison: called before the step with what the rows hold.
    """
    plan, bucket = executable.plan, case.bucket
    owners, held, rows = Sequences(plan), [], case.step.rows
    for row in rows:
        pages = owners.pages(row.slot, row.start + len(row.ids))
        values = {"pages": pages, "prompt_len": row.start, **SAMPLING[row.slot % len(SAMPLING)]}
        executable.write_slot(row.slot, values)
        held.append(Held(row.slot, pages, row.start, row.slot + 1 if row.start else 0))
    for step in case.before:
        executable.launch(step.bucket, step.arrays).wait()
    if poison is None:
        results = executable.launch(bucket, case.step.arrays).wait()
    else:
        poison(executable, case, held)
        results = run_poisoned(executable, case)
    count, tokens = len(rows), sum(len(row.ids) for row in rows)
    made = {name: array[: live(plan, case, name, count, tokens)] for name, array in results.items()}
    made["logits"] = executable.operand(bucket, "token_logprobs", "logits")[:count]
    for name in ("length", "history"):
        bits = executable.peek(bucket, name)
        for number, row in enumerate(rows):
            tree = plan.steps[bucket.phase].gain is not None  # of which one branch is kept
            end = row.start + (1 + int(results["accepted"][number]) if tree else len(row.ids))
            made[f"{name}.{row.slot}"] = bits[row.slot] if name == "length" else bits[row.slot, : end + 1]
    for group in plan.kv.groups:
        for part in group.parts:
            bits = executable.peek(bucket, part.name)
            for one, row in zip(held, rows, strict=True):
                if group.unit is None:
                    cached = bits[row.slot + 1]
                else:
                    end = row.start + len(row.ids) - entries_behind(plan, part.name)
                    cached = bits[one.pages].reshape(-1, *bits.shape[2:])[:end]
                made[f"{part.name}.{row.slot}"] = cached
    return {name: array.copy() for name, array in made.items()}


def entries_behind(plan: Plan, part: str) -> int:
    """By how many of a row's last tokens its entries are behind: drafters are given a state with the next token."""
    trained = plan.options.speculative.method in ("eagle", "eagle3", "mtp")
    return int(trained and part.startswith(DRAFT) and part != f"{DRAFT}hidden")


def live(plan: Plan, case: Case, name: str, rows: int, tokens: int) -> int:
    """Entries of a result that are somebody's."""
    spec = next(f.spec for f in plan.steps[case.bucket.phase].results if f.name == name)
    return {ROWS: rows, TOKENS: tokens}[str(spec.shape[0])]


def poison_memory(executable: Any, case: Case, held: list[Held]) -> None:
    """NaN patterns wherever nothing of the rows lies."""
    executable.poison(held)


def run_poisoned(executable: Any, case: Case) -> dict[str, np.ndarray]:
    """Run the step; whatever each launch leaves in padding rows and padding tokens becomes NaN.

    On executables that cannot be written between launches the step just runs.
    """
    if executable.asynchronous:
        return executable.launch(case.bucket, case.step.arrays).wait()
    plan, bucket = executable.plan, case.bucket
    program = plan.programs[bucket.phase]
    padding = {ROWS: len(case.step.rows), TOKENS: sum(len(row.ids) for row in case.step.rows)}
    for done in executable.walk(bucket, case.step.arrays):
        for name in program.launches[done - 1].results.values():
            spec = plan.spec(bucket.phase, name)
            axis = str(spec.shape[0]) if spec.shape else ""
            if axis in padding and "float" in spec.dtype:
                bits = executable.peek(bucket, name)
                bits[padding[axis] :] = np.array(-1).astype(bits.dtype)
                executable.poke(bucket, name, bits)
    kind = plan.steps[bucket.phase]
    made = {f.name: executable.peek(bucket, f.name) for f in kind.results}
    return {f.name: made[f.name].view(f.spec.dtype) for f in kind.results}


def assert_same(clean: dict[str, np.ndarray], poisoned: dict[str, np.ndarray], where: str) -> None:
    """Every answer has the same bits and is a number."""
    assert clean.keys() == poisoned.keys()
    for name, array in clean.items():
        assert array.tobytes() == poisoned[name].tobytes(), f"{where}: {name} depends on what is nobody's"
        if array.dtype.kind == "f":
            assert not np.isnan(array).any(), f"{where}: {name} is NaN"
