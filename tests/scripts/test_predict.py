"""Predictions from command lines, and dry runs of batch jobs beside the jobs themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts_in_process import TINY, script

SMALL = (*TINY, "plan.max_rows=4", "plan.max_tokens=16", "plan.page_size=4")


def test_a_plan_and_a_load(capsys):
    assert script("compile")(*SMALL, "output=plan") == 0
    load = ("throughput.prompts=5", "throughput.input=20", "throughput.output=6")
    assert (
        script("predict")("plan=plan", *load, "rows=[1,3]", "latency.prompts=[9]", "output=found.json") == 0
    )
    found = json.loads(Path("found.json").read_text())
    assert found["context"] == 64
    assert [row["rows"] for row in found["time_between_tokens"]] == [1, 3]
    assert found["time_to_first_token"][0]["prompt_tokens"] == 9
    made = found["throughput"]
    assert (made["requests"], made["prompt_tokens"], made["output_tokens"]) == (5, 100, 30)
    assert made["output_throughput"] == pytest.approx(30 / made["seconds"])
    assert "5 requests in" in capsys.readouterr().out
    # The same plan, compiled for the prediction, and what is predicted where nothing is asked for.
    assert script("predict")(*SMALL, *load, "output=again.json") == 0
    again = json.loads(Path("again.json").read_text())
    assert (again["plan"], again["throughput"]) == (found["plan"], made)
    assert [row["rows"] for row in again["time_between_tokens"]] == [1]
    assert again["time_to_first_token"] == []


def test_a_trace_is_replayed_at_its_arrivals():
    Path("trace.csv").write_text("time,in,out\n0,10,3\n1000,12,2\n")
    assert script("predict")(*SMALL, "replay.trace=trace.csv", "replay.speed=2", "output=found.json") == 0
    made = json.loads(Path("found.json").read_text())["replay"]
    assert made["output_tokens"] == 5
    assert 500 < made["seconds"] < 501
    assert made["ttft_milliseconds"]["p99"] < 1000


ROWS = [
    {"token_ids": [1, 2, 3], "max_new_tokens": 5},
    {"token_ids": [4] * 20, "max_new_tokens": 7, "n": 2},
    {"token_ids": [5] * 60, "max_new_tokens": 30},  # beyond the context
    {"unheard": "of"},
    {"token_ids": [1, 2, 3], "max_new_tokens": 1},
]


def test_a_dry_run_counts_what_the_job_then_has(capsys):
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    job = (*SMALL, "prompts=in.jsonl", "sampling.ignore_eos=true", "carry=false")
    assert script("generate")(*job, "dry_run=true") == 0
    said = capsys.readouterr().out
    assert not Path("out.jsonl").exists()
    assert script("generate")(*job, "output=out.jsonl") == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    failed = [answer for answer in answers if answer.get("error")]
    prompts, outputs = 3 + 2 * 20 + 3, 5 + 2 * 7 + 1
    assert len(failed) == 3
    first, second, third = said.splitlines()
    counted = f"6 rows (3 cannot be served), 4 requests: {prompts} prompt tokens (16 cached)"
    assert first == f"{counted}, at most {outputs} output tokens"
    assert second.startswith("predicted for one cpu: at most ")
    assert third.startswith("memory: ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("predict", [], "there is nothing to predict"),
        ("predict", ["plan=x", "checkpoint=y"], "checkpoint is not read beside plan=x"),
        ("predict", ["plan=x", "plan.max_rows=4"], "plan.max_rows cannot be chosen beside plan=x"),
        ("predict", ["plan=x", "rows=[0]"], "rows must be at least 1"),
        ("predict", ["plan=x", "replay.trace=gone"], "replay.trace=gone is no file"),
        ("generate", ["checkpoint=x", "prompt=a", "dry_run=true"], "dry_run=true is for a job over prompts="),
        ("generate", ["checkpoint=x", "prompts=gone", "dry_run=true"], "prompts=gone is no file"),
        (
            "generate",
            ["checkpoint=x", "prompts=a", "output=b", "scale=ray", "dry_run=true"],
            "dry_run=true predicts one engine",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(name, options, reason, capsys):
    Path("a").write_text("{}\n")
    assert script(name)(*options) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_rows_beyond_the_plan_are_refused(capsys):
    assert script("predict")(*SMALL, "rows=[5]") == 1
    assert "5 rows of 64 tokens are more than the plan's 4 of 64" in capsys.readouterr().err
