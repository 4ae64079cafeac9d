"""Ollama's API, by their own client against a real server with a real model."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import httpx
import jsonschema
import ollama
import openai
import pytest
from server_process import WAIT_SECONDS, ServerProcess
from smollm2 import smollm2
from test_openai_client import TEMPLATE, TOOLS

THINKS = TEMPLATE.replace("if thinks", "if enable_thinking")
USER: Any = [{"role": "user", "content": "Name three colours."}]
WEATHER: Any = [{"role": "user", "content": "Weather in London?"}]
FIXED: dict[str, Any] = {"model": "smol", "options": {"temperature": 0, "num_predict": 5}}


class Adding(httpx.HTTPTransport):
    """Adds fields to bodies that the client has no arguments for."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self._fields = fields

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = json.dumps({**json.loads(request.content), **self._fields}).encode()
        headers = [(name, value) for name, value in request.headers.items() if name != "content-length"]
        return super().handle_request(
            httpx.Request(request.method, request.url, headers=headers, content=body)
        )


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> ollama.Client:
    return ollama.Client(server.url, timeout=WAIT_SECONDS)


@pytest.fixture(scope="module")
def tools_client(server: ServerProcess) -> ollama.Client:
    return ollama.Client(server.url, timeout=WAIT_SECONDS, transport=Adding(chat_template=THINKS))


@pytest.fixture(scope="module")
def chats(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)


def check_end(last: Any, reason: str, tokens: int | None = None) -> None:
    """What the last line says."""
    assert (last.done, last.done_reason) == (True, reason)
    assert last.prompt_eval_count > 0
    assert tokens in (None, last.eval_count)
    assert last.total_duration >= last.prompt_eval_duration + last.eval_duration > 0
    age = datetime.now(timezone.utc) - datetime.fromisoformat(last.created_at.replace("Z", "+00:00"))
    assert abs(age.total_seconds()) < 900  # a wrong time zone is further off


def test_a_streamed_chat_is_the_plain_one(client: ollama.Client, chats: openai.OpenAI) -> None:
    asked = FIXED | {"messages": USER, "logprobs": True, "top_logprobs": 2}
    plain = client.chat(**asked)
    *lines, last = client.chat(**asked, stream=True)
    check_end(plain, "length", 5)
    check_end(last, "length", 5)
    assert "".join(line.message.content for line in (*lines, last)) == plain.message.content
    assert not any(line.done for line in lines)
    assert [entry for line in lines for entry in line.logprobs or ()] == plain.logprobs
    assert [len(entry.top_logprobs) for entry in plain.logprobs] == [2] * 5
    chat = chats.chat.completions.create(model="smol", messages=USER, temperature=0, max_tokens=5)
    assert plain.message.content == chat.choices[0].message.content
    assert plain.prompt_eval_count == chat.usage.prompt_tokens


def test_generate_with_a_template_and_without(client: ollama.Client, chats: openai.OpenAI) -> None:
    made = client.generate(**FIXED, prompt=USER[0]["content"], system="Be brief.")
    messages: Any = [{"role": "system", "content": "Be brief."}, *USER]
    chat = chats.chat.completions.create(model="smol", messages=messages, temperature=0, max_tokens=5)
    assert made.response == chat.choices[0].message.content
    check_end(made, "length", 5)
    asked = FIXED | {"prompt": "One, two, three,", "raw": True}
    asked["options"] = {"temperature": 0, "num_predict": 9, "stop": [" six"]}
    plain = client.generate(**asked)
    *lines, last = client.generate(**asked, stream=True)
    assert plain.response == " four, five,"
    assert "".join(line.response for line in lines) == plain.response
    check_end(plain, "stop")
    check_end(last, "stop")


def test_tools_are_called(tools_client: ollama.Client) -> None:
    asked = FIXED | {"messages": WEATHER, "tools": TOOLS, "options": {"temperature": 0, "num_predict": 40}}
    lines = list(tools_client.chat(**asked, stream=True))
    check_end(lines[-1], "stop")
    (call,) = [call for line in lines for call in line.message.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "London"})
    assert not any(line.message.content for line in lines)


def test_a_conversation_is_the_same_chat(server: ServerProcess, chats: openai.OpenAI) -> None:
    template = (
        "{% for m in messages %}{{ m.role }} {{ m.reasoning_content or '' }} {{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{{ c.id }}"
        "{% endfor %}{{ m.tool_call_id or '' }}\n{% endfor %}"
    )
    names = ("get_time", "get_weather")
    told: Any = [{"function": {"name": name, "arguments": {"city": "Rome"}}} for name in names]
    messages: Any = [
        *WEATHER,
        {"role": "assistant", "content": "I look.", "thinking": "Hm.", "tool_calls": told},
        {"role": "tool", "tool_name": "get_weather", "content": "Sun."},
        {"role": "tool", "tool_name": "get_time", "content": "Noon."},
        {"role": "user", "content": "So?"},
    ]
    calls = [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {"name": name, "arguments": '{"city": "Rome"}'},
        }
        for i, name in enumerate(names)
    ]
    same: Any = [
        *WEATHER,
        {"role": "assistant", "content": "I look.", "reasoning": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call00001", "content": "Sun."},
        {"role": "tool", "tool_call_id": "call00000", "content": "Noon."},
        {"role": "user", "content": "So?"},
    ]
    mine = ollama.Client(server.url, timeout=WAIT_SECONDS, transport=Adding(chat_template=template))
    made = mine.chat(**FIXED, messages=messages)
    chat = chats.chat.completions.create(
        model="smol", temperature=0, max_tokens=5, messages=same, extra_body={"chat_template": template}
    )
    assert made.message.content == chat.choices[0].message.content
    assert made.prompt_eval_count == chat.usage.prompt_tokens


def test_thinking(client: ollama.Client, tools_client: ollama.Client) -> None:
    asked = FIXED | {"messages": WEATHER, "options": {"temperature": 0, "num_predict": 3}}
    thought = tools_client.chat(**asked, think=True)
    assert thought.message.thinking
    assert thought.message.content == ""
    lines = list(tools_client.chat(**asked, think=True, stream=True))
    assert "".join(line.message.thinking or "" for line in lines) == thought.message.thinking
    assert tools_client.chat(**asked, think="low").message.thinking == thought.message.thinking
    silent = tools_client.chat(**asked, think=False).message
    assert silent.thinking is None
    assert silent.content
    assert client.chat(**asked, think=False).message.content
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(**asked, think=True)


def test_formats_are_followed(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    options = {"num_predict": 60, "seed": 1}
    made = client.chat("smol", USER, format=schema, options=options)
    assert made.done_reason == "stop"
    jsonschema.validate(json.loads(made.message.content), schema)
    text = client.generate("smol", "An object.", format="json", options=options | {"num_predict": 3}).response
    assert text.lstrip().startswith("{")


def test_options_reach_the_sampler_or_are_named(client: ollama.Client, server: ServerProcess) -> None:
    options = {"seed": 7, "temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "num_predict": 4}
    options |= {"repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    first, again, other = (
        client.generate("smol", "x", options={**options, "seed": seed}).response for seed in (7, 7, 8)
    )
    assert first == again != other
    body = FIXED | {"prompt": "x", "stream": False, "wish": 1, "keep_alive": "5m"}
    body["options"] = {"num_predict": 1, "num_ctx": 4096, "mirostat": 0, "seed": -1}
    made = httpx.post(server.url + "/api/generate", json=body)
    assert made.headers["x-makeready-ignored-fields"] == "options.num_ctx, wish"
    made = httpx.post(
        server.url + "/api/generate", json={"model": "smol", "prompt": "x", "options": {"num_predict": 2}}
    )
    assert made.headers["content-type"] == "application/x-ndjson"
    assert json.loads(made.text.splitlines()[-1])["done"] is True


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("chat", {"messages": [{"content": "x"}]}, "role"),
        ("chat", {"messages": {}}, "messages must be a list"),
        ("chat", {"messages": USER, "think": 1}, "think"),
        ("chat", {"messages": USER, "format": "xml"}, "format"),
        ("chat", {"messages": USER, "tools": TOOLS}, "no known family"),
        ("chat", {"messages": [], "keep_alive": 0}, "stays loaded"),
        ("chat", {"messages": USER, "stream": "no"}, "stream"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "context": [1]}, "context"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, "system"),
        ("generate", {"prompt": 1}, "prompt"),
        ("generate", {"prompt": "x", "options": {"mirostat": 2}}, "mirostat"),
        ("generate", {"prompt": "x", "options": {"repeat_penalty": 0}}, "repeat_penalty"),
        ("generate", {"prompt": "x", "options": []}, "options"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    server: ServerProcess, path: str, more: Any, said: str
) -> None:
    made = httpx.post(f"{server.url}/api/{path}", json={"model": "smol", **more})
    assert made.status_code == 400
    assert said in made.json()["error"]


def test_models(client: ollama.Client, server: ServerProcess) -> None:
    listed = client.list().models
    assert [model.model for model in listed] == ["smol", "other"]
    assert listed[0].size == smollm2().stat().st_size
    assert len(listed[0].digest) == 64
    assert listed[0].modified_at.timestamp() == pytest.approx(smollm2().stat().st_mtime, abs=1)
    details = listed[0].details
    assert (details.family, details.format, details.quantization_level) == ("llama", "gguf", "Q4_1")
    assert details.parameter_size in ("134.5M", "162.8M")
    shown = client.show("smol:latest")
    assert shown.capabilities == ["completion"]  # nothing in its template tells of tools
    assert "<|im_start|>" in shown.template
    assert shown.modelinfo["llama.context_length"] == 512
    assert shown.modelinfo["llama.block_count"] == 30
    (running, _) = client.ps().models
    assert (running.model, running.digest, running.context_length) == ("smol", listed[0].digest, 512)
    assert client.generate("smol").done_reason == "load"
    assert client.generate("other:latest", "x", options={"num_predict": 1}).model == "other:latest"
    for call in (lambda: client.show("third"), lambda: client.chat("third", USER)):
        with pytest.raises(ollama.ResponseError, match="no model 'third'") as missing:
            call()
        assert missing.value.status_code == 404
    told = httpx.get(server.url + "/api/version").json()["version"]
    assert tuple(map(int, told.split("."))) >= (0, 12, 11)
    assert httpx.head(server.url + "/").status_code == 200
