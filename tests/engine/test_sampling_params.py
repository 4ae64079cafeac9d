"""What SamplingParams refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from makeready.engine.errors import RequestError
from makeready.engine.sampling import SamplingParams
from makeready.graphs.spec import Limits

LIMITS = Limits(max_rows=2, max_tokens=8, context_len=32, page_size=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 asks for nothing; it must be at least 1"),
        ({"logprob_start_len": 0}, "logprob_start_len needs return_logprob"),
        ({"max_new_tokens": -5}, "max_new_tokens=-5"),
        ({"top_k": 10**400}, "top_k=10+ is out of range"),
        ({"temperature": float("nan")}, "temperature=nan must be a number"),
        ({"max_new_tokens": 2.5}, "must be a whole number"),
        ({"max_new_tokens": "9"}, "must be a number"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range; it must be from 0 to 10000"),
        ({"temperature": float("nan")}, "must be a number"),
        ({"top_p": 1.5}, "from 0 to 1"),
        ({"top_p": 0}, "use temperature=0"),
        ({"min_p": -1}, "min_p=-1"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_k": 2**40}, "top_k=1099511627776"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"stop_token_ids": [1.5]}, "1.5, which is no token id"),
        ({"stop_token_ids": [float("inf")]}, "no token id"),
        ({"logit_bias": {1: 1e300}}, "must be a number from"),
        ({"frequency_penalty": 3}, "from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"n": 0}, "n=0"),
        ({"min_new_tokens": 5, "max_new_tokens": 3}, "min_new_tokens=5 is above max_new_tokens=3"),
        ({"sampling_seed": -1}, "sampling_seed=-1"),
        ({"top_logprobs_num": 3}, "needs return_logprob"),
        ({"stop": ["a", ""]}, "non-empty"),
        ({"stop": [3]}, "non-empty string"),
        ({"stop_token_ids": "12"}, "list of token ids"),
        ({"stop_token_ids": ["x"]}, "no token id"),
        ({"logit_bias": {"x": 1.0}}, "no token id"),
        ({"logit_bias": {"1": "high"}}, "must be a number"),
        ({"logit_bias": [1, 2]}, "cannot be read"),
        ({"temprature": 1}, "there is no sampling field 'temprature'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams.from_mapping(fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop_token_ids": list(range(17))}, "stop_token_ids asks for 17 entries, the plan allows 16"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias asks for 301"),
        ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num asks for 21"),
        ({"stop_token_ids": [1000]}, "the vocabulary ends at 999"),
        ({"logit_bias": {-1: 1.0}}, "token id -1"),
    ],
)
def test_what_a_plan_cannot_take_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields).check(LIMITS, vocabulary=1000, steps=("decode", "extend"))


def test_samples_of_one_request_have_seeds_of_their_own() -> None:
    params = SamplingParams(sampling_seed=7, n=3)
    assert params.seed(0) == 7
    assert len({params.seed(i) for i in range(1000)}) == 1000
    assert all(0 <= params.seed(i) < 2**63 for i in range(1000))
    assert SamplingParams().seed(0) != SamplingParams().seed(0)


def test_json_forms_are_normalised() -> None:
    params = SamplingParams.from_mapping({"stop": "x", "logit_bias": {"5": -1}, "stop_token_ids": [1, "2"]})
    assert params.stop == ("x",)
    assert params.logit_bias == {5: -1}
    assert params.stop_token_ids == (1, 2)
