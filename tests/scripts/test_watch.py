"""What generate.py tells of its engine: figures and time line held against the answers of the same job."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from scripts_in_process import TINY, script

from makeready.engine import trace
from makeready.engine.entrypoints import generate, watch
from makeready.engine.entrypoints.batch.on_ray import EngineSpec, RayEngine
from makeready.engine.entrypoints.batch.worker import Worker
from makeready.engine.entrypoints.watch import MetricsFile, Watch
from makeready.engine.trace import StepTrace

OPTIONS = (
    *TINY,
    "sampling=greedy",
    "sampling.ignore_eos=true",
    "sampling.max_new_tokens=5",
    "plan.max_rows=4",
)
SHARED = [1] * 40  # of 16-token pages, so two whole ones
FILES = ("metrics=m.prom", "trace=t.json")


@pytest.fixture(scope="module", autouse=True)
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(autouse=True)
def one_cache(own_cache: Path, plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan serves all of these tests."""
    monkeypatch.setenv("MAKEREADY_CACHE", str(plans))


def run(rows: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    """Answers to a file of rows."""
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("generate")(*OPTIONS, "prompts=in.jsonl", "output=out.jsonl", *more) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def metrics(name: str, path: str = "m.prom") -> dict[str, float]:
    """Labels and values of a metric in a file."""
    found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", Path(path).read_text(), re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def steps(path: str = "t.json") -> list[dict[str, Any]]:
    """Facts of every step in a trace."""
    return [
        event["args"] for event in json.loads(Path(path).read_text()) if "padding" in event.get("args", {})
    ]


def test_figures_and_time_line_are_those_of_the_answers():
    rows = [{"token_ids": [*SHARED, i], "max_new_tokens": 1 + i} for i in range(7)]
    made = run([*rows, {"token_ids": []}, {"token_ids": [5], "n": 2}], *FILES)
    served = [answer for answer in made if "error" not in answer]
    samples = [sample for answer in served for sample in answer.get("samples", [answer])]
    generated = sum(sample["completion_tokens"] for sample in samples)
    prompts = 7 * 41 + 2 * 1
    assert (len(samples), len(made) - len(served)) == (9, 1)
    assert metrics("makeready_generated_tokens_total") == {"": generated}
    cached = metrics("makeready_cached_tokens_total")[""]
    assert cached == 6 * 32  # the first computes two pages, which the six behind it share
    assert metrics("makeready_prompt_tokens_total") == {"": prompts - cached}
    assert metrics("makeready_requests_total") == {'{reason="length"}': 9, '{reason="error"}': 1}
    assert metrics("makeready_running_requests") == metrics("makeready_waiting_requests") == {"": 0}
    assert sum(step["new"] for step in steps()) == generated
    assert sum(step["cached"] for step in steps()) == cached
    assert len(steps()) == sum(metrics("makeready_steps_total").values())


def test_progress_tells_how_much_of_the_prompts_was_cached(capsys):
    rows = [{"token_ids": [*SHARED, 3]}, {"token_ids": [*SHARED, 4]}]
    run(rows)
    assert "39% of prompt tokens cached" in capsys.readouterr().err  # 32 of 82
    run(rows, "overwrite=true", "scheduler.prefix_cache=false")
    assert "cached" not in capsys.readouterr().err
    keys = [{**row, "extra_key": key} for row, key in zip(rows, "ab", strict=True)]
    run(keys, "overwrite=true")
    assert "cached" not in capsys.readouterr().err


def test_rows_of_one_key_share_and_openai_says_so():
    body = {"model": "m", "prompt": [*SHARED, 5], "max_tokens": 2}
    keys = ["a", "b", "a", None, "", "b"]
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body | {"extra_key": key}}
        for i, key in enumerate(keys)
    ]
    bodies = [answer["response"]["body"] for answer in run(rows)]
    cached = [made["usage"]["prompt_tokens_details"]["cached_tokens"] for made in bodies]
    assert cached == [0, 0, 32, 0, 32, 32]  # null and the empty key are none
    assert len({tuple(made["choices"][0]["token_ids"]) for made in bodies}) == 1


def test_higher_priority_goes_first_under_that_policy(monkeypatch):
    rows = [{"id": i, "token_ids": [i + 1], "priority": p} for i, p in enumerate([0, 2, 1, -1, 3, 2])]
    order: list[int] = []
    answer = Worker._answer

    def noted(self: Worker, entry: Any) -> Any:
        order.append(entry.fields["id"])
        return answer(self, entry)

    monkeypatch.setattr(Worker, "_answer", noted)
    one = ("scheduler.max_running_requests=1",)
    run(rows, *one, "scheduler.policy=priority")
    assert order == [4, 1, 5, 2, 0, 3]
    order.clear()
    run(rows, *one, "overwrite=true")
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_start_that_finds_all_done_leaves_the_files_alone():
    run([{"token_ids": [1]}], *FILES)
    before = Path("m.prom").read_bytes(), Path("t.json").read_bytes()
    run([{"token_ids": [1]}], *FILES)
    assert (Path("m.prom").read_bytes(), Path("t.json").read_bytes()) == before
    run([{"token_ids": [1]}], "metrics=other.prom")  # where they lie is no part of what the job is
    assert not Path("other.prom").exists()


def test_metrics_are_whole_at_any_moment(monkeypatch):
    """Every text is complete under another name before it takes the place of the one before."""
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    replace = os.replace
    seen: list[dict[str, float]] = []

    def noted(source: Any, target: Any) -> None:
        if Path(target).name == "m.prom":
            seen.append(metrics("makeready_steps_total", str(source)))
            assert Path(source).read_text().endswith("\n")
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    run([{"token_ids": [1]}, {"token_ids": [2], "max_new_tokens": 20}], *FILES)
    counts = [sum(values.values()) for values in seen]
    assert counts == [*range(len(counts) - 1), counts[-2]]  # at the start, every step, the end
    assert len(counts) > 20
    assert not Path("m.prom.tmp").exists()


def test_a_link_stays_and_what_it_names_is_replaced():
    Path("there").mkdir()
    Path("m.prom").symlink_to("there/real.prom")
    run([{"token_ids": [1]}], "metrics=m.prom")
    assert Path("m.prom").is_symlink()
    assert metrics("makeready_generated_tokens_total", "there/real.prom") == {"": 5}


def test_a_full_disk_ends_the_files_and_not_the_job(monkeypatch, capsys):
    attach = Watch.attach

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def attached(self: Watch, engine: Any) -> None:
        """From here on nothing more can be written to either."""
        monkeypatch.setattr(MetricsFile, "write", full)
        monkeypatch.setattr(StepTrace, "_flush", full)
        attach(self, engine)

    monkeypatch.setattr(Watch, "attach", attached)
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    monkeypatch.setattr(trace, "SECONDS", 0.0)
    made = run([{"token_ids": [1]}, {"token_ids": [2]}], *FILES)
    assert [len(answer["token_ids"]) for answer in made] == [5, 5]
    said = capsys.readouterr().err
    for name in ("metrics", "trace"):
        assert said.count(f"{name}= is given up (No space left on device); the job goes on without it") == 1


def test_a_place_that_cannot_be_written_is_said_before_the_model_loads(monkeypatch, capsys):
    monkeypatch.setattr(generate, "load", lambda *arguments: pytest.fail("the model was loaded"))
    Path("in.jsonl").write_text('{"token_ids": [1]}\n')
    Path("m.prom.tmp").mkdir()  # also for root, whom no permission stops
    job = (*OPTIONS, "prompts=in.jsonl", "output=out.jsonl")
    assert script("generate")(*job, "metrics=m.prom") == 1
    assert capsys.readouterr().err.endswith("error: m.prom.tmp: Is a directory\n")


@pytest.mark.parametrize("name", ["metrics", "trace"])
def test_a_disk_that_is_full_to_begin_with_is_said_with_the_file(name, monkeypatch, capsys):
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(trace.os, "write", full)
    assert script("generate")(*OPTIONS, "prompt=a", f"{name}=f") == 1
    assert capsys.readouterr().err.endswith("error: f: No space left on device\n")


def test_requests_of_a_job_are_lines_of_its_trace():
    began = time.perf_counter()
    run([{"token_ids": [1, 2, 3]}, {"token_ids": []}, {"token_ids": [5], "n": 2}], *FILES)
    took = 1e6 * (time.perf_counter() - began)
    events = json.loads(Path("t.json").read_text())
    facts = [event["args"] for event in events if (event["name"], event["ph"]) == ("request", "b")]
    lengths = sorted((each["prompt_tokens"], each["completion_tokens"]) for each in facts)
    assert lengths == [(1, 5), (1, 5), (3, 5)]
    assert {each["reason"] for each in facts} == {"length"}
    last = max(event["ts"] for event in events if event["ph"] == "X")  # the last step's last slice begins
    ends = [event["ts"] for event in events if (event["name"], event["ph"]) == ("request", "e")]
    assert min(ends) > 0
    assert last <= max(ends) <= took


def test_ray_engines_have_the_scheduler_that_was_asked_for(monkeypatch):
    """With the fleet replaced by one of its engines, in this process."""
    specs: list[EngineSpec] = []

    class OneEngine:
        def __init__(self, spec: EngineSpec, **options: Any) -> None:
            specs.append(spec)
            self.engine = RayEngine(spec)

        def __enter__(self) -> OneEngine:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def run(self, rows: Any) -> None:
            rows.done(self.engine.work(rows.take(9)).done)
            while self.engine._worker.busy:
                rows.done(self.engine.work([]).done)

    monkeypatch.setattr(generate, "Fleet", OneEngine)
    rows = [{"token_ids": [*SHARED, i]} for i in range(3)]
    options = ("scheduler.policy=lof", "scheduler.prefix_cache=false", "scale=ray", "scale.engines=1")
    there = run(rows, *options)
    made = specs[0].scheduler
    assert (made.policy, made.prefix_cache) == ("lof", False)
    assert there == run(rows, "overwrite=true")
