"""Judges that nobody here wrote: other clients, and a fuzzer that reads our description of ourselves.

They are large, so each test says what it needs: the extra ``judge``, or in a folder that ``MAKEREADY_NODE`` names,
``npm install openai @anthropic-ai/sdk ollama``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_process import WAIT_SECONDS, ServerProcess
from small_model import small_model

pytestmark = pytest.mark.slow
MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]
# Tells of calls as Qwen2.5 writes them; results of tools are messages like others.
TEMPLATE = (
    "{# <tool_call> arguments #}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
NUMBERS = {"type": "integer", "minimum": 0, "maximum": 99}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": NUMBERS, "b": NUMBERS},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "today",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
]


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (the extra judge)")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With a model and a context that are so small that a request for all tokens ends soon."""
    folder = small_model(tmp_path_factory.mktemp("small"), TEMPLATE)
    options = ("plan.max_rows=8", "plan.context_len=96", "plan.max_tokens=64", "plan.max_logprob_tokens=32")
    more = (f"files_dir={tmp_path_factory.mktemp('files')}", "served_model_name=[small]")
    with ServerProcess(f"checkpoint={folder}", *options, *more) as made:
        yield made


def test_bodies_of_our_description_and_others_never_end_in_a_server_error(
    small: ServerProcess, tmp_path: Path
) -> None:
    """``MAKEREADY_EXAMPLES`` says how many bodies an operation gets at most."""
    needs("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{small.url}/openapi.json", "--seed", "1"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--workers", "4"]
    command += ["--max-examples", os.environ.get("MAKEREADY_EXAMPLES", "5"), "--continue-on-failure"]
    command += ["--suppress-health-check", "all", "--request-timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert small.process.poll() is None
    assert httpx.get(f"{small.url}/health_generate").status_code == 200


def test_litellm(server: ServerProcess) -> None:
    needs("litellm")
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet
    import litellm  # pyright: ignore[reportMissingImports]

    said: dict[str, str] = {}
    for name, more in (
        ("openai/smol", {"api_base": f"{server.url}/v1"}),
        ("hosted_vllm/smol", {"api_base": f"{server.url}/v1"}),
        ("anthropic/smol", {"api_base": server.url}),
        ("ollama_chat/smol", {"api_base": server.url}),
    ):
        asked: dict[str, Any] = {"model": name, "api_key": "none", "max_tokens": 12, "temperature": 0, **more}
        whole = litellm.completion(messages=MESSAGES, **asked)
        said[name] = whole.choices[0].message.content
        chunks = list(litellm.completion(messages=MESSAGES, stream=True, **asked))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said[name], name
        assert whole.usage.completion_tokens == 12, name
    assert len(set(said.values())) == 1, said
    asked = {"model": "openai/smol", "api_base": f"{server.url}/v1", "api_key": "none", "messages": MESSAGES}
    tools = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    called = litellm.completion(**asked, **tools, extra_body={"chat_template": TEMPLATE})
    assert called.choices[0].finish_reason == "tool_calls"
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**asked, top_p=7)


def test_the_clients_of_node(server: ServerProcess) -> None:
    folder, node = os.environ.get("MAKEREADY_NODE"), shutil.which("node")
    if node is None or folder is None:
        pytest.skip("there is no node, or MAKEREADY_NODE names no folder with its packages")
    command = [node, str(Path(__file__).parent / "clients.mjs"), server.url, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= 15


def test_an_agent_with_two_tools(server: ServerProcess) -> None:
    """Calls and their results go to and fro until the model answers."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)
    does = {"add": lambda a, b: str(a + b), "today": lambda: "Monday"}
    messages: list[Any] = [{"role": "user", "content": "What is 2 + 3, and which day is it?"}]
    choices: list[Any] = [{"type": "function", "function": {"name": name}} for name in does] + ["none"]
    for choice in choices:
        asked: dict[str, Any] = {"model": "smol", "messages": messages, "temperature": 0, "max_tokens": 60}
        asked |= {"tools": TOOLS, "tool_choice": choice, "extra_body": {"chat_template": TEMPLATE}}
        whole = client.chat.completions.create(**asked).choices[0]
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
        if choice == "none":
            assert whole.message.content
            assert "".join(delta.content or "" for delta in deltas) == whole.message.content
            continue
        (call,) = whole.message.tool_calls or ()
        told = [each for delta in deltas for each in delta.tool_calls or ()]
        assert [each.function.name for each in told if each.function.name] == [call.function.name]
        assert "".join(each.function.arguments or "" for each in told) == call.function.arguments
        result = does[call.function.name](**json.loads(call.function.arguments))
        messages += [
            whole.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": result},
        ]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "tool"]
