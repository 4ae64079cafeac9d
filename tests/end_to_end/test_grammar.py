"""Grammars through their masks: valid texts pass token by token, no others do, and what is drawn is valid."""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest
from smollm2 import smollm2

from makeready.engine.errors import RequestError
from makeready.engine.protocol.openai.structured import grammar_of
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.grammar import Grammar, Grammars, check_grammar
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

VOCABULARY = 49152 + 13  # as models pad theirs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(open_checkpoint(smollm2()))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCABULARY, tokenizer.eos_ids)


def begun(grammars: Grammars, **asked: Any) -> Grammar:
    grammar = SamplingParams(**asked).grammar
    assert grammar is not None
    return grammars.start(grammar)


def mask_of(grammar: Grammar) -> np.ndarray:
    words = np.zeros(-(-VOCABULARY // 32), np.int32)
    grammar.allow(words)
    assert grammar.error is None
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY].astype(bool)


def accepts(grammars: Grammars, tokenizer: Tokenizer, text: str, **asked: Any) -> bool:
    """Whether a text passes the masks and may end."""
    grammar = begun(grammars, **asked)
    complete = False
    for token in tokenizer.encode(text, add_special_tokens=False):
        if complete or not mask_of(grammar)[token]:
            return False
        complete = grammar.take(token)
    return complete or bool(mask_of(grammar)[list(tokenizer.eos_ids)].all())


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
VALID = [
    {"name": "Ada", "age": 36},
    {"name": "é😀", "age": 0, "tags": []},
    {"name": "Bob", "age": 130, "tags": ["a", None, "b"], "home": None},
    {"name": "Eve", "age": 7, "home": {"city": "Rome"}},
]
INVALID = [
    {"name": "", "age": 36},
    {"name": "Ada"},
    {"name": "Ada", "age": 131},
    {"name": "Ada", "age": 1.5},
    {"name": "Ada", "age": 1, "tags": ["a", "c"]},
    {"name": "Ada", "age": 1, "tags": ["a"] * 4},
    {"name": "Ada", "age": 1, "home": {"town": "Rome"}},
    {"name": "Ada", "age": 1, "more": 1},
    ["Ada", 1],
]


@pytest.mark.parametrize("layout", [{"separators": (",", ":")}, {}, {"indent": 2}], ids=str)
def test_json_of_a_schema_passes_in_every_layout_and_no_other(grammars, tokenizer, layout) -> None:
    for instance in VALID:
        jsonschema.validate(instance, PERSON)
        text = json.dumps(instance, ensure_ascii=False, **layout)
        assert accepts(grammars, tokenizer, text, json_schema=PERSON), text
    for instance in INVALID:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(instance, PERSON)
        text = json.dumps(instance, ensure_ascii=False, **layout)
        assert not accepts(grammars, tokenizer, text, json_schema=PERSON), text


def test_a_schema_may_ask_for_one_line(grammars, tokenizer) -> None:
    body = {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}}
    asked = grammar_of(body)
    for instance in VALID:
        assert accepts(grammars, tokenizer, json.dumps(instance, ensure_ascii=False), **asked)
        assert not accepts(grammars, tokenizer, json.dumps(instance, indent=1), **asked)
    grammar = begun(grammars, **asked)
    assert (
        tokenizer.decode(list(grammar.forced()))
        == '{"name": "'[: len(tokenizer.decode(list(grammar.forced())))]
    )
    assert len(grammar.forced()) > 2


SCHEMAS = [
    PERSON,
    {"type": "object"},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    {"oneOf": [{"const": 1}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}}, {"required": ["a"]}]},
    {"type": "string", "format": "uuid"},
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_is_drawn_at_random_under_the_masks_is_valid(grammars, tokenizer, number) -> None:
    schema = SCHEMAS[number]
    finished = 0
    for seed in range(6):
        rng, grammar, drawn = random.Random(seed), begun(grammars, json_schema=schema), []
        for _ in range(60):
            allowed = np.flatnonzero(mask_of(grammar))
            ends = [int(t) for t in allowed if t in tokenizer.eos_ids]
            token = ends[0] if ends and rng.random() < 0.7 else int(rng.choice(allowed))
            if token in tokenizer.eos_ids:
                break
            drawn.append(token)
            if grammar.take(token):
                break
        else:
            continue
        finished += 1
        text = tokenizer.decode(drawn)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert finished or number < 2  # free strings go on for long


@pytest.mark.parametrize(
    ("asked", "yes", "no"),
    [
        (
            {"regex": r"[a-z]+@[a-z]+\.(com|org)"},
            ["me@here.org"],
            ["me@here.net", "me@here.", " me@here.org"],
        ),
        ({"choice": ["yes", "no", 'a "b"\n']}, ["yes", 'a "b"\n'], ["ye", "yes!", "maybe", ""]),
        ({"ebnf": 'root ::= "(" root ")" | [0-9]+'}, ["((42))", "7"], ["((42)", "()", "x"]),
        ({"lark": 'start: item ("," item)*\nitem: /[a-z]+/'}, ["a,bc,d", "x"], ["a,", "A"]),
        ({"json_schema": True}, ['{"a": [1, null]}', "3"], ["{", "{a: 1}"]),
        ({"json_schema": json.dumps({"const": [1, "x"]})}, ['[1,"x"]', '[1, "x"]'], ['[1,"y"]']),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_grammars(grammars, tokenizer, asked, yes, no) -> None:
    for text in yes:
        assert accepts(grammars, tokenizer, text, **asked), text
    for text in no:
        assert not accepts(grammars, tokenizer, text, **asked), text


def test_blanks_between_tokens_of_json_are_bounded(grammars, tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    assert accepts(grammars, tokenizer, "[\n" + 30 * " " + "1]", json_schema=schema)
    assert not accepts(grammars, tokenizer, "[  1]", json_schema=schema)
    assert not accepts(grammars, tokenizer, "[\n\n1]", json_schema=schema)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"json_schema": {"type": "object", "not": {"required": ["a"]}}}, "cannot be enforced: .*not"),
        (
            {"json_schema": {"type": "string", "minLength": 5, "maxLength": 3}},
            "json_schema cannot be enforced",
        ),
        ({"json_schema": {"type": "nothing"}}, "json_schema cannot be enforced"),
        ({"regex": "(a"}, "regex cannot be enforced: unclosed group"),
        ({"regex": r"(?=a)b"}, "regex cannot be enforced: .*look-around"),
        ({"ebnf": "root ::= missing"}, "ebnf cannot be (enforced|read)"),
        ({"ebnf": "no rules"}, "ebnf cannot be read"),
        ({"lark": "start: missing"}, "lark cannot be enforced: .*missing"),
        (
            {"json_schema": {"items": {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}}},
            "has 5,000 properties that may be missing, at most 2,000",
        ),
        ({"regex": "a" * 2**21}, "regex has 2,097,15. characters, at most 1,048,576"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_enforced_is_refused_by_its_name(grammars, asked, reason) -> None:
    with pytest.raises(RequestError, match=reason):
        begun(grammars, **asked)
    ((kind, value),) = asked.items()
    with pytest.raises(RequestError, match=reason):  # before there is a tokenizer
        check_grammar(kind, value)


HOSTILE: dict[str, dict[str, Any]] = {
    "optional": {
        "json_schema": {
            "type": "object",
            "properties": {f"p{i}": {"type": "integer"} for i in range(2000)},
            "additionalProperties": False,
        }
    },
    "nested": {"regex": "((([a-z]{1,30}-){1,30};){1,30})"},
    "repeated": {"regex": "(a?){1000}(b|c){1000}"},
    "enum": {"json_schema": {"enum": [f"value {i}" for i in range(20_000)]}},
    "deep": {"json_schema": json.loads('{"items":' * 150 + "{}" + "}" * 150)},
    "lengths": {"json_schema": {"type": "string", "minLength": 900_000}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_in_their_own_error_or_work_soon(grammars, tokenizer, name) -> None:
    began = time.thread_time()
    error = _error_of(grammars, HOSTILE[name])
    refused = "(json_schema|regex) cannot be enforced: .+; correct or simplify it"
    assert error is None or re.match(
        f"{refused}|the grammar cannot be followed any further: .+; simplify it", error
    )
    assert time.thread_time() - began < 20  # a hang, and no timing of how fast it is


def _error_of(grammars: Grammars, asked: dict[str, Any]) -> str | None:
    """Why a grammar cannot be followed for five tokens; None if it can."""
    try:
        grammar = begun(grammars, **asked)
    except RequestError as error:
        return str(error)
    words = np.zeros(-(-VOCABULARY // 32), np.int32)
    for _ in range(5):
        grammar.allow(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        if grammar.error is not None or grammar.take(int(np.flatnonzero(bits)[-1])):
            break
    return grammar.error


def test_threads_share_grammars_whose_states_are_apart(grammars, tokenizer) -> None:
    asked = SamplingParams(regex="ab*c").grammar
    assert asked is not None
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: grammars.start(asked), range(8)))
    a = tokenizer.encode("a", add_special_tokens=False)[0]
    made[0].take(a)
    assert not mask_of(made[0])[a]
    assert all(mask_of(other)[a] for other in made[1:])


def test_only_one_grammar_is_taken() -> None:
    with pytest.raises(RequestError, match="json_schema and regex cannot both hold; give one"):
        SamplingParams(json_schema={}, regex="a")
    with pytest.raises(RequestError, match="regex is empty"):
        SamplingParams(regex="")
    with pytest.raises(RequestError, match=r"json_schema=.* is no JSON"):
        SamplingParams(json_schema="{")
    with pytest.raises(RequestError, match="must be a JSON schema: an object"):
        SamplingParams(json_schema=[1])  # type: ignore[arg-type]
    for schema in ({"const": float("nan")}, {"const": {1}}):
        with pytest.raises(RequestError, match="is no JSON"):
            SamplingParams(json_schema=schema)
