"""Triton kernels that sample and give log-probabilities, without a GPU: interpreted, and cross-compiled."""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import re

import pytest
import torch
from benchmarks.gpu.sample_rows import MARGIN, margin, requests
from interpreted import (
    check_interpreted,
    columns_of,
    compiled,
    compiled_kernels,
    interpreted,
    launch_interpreted,
    op_call,
    random,
    run_interpreted,
)

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS


@compiled
@pytest.mark.slow
def test_interpreted():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("rows", "vocabulary", "spread"), [(24, 131, 2.5), (12, 4200, 0.5)])
def test_sample(rows, vocabulary, spread):
    operands = requests(rows, vocabulary, spread=spread)
    call = op_call("sample", operands, {})
    want_history = operands["history"].clone()
    want = CONTRACTS["sample"].reference(**{**operands, "history": want_history})
    clear = [r for r in range(rows) if margin(operands, r) > MARGIN]
    assert len(clear) > rows * 0.8
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, {**operands, "history": operands["history"].clone()})
            differ = [r for r in clear if got["tokens"][r] != want[r]]
            assert not differ, (differ, got["tokens"][differ], want[differ])
            assert (got["tokens"][rows:] == 0).all()
            slots = operands["row_slot"][clear].long()
            assert got["history"][slots].equal(want_history[slots])


@interpreted
@pytest.mark.parametrize("vocabulary", [131, 2100])
def test_branches_are_sampled_as_what_they_are_of(vocabulary):
    """The last tokens of each row come by its branch, those of the history behind it are others' of the slot."""
    rows, deep = 20, 5
    operands = requests(rows, vocabulary)
    want = CONTRACTS["sample"].reference(**{**operands, "history": operands["history"].clone()})
    history, count = operands["history"].clone(), len(operands["row_slot"])
    path, path_len = torch.full((count, deep), 7, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    for r in range(rows):
        slot, length = int(operands["row_slot"][r]), int(operands["context_len"][r])
        path_len[r] = own = min(r % (deep + 1), length - 1)
        path[r, :own] = history[slot, length - own : length]
        history[slot, length - own :] = 1
    branches = operands | {"history": history, "path": path, "path_len": path_len}
    call, clear = op_call("sample", branches, {}), [r for r in range(rows) if margin(operands, r) > MARGIN]
    assert CONTRACTS["sample"].reference(**{**branches, "history": history.clone()}).equal(want)
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            own = {**branches, "history": history.clone()}
            got = launch_interpreted(candidate, call, own)
            assert got["tokens"][clear].equal(want[clear])
            assert own["history"].equal(history)


@interpreted
@pytest.mark.parametrize("vocabulary", [131, 2100])
def test_a_slot_has_masks_of_several_places(vocabulary):
    rows = 12
    operands = requests(rows, vocabulary, greedy=True)
    words, slots = -(-vocabulary // 32), len(operands["masked"])
    masks = torch.randint(-(2**31), 2**31 - 1, (slots, 3, words)).int()
    masks[..., 0] |= 1  # a token is left
    operands["masked"][:], operands["allowed"] = 1, masks.flatten(1)
    own = {**operands, "history": operands["history"].clone()}
    want = CONTRACTS["sample"].reference(**own)
    assert len({int(place) % 3 for place in operands["context_len"][:rows]}) == 3
    call = op_call("sample", operands, {})
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, {**operands, "history": operands["history"].clone()})
            assert got["tokens"].equal(want)


@interpreted
@pytest.mark.parametrize("asked", [1, 4, 7, 10])
def test_rows_of_one_slot_see_the_history_as_it_was(asked):
    """As drafts are sampled behind: every row at the place behind the one before it, written by none but it."""
    rows = 6
    operands = requests(24, 331)
    slot, first = int(operands["row_slot"][asked]), 200
    operands["logits"], operands["row_slot"] = operands["logits"][:rows], torch.full((rows,), slot).int()
    operands["context_len"] = torch.arange(first, first + rows, dtype=torch.int32)
    operands["prompt_len"][slot] = first - 3
    want = []
    for r in range(rows):
        alone = {name: operands[name][r : r + 1] for name in ("logits", "row_slot", "context_len")}
        alone |= {"history": operands["history"].clone()}
        want.append(int(CONTRACTS["sample"].reference(**{**operands, **alone})))
    history = operands["history"].clone()
    history[slot, first : first + rows] = torch.tensor(want, dtype=torch.int32)
    clear = [r for r in range(rows) if margin(operands, r) > MARGIN]
    assert len(clear) >= rows - 1
    made = {"history": operands["history"].clone()}
    assert CONTRACTS["sample"].reference(**{**operands, **made}).tolist() == want
    assert made["history"].equal(history)
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(op_call("sample", operands, {})):
            own = {**operands, "history": operands["history"].clone()}
            got = launch_interpreted(candidate, op_call("sample", operands, {}), own)
            assert [int(got["tokens"][r]) for r in clear] == [want[r] for r in clear]
            assert all(own["history"][slot, first + r] == want[r] for r in clear)
            assert own["history"][:, :first].equal(history[:, :first])


@interpreted
@pytest.mark.parametrize("vocabulary", [131, 4200])
@pytest.mark.parametrize("greedy", [True, False])
def test_sample_refuses_rows_that_are_not_finite(vocabulary, greedy):
    """One number among finite ones, of either sign, in the first chunk or the last; every other row as before."""
    rows, nan, inf = 24, math.nan, math.inf
    operands = requests(rows, vocabulary, greedy=greedy)
    sound = operands["logits"].clone()
    for row, value in enumerate([nan, -nan, inf, nan, -nan, inf]):
        operands["logits"][4 * row, [0, vocabulary - 1][row % 2]] = value
    operands["logits"][22] = -inf
    operands["bias_ids"][operands["row_slot"][22].long()] = -1
    operands["masked"][operands["row_slot"][:24].long()] = 0  # a mask may hide what is not finite
    broken = [0, 4, 8, 12, 16, 20, 22]
    left = [r for r in range(rows) if r not in broken]
    want_history = operands["history"].clone()
    want = CONTRACTS["sample"].reference(**{**operands, "history": want_history})
    clear = [r for r in left if margin({**operands, "logits": sound}, r) > MARGIN]
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(op_call("sample", operands, {})):
            history = operands["history"].clone()
            got = launch_interpreted(
                candidate, op_call("sample", operands, {}), {**operands, "history": history}
            )
            assert got["tokens"][broken].tolist() == [-1] * len(broken)
            assert got["tokens"][clear].equal(want[clear])
            assert (got["tokens"][left] >= 0).all()
            assert (got["tokens"][rows:] == 0).all()
            slots = operands["row_slot"][[*broken, *clear]].long()
            assert got["history"][slots].equal(want_history[slots])


@interpreted
@pytest.mark.parametrize(("vocabulary", "most"), [(7, 20), (131, 3), (9000, 20)])
def test_token_logprobs(vocabulary, most):
    rows = 6
    logits = (random(rows, vocabulary) * 8).round() / 2  # many equals
    logits[1] = -60.0
    logits[1, 5] = 40.0  # a probability of 1
    logits[2, 2:4] = -math.inf
    operands = {
        "logits": columns_of(logits),
        "tokens": torch.tensor([0, 5, 1, 6, 2, 0], dtype=torch.int32),
        "row_slot": torch.tensor([3, 0, 2, 1, 4, 7], dtype=torch.int32),
        "top_logprobs": torch.tensor([20, -1, 5, 0, 20, 0, 0, -1], dtype=torch.int32),
    }
    check_interpreted("token_logprobs", operands, max_top=most)


@interpreted
def test_a_token_that_could_not_be_sampled_has_no_logprob():
    operands = {
        "logits": torch.zeros(2, 4),
        "tokens": torch.tensor([-1, 3], dtype=torch.int32),
        "row_slot": torch.tensor([0, 1], dtype=torch.int32),
        "top_logprobs": torch.tensor([0, 0, -1], dtype=torch.int32),
    }
    call = op_call("token_logprobs", operands, {"max_top": 2})
    for kernel in registry.cuda_kernels("token_logprobs"):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, operands)["logprob"]
            assert got[0].isnan()
            assert got[1] == pytest.approx(-math.log(4))


@compiled
@pytest.mark.slow
def test_cross_compiles_sampling():
    operands = {k: v.contiguous() for k, v in requests(2, 151936).items()}
    chunks, _ = compiled_kernels("sample", operands, {})
    assert re.search(r"ld\.global\S*\.v4", chunks.ptx)
    assert chunks.registers <= 80  # 6 blocks a multiprocessor, which is what reading at full rate takes
    slots = {
        "tokens": operands["row_slot"],
        "row_slot": operands["row_slot"],
        "top_logprobs": operands["top_k"],
    }
    list(compiled_kernels("token_logprobs", {"logits": operands["logits"], **slots}, {"max_top": 20}))
