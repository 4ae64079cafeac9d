"""Sweeps of published schemas through the masks: no invalid instance passes, but for the cases that are listed here.

Nothing is downloaded: the suites lie where these variables say.

    MAKEREADY_SCHEMA_SUITE   json/tests/draft2020-12 of the JSON Schema Test Suite, as in the sdist of ``jsonschema``
    MAKEREADY_BFCL           bfcl_eval/data of the wheel ``bfcl-eval``
    MAKEREADY_QWEN           a GGUF file of Qwen2.5
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from smollm2 import smollm2

from makeready.engine.errors import RequestError
from makeready.engine.given import Conversation
from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.text.grammar import Grammar, Grammars, check_grammar
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

# Files of the suite and why llguidance takes invalid instances of theirs: by the number of such instances, at most.
KNOWN: dict[str, tuple[int, str]] = {
    "optional/format/date-time.json": (2, "a leap second where there is none"),
    "optional/format/date.json": (2, "a day that its month has not that year"),
    "optional/format/time.json": (10, "a leap second where there is none"),
}


def folder_of(variable: str) -> Path:
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no folder with the suite")
    return Path(found)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(open_checkpoint(smollm2()))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


class Masks:
    """A grammar's masks, one after the other."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self.grammar, self._ends = grammar, list(tokenizer.eos_ids)
        self._words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)

    def allowed(self) -> np.ndarray:
        self.grammar.allow(self._words)
        assert self.grammar.error is None, self.grammar.error
        return np.unpackbits(self._words.view(np.uint8), bitorder="little")

    def accept(self, ids: list[int]) -> bool:
        complete = False
        for token in ids:
            if complete or not self.allowed()[token]:
                return False
            complete = self.grammar.take(token)
        return complete or bool(self.allowed()[self._ends].any())


def accepts(grammars: Grammars, tokenizer: Tokenizer, schema: Any, instance: Any) -> bool:
    text = json.dumps(instance, ensure_ascii=False)
    return Masks(grammars.start(SamplingParams(json_schema=schema).grammar), tokenizer).accept(
        tokenizer.encode(text, add_special_tokens=False)
    )


@pytest.mark.slow
def test_the_json_schema_test_suite(grammars: Grammars, tokenizer: Tokenizer, capsys: Any) -> None:
    folder, counts, wrong = folder_of("MAKEREADY_SCHEMA_SUITE"), Counter[str](), Counter[str]()
    told: list[str] = []
    for path in sorted((*folder.glob("*.json"), *folder.glob("optional/format/*.json"))):
        name = str(path.relative_to(folder))
        for group in json.loads(path.read_text(encoding="utf-8")):
            schema = group["schema"]
            try:
                grammars.start(SamplingParams(json_schema=schema).grammar)
                counts["schemas taken"] += 1
            except RequestError:
                counts["schemas refused"] += 1
                continue
            for test in group["tests"]:
                if "\ud800" <= max(json.dumps(test["data"], ensure_ascii=False)) <= "\udfff":
                    continue
                passed = accepts(grammars, tokenizer, schema, test["data"])
                counts[
                    f"{'valid' if test['valid'] else 'invalid'} {'accepted' if passed else 'refused'}"
                ] += 1
                if passed and not test["valid"]:
                    wrong[name] += 1
                    told.append(f"{name}: {test['description']}: {json.dumps(test['data'])}")
    with capsys.disabled():
        print(dict(counts), *told, sep="\n")
    for name, count in wrong.items():
        assert count <= KNOWN.get(name, (0, ""))[0], f"{name}: {count} invalid instances pass"
    assert counts["schemas taken"] > 100


OF_BFCL = {
    "dict": "object", "float": "number", "double": "number", "long": "integer", "byte": "integer", "short": "integer",
    "tuple": "array", "list": "array", "arraylist": "array", "hashmap": "object", "bigint": "integer",
    "char": "string", "hashtable": "object", "queue": "array", "stack": "array", "set": "array",
}  # fmt: skip
TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}


def plain(schema: Any) -> Any:
    """A schema of BFCL's as JSON Schema has it: Python's, Java's and JavaScript's names of types are JSON's."""
    if isinstance(schema, list):
        return [plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: plain(value)
        for key, value in schema.items()
        if key not in ("default", "description", "optional")
    }
    if isinstance(schema.get("type"), str):
        name = OF_BFCL.get(schema["type"].lower(), schema["type"].lower())
        made["type"] = name
        if name not in TYPES:  # any, and classes
            del made["type"]
    if isinstance(made.get("required"), bool):
        del made["required"]
    return made


def functions(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and schemas of all different functions."""
    seen: set[str] = set()
    for path in (
        *sorted(folder.glob("BFCL_v*.json")),
        *sorted((folder / "multi_turn_func_doc").glob("*.json")),
    ):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith('{"'):  # one file is no list of rows
                continue
            row = json.loads(line)
            listed = row.get("function", [row] if "parameters" in row else [])
            for function in listed if isinstance(listed, list) else [listed]:
                schema = plain(function["parameters"])
                if (key := json.dumps(schema)) not in seen:
                    seen.add(key)
                    yield function["name"], schema


def drawn(masks: Masks, tokenizer: Tokenizer, rng: random.Random) -> str | None:
    """JSON at random under masks, which soon comes to an end; None where it does not."""
    short = [tokenizer.token_to_id(text) for text in ('"', '",', '"}', "}", "]", "1", "a", ",", '":', ":")]
    soon, ids = [token for token in short if token is not None], list[int]()
    for _ in range(300):
        bits = masks.allowed()
        able = [token for token in soon if bits[token]]
        bits[list(tokenizer.eos_ids)] = 0
        every = np.flatnonzero(bits)
        if not len(every):
            return tokenizer.decode(ids)
        token = rng.choice(able) if able and rng.random() < 0.9 else int(rng.choice(every.tolist()))
        ids.append(token)
        if masks.grammar.take(token):
            return tokenizer.decode(ids)
    return None


def broken(instance: Any, schema: Any, rng: random.Random) -> Iterator[Any]:
    """Instances that are a little other."""
    if not isinstance(instance, dict):
        return
    for key in instance:
        yield {k: v for k, v in instance.items() if k != key}
        for value in (None, "x", 1, 1.5, True, [], {}, [None]):
            yield {**instance, key: value}
    yield {**instance, "another key": rng.random()}


@pytest.mark.slow
def test_the_functions_of_bfcl(grammars: Grammars, tokenizer: Tokenizer, capsys: Any) -> None:
    """What is drawn under the masks of a function is valid, and what jsonschema refuses does not pass."""
    counts, rng = Counter[str](), random.Random(0)
    for _name, schema in functions(folder_of("MAKEREADY_BFCL")):
        try:
            grammar = grammars.start(("json_schema", schema))
        except RequestError:
            counts["refused"] += 1
            continue
        counts["taken"] += 1
        text = drawn(Masks(grammar, tokenizer), tokenizer, rng)
        if text is None:
            counts["without end in 300 tokens"] += 1
            continue
        instance = json.loads(text)
        jsonschema.validate(instance, schema)
        counts["drawn and valid"] += 1
        for other in broken(instance, schema, rng) if counts["taken"] % 4 == 0 else ():
            if not jsonschema.Draft202012Validator(schema).is_valid(other):
                assert not accepts(grammars, tokenizer, schema, other), (schema, other)
                counts["invalid refused"] += 1
            elif accepts(grammars, tokenizer, schema, other):
                counts["valid accepted"] += 1
            else:
                counts["valid refused"] += 1
    with capsys.disabled():
        print(dict(counts))
    assert counts["taken"] > 100 * counts["refused"]


@pytest.mark.slow
def test_a_model_whose_markers_are_tokens_calls_the_functions_of_bfcl(capsys: Any) -> None:
    """Qwen2.5's own template and tokens; ``MAKEREADY_CALLS`` says for how many functions."""
    folder, file = folder_of("MAKEREADY_BFCL"), folder_of("MAKEREADY_QWEN")
    count, chosen = int(os.environ.get("MAKEREADY_CALLS", "500")), list[dict[str, Any]]()
    for name, schema in functions(folder):
        try:
            check_grammar("json_schema", schema)
        except RequestError:
            continue
        function = {"name": re.sub(r"\W", "_", name), "parameters": schema, "strict": True}
        chosen.append({"type": "function", "function": function})
    chosen = random.Random(1).sample(chosen, min(count, len(chosen)))
    counts, wrong = Counter[str](), list[tuple[str, Any]]()
    asked = [{"role": "user", "content": "Call the function with some arguments."}]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    with LLM(file, target="cpu", max_rows=16, context_len=4096) as llm:
        # In parts, so that what a long run has found is seen before its end.
        for begin, choice in itertools.product(range(0, len(chosen), 50), ("required", "auto")):
            tools = chosen[begin : begin + 50]
            # One call each: this model goes on calling until its tokens are used up.
            said = {"tool_choice": choice, "parallel_tool_calls": False}
            more = [Conversation(asked, {"tools": [tool], **said}) for tool in tools]
            for output, tool in zip(llm.generate(more, params), tools, strict=True):
                counts[f"{choice}: {output.finish_reason}"] += 1
                if reason := wrong_of(output, tool["function"], forced=choice == "required"):
                    wrong.append((f"{choice} {tool['function']['name']}: {reason}", output.text))
                counts[f"{choice}: valid calls"] += sum(call.complete for call in output.tool_calls or ())
            with capsys.disabled():
                print(begin + len(tools), dict(counts), *wrong, sep="\n", flush=True)
    assert not wrong
    assert counts["required: valid calls"]


def wrong_of(output: Any, function: dict[str, Any], *, forced: bool) -> str:
    """What of an answer is not as the only tool has it; "" for nothing."""
    if output.error is not None:
        return output.error
    for call in output.tool_calls or ():
        if call.name != function["name"]:
            return f"called {call.name}"
        if call.complete:
            try:
                jsonschema.validate(json.loads(call.arguments), function["parameters"])
            except (ValueError, jsonschema.ValidationError) as error:
                return str(error)
    answered = output.finish_reason != "tool_calls" or output.content is not None
    if forced and output.finish_reason != "length" and answered:
        return f"{output.finish_reason} with content {output.content!r}"
    return ""
