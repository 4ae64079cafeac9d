"""sample against a float64 oracle in numpy, as a source of random tokens, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from makeready.kernels.sample.sample import sample
from makeready.kernels.signature import ContractError
from makeready.kernels.spec import TensorSpec

INF = float("inf")
DEFAULTS = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": 0, "min_new_tokens": 0,
}  # fmt: skip
INTEGERS = {"top_k": torch.int32, "min_new_tokens": torch.int32, "seed": torch.int64}


def operands(logits, rows, *, slots=None, context=None, pad_to=0):
    """Operands of ``sample``: ``rows`` holds a dict of knobs, prompt and output for each row of logits."""
    count, vocabulary = logits.shape
    total = (max(slots) + 2) if slots else count + 1
    slots = slots or list(range(count))
    lengths = [len(row.get("prompt", [0])) + len(row.get("output", [])) for row in rows]
    context = context or max(lengths) + 3
    op = {"logits": logits}
    op["row_slot"] = torch.tensor(slots + [total - 1] * pad_to, dtype=torch.int32)
    op["context_len"] = torch.tensor(lengths + [0] * pad_to, dtype=torch.int32)
    # What lies past a request's tokens must not matter: it is filled with another request's leftovers.
    op["history"] = torch.arange(total * context, dtype=torch.int32).reshape(total, context) % vocabulary
    op["prompt_len"] = torch.ones(total, dtype=torch.int32)
    for name, value in DEFAULTS.items():
        op[name] = torch.full((total,), value, dtype=INTEGERS.get(name, torch.float32))
    op["stop_ids"] = torch.full((total, 3), -1, dtype=torch.int32)
    op["bias_ids"] = torch.full((total, 4), -1, dtype=torch.int32)
    op["bias_values"] = torch.full((total, 4), 7.0)
    op["masked"] = torch.zeros(total, dtype=torch.int32)
    op["allowed"] = torch.zeros(total, -(-vocabulary // 32), dtype=torch.int32)  # left by others: nothing
    for slot, row in zip(slots, rows, strict=True):
        tokens = [*row.get("prompt", [0]), *row.get("output", [])]
        op["history"][slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        op["prompt_len"][slot] = len(row.get("prompt", [0]))
        for i, stop in enumerate(row.get("stop", ())):
            op["stop_ids"][slot, i] = stop
        for i, (token, value) in enumerate(row.get("bias", {}).items()):
            op["bias_ids"][slot, i + 1], op["bias_values"][slot, i + 1] = token, value
        if row.get("allowed") is not None:
            op["masked"][slot] = 1
            bits = np.zeros(op["allowed"].shape[1] * 32, dtype=np.uint8)
            bits[row["allowed"]] = 1
            op["allowed"][slot] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))
        for name in DEFAULTS.keys() & row.keys():
            op[name][slot] = row[name]
    if pad_to:
        op["logits"] = torch.cat((logits, torch.full((pad_to, vocabulary), float("nan"))))
    return op


def draw(logits, rows, **kwargs):
    return sample(**operands(logits, rows, **kwargs)).tolist()


# ---- against an oracle that shares nothing with the reference: numpy, float64, full sorts


def oracle_noise(seed, position, vocabulary):
    def mix64(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def fmix32(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    golden = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    start = mix64(np.array([seed], dtype=np.int64).view(np.uint64) + golden)
    low, high = mix64(start + np.uint64(position) * golden).view(np.uint32)  # little-endian
    bits = fmix32(fmix32(np.arange(vocabulary, dtype=np.uint32) ^ low) ^ high)
    return -np.log1p(-(bits.astype(np.float64) + 0.5) / 2.0**32)


def oracle_adjust(logits, row):
    z = logits.astype(np.float64)
    for token, value in row["bias"].items():
        z[token] += value
    if len(row["output"]) < row["min_new_tokens"]:
        z[row["stop"]] = -INF
    for token in {*row["prompt"], *row["output"]}:
        factor = np.float64(np.float32(row["repetition_penalty"]))
        z[token] = z[token] / factor if z[token] > 0 else z[token] * factor
    for token in set(row["output"]):
        z[token] -= row["frequency_penalty"] * row["output"].count(token) + row["presence_penalty"]
    if row["allowed"] is not None:
        z[[token for token in range(len(z)) if token not in row["allowed"]]] = -INF
    return z


def oracle(logits, row):
    """Token of one row, and how far the closest decision was from going the other way."""
    z = oracle_adjust(logits, row)
    if row["temperature"] == 0:
        return int(z.argmax()), 1.0
    order = np.argsort(-z, kind="stable")
    weight = np.exp((z - z.max()) / np.float64(np.float32(row["temperature"])))
    level = z[order]
    alive = np.ones(len(z), dtype=bool)
    margin = 1.0
    if 0 < row["top_k"] < len(z):
        alive = level >= level[row["top_k"] - 1]
    if row["top_p"] < 1:
        share = weight[order] * alive / (weight[order] * alive).sum()
        above = np.array([share[level > x].sum() for x in level])
        keep = above < np.float64(np.float32(row["top_p"]))
        keep[level == level[0]] = True
        margin = min(margin, np.abs(above[1:] - row["top_p"]).min(initial=1))
        alive &= keep
    if row["min_p"] > 0:
        alive &= weight[order] >= row["min_p"]
        margin = min(margin, np.abs(weight - row["min_p"]).min())
    with np.errstate(divide="ignore"):
        score = np.log(weight) - np.log(oracle_noise(row["seed"], row["position"], len(z)))
    score[order[~alive]] = -INF
    best = np.sort(score)[::-1]
    margin = min(margin, best[0] - best[1]) if len(best) > 1 else margin
    return int(score.argmax()), margin


def token_lists(vocabulary, least):
    return st.lists(st.integers(0, vocabulary - 1), min_size=least, max_size=8)


@st.composite
def requests(draw_):
    vocabulary = draw_(st.integers(1, 40))
    # A coarse grid: many ties, and sums that float32 holds exactly.
    logits = draw_(st.lists(st.integers(-12, 12), min_size=vocabulary, max_size=vocabulary))
    logits = [-INF if draw_(st.integers(0, 9)) == 0 else x / 2 for x in logits]
    token = st.integers(0, vocabulary - 1)
    row = {
        "prompt": draw_(token_lists(vocabulary, 1)),
        "output": draw_(token_lists(vocabulary, 0)),
        "temperature": draw_(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        "top_k": draw_(st.sampled_from([-1, 0, 1, 3, 10, 100])),
        "top_p": draw_(st.sampled_from([0.0, 0.35, 0.8, 0.97, 1.0])),
        "min_p": draw_(st.sampled_from([0.0, 0.07, 0.4, 1.0])),
        "presence_penalty": draw_(st.sampled_from([0.0, 0.0, 0.5, -1.0])),
        "frequency_penalty": draw_(st.sampled_from([0.0, 0.0, 0.25, -0.5])),
        "repetition_penalty": draw_(st.sampled_from([1.0, 1.0, 1.3, 0.75])),
        "seed": draw_(st.integers(-(2**63), 2**63 - 1)),
        "min_new_tokens": draw_(st.integers(0, 9)),
        "stop": draw_(st.lists(token, max_size=3)),
        "bias": draw_(st.dictionaries(token, st.sampled_from([-2.0, 1.5, 100.0]), max_size=3)),
        "allowed": draw_(st.none() | st.lists(token, unique=True)),
    }
    row["position"] = len(row["prompt"]) + len(row["output"])
    return logits, row


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_any_request_is_the_oracles(request_):
    logits, row = request_
    logits = np.array(logits, dtype=np.float32)
    assume(oracle_adjust(logits, row).max() > -INF)
    want, margin = oracle(logits, row)
    assume(margin > 1e-5 or row["min_p"] == 1)
    assert draw(torch.from_numpy(logits)[None], [row]) == [want]


# ---- as a source of random tokens


def chi_square(counts, probabilities):
    """z-score of Pearson's statistic over the possible tokens (Wilson and Hilferty 1931)."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0, "a token of probability 0 was drawn"
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5
    freedom = possible.sum() - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


FILTERS = [{}, {"top_k": 4}, {"top_p": 0.85}, {"min_p": 0.15}, {"top_k": 6, "top_p": 0.9, "min_p": 0.1}]


@pytest.mark.parametrize(("by", "filters"), [("position", {}), *(("seed", f) for f in FILTERS)], ids=str)
def test_frequencies_follow_the_filtered_distribution(by, filters):
    draws, vocabulary, temperature = 1500, 9, 1.3
    logits = torch.tensor([0.6, -INF, 0.1, 2.4, 1.6, -1.2, -0.8, 0.4, 2.3])
    row = {"temperature": temperature, **filters}
    op = operands(logits.expand(draws, -1), [row] * draws, context=draws + 1)
    counts = np.zeros(vocabulary, dtype=int)
    for repeat in range(2):
        if by == "position":
            op["context_len"] = torch.arange(1, draws + 1, dtype=torch.int32)
            op["seed"].fill_(repeat)
        else:
            op["seed"] = torch.arange(draws + 1) + repeat * draws
        counts += np.bincount(sample(**op).numpy(), minlength=vocabulary)

    scores = logits[None] / temperature
    if "top_k" in filters:
        scores = hf.TopKLogitsWarper(filters["top_k"])(None, scores)
    if "top_p" in filters:
        scores = hf.TopPLogitsWarper(filters["top_p"])(None, scores)
    if "min_p" in filters:
        scores = hf.MinPLogitsWarper(filters["min_p"])(None, scores)
    assert abs(chi_square(counts, scores[0].double().softmax(-1).numpy())) < 3.5
    # The check has teeth: it would notice that the temperature is ignored.
    assert chi_square(counts, (scores[0] * temperature).double().softmax(-1).numpy()) > 3.5


def mixed_rows(count, vocabulary):
    rng = np.random.default_rng(3)
    rows = []
    for i in range(count):
        row = {
            "prompt": rng.integers(vocabulary, size=rng.integers(1, 12)).tolist(),
            "output": rng.integers(vocabulary, size=rng.integers(0, 12)).tolist(),
            "temperature": [0.0, 0.7, 1.5][i % 3],
            "seed": int(rng.integers(2**40)),
        }
        row |= [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"repetition_penalty": 1.2}][i % 5]
        row |= [{}, {"bias": {3: 4.0, 8: -4.0}}, {"frequency_penalty": 0.3}, {"min_new_tokens": 9}][i % 4]
        rows.append(row | {"stop": [1, 2, 3]})
    return rows


def test_tokens_depend_on_neither_batch_nor_row_nor_slot():
    count, vocabulary = 30, 257
    rows = mixed_rows(count, vocabulary)
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    together = draw(logits, rows)
    alone = [draw(logits[i : i + 1], [rows[i]], slots=[i % 7], context=50)[0] for i in range(count)]
    assert together == alone
    order = np.random.default_rng(0).permutation(count).tolist()
    slots = np.random.default_rng(1).permutation(2 * count)[:count].tolist()
    shuffled = draw(logits[order], [rows[i] for i in order], slots=slots, pad_to=3)
    assert shuffled == [together[i] for i in order] + [0] * 3
    assert len(set(together)) > count // 2


def test_same_seed_and_position_is_same_token_and_else_is_not():
    logits = torch.zeros(1, 1000).expand(40, -1)
    same = [{"temperature": 1.0, "seed": 7, "prompt": [i] * 5} for i in range(40)]
    assert len(set(draw(logits, same))) == 1
    positions = [{"temperature": 1.0, "seed": 7, "prompt": [0] * (i + 1)} for i in range(40)]
    assert len(set(draw(logits, positions))) > 30
    seeds = [{"temperature": 1.0, "seed": i, "prompt": [0] * 5} for i in range(40)]
    assert len(set(draw(logits, seeds))) > 30
    # The split into prompt and output is no part of it: a preempted request may return as a prompt.
    split = [
        {"temperature": 1.0, "seed": 7, "prompt": [0] * (i + 1), "output": [0] * (39 - i)} for i in range(39)
    ]
    assert len(set(draw(logits[:39], split))) == 1


# ---- greedy, padding, history


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert draw(logits, [{}, {}]) == [1, 0]
    # Equals made by a penalty, on the path of adjusted rows.
    assert draw(logits[:1], [{"prompt": [1], "repetition_penalty": 5.0}]) == [2]
    assert draw(logits[:1], [{"bias": {0: 4.0}}]) == [0]
    assert draw(logits[:1], [{"min_new_tokens": 1, "stop": [1]}]) == [2]


def test_only_the_next_place_of_each_live_row_is_written():
    rows = [*mixed_rows(5, 50), {"prompt": [1] * 29}, {"prompt": [1] * 30}]
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(2))
    for chosen in (rows, [{**row, "temperature": 0.0} for row in rows], [{"prompt": [1, 2]}] * 7):
        op = operands(logits, chosen, slots=[4, 1, 6, 0, 9, 3, 2], context=30, pad_to=2)
        op["logits"][-1] = torch.arange(50)
        before = {name: tensor.clone() for name, tensor in op.items()}
        tokens = sample(**op)
        want = before["history"].clone()
        for slot, length, token in zip(op["row_slot"][:7], op["context_len"], tokens, strict=False):
            if length < 30:
                want[slot, length] = token
        assert op["history"].equal(want)
        assert tokens.dtype == torch.int32
        assert tokens[7:].tolist() == [0, 0]
        for name in op.keys() - {"history", "logits"}:
            assert op[name].equal(before[name])
        assert op["logits"].view(torch.int32).equal(before["logits"].view(torch.int32))


def test_a_batch_of_padding_alone_changes_nothing():
    op = operands(torch.randn(1, 5), [{}], pad_to=3)
    for name in ("logits", "row_slot", "context_len"):
        op[name] = op[name][1:]
    before = op["history"].clone()
    assert sample(**op).tolist() == [0, 0, 0]
    assert op["history"].equal(before)


@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}])
@pytest.mark.parametrize("changed", [{}, {"presence_penalty": 0.25}, {"bias": {2: 1.0}}], ids=str)
def test_rows_that_are_not_finite_have_no_token(knobs, changed):
    """A negative id, and beside them rows whose tokens stay what they are."""
    nan = float("nan")
    broken = [[nan, 1.0, 2.0], [1.0, 2.0, -nan], [nan] * 3, [-INF] * 3, [INF, 0.0, -INF], [INF, INF, nan]]
    sound = [[3e38, -3e38, 0.0], [-INF, -INF, -2.0], [-INF, 7.0, -INF]]
    rows = [{"seed": i, **knobs, **changed} for i in range(len(broken) + len(sound))]
    op = operands(torch.tensor(broken + sound), rows, pad_to=2)
    assert sample(**op).tolist() == [-1] * len(broken) + [0, 2, 1] + [0, 0]
    # What may run before the host learns of it is some token of the vocabulary.
    assert op["history"][torch.arange(len(rows)), op["context_len"][: len(rows)]].tolist() == (
        [0] * len(broken) + [0, 2, 1]
    )


def test_masks_are_no_reason_to_refuse_a_row():
    """-inf by a minimum length, by penalties of -inf, or of all but one token."""
    logits = torch.tensor([[5.0, 1.0, -INF]])
    for knobs in ({}, {"temperature": 1.0, "top_p": 0.9}):
        assert draw(logits, [{"min_new_tokens": 2, "stop": [0, 2], **knobs}]) == [1]
        assert draw(logits, [{"repetition_penalty": 2.0, "prompt": [2], "bias": {0: -1e6}, **knobs}]) == [1]


@pytest.mark.parametrize("places", [1, 2, 5])
def test_a_slot_has_masks_of_several_places(places):
    """Rows of one slot at places in turn: each draws what its own mask allows, of 70 tokens in 3 words."""
    rows, vocabulary, first = 7, 70, 4
    random = np.random.default_rng(places)
    logits = random.normal(size=(rows, vocabulary)).astype(np.float32)
    may = random.random((places, vocabulary)) < 0.1
    may[:, 69] = True
    op = operands(torch.from_numpy(logits), [{} for _ in range(rows)], context=20)
    op["row_slot"][:] = 3
    op["context_len"] = torch.arange(first, first + rows, dtype=torch.int32)
    op["masked"][3] = 1
    padded = np.zeros((places, 96), np.uint8)
    padded[:, :vocabulary] = may
    words = np.packbits(padded, bitorder="little").view(np.int32)
    op["allowed"] = torch.zeros(rows + 1, 3 * places, dtype=torch.int32)
    op["allowed"][3] = torch.from_numpy(words)
    expected = [int(np.where(may[(first + r) % places], logits[r], -np.inf).argmax()) for r in range(rows)]
    assert sample(**op).tolist() == expected


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[1.0, -INF, 5.0, 4.999]]).expand(64, -1)
    tokens = set(draw(logits, [{"temperature": temperature, "seed": i} for i in range(64)]))
    assert tokens == ({2} if temperature < 1 else {0, 2, 3})


def test_contract_names_what_does_not_fit():
    op = operands(torch.zeros(2, 5), [{}, {}])
    specs = {n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in op.items()}
    assert sample.infer(specs, {}) == {"tokens": TensorSpec((2,), "int32")}
    assert sample.writes == ("history",)
    with pytest.raises(ContractError, match="seed"):
        sample.infer({**specs, "seed": TensorSpec((3,), "int32")}, {})
