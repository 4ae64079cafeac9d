"""Loads are what they say, traces are read as published, and the figures are those of known runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import serve, steps, suites, workloads
from scripts_in_process import ROOT, TINY, script

sys.path.append(str(ROOT / "tests" / "engine"))

from step_records import make_record, overlapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from makeready.engine.entrypoints import bench_options
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.output import Output

SMALL = (*TINY, "plan.max_rows=4", "plan.max_tokens=16", "plan.page_size=4")


def test_random_prompts_have_the_lengths_that_were_asked_for():
    fixed = workloads.random_prompts(50, prompts=20, input=9, output=5, ratio=1.0, seed=0)
    assert {(len(work.prompt), work.output, work.arrival) for work in fixed} == {(9, 5, 0.0)}
    assert all(0 <= token < 50 for work in fixed for token in work.prompt)
    spread = workloads.random_prompts(50, prompts=400, input=10, output=4, ratio=0.5, seed=1)
    assert {len(work.prompt) for work in spread} == set(range(5, 11))
    assert {work.output for work in spread} == {2, 3, 4}
    least = workloads.random_prompts(50, prompts=100, input=3, output=3, ratio=0.0, seed=1)
    assert {work.output for work in least} == {1, 2, 3}
    assert spread == workloads.random_prompts(50, prompts=400, input=10, output=4, ratio=0.5, seed=1)


def test_prompts_of_a_group_begin_alike_and_only_these():
    works = workloads.shared_prefixes(10**6, groups=3, prompts=4, shared=6, own=2, output=1, seed=0)
    begins = [tuple(work.prompt[:6]) for work in works]
    assert sorted(map(begins.count, set(begins))) == [4, 4, 4]
    assert len({tuple(work.prompt) for work in works}) == 12
    assert begins != sorted(begins, key=begins.index), "groups follow one another"


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,2,7
"""
MOONCAKE = """
{"timestamp": 3000, "input_length": 7, "output_length": 2, "hash_ids": [0, 5]}
{"timestamp": 1000, "input_length": 5, "output_length": 3, "hash_ids": [0, 4]}
{"timestamp": 9500, "input_length": 3, "output_length": 1}
"""


def test_traces_are_read_as_they_are_published(tmp_path):
    azure, mooncake = tmp_path / "a.csv", tmp_path / "m.jsonl"
    azure.write_text(AZURE)
    rows = workloads.read_trace(azure, None, 512)
    assert [(round(r.arrival, 6), r.input, r.output) for r in rows] == [
        (0.0, 374, 44),
        (4.314579, 396, 109),
        (60.0, 2, 7),
    ]
    zoned = AZURE.replace("6805900,", "68059+00:00,").replace("9951690,", "995169Z,")
    azure.write_text(zoned)
    assert [round(r.arrival, 6) for r in workloads.read_trace(azure, 2, 512)] == [0.0, 4.314579]
    azure.write_text("a,b,c\n1.5,2,3\n0.5,2,3\n")
    assert [r.arrival for r in workloads.read_trace(azure, None, 512)] == [0.0, 1.0]
    mooncake.write_text(MOONCAKE)
    rows = workloads.read_trace(mooncake, None, 4)
    assert [(r.arrival, r.input, r.blocks) for r in rows] == [(0, 5, (0, 4)), (2, 7, (0, 5)), (8.5, 3, ())]


def test_equal_blocks_become_equal_tokens():
    rows = [
        workloads.TraceRow(0, 5, 3, (0, 4)),
        workloads.TraceRow(2, 7, 2, (0, 5)),
        workloads.TraceRow(3, 4, 1),
    ]
    first, second, third = workloads.replayed(rows, 1000, block=4, speed=2, seed=0)
    assert [len(work.prompt) for work in (first, second, third)] == [5, 7, 4]
    assert first.prompt[:4] == second.prompt[:4]
    assert first.prompt[4] != second.prompt[4]
    assert [work.arrival for work in (first, second, third)] == [0, 1, 1.5]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "T,C,G\n1.0,2\n", "line 2: .*a row is arrival, prompt tokens"),
        ("a.csv", "T,C,G\nsoon,2,3\n", "line 2"),
        ("a.csv", "T,C,G\n1,0,3\n", "0 prompt tokens and 3 generated ones"),
        ("a.csv", "T,C,G\n", "has no requests"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 5}\n', "line 1: 'output_length' is missing"),
        ("a.jsonl", "\nnonsense\n", "line 2"),
        (
            "a.jsonl",
            '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n',
            "2 blocks of replay.block=4 are less than 9 tokens",
        ),
    ],
)
def test_what_is_no_trace_is_refused_by_its_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        workloads.read_trace(tmp_path / name, None, 4)


def test_figures_of_a_known_run():
    def output(first: float, end: float, tokens: int, cached: int) -> Output:
        meta = {
            "completion_tokens": tokens,
            "cached_tokens": cached,
            "queue_time": 0.5,
            "time_to_first_token": first,
            "e2e_latency": end,
        }
        return Output("", (1,) * tokens, "length", 10, meta_info=meta)

    served = serve.Served(4.0, [output(1.0, 3.0, 5, 6), output(2.0, 2.0, 1, 0)], refused=1)
    found = serve.throughput(served)
    assert (found["successful_requests"], found["refused_requests"]) == (2, 1)
    assert (found["input_throughput"], found["output_throughput"]) == (5.0, 1.5)
    assert (found["total_throughput"], found["request_throughput"]) == (6.5, 0.5)
    assert found["cache_hit_rate"] == 0.3
    found = serve.latencies(served)
    assert found["concurrency"] == 1.25
    assert found["milliseconds"]["tpot"]["p50"] == 500.0
    assert found["milliseconds"]["ttft"]["mean"] == 1500.0
    values = np.arange(1, 101) / 1000
    assert serve.percentiles(values)["p99"] == pytest.approx(99.01)


def test_step_figures_of_a_known_run():
    records = overlapped(50)
    found = steps.step_figures(records)["decode"]
    assert found["steps"] == 50
    assert found["milliseconds"]["p50"] == pytest.approx(10)
    assert found["host_milliseconds"]["mean"] == pytest.approx(0.9)
    assert found["padding_share"] == pytest.approx(0.25)
    assert found["idle_share"] == 0
    assert steps.last_throughput(records) == pytest.approx(6 / 0.01)
    # Launched 2 ms after the results of the step before it were read.
    late = [records[0], make_record(launch_end=1.013, wait_start=1.013, results_read=1.021)]
    assert steps.step_figures(late)["decode"]["idle_share"] == pytest.approx(0.2)
    # Results that were there at once may have been there since the launch.
    there = [make_record(wait_start=1.011), make_record(launch_end=1.0015, results_read=1.021)]
    assert steps.step_figures(there)["decode"]["idle_share"] == pytest.approx(0.05)


def test_every_suite_can_be_named():
    assert set(suites.SUITES) == set(bench_options.SUITES)


def bench(*options: str) -> dict:
    assert script("bench")(*options, "output=result.json") == 0
    return json.loads(Path("result.json").read_text())


def test_rows_that_do_not_run_at_once_are_no_batch(capsys):
    sizes = ("rows=[4]", "tokens=20", "latency.context=30", "kv.memory_gib=1e-5")
    assert script("bench")(*SMALL, "suite=[latency]", *sizes) == 2
    assert "4 rows of 51 tokens need 52 pages" in capsys.readouterr().err


def test_json_beside_plain_text(capsys):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters | {"<end>": len(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.save("tokenizer.json")
    Path("tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    sizes = ("rows=[1,3]", "tokens=30", "repeats=1", "constrained.context=8", "constrained.tokenizer=.")
    found = bench(*SMALL, "model.vocab_size=257", "model.eos_token_id=256", "suite=[constrained]", *sizes)
    for batch, rows in zip(found["constrained"]["batches"], (1, 3), strict=True):
        assert batch["rows"] == rows
        assert 0 < batch["json"]["steps"] <= batch["plain"]["steps"] <= 32
        assert min(batch[kind]["milliseconds"] for kind in ("plain", "json")) > 0
    assert "1 rows: plain" in capsys.readouterr().out


def test_json_needs_a_tokenizer(capsys):
    assert script("bench")(*SMALL, "suite=[constrained]", "rows=[1]") == 2
    assert "give constrained.tokenizer=FOLDER" in capsys.readouterr().err


def test_throughput_of_a_tiny_model(capsys):
    options = ("throughput.prompts=9", "throughput.input=11", "throughput.output=5", "throughput.ratio=0.5")
    found = bench(*SMALL, "suite=[throughput]", *options)["throughput"]
    assert set(found["steps"]) == {"decode", "extend"}
    assert found["last_gen_throughput"] > 0
    assert found["successful_requests"] == 9
    assert 9 * 2 <= found["total_output_tokens"] <= 9 * 5
    assert found["output_throughput"] == pytest.approx(found["total_output_tokens"] / found["total_latency"])
    assert "offline: 9 requests in" in capsys.readouterr().out


def test_replay_keeps_to_the_arrivals():
    Path("trace.csv").write_text("T,C,G\n0,5,3\n0.2,9,2\n0.4,60,9\n0.6,4,1\n")
    found = bench(*SMALL, "suite=[replay]", "replay.trace=trace.csv", "replay.speed=2")["replay"]
    assert (found["successful_requests"], found["refused_requests"]) == (3, 1)
    assert found["total_latency"] >= 0.3
    assert found["total_output_tokens"] == 6


def test_prefix_cache_on_and_off(capsys):
    sizes = ("prefix.groups=2", "prefix.prompts=5", "prefix.shared=20", "prefix.own=3", "prefix.output=2")
    found = bench(*SMALL, "suite=[prefix]", *sizes, "trace=steps.json")["prefix"]
    assert found["off"]["cache_hit_rate"] == 0
    # Of each group all but the first find its 20 tokens, of a prompt of 23.
    assert found["on"]["cache_hit_rate"] == pytest.approx(2 * 4 * 20 / (10 * 23))
    assert found["on"]["total_output_tokens"] == found["off"]["total_output_tokens"] == 20
    assert "times as fast with it" in capsys.readouterr().out
    names = {event["name"] for event in json.loads(Path("steps.json").read_text())}
    assert {"plan", "wait", "commit", "requests", "pages"} <= names


def test_a_recorded_load_with_the_cache_on_and_off():
    Path("trace.jsonl").write_text(MOONCAKE)
    found = bench(*SMALL, "suite=[prefix]", "replay.trace=trace.jsonl", "replay.block=4")["prefix"]
    assert found["on"]["successful_requests"] == found["off"]["successful_requests"] == 3
    assert found["on"]["cache_hit_rate"] == pytest.approx(4 / 15)


def test_host_cost_needs_no_checkpoint():
    load = ("host.rows=[2]", "host.waiting=[0,60]", "host.context=9", "host.steps=3")
    found = bench("suite=[host]", *load, "scheduler.policy=lpm")
    assert [(row["rows"], row["waiting"]) for row in found["host"]["steps"]] == [(2, 0), (2, 60)]
    assert all(row["decode_us"]["min"] > 0 for row in found["host"]["steps"])
    assert "turnover_us" in found["host"]["steps"][1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["suite=[decode]"], "checkpoint= is missing"),
        (["suite=[speed]"], "suite=['speed'] must list some of decode, startup"),
        (["suite=[]"], "must list some of"),
        (["suite=[decode]", *TINY], "is not read by suite=decode"),
        (["suite=[host]", "checkpoint=x", "rows=[1]"], "rows= is not read by suite=host; it is for decode"),
        (["suite=[throughput]", "checkpoint=x", "replay.speed=2"], "it is for replay, prefix"),
        (["suite=[replay]", "checkpoint=x"], "needs replay.trace=FILE"),
        (["suite=[replay]", "checkpoint=x", "replay.trace=gone"], "replay.trace=gone is no file"),
        (["suite=[throughput]", "checkpoint=x", "throughput.input=0"], "throughput.input must be at least 1"),
        (["suite=[throughput]", "checkpoint=x", "throughput.ratio=2"], "must be from 0 to 1"),
        (["suite=[throughput]", "checkpoint=x", "plan=p", "plan.max_rows=8"], "plan.max_rows cannot be"),
        (["suite=[throughput]", "checkpoint=dummy"], "add model="),
        (["suite=[host]", "scheduler.policy=best"], "there is no scheduler.policy='best'"),
        (["suite=[host]", "scheduler.max_wait=-1"], "scheduler.max_wait=-1 is out of range"),
        (
            ["suite=[prefix]", "checkpoint=x", "scheduler.policy=lpm"],
            "goes by the prefix cache, which is off",
        ),
        (["suite=[prefix]", "checkpoint=x", "scheduler.prefix_cache=true"], "both ways; leave it out"),
        (["suite=[host]", "host.waiting=[-1]"], "host.waiting must be at least 0"),
        (["suite=[gemm_few]", "gemm_few.tokens=[65]"], "gemm_few.tokens=[65] must be at most 64"),
        (["suite=[gemm_few]", "gemm_few.kinds=[fp4]"], "gemm_few.kinds=['fp4'] must list some of bf16"),
        (["suite=[constrained]", "checkpoint=x", "constrained.tokenizer=y"], "a checkpoint has its own"),
        (
            [
                "suite=[latency]",
                *TINY,
                "speculative=draft",
                "speculative.tree=[2]",
                "speculative.num_draft_tokens=3",
            ],
            "speculative.num_draft_tokens= is of chains",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options, reason, capsys):
    assert script("bench")(*options) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ")
    assert reason in printed
    assert not list(Path().iterdir())


WITHOUT_TORCH = """
import importlib, sys
sys.path.append({scripts!r})

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "transformers"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
for name in ("suites", "serve", "workloads", "host_cost", "record"):
    importlib.import_module("benchmarks." + name)
"""


def test_what_runs_a_plan_on_a_gpu_imports_without_torch():
    program = WITHOUT_TORCH.format(scripts=str(ROOT / "scripts"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
