"""Adjustments and filters of one row of logits against transformers' processors and warpers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from makeready.kernels.sample.filters import adjust, candidates, survivors

INF = float("inf")


def kept(logits, temperature=1.0, **filters):
    return set(survivors(candidates(logits, temperature), **filters).ids.tolist())


def finite(scores):
    return set((scores > -INF).nonzero()[:, -1].tolist())


def random_logits(vocabulary, seed, holes=0.2):
    """Distinct logits, some of them -inf, never all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator) * 3
    logits[torch.rand(vocabulary, generator=generator) < holes] = -INF
    logits[vocabulary // 2] = 1.0
    return logits


CASES = [(v, seed) for v in (1, 2, 7, 333, 4097) for seed in range(3)]


@pytest.mark.parametrize(("vocabulary", "seed"), CASES)
def test_temperature_is_transformers(vocabulary, seed):
    logits = random_logits(vocabulary, seed)
    for temperature in (0.1, 0.7, 1.0, 3.0):
        want = hf.TemperatureLogitsWarper(temperature)(None, logits[None])[0].softmax(-1)
        got = candidates(logits, temperature).gaps.softmax(-1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("vocabulary", "seed"), CASES)
def test_each_filter_is_transformers(vocabulary, seed):
    logits = random_logits(vocabulary, seed)
    possible = finite(logits)
    for k in (1, 2, 5, vocabulary, vocabulary + 3):
        want = finite(hf.TopKLogitsWarper(k)(None, logits[None]))
        assert kept(logits, top_k=k) & possible == want
    for p in (0.0, 0.1, 0.5, 0.9, 0.999):
        want = finite(hf.TopPLogitsWarper(p)(None, logits[None]))
        assert kept(logits, top_p=p) & possible == want
    for p in (0.01, 0.1, 0.5, 1.0):
        want = finite(hf.MinPLogitsWarper(p)(None, logits[None]))
        assert kept(logits, min_p=p) & possible == want


def test_all_filters_together_are_transformers():
    for seed in range(20):
        logits = random_logits(501, seed)
        warpers = (hf.TemperatureLogitsWarper(0.8), hf.TopKLogitsWarper(30))
        warpers += (hf.TopPLogitsWarper(0.8), hf.MinPLogitsWarper(0.06))
        scores = logits[None]
        for warper in warpers:
            scores = warper(None, scores)
        got = survivors(candidates(logits, 0.8), top_k=30, top_p=0.8, min_p=0.06)
        assert set(got.ids.tolist()) == finite(scores)
        torch.testing.assert_close(got.gaps.softmax(-1), scores[0].softmax(-1)[got.ids])


def test_ties_stay_together():
    logits = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0, 1.0, -INF])
    assert kept(logits, top_k=2) == {1, 3, 4}
    assert kept(logits, top_k=3) == {1, 3, 4}
    assert kept(logits, top_k=4) == {0, 1, 2, 3, 4, 5}
    # The transformers set, completed by the equals of its least probable member.
    for p in (0.0, 0.3, 0.6, 0.7, 0.8, 0.9, 0.95, 0.999):
        theirs = finite(hf.TopPLogitsWarper(p)(None, logits[None]))
        floor = min(logits[i].item() for i in theirs)
        assert kept(logits, top_p=p) == {i for i in range(7) if logits[i] >= floor}
    assert kept(torch.zeros(5), top_p=0.1) == set(range(5))
    assert kept(torch.zeros(5000), top_p=0.1) == set(range(5000))


def test_nucleus_that_exactly_reaches_top_p_ends_there():
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log2() * math.log(2)
    assert kept(logits, top_p=0.5) == {1}
    assert kept(logits, top_p=0.501) == {0, 1}
    # Renormalised after top-k: 2/3 and 1/3.
    assert kept(logits, top_k=2, top_p=0.66) == {1}
    assert kept(logits, top_k=2, top_p=0.68) == {0, 1}


@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.1, 1.0, 3.0, 30.0])
def test_nucleus_of_a_large_vocabulary(scale):
    """Logits as a bf16 model gives them: many equals."""
    logits = torch.randn(50001, generator=torch.Generator().manual_seed(4)).bfloat16().float() * scale
    value, order = logits.double().sort(descending=True)
    share = value.softmax(-1)
    starts = torch.cat((torch.tensor([True]), value[1:] != value[:-1]))
    above = torch.where(starts, share.cumsum(0) - share, 0).cummax(0).values  # mass over each group of equals
    for p in (0.01, 0.5, 0.9, 0.99, 1 - 2.0**-12):
        assert (above - p).abs().min() > 1e-8
        assert kept(logits, top_p=p) == set(order[above < p].tolist())


def row_inputs(**row):
    prompt, output = row.get("prompt", [0]), row.get("output", [])
    bias = row.get("bias", {})
    tensors = {"prompt": prompt, "output": output, "stop_ids": row.get("stop", [-1]), "bias_ids": list(bias)}
    ints = {name: torch.tensor(ids, dtype=torch.int32) for name, ids in tensors.items()}
    knobs = {name: row[name] for name in row if name.endswith("penalty") or name == "min_new_tokens"}
    return {**ints, "bias_values": torch.tensor(list(bias.values()), dtype=torch.float32), **knobs}


@pytest.mark.parametrize(("vocabulary", "seed"), [(v, seed) for v in (1, 7, 333) for seed in range(3)])
def test_adjustments_are_transformers(vocabulary, seed):
    logits = random_logits(vocabulary, seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (9,), generator=generator).tolist()
    output = torch.randint(vocabulary, (4,), generator=generator).tolist()
    ids = torch.tensor([prompt + output])

    for penalty in (0.5, 1.3, 2.0):
        want = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None])[0]
        got = adjust(logits, **row_inputs(prompt=prompt, output=output, repetition_penalty=penalty))
        assert got.equal(want)

    bias = {vocabulary - 1: 2.5} | {vocabulary // 3: -100.0}
    want = hf.SequenceBiasLogitsProcessor({(i,): v for i, v in bias.items()})(ids, logits[None])[0]
    assert adjust(logits, **row_inputs(bias=bias)).equal(want)

    stop = [0, vocabulary - 1]
    for least in (0, 3, 4, 5):
        processor = hf.MinNewTokensLengthLogitsProcessor(9, least, stop)
        want = processor(ids, logits[None])[0]
        got = adjust(logits, **row_inputs(prompt=prompt, output=output, stop=stop, min_new_tokens=least))
        assert got.equal(want)


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(6)
    row = {"prompt": [5, 5, 1], "output": [1, 2, 2, 2], "frequency_penalty": 0.5, "presence_penalty": 0.25}
    assert adjust(logits, **row_inputs(**row)).tolist() == [0, -0.75, -1.75, 0, 0, 0]


def test_ids_outside_the_vocabulary_are_unused():
    logits = torch.arange(4.0)
    row = {"bias": {-1: 9.0, 4: 9.0, 2: 1.0}, "stop": [-1, 4, 3], "min_new_tokens": 1}
    assert adjust(logits, **row_inputs(**row)).tolist() == [0, 1, 3, -INF]
