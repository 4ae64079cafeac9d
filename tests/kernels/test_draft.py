"""Drafts and what becomes of them, by brute force over all places of a sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from step_inputs import COUNT_DRAFTS, DRAFT, DRAFTS, drafting

from makeready.kernels.step import draft as ops
from makeready.kernels.step import draft_chain as chain


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


@pytest.mark.parametrize(
    ("label", "counts", "ngram", "sizes"), DRAFTS, ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("seed", range(6))
def test_a_chain_runs_each_draft_behind_the_one_before(label, counts, ngram, sizes, seed):
    """One that draws what a look-up finds packs the same rows as the look-up."""
    made = drafting(seed, counts, **sizes)
    wanted = ops.draft_ngram(*(made[name] for name in DRAFT), ngram_min=ngram[0], ngram_max=ngram[1])
    start, most = chain.count_drafts(*(made[name] for name in COUNT_DRAFTS))
    drafts, found = torch.zeros_like(start), wanted[2].tolist()
    for r, count in enumerate(counts):
        assert int(start[r]) == int(made["starts"][r])
        if count > 0:
            room = min(count, int(made["limit"][r]) - 1 - int(start[r])) - 1
            assert int(most[r]) == max(room, 0)
            drafts[r] = found[r] - 1
        else:
            assert int(most[r]) == 0
    history = made["history"]
    for step in range(max(found, default=1) - 1):
        ids, positions, slot, first, count, context, drawn_for, place = chain.next_draft(
            made["row_slot"], made["sample_slot"], start, drafts, history, step=step, behind=0
        )
        shifted = chain.next_draft(
            made["row_slot"], made["sample_slot"], start, drafts, history, step=step, behind=1
        )
        for r in range(sizes["rows"]):
            live = step < int(drafts[r])
            assert int(count[r]) == live
            assert int(first[r]) == r
            assert (int(slot[r]) == len(history) - 1) == (not live)
            if live:
                at = int(start[r]) + step
                assert int(ids[r]) == int(history[slot[r], at])
                assert (int(positions[r]), int(context[r]), int(place[r])) == (at, at + 1, at + 1)
                assert (int(shifted[1][r]), int(shifted[5][r]), int(shifted[7][r])) == (at - 1, at, at + 1)
                drawn = wanted[0][int(wanted[1][r]) + 1 + step]
                history[int(drawn_for[r]), int(place[r])] = drawn
    packed = chain.pack_drafts(
        *(made[n] for n in ("token_ids", "row_slot", "query_start", "query_len", "sample_slot")),
        start, drafts, history,
    )  # fmt: skip
    assert [x.tolist() for x in packed] == [x.tolist() for x in wanted]


def test_a_sequence_ends_behind_the_last_right_draft():
    #          all right    first wrong  one right, not finite  no drafts  padding
    drafts = [[-1, 4, 5], [-1, 6, 7], [-1, 8, 9], [-1]]
    sampled = [[4, 5, 6], [5, 7, 1], [8, -1, 3], [2]]
    counts = [len(row) for row in drafts]
    int32 = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    length = int32([0, 13, 23, 33, 41, 7])
    drafted, accepted = ops.accept_drafts(
        int32([*itertools.chain(*drafts), 0, 0]),
        int32([*itertools.chain(*sampled), 0, 0]),
        int32([1, 2, 3, 4, 5]),
        int32([0, 3, 6, 9, 10]),
        int32([*counts, 0]),
        int32([13, 23, 33, 41, 0]),
        length,
    )
    assert drafted.tolist() == [2, 2, 2, 0, 0]
    assert accepted.tolist() == [2, 0, 1, 0, 0]
    assert length.tolist() == [0, 13, 21, 32, 41, 7]
