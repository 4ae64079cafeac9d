"""Chat templates that are passed, bos that a prompt already has, and the model's own sampling values."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from reference import make_model
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from makeready.engine.async_llm import AsyncLLM
from makeready.engine.entrypoints.batch.worker import Worker
from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.generate import generate_job
from makeready.engine.entrypoints.generate_options import GenerateJob
from makeready.engine.errors import RequestError
from makeready.engine.front import Front
from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.text.parts import TextError

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
BOS, END = "<s>", "<|im_end|>"
OWN = "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + pad_token }}{% endfor %}"
OTHER = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
HELLO = [{"role": "user", "content": "hello there"}]
STATED = {"temperature": 0.25, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": False}


def add_tokenizer(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["hello there, hello world", "the quick brown fox"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[BOS, END, "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single=[BOS, "$A"], special_tokens=[(BOS, 0)])
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": END, "pad_token": "<pad>", "chat_template": OWN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    make_model(made, "llama", vocab_size=304)
    add_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def stating(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with sampling values of its own."""
    made = tmp_path_factory.mktemp("stating") / "model"
    shutil.copytree(folder, made)
    (made / "generation_config.json").write_text(json.dumps(STATED))
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, max_rows=2, max_tokens=64, max_logprob_tokens=64)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def run(llm: LLM, *rows: dict[str, Any], format: str = "rows", **options: Any) -> list[dict[str, Any]]:
    worker = Worker(llm, format, SamplingParams(max_new_tokens=1, temperature=0), **options)
    worker.put([(number, json.dumps(row).encode()) for number, row in enumerate(rows)])
    done: dict[int, Any] = {}
    while worker.busy:
        done |= {row.number: json.loads(row.answer) for row in worker.step()}
    return [done[number] for number in range(len(rows))]


def openai(**body: Any) -> dict[str, Any]:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"model": "m", "max_tokens": 1, "temperature": 0, **body}
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


def generate(*arguments: str | Path) -> int:
    return launch(SCRIPT, GenerateJob, generate_job, [str(argument) for argument in arguments])


def ids(theirs: Any, template: str | None = None) -> list[int]:
    text = theirs.apply_chat_template(
        HELLO, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return theirs.encode(text, add_special_tokens=False)


def test_a_template_is_passed_in_python(llm: LLM, folder: Path, theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.jinja"
    path.write_text(OTHER)
    assert llm.render(HELLO) == ids(theirs)  # which names pad_token
    for given in (OTHER, path, str(path)):
        assert llm.render(HELLO, chat_template=given) == ids(theirs, OTHER)
        (output,) = llm.chat(HELLO, SamplingParams(max_new_tokens=1), chat_template=given)
        assert output.prompt_tokens == len(ids(theirs, OTHER))
    assert LLM(folder, llm.plan, chat_template=path).render(HELLO) == ids(theirs, OTHER)
    with pytest.raises(TextError, match="chat_template='nothing' is no file"):
        LLM(folder, llm.plan, chat_template="nothing")
    with pytest.raises(TextError, match="broken at line 1"):
        LLM(folder, llm.plan, chat_template="{% for %}")
    make_model(tmp_path / "bare", "llama")
    with pytest.raises(RequestError, match="chat_template needs a tokenizer"):
        LLM(tmp_path / "bare", chat_template=OTHER)


def test_a_template_is_passed_in_rows(llm: LLM, theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.jinja"
    path.write_text(OTHER)
    own, text, file, missing = run(
        llm,
        {"messages": HELLO},
        {"messages": HELLO, "chat_template": OTHER},
        {"messages": HELLO, "chat_template": str(path)},
        {"messages": HELLO, "chat_template": "none.jinja"},
    )
    assert own["prompt_tokens"] == len(ids(theirs))
    assert text["prompt_tokens"] == file["prompt_tokens"] == len(ids(theirs, OTHER))
    assert "is no file" in missing["error"]["message"]
    (answer,) = run(llm, openai(messages=HELLO, chat_template=OTHER), format="openai")
    assert answer["response"]["body"]["usage"]["prompt_tokens"] == len(ids(theirs, OTHER))


def test_a_template_is_passed_on_the_command_line(
    folder: Path,
    theirs: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.jinja").write_text(OTHER)
    job = (f"checkpoint={folder}", "sampling=greedy", "sampling.max_new_tokens=2")
    assert generate(*job, "chat=hello there", "chat_template=other.jinja") == 0
    assert f"{len(ids(theirs, OTHER))} + 2 tokens" in capsys.readouterr().err
    assert generate(*job, "prompt=hello", "chat_template=other.jinja") == 2
    assert "chat_template= is for chat= and prompts=" in capsys.readouterr().err

    Path("in.jsonl").write_text(json.dumps({"messages": HELLO}) + "\n")
    files = ("prompts=in.jsonl", "output=out.jsonl", "chat_template=other.jinja")
    assert generate(*job, *files) == 0
    assert json.loads(Path("out.jsonl").read_text())["prompt_tokens"] == len(ids(theirs, OTHER))
    capsys.readouterr()
    Path("other.jinja").write_text(OTHER + "x")
    assert generate(*job, *files) == 1  # another template, another job
    assert "chat_template" in capsys.readouterr().err


def test_a_second_bos_is_told_and_can_be_left_out(
    folder: Path, llm: LLM, theirs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    again = LLM(folder, llm.plan)
    one = SamplingParams(max_new_tokens=1, temperature=0)
    with caplog.at_level(logging.WARNING, "makeready"):
        again.generate(["hello", "hello"], one)
        assert not caplog.records
        outputs = again.generate(["<s>hello", "<s>hello"], one)
        (record,) = caplog.records
    assert "begins with <s> and the tokenizer adds another; add_special_tokens=false" in record.message
    assert [output.prompt_tokens for output in outputs] == [len(theirs.encode("<s>hello"))] * 2
    (output,) = again.generate("<s>hello", one, add_special_tokens=False)
    assert output.prompt_tokens == len(theirs.encode("<s>hello", add_special_tokens=False))
    assert again.render(HELLO, add_special_tokens=True) == [0, *again.render(HELLO)]
    pieces = list(again.stream("<s>hello", one, add_special_tokens=False))
    assert "".join(pieces) == output.text


async def _counted(llm: LLM) -> int:
    async with AsyncLLM(llm) as engine:
        params = SamplingParams(max_new_tokens=1)
        async for piece in engine.generate("hello", params, add_special_tokens=False):
            if piece.output is not None:
                return piece.output.prompt_tokens
    return -1


def test_rows_leave_special_tokens_out(folder: Path, llm: LLM, theirs: Any) -> None:
    import asyncio

    count = len(theirs.encode("hello"))
    rows = [{"prompt": "hello"}, {"prompt": "hello", "add_special_tokens": False}]
    assert [answer["prompt_tokens"] for answer in run(llm, *rows)] == [count, count - 1]
    rows[0]["add_special_tokens"] = True
    made = run(llm, *rows, {"prompt": "hello"}, add_special_tokens=False)
    assert [answer["prompt_tokens"] for answer in made] == [count, count - 1, count - 1]
    (answer,) = run(
        llm, openai(prompt="hello", add_special_tokens=False, echo=True, logprobs=1), format="openai"
    )
    body = answer["response"]["body"]
    assert body["usage"]["prompt_tokens"] == count - 1
    assert body["choices"][0]["logprobs"]["text_offset"][0] == 0
    chat = run(llm, openai(messages=HELLO, add_special_tokens=True), openai(messages=HELLO), format="openai")
    used = [answer["response"]["body"]["usage"]["prompt_tokens"] for answer in chat]
    assert used == [len(ids(theirs)) + 1, len(ids(theirs))]
    assert asyncio.run(_counted(LLM(folder, llm.plan))) == count - 1


def test_the_models_sampling_values_stand_in_for_what_is_not_asked(
    stating: Path, llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "makeready"):
        stated = LLM(stating, llm.plan)
    (record,) = caplog.records
    assert "temperature=0.25, top_k=7, top_p=0.9, repetition_penalty=1.1" in record.message
    assert "generation_config=false" in record.message
    theirs = transformers.GenerationConfig.from_pretrained(stating)
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(stated.default_sampling, name) == getattr(theirs, name)
        (reply,) = stated.replies("hello", None)
        assert getattr(reply.sequence.sampling, name) == getattr(theirs, name)
    given = SamplingParams(max_new_tokens=3)
    assert stated.replies("hello", given)[0].sequence.sampling == given  # stands for itself
    caplog.clear()
    silent = LLM(stating, llm.plan, generation_config=False)
    assert silent.default_sampling == SamplingParams()
    assert not caplog.records

    seen: list[SamplingParams] = []
    replies = Front.replies

    def watched(self: Front, prompt: Any, sampling: Any, **more: Any) -> Any:
        made = replies(self, prompt, sampling, **more)
        seen.extend(reply.sequence.sampling for reply in made)
        return made

    monkeypatch.setattr(Front, "replies", watched)
    stated.generate(["hello"])
    stated.chat(HELLO)
    list(stated.stream("hello"))
    assert [(params.temperature, params.top_k) for params in seen] == [(0.25, 7)] * 3


def test_most_tokens_of_the_model_end_with_the_context(stating: Path, llm: LLM, tmp_path: Path) -> None:
    shutil.copytree(stating, tmp_path / "long")
    (tmp_path / "long" / "generation_config.json").write_text('{"max_new_tokens": 2048}')
    made = LLM(tmp_path / "long", llm.plan, report=lambda sentence: None)
    assert made.default_sampling.max_new_tokens == 2048
    (reply,) = made.replies([5, 6, 7], None)
    assert reply.sequence.sampling.max_new_tokens == llm.plan.limits.context_len - 3
    with pytest.raises(RequestError, match="2048"):  # asked for, it is refused as ever
        made.engine.submit(made.replies([5], SamplingParams(max_new_tokens=2048))[0].sequence)


def test_a_dict_of_fields_changes_the_models_values_by_these(stating: Path, llm: LLM, tmp_path: Path) -> None:
    stated = LLM(stating, llm.plan, report=lambda sentence: None)
    (reply,) = stated.replies("hello", {"temperature": 0.5, "top_p": None})
    asked = reply.sequence.sampling
    assert (asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty) == (0.5, 7, 0.9, 1.1)
    good, bad = stated.generate(["hello", "hello"], [{"max_new_tokens": 1}, {"top_q": 1}])
    assert good.completion_tokens == 1
    assert bad.error is not None
    assert "top_q" in bad.error
    with pytest.raises(RequestError, match="top_q"):
        stated.generate(["hello", "hello"], {"top_q": 1})
    shutil.copytree(stating, tmp_path / "long")
    (tmp_path / "long" / "generation_config.json").write_text('{"max_new_tokens": 2048}')
    made = LLM(tmp_path / "long", llm.plan, report=lambda sentence: None)
    (reply,) = made.replies([5, 6, 7], {"temperature": 0})
    assert reply.sequence.sampling.max_new_tokens == llm.plan.limits.context_len - 3
    (reply,) = made.replies([5, 6, 7], {"max_new_tokens": 2048})
    assert reply.sequence.sampling.max_new_tokens == 2048  # asked for: refused when it is queued


def test_leaving_out_special_tokens_is_true_or_false(llm: LLM) -> None:
    one = SamplingParams(max_new_tokens=1)
    told = "add_special_tokens='no' must be true or false"
    (output,) = llm.generate(["hello"], one, add_special_tokens="no")  # type: ignore[arg-type]
    assert output.error == told
    (output,) = llm.chat(HELLO, one, add_special_tokens="no")  # type: ignore[arg-type]
    assert output.error == told


def test_openai_rows_without_a_limit_end_where_the_model_says(
    stating: Path, llm: LLM, tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions after 16 tokens or the model's own most, chats after those or where the context ends."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(stating, model)
    unlimited = [openai(prompt="hello", max_tokens=None), openai(messages=HELLO, max_tokens=None)]
    rows = [*unlimited, openai(prompt="hello", max_tokens=30)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = (f"checkpoint={model}", "prompts=in.jsonl", "output=out.jsonl")
    job = (*job, "sampling=greedy", "sampling.ignore_eos=true")

    def counts(most: int, *more: str) -> list[int]:
        (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": most}))
        assert generate(*job, "overwrite=true", *more) == 0
        made = map(json.loads, Path("out.jsonl").read_text().splitlines())
        return [answer["response"]["body"]["usage"]["completion_tokens"] for answer in made]

    assert counts(4) == [4, 4, 30]
    assert counts(4, "sampling.max_new_tokens=7") == [7, 7, 30]
    context = llm.plan.limits.context_len
    assert counts(2048) == [16, context - len(ids(theirs)), 30]
    assert counts(24) == [16, 24, 30]
    assert generate(*job) == 0  # complete
    assert generate(*job, "sampling.max_new_tokens=24") == 1  # would be 24 tokens of both


@pytest.mark.parametrize("value", ['{"top_p": 0}', '{"temperature": "hot"}', '{"top_k": true}'])
def test_values_that_cannot_be_are_told_with_the_way_out(
    stating: Path, llm: LLM, tmp_path: Path, value: str
) -> None:
    shutil.copytree(stating, tmp_path / "broken")
    (tmp_path / "broken" / "generation_config.json").write_text(value)
    with pytest.raises(RequestError, match=r"^generation_config\.json: .*generation_config=false$"):
        LLM(tmp_path / "broken", llm.plan)
    LLM(tmp_path / "broken", llm.plan, generation_config=False)


def test_the_command_line_says_which_values_hold(
    stating: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[SamplingParams] = []
    check = SamplingParams.check

    def watched(self: SamplingParams, *arguments: Any) -> None:
        seen.append(self)
        check(self, *arguments)

    monkeypatch.setattr(SamplingParams, "check", watched)
    Path("in.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "hello", "top_k": 3, "temperature": 0.5}\n')
    job = (f"checkpoint={stating}", "sampling.max_new_tokens=2", "prompts=in.jsonl", "output=out.jsonl")
    for options, expected in (
        ((), [(0.25, 7), (0.5, 3)]),
        (("sampling.temperature=0.75",), [(0.75, 7), (0.5, 3)]),
        (("sampling=greedy",), [(0.0, 7), (0.5, 3)]),
        (("generation_config=false",), [(1.0, -1), (0.5, 3)]),
    ):
        seen.clear()
        assert generate(*job, *options, "overwrite=true") == 0
        told = capsys.readouterr().err
        assert ("generation_config.json are used" in told) == ("generation_config=false" not in options)
        assert [(params.temperature, params.top_k) for params in seen] == expected
    (stating / "generation_config.json").write_text(json.dumps({**STATED, "top_k": 9}))
    try:
        assert generate(*job) == 1
        assert "sampling.temperature is 1.0 there and 0.25 here" in capsys.readouterr().err
    finally:
        (stating / "generation_config.json").write_text(json.dumps(STATED))
