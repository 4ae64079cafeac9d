"""token_logprobs against log-softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch

from makeready.kernels.sample.logprobs import token_logprobs
from makeready.kernels.spec import TensorSpec

INF = float("inf")


def run(logits, tokens, asked, max_top):
    """One row a slot, slots in reverse order."""
    rows = len(logits)
    slots = torch.arange(rows - 1, -1, -1, dtype=torch.int32)
    top_logprobs = torch.tensor([*reversed(asked), -1], dtype=torch.int32)
    return token_logprobs(
        logits, torch.tensor(tokens, dtype=torch.int32), slots, top_logprobs, max_top=max_top
    )


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 4097, 49152])
def test_log_softmax_of_raw_logits(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=generator) * 6
    logits[1, :: max(vocabulary // 5, 1)] = -INF
    logits[1, vocabulary // 2] = 40.0
    logits[2] += 1e4
    logits[4] = float("nan")
    tokens = [0, vocabulary // 2, vocabulary - 1, vocabulary // 3, 0]
    asked = [7, 2, 0, 100, -1]
    logprob, top_ids, top_values = run(logits, tokens, asked, max_top=8)
    want = logits.double().log_softmax(-1)
    for r, k in enumerate(asked):
        k = min(k, 8, vocabulary)
        if k < 0:
            assert logprob[r] == 0
        else:
            torch.testing.assert_close(logprob[r].double(), want[r, tokens[r]], rtol=2e-6, atol=1e-12)
        count = max(k, 0)
        order = want[r].argsort(descending=True, stable=True)[:count]
        assert top_ids[r, :count].tolist() == order.tolist()
        torch.testing.assert_close(top_values[r, :count].double(), want[r, order], rtol=2e-6, atol=1e-12)
        assert top_ids[r, count:].tolist() == [-1] * (8 - count)
        assert top_values[r, count:].tolist() == [0.0] * (8 - count)


def test_a_nearly_certain_token_keeps_its_digits():
    logprob, _, _ = run(torch.tensor([[30.0, 0.0, 1.0]]), [0], [0], max_top=0)
    want = -math.log1p(math.exp(-30) + math.exp(-29))
    assert logprob.item() == pytest.approx(want, rel=1e-2)


def test_ties_come_by_lowest_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0], [3.0] * 6])
    _, top_ids, top_values = run(logits, [0, 0], [4, 3], max_top=4)
    assert top_ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, -1]]
    assert top_values[1].tolist() == pytest.approx([-math.log(6)] * 3 + [0.0])


def test_impossible_tokens_are_minus_infinity():
    logprob, top_ids, top_values = run(torch.tensor([[0.0, -INF, -INF]]), [2], [3], max_top=3)
    assert logprob.tolist() == [-INF]
    assert top_ids.tolist() == [[0, 1, 2]]
    assert top_values.tolist() == [[0.0, -INF, -INF]]


def test_a_row_of_nan_does_not_touch_the_others():
    logits = torch.stack((torch.full((9,), float("nan")), torch.arange(9.0)))
    logprob, top_ids, _ = run(logits, [3, 8], [2, 2], max_top=2)
    assert logprob[0].isnan()
    assert logprob[1] == pytest.approx(torch.arange(9.0).log_softmax(0)[8].item())
    assert top_ids[1].tolist() == [8, 7]


def test_a_token_that_could_not_be_sampled_has_none():
    """Neither the last one's nor what lies before the row in memory."""
    logprob, _, _ = run(torch.zeros(2, 4), [-1, 1], [0, 0], max_top=0)
    assert logprob[0].isnan()
    assert logprob[1] == pytest.approx(-math.log(4))


def test_nothing_to_report_and_shapes():
    logprob, top_ids, top_values = run(torch.zeros(2, 4), [1, 1], [-1, 3], max_top=0)
    assert top_ids.shape == top_values.shape == (2, 0)
    assert logprob.tolist() == pytest.approx([0.0, -math.log(4)])
    specs = {
        "logits": TensorSpec(("R", 7), "float32"),
        "tokens": TensorSpec(("R",), "int32"),
        "row_slot": TensorSpec(("R",), "int32"),
        "top_logprobs": TensorSpec((9,), "int32"),
    }
    assert token_logprobs.infer(specs, {"max_top": 5}) == {
        "logprob": TensorSpec(("R",), "float32"),
        "top_ids": TensorSpec(("R", 5), "int32"),
        "top_values": TensorSpec(("R", 5), "float32"),
    }
