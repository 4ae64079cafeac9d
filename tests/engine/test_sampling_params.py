"""What SamplingParams refuses, and in which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import numpy as np
import pytest

from makeready.engine.errors import RequestError
from makeready.engine.sampling import CHECKS, SamplingParams
from makeready.graphs.plan.spec import Limits

LIMITS = Limits(max_rows=2, max_tokens=8, context_len=32, page_size=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 asks for nothing; it must be at least 1"),
        ({"logprob_start_len": 0}, "logprob_start_len needs return_logprob"),
        ({"max_new_tokens": -5}, "max_new_tokens=-5"),
        ({"top_k": 10**400}, r"top_k=10+\.\.\. is out of range; it must be from -1 to 2147483647"),
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
        ({"logit_bias": [1, 2]}, "must be an object of token ids and numbers"),
        ({"logit_bias": {"299": 1, "0299": -1}}, "'0299', which is no token id"),
        ({"logit_bias": {"299": 1, 299: -1}}, "token id 299 twice"),
        ({"logit_bias": {"1": True}}, "must be a number"),
        ({"logit_bias": {True: 1}}, "no token id"),
        ({"temprature": 1}, "no sampling field 'temprature'; did you mean temperature"),
        ({"max_tokens": 1}, "no sampling field 'max_tokens'; did you mean max_new_tokens"),
        ({"seed": 1}, "did you mean sampling_seed"),
        ({"zzz": 1}, "fields are choice, ebnf, frequency_penalty, ignore_eos"),
        ({"sampling_seed": True}, "sampling_seed=True must be a number"),
        ({"sampling_seed": 10**5000}, "sampling_seed=<int> is out of range; it must be at least 0"),
        ({"stop_token_ids": [True]}, "True, which is no token id"),
        ({"stop_token_ids": ["٣"]}, "no token id"),
        ({"stop_token_ids": [" 3"]}, "no token id"),
        ({"stop_token_ids": 5}, "list of token ids"),
        ({"stop": {"a": 1}}, "must be a non-empty string or a list of them"),
        ({"stop": False}, "must be a non-empty string or a list of them"),
        ({"stop": 0}, "must be a non-empty string or a list of them"),
        ({"stop": b"a"}, "must be a non-empty string or a list of them"),
        ({"stop": ["a"] * 129}, "stop has 129 entries, at most 128"),
        ({"stop": "a" * 1025}, "stop has a text of 1025 characters; at most 1024"),
        ({"stop_regex": {"a": 1}}, "must be a non-empty string or a list of them"),
        ({"stop_regex": ["a"] * 17}, "stop_regex has 17 entries, at most 16"),
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


BOOLEANS = [name for name, kind in get_type_hints(SamplingParams).items() if kind is bool]
NUMBERS = [name for name, kind in get_type_hints(SamplingParams).items() if kind in (int, float)]


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", [0, 1, "false", "no", [], [0], 0.0, np.int64(1)])
def test_a_boolean_is_a_boolean(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}=.* must be true or false"):
        SamplingParams.from_mapping({name: value})
    assert getattr(SamplingParams(**{name: np.bool_(False)}), name) is False


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, False, "1", [1], {}, math.nan, np.bool_(True)])
def test_a_number_is_a_number(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}=.* must be a number"):
        SamplingParams.from_mapping({name: value})


def test_every_field_is_checked() -> None:
    assert list(CHECKS) == [field.name for field in dataclasses.fields(SamplingParams)]


def test_numbers_of_tables_and_of_numpy_are_taken() -> None:
    """A table has floats where a column of whole numbers has a null."""
    given = {
        "max_new_tokens": 4.0,
        "top_k": np.int32(5),
        "n": np.float64(2),
        "stop_token_ids": np.array([3, 4]),
    }
    params = SamplingParams.from_mapping(given | {"temperature": np.float32(0.5), "logit_bias": {7.0: 2}})
    assert (params.max_new_tokens, params.top_k, params.n) == (4, 5, 2)
    assert [type(v) for v in (params.max_new_tokens, params.top_k, params.n, params.temperature)] == [
        *[int] * 3,
        float,
    ]
    assert (params.stop_token_ids, params.logit_bias) == ((3, 4), {7: 2})


def test_null_is_what_is_not_there() -> None:
    assert SamplingParams.from_mapping(dict.fromkeys(CHECKS)) == SamplingParams()


def test_json_forms_are_normalised() -> None:
    params = SamplingParams.from_mapping({"stop": "x", "logit_bias": {"5": -1}, "stop_token_ids": [1, "2"]})
    assert params.stop == ("x",)
    assert params.logit_bias == {5: -1}
    assert params.stop_token_ids == (1, 2)
