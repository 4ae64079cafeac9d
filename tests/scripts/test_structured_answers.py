"""Answers of a real model that follow a schema: valid, and in the field where they belong, by every way in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from scripts_in_process import script
from test_scripts_smollm2 import checkpoint

from makeready.engine.async_llm import AsyncLLM
from makeready.engine.llm import LLM
from makeready.engine.options import SchedulerOptions
from makeready.engine.output import Output

__all__ = ["checkpoint"]  # a fixture

# A model of 135M goes on as it has seen it.
PLAIN, SHOTS = (
    "".join(
        f"<|im_start|>user\nDescribe {name}.<|im_end|>\n<|im_start|>assistant\n"
        f'{thought.format(name)}{{"name": "{name}"}}<|im_end|>\n'
        for name in ("Rome", "Oslo", "Lima")
    )
    for thought in ("", "<think>\n{} is a city.\n</think>\n\n")
)
# The model begins to think of its own accord, or the prompt has begun, or has ended what was not thought.
TEMPLATE = (
    f"{{% if mode == 'off' %}}{{{{ {PLAIN!r} }}}}{{% else %}}{{{{ {SHOTS!r} }}}}{{% endif %}}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}{% if mode == 'opened' %}{{ '<think>\n' }}{% endif %}"
    "{% if mode == 'off' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
MODES = ("own", "opened", "off")
ASKED = [{"role": "user", "content": "Describe Cairo."}]


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


NAME, COUNT = {"type": "string", "maxLength": 8}, {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMAS: list[dict[str, Any]] = [
    record(name=NAME),
    record(name=NAME, population=COUNT, capital={"type": "boolean"}),
    record(kind={"enum": ["city", "river", "person"]}, place=record(country=NAME, rank=COUNT)),
    record(tags={"type": "array", "items": {"enum": ["old", "new"]}, "minItems": 1, "maxItems": 2}),
    record(answer={"anyOf": [{"type": "null"}, COUNT]}),
    {"type": "array", "items": record(x=COUNT, y=COUNT), "minItems": 1, "maxItems": 2},
    {"enum": ["Africa", "Asia", "Europe"]},
    {"const": {"city": True, "words": ["the", "largest", "city"]}},
]
FIELDS = {"temperature": 0, "max_new_tokens": 70}


def check(output: Output, schema: Any, mode: str) -> None:
    assert output.finish_reason == "stop", output
    jsonschema.validate(json.loads(output.content or ""), schema)
    assert bool(output.reasoning_content) == (mode != "off")
    assert "think>" not in f"{output.content}{output.reasoning_content or ''}"


@pytest.mark.parametrize(
    ("forced", "schemas"),
    [
        (True, SCHEMAS[:2]),
        pytest.param(True, SCHEMAS, marks=pytest.mark.slow),
        pytest.param(False, SCHEMAS, marks=pytest.mark.slow),
    ],
    ids=["few", "all", "one by one"],
)
def test_llm_and_async_llm(checkpoint, forced: bool, schemas: list[dict[str, Any]]) -> None:
    path, options = checkpoint.removeprefix("checkpoint="), SchedulerOptions(forced_tokens=forced)
    asked: list[Any] = [FIELDS | {"json_schema": schema} for schema in schemas]

    async def streamed(llm: LLM, mode: str) -> list[Output]:
        async def one(served: AsyncLLM, sampling: Any) -> Output:
            pieces = [piece async for piece in served.chat(ASKED, sampling, mode=mode)]
            last = pieces[-1].output
            assert last is not None
            assert "".join(piece.content for piece in pieces) == (last.content or "")
            assert "".join(piece.reasoning_content for piece in pieces) == (last.reasoning_content or "")
            return last

        async with AsyncLLM(llm) as served:
            return await asyncio.gather(*(one(served, sampling) for sampling in asked[:2]))

    with LLM(path, chat_template=TEMPLATE, target="cpu", max_rows=8, scheduler=options) as llm:
        for mode in MODES if forced else MODES[1:2]:
            outputs = llm.chat([ASKED] * len(asked), asked, mode=mode)
            for output, schema in zip(outputs, schemas, strict=True):
                check(output, schema, mode)
            for output, whole in zip(asyncio.run(streamed(llm, mode)), outputs, strict=False):
                assert output.token_ids == whole.token_ids
            if mode == "own" and forced:
                _forced_tokens_change_nothing_else(llm, asked, outputs)


def _forced_tokens_change_nothing_else(llm: LLM, asked: list[Any], outputs: list[Output]) -> None:
    """The same tokens where they come one by one, as with log-probabilities; and in fewer steps."""
    steps: list[int] = []
    llm.engine.observer = lambda step: steps.append(step.rows)
    again = llm.chat([ASKED] * len(asked), asked)
    fast, steps[:] = len(steps), ()
    slow = llm.chat([ASKED] * len(asked), [each | {"return_logprob": True} for each in asked])
    for one, two, three in zip(outputs, again, slow, strict=True):
        assert one.token_ids == two.token_ids == three.token_ids
        assert three.logprobs is not None
        assert len(three.logprobs) == len(three.token_ids)
    assert fast < len(steps)


@pytest.mark.slow
def test_batches_of_openai_bodies(checkpoint, capfd) -> None:
    Path("chat.jinja").write_text(TEMPLATE)
    rows, expected = [], []
    for number, schema in enumerate(SCHEMAS[1:2]):
        for mode in MODES:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            body = {
                "model": "m",
                "messages": ASKED,
                "response_format": form,
                "temperature": 0,
                "max_tokens": 70,
            }
            body["chat_template_kwargs"] = {"mode": mode}
            ask = {"custom_id": f"{number} {mode}", "method": "POST", "url": "/v1/chat/completions"}
            rows.append(ask | {"body": body})
            expected.append((schema, mode))
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = (checkpoint, "target=cpu", "plan.max_rows=8", "prompts=in.jsonl", "output=out.jsonl")
    assert script("generate")(*job, "chat_template=chat.jinja") == 0, capfd.readouterr().err
    for line, (schema, mode) in zip(Path("out.jsonl").read_text().splitlines(), expected, strict=True):
        (choice,) = json.loads(line)["response"]["body"]["choices"]
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
        assert bool(choice["message"].get("reasoning_content")) == (mode != "off")
        assert choice["finish_reason"] == "stop"
