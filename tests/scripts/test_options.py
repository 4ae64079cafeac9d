"""What can be said on a command line, what is refused, and what --help tells."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scripts_in_process import ROOT, SCRIPTS, TINY, script

from makeready.engine.entrypoints.batch.worker import FORMATS as READABLE
from makeready.engine.entrypoints.cli import arranged, launch, restored
from makeready.engine.entrypoints.describe import describe
from makeready.engine.entrypoints.generate_options import FORMATS, GenerateJob
from makeready.engine.generation_config import FIELDS as STATED
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.graphs.planner.compile import Request

TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.text("\\${}'\"a,=:[] \n", max_size=12)


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Full name of every option in composed YAML."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        yield from keys(value, name + ".") if isinstance(value, dict) and value else [name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_tells_every_option_and_config_prints_it(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        script(name)("--help")
    text = capsys.readouterr().out
    table = text.partition("\nOptions (")[2]
    assert script(name)("--cfg", "job") == 0
    options = list(keys(yaml.safe_load(capsys.readouterr().out)))
    assert options
    for option in options:
        meaning = table.partition(f"\n  {option}=")[2].partition("\n")[2]
        assert meaning.startswith("      "), f"--help says nothing about {option}"
    assert f"python scripts/{name}.py" in text
    assert not list(Path().iterdir()), "reading options leaves files behind"


@pytest.mark.parametrize("option", ["plan.candidates=4"])
def test_what_only_gpus_have_is_refused_on_the_cpu(option, capsys):
    assert script("compile")("checkpoint=dummy", "model=qwen3_0_6b", option, "output=x") == 2
    said = capsys.readouterr().err
    assert f"{option.partition('=')[0]}" in said
    assert "is for GPU targets; target=cpu" in said


@hypothesis.given(TEXT)
@hypothesis.example("???")  # OmegaConf's word for a missing value, which nothing escapes
@hypothesis.settings(max_examples=300)
def test_text_and_paths_are_taken_as_they_stand(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = arranged([f"prompt={text}"], frozenset({"prompt"}), frozenset(), None)
    config = OmegaConf.create({"prompt": None})
    config.prompt = OverridesParser.create().parse_override(argument).value()
    assert not OmegaConf.is_missing(config, "prompt")
    made: Any = OmegaConf.to_object(config)
    assert restored([made["prompt"]]) == [text]


def job(*arguments: str) -> GenerateJob:
    """The job that a command line comes to."""
    jobs: list[GenerateJob] = []
    assert (
        launch(ROOT / "scripts" / "generate.py", GenerateJob, jobs.append, ["checkpoint=x", *arguments]) == 0
    )
    return jobs[0]


@pytest.mark.parametrize(
    ("value", "stops"),
    [
        ("</s>", ("</s>",)),
        ("###", ("###",)),
        ("<|im_end|>", ("<|im_end|>",)),
        ("a, b", ("a, b",)),
        (" ", (" ",)),
        ("[]", ()),
        ("null", ()),
        (r"\n", ("\n",)),
        (r"\n\n", ("\n\n",)),
        (r"\nabla", (r"\nabla",)),
        (r'"\n"', ("\n",)),
        (r"'\n'", ("\n",)),
        (r'["\n"]', ("\n",)),
        (r"['\n', '###']", ("\n", "###")),
        (r'["\u4e2d\ud83c\udf89", "a\"b", "[INST]"]', ("中🎉", 'a"b', "[INST]")),
        (r"['it\'s, \\n', \t]", (r"it's, \n", "\t")),
        ("[</s>,###]", ("</s>", "###")),
        ("[</s>, <|im_end|>]", ("</s>", "<|im_end|>")),
        ('["${x}", "$", "{a: b}"]', ("${x}", "$", "{a: b}")),
        ("???", ("???",)),
        ("true", ("true",)),
        ("5", ("5",)),
    ],
)
def test_stop_strings_as_people_type_them(value, stops):
    assert job("prompt=a", f"sampling.stop={value}").params().stop == stops
    assert job("prompt=a", f"++sampling.stop={value}").params().stop == stops


@pytest.mark.parametrize(
    ("value", "patterns"),
    [
        (r"\d+\.", (r"\d+\.",)),
        (r'["\d+", "[.?!]\n"]', (r"\d+", r"[.?!]\n")),
        (r"['a\'b', \n]", ("a'b", r"\n")),
        (r"a{2,3}|b", ("a{2,3}|b",)),
    ],
)
def test_stop_patterns_keep_their_backslashes(value, patterns):
    assert job("prompt=a", f"sampling.stop_regex={value}").params().stop_regex == patterns


def test_question_marks_are_text():
    assert job("prompt=???").prompt == "???"
    assert job("chat=???").chat == "???"


@pytest.mark.parametrize(
    ("argument", "seen"),
    [
        ("plan=plans/x", "plan.path='plans/x'"),
        ("plan=/a b/x=1,y", "plan.path='/a b/x=1,y'"),
        ("plan=default", "plan=default"),
        ("plan=./default", "plan.path='./default'"),
        ("plan.max_rows=8", "plan.max_rows=8"),
        ("prompt=What's {up}, ${x}?", r"prompt='What\'s {up}, \${x}?'"),
        ("prompt=null", "prompt='null'"),
        ("free.x=1", "++free.x=1"),
        ("free={x: 1}", "++free={x: 1}"),
        ("freedom=1", "freedom=1"),
        ("--cfg", "--cfg"),
        ("--config-dir=a", "--config-dir=a"),
    ],
)
def test_command_lines_are_arranged_for_hydra(argument, seen):
    verbatim, free = frozenset({"plan.path", "prompt"}), frozenset({"free"})
    assert arranged([argument], verbatim, free, {"default"}) == [seen]
    if argument.startswith("plan="):
        assert arranged([argument], verbatim, free, None) == [argument]


def test_sweeps_keep_their_commas():
    arguments = ["-m", "prompt=a,b", "plan=default"]
    assert arranged(arguments, frozenset({"prompt"}), frozenset(), {"default"}) == arguments


def test_what_drafts_is_named_as_the_model_is(capsys):
    asked = ("speculative=draft", "speculative.checkpoint=dummy", "speculative.model=qwen3_0_6b")
    assert script("compile")("--cfg", "job", *asked) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"] is None
    assert config["speculative"]["method"] == "draft"
    assert config["speculative"]["model"]["hidden_size"] == 1024


@pytest.mark.parametrize(("said", "nodes"), [("[2,1]", [2, 1]), ("[[0],[0,0]]", [[0], [0, 0]])])
def test_trees_of_drafts_are_lists(capsys, said, nodes):
    assert script("compile")("--cfg", "job", "speculative=eagle3", f"speculative.tree={said}") == 0
    assert yaml.safe_load(capsys.readouterr().out)["speculative"]["tree"] == nodes


def test_defaults_are_those_of_the_python_interface(capsys):
    """conf/ states every default once more, where users look; the two may not drift apart."""
    assert script("generate")("--cfg", "job") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    params = dataclasses.asdict(SamplingParams())
    # Those that the model may state are null; what they are without it stands in the help.
    told = ", ".join(str(params[name]) for name in STATED)
    assert told in describe(GenerateJob)["generation_config"]
    params |= dict.fromkeys(STATED)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config["sampling"].items()} == params
    assert config["scheduler"] == dataclasses.asdict(SchedulerOptions())
    request = dataclasses.asdict(Request())
    del config["plan"]["path"]
    assert config["speculative"].pop("checkpoint") is config["speculative"].pop("model") is None
    stated = config["plan"] | {
        "target": config["target"],
        "device": config["device"],
        "quant": config["quant"],
    }
    stated |= {f"kv_{name}": config["kv"][name] for name in ("dtype", "state_dtype", "state_snapshots")}
    stated |= {"speculative": config["speculative"] | {"tree": tuple(config["speculative"]["tree"])}}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()} == request


def test_every_format_of_rows_can_be_named():
    assert set(FORMATS) == {"auto", *READABLE}


ROWS = ("checkpoint=x", "prompts=rows", "output=o")
ONE = ("checkpoint=x", "prompt=a")
MEANT = {
    "seed": "sampling.sampling_seed",
    "+seed": "sampling.sampling_seed",
    "max_tokens": "sampling.max_new_tokens",
    "sampling.max_tokens": "sampling.max_new_tokens",
    "sampling.seed": "sampling.sampling_seed",
    "temperatur": "sampling.temperature",
    "top_logprobs": "sampling.top_logprobs_num",
    "max_model_len": "plan.context_len",
    "model_path": "checkpoint",
    "kv_cache_dtype": "kv.dtype",
}
REFUSED = [
    *(("generate", [*ONE, f"{name}=1"], 2, f"did you mean {option};") for name, option in MEANT.items()),
    ("generate", [*ONE, "+nonsense=1"], 2, "there is no option nonsense"),
    ("generate", [*ONE, "sampling.stop=[a"], 2, "sampling.stop=[a begins a list that does not end"),
    ("generate", [*ONE, "sampling.stop=['a, b]"], 2, "has a quote that does not end"),
    ("generate", [*ONE, "sampling.stop="], 2, "sampling.stop has ''"),
    ("generate", [*ONE, "sampling.ignore_eos=1"], 2, "sampling.ignore_eos=1 must be true or false"),
    ("generate", [*ONE, "sampling.ignore_eos=no"], 2, "sampling.ignore_eos=no must be true or false"),
    ("generate", [*ONE, "sampling.ignore_eos=2"], 2, "sampling.ignore_eos=2 must be true or false"),
    ("generate", [*ONE, "scheduler.overlap=0"], 2, "scheduler.overlap=0 must be true or false"),
    ("generate", [*ROWS, "overwrite=7"], 2, "overwrite=7 must be true or false"),
    ("generate", [*ONE, "sampling.top_k=true"], 2, "sampling.top_k=true: "),
    ("generate", [*ONE, "sampling.stop_token_ids=[true]"], 2, "True, which is no token id"),
    ("generate", [], 2, "checkpoint= is missing"),
    ("generate", ["checkpoint=x"], 2, "give one of prompt=TEXT, chat=TEXT and prompts=FILE"),
    ("generate", ["checkpoint=x", "prompt=a", "chat=b"], 2, "prompt= and chat= were given together"),
    ("generate", ["checkpoint=x", "prompt=a", "prompts=b"], 2, "prompt= and prompts= were given together"),
    ("generate", ["checkpoint=x", "prompt=a", "output=b"], 2, "output= is for the answers to prompts="),
    ("generate", ["checkpoint=x", "prompts=rows"], 2, "prompts= needs output="),
    ("generate", ["checkpoint=x", "prompts=gone", "output=b"], 2, "prompts=gone is no file"),
    ("generate", ["checkpoint=x", "prompts=rows", "output=rows"], 2, "is the file of prompts"),
    ("generate", ["checkpoint=x", "prompts=rows", "output=taken"], 1, "add overwrite=true"),
    ("generate", ["checkpoint=x", "prompts=rows", "output=/dev/null"], 2, "is a device or a pipe"),
    ("generate", ["checkpoint=x", "prompts=rows", "output=o", "format=csv"], 2, "auto, rows, openai"),
    ("generate", ["checkpoint=x", "prompts=empty", "output=o"], 1, "prompts=empty has no rows"),
    ("generate", ["checkpoint=x", "prompt=a", "format=openai"], 2, "format= is for the answers to prompts="),
    ("generate", ["checkpoint=x", "prompt=a", "scale=ray"], 2, "scale=ray is for the rows of prompts="),
    ("generate", ["checkpoint=x", "prompt=a", "scale=slurm"], 2, "choose one of local, ray"),
    ("generate", ["checkpoint=x", "prompt=a", "scale.engines=2"], 2, "scale.engines is for scale=ray"),
    (
        "generate",
        ["checkpoint=x", "prompts=rows", "output=o", "scale=ray", "scale.engines=0"],
        2,
        "scale.engines=0 must be at least 1",
    ),
    ("generate", ["checkpoint=x", "prompts=rows", "output=no/where"], 2, "there is no folder no"),
    ("generate", ["checkpoint=x", "prompt="], 2, "prompt= is empty"),
    ("generate", ["checkpoint=x", "prompt=a", "temperature=0"], 2, "did you mean sampling.temperature"),
    ("generate", ["checkpoint=x", "prompt=a", "plan.max_row=1"], 2, "did you mean plan.max_rows"),
    ("generate", ["checkpoint=x", "prompt=a", "sampling.temperature=hot"], 2, "sampling.temperature=hot: "),
    ("generate", ["checkpoint=x", "prompt=a", "sampling.top_k=1.5"], 2, "sampling.top_k=1.5: "),
    (
        "generate",
        ["checkpoint=x", "prompt=a", "sampling.max_new_tokens=0"],
        2,
        "sampling.max_new_tokens=0 asks",
    ),
    ("generate", ["checkpoint=x", "prompt=a", "sampling.top_p=-1"], 2, "sampling.top_p=-1.0 is out of range"),
    ("generate", ["checkpoint=x", "prompt=a", "sampling.n=2"], 2, "give prompts= and output="),
    ("generate", ["checkpoint=x", "prompt=a", "sampling=bold"], 2, "choose one of default, greedy"),
    ("generate", ["checkpoint=x", "prompt=a", "plan=p", "plan.max_rows=8"], 2, "plan.max_rows cannot be"),
    ("generate", ["checkpoint=x", "prompt=a", "plan=p", "target=cpu"], 2, "target cannot be chosen"),
    ("generate", ["checkpoint=x", "prompt=a", "plan=p", "kv.dtype=float32"], 2, "kv.dtype cannot be"),
    ("generate", ["checkpoint=x", "prompt=a", "plan=p", "plan.traffic.context=9"], 2, "plan.traffic.context"),
    ("generate", ["checkpoint=x", "prompt=a", "target=sm_1"], 2, "targets are cpu"),
    ("generate", ["checkpoint=x", "prompt=a", "kv.memory_gib=-1"], 2, "kv.memory_gib=-1.0 must be above 0"),
    ("generate", ["checkpoint=x", "prompt=a", "model=qwen3_8b"], 2, "drop one of them"),
    ("generate", ["checkpoint=x", "prompt=a"], 1, "x does not exist"),
    ("generate", ["checkpoint=x", "prompt=a", "stop"], 2, "'stop' cannot be read as OPTION=VALUE"),
    (
        "generate",
        ["checkpoint=x", "prompt=a", "sampling.stop_token_ids=[1"],
        2,
        "cannot be read as OPTION=VALUE",
    ),
    ("generate", ["checkpoint=x", "prompt=a", "sampling.top_k=1,2"], 2, "--multirun"),
    ("generate", ["checkpoint=x", "prompt=a", "chat_template_kwargs.x=1"], 2, "is for chat= and prompts="),
    ("generate", ["checkpoint=x", "chat=a", "tool_call_parser=qwen"], 2, "is for the answers to prompts="),
    ("generate", [*ROWS, "tool_call_parser=hermes"], 2, "it is one of auto, none, deepseekv3"),
    ("generate", [*ROWS, "tool_call_parser=qwen", "reasoning_parser=gpt-oss"], 2, "leave one of them out"),
    ("generate", ["checkpoint=x", "prompt=a", "scheduler.policy=sjf"], 2, "take one of auto, offline, fcfs"),
    ("generate", ["checkpoint=x", "prompt=a", "scheduler.policies=lpm"], 2, "did you mean scheduler.policy"),
    (
        "generate",
        ["checkpoint=x", "prompt=a", "scheduler.decode_interval=-1"],
        2,
        "scheduler.decode_interval=-1",
    ),
    ("generate", [*ROWS, "scheduler.max_queued_requests=9"], 2, "rows of a file wait for their turn"),
    (
        "generate",
        [*ROWS, "metrics=no/m.prom"],
        2,
        "metrics=no/m.prom cannot be written: there is no folder no",
    ),
    ("generate", [*ROWS, "metrics=."], 2, "metrics=. is a folder"),
    ("generate", [*ROWS, "trace=/dev/null"], 2, "trace=/dev/null is a device or a pipe"),
    ("generate", [*ROWS, "trace=./o"], 2, "trace=o is the file of output= too"),
    ("generate", [*ROWS, "metrics=rows"], 2, "metrics=rows is the file of prompts= too"),
    ("generate", [*ROWS, "metrics=x"], 2, "metrics=x is the file of checkpoint= too"),
    ("generate", [*ROWS, "metrics=m", "trace=m"], 2, "trace=m is the file of metrics= too"),
    ("generate", [*ROWS, "metrics=m", "trace=m.tmp"], 2, "trace=m.tmp is a file that metrics= writes too"),
    ("generate", [*ROWS, "trace=o.partial"], 2, "trace=o.partial is a file that output= writes too"),
    ("generate", [*ROWS, "output=x"], 2, "output=x is the file of checkpoint= too"),
    ("generate", [*ROWS, "metrics=m", "scale=ray"], 2, "metrics= tells of the engine in this process"),
    ("compile", ["checkpoint=dummy"], 2, "add model="),
    (
        "compile",
        ["checkpoint=dummy", "model=gpt5"],
        2,
        "choose one of deepseek_moe_16b, deepseek_v2, deepseek_v2_lite, deepseek_v3, gemma3_270m",
    ),
    ("compile", [*TINY, "plan=plans/x"], 2, "plan=plans/x is no choice"),
    ("compile", [*TINY, "plan.path=x"], 2, "there is no option plan.path"),
    ("compile", [*TINY, "plan.max_rows=-3"], 1, "plan.max_rows=-3"),
    ("compile", [*TINY, "plan.max_rows=null"], 2, "plan.max_rows=null"),
    ("compile", [*TINY, "plan.context_len=65"], 1, "plan.context_len=65"),
    ("compile", [*TINY, "plan.weight_dtype=int3"], 1, "plan.weight_dtype=int3"),
    ("compile", [*TINY, "quant=int3"], 1, "quant=int3 is not supported; choose one of fp8"),
    ("compile", [*TINY, "plan.disabled_passes=[fuse]"], 2, "there is no pass fuse"),
    ("compile", [*TINY, "model.num_key_value_heads=3"], 1, "num_key_value_heads"),
    ("inspect_plan", [], 2, "plan= is missing"),
    ("inspect_plan", ["plan=."], 1, "holds no plan"),
    ("inspect_plan", ["plan=x", "context=0"], 2, "context=0 must be at least 1"),
    ("inspect_plan", ["plan=x", "page=1"], 2, "there is no option page"),
]


@pytest.mark.parametrize(("name", "arguments", "code", "reason"), REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name, arguments, code, reason, capsys):
    Path("rows").write_text('{"prompt": "a"}\n')
    Path("taken").write_text("old\n")
    Path("empty").write_text("\n")
    assert script(name)(*arguments) == code
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
    assert "Traceback" not in printed.err
    assert not printed.out
    assert Path("taken").read_text() == "old\n"
    assert {path.name for path in Path().iterdir()} == {"rows", "taken", "empty"}


@pytest.mark.parametrize("end", ["partial", "tmp", "job.json", "job.json.tmp"])
def test_prompts_are_no_file_that_a_job_writes_beside_its_output(end, capsys):
    prompts = Path(f"out.{end}")
    prompts.write_text('{"token_ids": [1]}\n')
    assert script("generate")(*TINY, f"prompts={prompts}", "output=out") == 2
    assert f"output=out also writes {prompts}, the file of prompts=" in capsys.readouterr().err
    assert prompts.read_text() == '{"token_ids": [1]}\n'


def test_a_plan_that_can_be_kept_nowhere_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path / "file"))
    assert script("compile")(*TINY) == 1
    said = capsys.readouterr().err
    assert (
        f"{tmp_path / 'file'} cannot be written; name a folder with output=, or set MAKEREADY_CACHE" in said
    )
    assert script("compile")(*TINY, "output=plan") == 0
    assert Path("plan/plan.json").is_file()
    assert script("generate")(*TINY, "prompts=in.jsonl", "output=out.jsonl") == 2  # no such file
    Path("in.jsonl").write_text('{"token_ids": [1], "max_new_tokens": 1}\n')
    assert script("generate")(*TINY, "prompts=in.jsonl", "output=out.jsonl") == 0
    assert "set MAKEREADY_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["0", "1.5", "true", "null", "", "-1", "1e400"])
def test_a_choice_that_reads_as_another_type_is_named(choice, capsys):
    assert script("generate")("checkpoint=dummy", f"model={choice}", "prompt=a") == 2
    assert f"error: model={choice} is no choice; choose one of" in capsys.readouterr().err


def test_a_plan_may_lie_in_a_folder_whose_name_is_a_number(capsys):
    assert script("generate")(*TINY, "plan=3", "prompt=a") == 1
    assert "error: 3 holds no plan" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["max_decode_buckets", "max_extend_buckets"])
def test_any_number_of_buckets_may_be_allowed(name, capsys):
    """There are no more than sizes worth one: for 8 rows a decode bucket for each."""
    assert script("compile")(*TINY, "plan.max_rows=8", "plan.max_tokens=16", f"plan.{name}=2147483648") == 0
    said = capsys.readouterr().out
    assert "decode     8 buckets: 1 2 3 4 5 6 7 8\n" in said
    if name == "max_extend_buckets":
        assert "16 buckets" in said or "extend" in said


@pytest.mark.parametrize("command", [*SCRIPTS, "tune", "bisect_plan", "main compile"])
def test_ctrl_c_during_imports_is_quiet(command, tmp_path):
    """The first heavy import is replaced by one that never ends, and says that it has begun."""
    import signal
    import subprocess
    import sys

    (tmp_path / "hydra.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    root = Path(__file__).parents[2]
    name, *rest = command.split()
    process = subprocess.Popen(
        [sys.executable, str(root / "scripts" / f"{name}.py"), *rest, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert said == ""
    assert process.returncode == -signal.SIGINT
