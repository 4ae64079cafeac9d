"""What steps derive of their sequences, token by token in plain Python."""

from __future__ import annotations

import pytest
from step_inputs import BATCHES, FIND_PAGES, LOCATE, apart, batch, positions_of

from makeready.kernels.step import locate as ops


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize(("label", "counts", "sizes"), BATCHES, ids=lambda x: x if isinstance(x, str) else "")
def test_tokens_come_behind_their_sequences(label, counts, sizes, packed):
    made = batch(7, counts, **sizes)
    made = made if packed else apart(7, made)
    history, length, null = made["history"].tolist(), made["length"].tolist(), len(made["length"]) - 1
    ids = [0] * sizes["tokens"]
    slots, positions = [null] * sizes["tokens"], [0] * sizes["tokens"]
    context = [0] * sizes["rows"]
    for r, start in enumerate(made["starts"].tolist()):
        slot, first, count = (int(made[name][r]) for name in ("row_slot", "query_start", "query_len"))
        if slot == null:
            continue
        for i in range(count):
            t = first + i
            given = int(made["token_ids"][t])
            if given >= 0:
                history[slot][start + i] = given
            ids[t], slots[t], positions[t] = history[slot][start + i], slot, start + i
        length[slot] = context[r] = start + count
    got = ops.locate(*(made[name] for name in LOCATE))
    assert [x.tolist() for x in got] == [ids, positions, slots, context]
    assert made["history"].tolist() == history
    assert made["length"].tolist() == length
    assert length[null] == 0, "padding has become a sequence"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize(("label", "counts", "sizes"), BATCHES, ids=lambda x: x if isinstance(x, str) else "")
def test_tokens_lie_in_the_pages_of_their_rows(label, counts, sizes, packed):
    made = batch(8, counts, **sizes)
    made = made if packed else apart(8, made)
    made["positions"], made["context_len"] = positions_of(made)
    size, pages = sizes["page_size"], made["pages"].tolist()
    kv_slot, table = [0] * sizes["tokens"], [[0] * len(pages[0]) for _ in range(sizes["rows"])]
    for r, start in enumerate(made["starts"].tolist()):
        own, first, count = (
            pages[int(made["row_slot"][r])],
            int(made["query_start"][r]),
            int(made["query_len"][r]),
        )
        for g, page in enumerate(made["grow_page"][r].tolist()):
            if page:
                own[int(made["grow_at"][r]) + g] = page
        for i in range(count):
            kv_slot[first + i] = own[(start + i) // size] * size + (start + i) % size
        held = -(-(start + count) // size)
        assert all(own[:held]), "the test gives a row too few pages"
        table[r][:held] = own[:held]
    got = ops.find_pages(*(made[name] for name in FIND_PAGES), page_size=size)
    assert [x.tolist() for x in got] == [kv_slot, table]
    assert made["pages"].tolist() == pages
