"""Drafts and what becomes of them, by brute force over all places of a sequence."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from step_inputs import DRAFT, DRAFTS, drafting

from makeready.kernels.step import draft as ops


def guesses(known: list[int], least: int, most: int, count: int) -> list[int]:
    """What comes behind ``known``, whose every place is looked at."""
    found = [
        (size, end)
        for end in range(1, len(known))
        for size in range(least, most + 1)
        if size <= end and known[end - size : end] == known[-size:]
    ]
    if not found:
        return []
    _, end = max(found)
    going_on = list(known)
    while len(going_on) < len(known) + count:  # what followed there may be a draft itself
        going_on.append(going_on[end + len(going_on) - len(known)])
    return going_on[len(known) :]


@pytest.mark.parametrize(
    ("label", "counts", "ngram", "sizes"), DRAFTS, ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("seed", range(6))
def test_drafts_are_what_came_before(label, counts, ngram, sizes, seed):
    made = drafting(seed, counts, **sizes)
    null = len(made["length"]) - 1
    ids, slots, places = [0] * sizes["tokens"], [null] * sizes["tokens"], [0] * sizes["tokens"]
    starts, lengths, t = [0] * sizes["rows"], [0] * sizes["rows"], 0
    for r in range(sizes["rows"]):
        starts[r] = t
        if r >= len(counts):
            continue
        slot, start, first = int(made["row_slot"][r]), int(made["starts"][r]), int(made["query_start"][r])
        row = made["token_ids"][first : first + abs(counts[r])].tolist()
        if counts[r] > 0:
            room = min(counts[r], int(made["limit"][r]) - 1 - start) - 1
            known = made["history"][slot, : start + 1].tolist()
            row = [-1, *(guesses(known, ngram[0], ngram[1], room) if room > 0 else [])]
        lengths[r] = len(row)
        for i, token in enumerate(row):
            ids[t], slots[t], places[t] = token, int(made["sample_slot"][r]), start + 1 + i
            t += 1
    got = ops.draft_ngram(*(made[name] for name in DRAFT), ngram_min=ngram[0], ngram_max=ngram[1])
    assert [x.tolist() for x in got] == [ids, starts, lengths, slots, places]


def test_a_sequence_ends_behind_the_last_right_draft():
    #          all right    first wrong  one right, not finite  no drafts  padding
    drafts = [[-1, 4, 5], [-1, 6, 7], [-1, 8, 9], [-1]]
    sampled = [[4, 5, 6], [5, 7, 1], [8, -1, 3], [2]]
    counts = [len(row) for row in drafts]
    int32 = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    length = int32([0, 13, 23, 33, 41, 7])
    drafted, accepted = ops.accept_drafts(
        int32([*chain(*drafts), 0, 0]),
        int32([*chain(*sampled), 0, 0]),
        int32([1, 2, 3, 4, 5]),
        int32([0, 3, 6, 9, 10]),
        int32([*counts, 0]),
        int32([13, 23, 33, 41, 0]),
        length,
    )
    assert drafted.tolist() == [2, 2, 2, 0, 0]
    assert accepted.tolist() == [2, 0, 1, 0, 0]
    assert length.tolist() == [0, 13, 21, 32, 41, 7]
