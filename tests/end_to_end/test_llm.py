"""The Python interface on SmolLM2: text, streams, stops, samples, log-probabilities, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import make_model
from smollm2 import smollm2

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.text import stop as stop_module
from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.tokenizer import Tokenizer
from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.plan import PlanError

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(smollm2(), max_rows=4, max_tokens=64, context_len=256, weight_dtype="float16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder, "llama", eos_token_id=3)
    return folder


def test_a_prompt_is_answered(llm: LLM) -> None:
    (output,) = llm.generate(["The capital of France is"], GREEDY)
    assert output.text.startswith(" Paris.")
    assert output.finish_reason == "length"
    assert (output.prompt_tokens, output.completion_tokens) == (5, 12)
    assert output.logprobs is None
    assert output.meta_info["finish_reason"] == {"type": "length", "length": 12}


def test_a_chat_ends_with_the_end_token(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2? Answer with one number."}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_new_tokens=60))
    assert output.finish_reason == "stop"
    assert output.token_ids[-1] == output.meta_info["finish_reason"]["matched"] in llm.end_ids
    assert "<|im_end|>" not in output.text


def test_a_stream_yields_the_text_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream("Once upon a time", GREEDY))
    assert len(pieces) > 5
    assert "".join(pieces) == llm.generate(["Once upon a time"], GREEDY)[0].text


def test_leaving_a_stream_frees_its_pages(llm: LLM) -> None:
    for _ in llm.stream("Once upon a time", GREEDY):
        break
    assert llm.engine.pool.held == 0
    assert not llm.engine.busy


def test_a_stop_pattern_that_takes_long_ends_its_own_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "REGEX_SECONDS", 1e-9)
    monkeypatch.setattr(stop_module, "REGEX_SECONDS_A_CHARACTER", 0.0)
    slow = SamplingParams(temperature=0, max_new_tokens=40, stop_regex="[%#]")
    plain = SamplingParams(temperature=0, max_new_tokens=40)
    failed, other = llm.generate(["Once upon a time"] * 2, [slow, plain])
    assert (failed.finish_reason, other.finish_reason) == ("error", "length")
    assert "takes too long" in (failed.error or "")
    with pytest.raises(RequestError, match="takes too long"):
        list(llm.stream("Once upon a time", slow))
    assert llm.engine.pool.held == 0


class Panic(BaseException):
    """What a library in Rust raises: no Exception."""


Panic.__name__ = "PanicException"


@pytest.mark.parametrize("error", [TypeError("odd"), MemoryError(), RecursionError("deep"), Panic("rust")])
@pytest.mark.parametrize("place", ["decode", "push", "flush"])
def test_whatever_a_requests_text_raises_ends_that_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
) -> None:
    """``decode`` makes the text of who has no stops, ``push`` and ``flush`` that of who has."""
    stop = () if place == "decode" else "zzz"
    bad = SamplingParams(temperature=0, max_new_tokens=6, stop=stop, n=2, skip_special_tokens=False)
    (expected,) = llm.generate(["The capital of France is"], GREEDY)

    kind = Tokenizer if place == "decode" else StreamDetokenizer
    original = getattr(kind, place)

    def fail(self: Any, *arguments: Any, **named: Any) -> str:
        if named.get("skip_special_tokens", getattr(self, "_skip_special_tokens", False)):
            return original(self, *arguments, **named)  # the other request's
        raise error

    monkeypatch.setattr(kind, place, fail)
    outputs = llm.generate(["The capital of France is"] * 2, [bad, GREEDY])
    assert [output.finish_reason for output in outputs] == ["error", "error", "length"]
    for output in outputs[:2]:
        assert f"{type(error).__name__}: {error}" in (output.error or "")
        assert output.text == "" or place == "flush"
    assert outputs[2].text == expected.text
    assert llm.engine.pool.held == 0
    assert not llm.engine.busy


def test_an_interruption_is_no_requests_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamDetokenizer, "push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Once upon a time"], SamplingParams(stop="zzz"))


def test_stop_strings_end_the_text(llm: LLM) -> None:
    full = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_new_tokens=30))[
        0
    ].text
    stop = full[9:14]
    cut = SamplingParams(temperature=0, max_new_tokens=30, stop=[stop, "never"])
    (output,) = llm.generate(["The capital of France is"], cut)
    assert output.text == full[: full.index(stop)]
    assert output.meta_info["finish_reason"] == {"type": "stop", "matched": stop}
    kept = SamplingParams(temperature=0, max_new_tokens=30, stop=stop, no_stop_trim=True)
    (output,) = llm.generate(["The capital of France is"], kept)
    assert output.text == full[: full.index(stop) + len(stop)]


def test_stop_ids_and_min_new_tokens(llm: LLM) -> None:
    tokens = llm.generate(["The capital of France is"], GREEDY)[0].token_ids
    stopped = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=[tokens[2]])
    (output,) = llm.generate(["The capital of France is"], stopped)
    assert output.token_ids == tokens[: tokens.index(tokens[2]) + 1]
    held = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=[tokens[2]], min_new_tokens=8)
    (output,) = llm.generate(["The capital of France is"], held)
    assert tokens[2] not in output.token_ids[:8]
    assert output.completion_tokens >= 8


def test_samples_depend_on_seed_and_position_alone(llm: LLM) -> None:
    """Alone, among others, or in another order: a seeded request draws the same tokens."""
    seeded = [
        SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=10, sampling_seed=s) for s in range(6)
    ]
    prompts = [f"Story {i}:" for i in range(6)]
    together = llm.generate(prompts, seeded)
    for i in (5, 0, 3):
        (alone,) = llm.generate([prompts[i]], seeded[i])
        assert alone.token_ids == together[i].token_ids
        assert alone.meta_info["seed"] == i
    assert len({output.token_ids for output in together}) > 1


def test_n_samples_come_next_to_each_other(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_new_tokens=8, n=3, sampling_seed=1)
    outputs = llm.generate(["Tell me", "Sing"], params)
    assert [o.prompt_tokens for o in outputs] == [2, 2, 2, *[outputs[3].prompt_tokens] * 3]
    assert len({o.token_ids for o in outputs[:3]}) == 3


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    """Those of the distribution before temperature and bias, by a forward of another program's logits."""
    params = SamplingParams(
        temperature=0.7,
        max_new_tokens=6,
        sampling_seed=3,
        return_logprob=True,
        top_logprobs_num=5,
        logit_bias={100: 5.0},
    )
    (output,) = llm.generate(["The capital of France is"], params)
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("The capital of France is")
    for at, entry in enumerate(output.logprobs):
        # The same distribution, from the whole context as a new prompt and no sampling options.
        again = SamplingParams(temperature=0, max_new_tokens=1, return_logprob=True, top_logprobs_num=20)
        (other,) = llm.generate(token_ids=[prompt + list(output.token_ids[:at])], sampling=again)
        assert other.logprobs is not None
        top = dict(other.logprobs[0].top)
        assert [i for i, _ in entry.top] == [i for i, _ in other.logprobs[0].top[:5]]
        assert np.allclose([v for _, v in entry.top], list(top.values())[:5], atol=2e-3)
        if entry.token_id in top:
            assert entry.logprob == pytest.approx(top[entry.token_id], abs=2e-3)


def test_bad_requests_leave_the_others_alone(llm: LLM) -> None:
    outputs = llm.generate(
        token_ids=[[1, 2, 3], [], [999_999], [1] * 250, [4, 5]], sampling=SamplingParams(max_new_tokens=8)
    )
    assert [o.finish_reason == "error" for o in outputs] == [False, True, True, True, False]
    assert outputs[1].error == "the prompt is empty; give at least one token"
    assert outputs[2].error == "token id 999999 of the prompt is not from 0 to 49151"
    assert "250 prompt tokens and max_new_tokens=8 exceed the context of 256 tokens" in (
        outputs[3].error or ""
    )
    assert outputs[4].completion_tokens > 0


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(tiny: Path) -> None:
    llm = LLM(tiny)
    assert llm.tokenizer is None
    (output,) = llm.generate(
        token_ids=[[1, 2, 3]], sampling=SamplingParams(max_new_tokens=4, ignore_eos=True)
    )
    assert output.text == ""
    assert output.completion_tokens == 4
    assert llm.end_ids == (3,)
    (output,) = llm.generate(["text"])
    assert "has none; give prompts as token_ids" in (output.error or "")
    (output,) = llm.generate(token_ids=[[1]], sampling=SamplingParams(stop="x"))
    assert "use stop_token_ids" in (output.error or "")


def test_a_plan_and_plan_options_contradict_each_other(tiny: Path, tmp_path: Path) -> None:
    llm = LLM(tiny)
    llm.plan.save(tmp_path / "plan")
    again = LLM(tiny, plan=tmp_path / "plan")
    assert again.plan == llm.plan
    with pytest.raises(RequestError, match="max_rows cannot be chosen for a plan that is already compiled"):
        LLM(tiny, plan=tmp_path / "plan", max_rows=4)
    with pytest.raises(RequestError, match="no such plan option"):
        LLM(tiny, max_row=4)


def test_a_plan_of_another_checkpoint_is_refused(tiny: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "other", "llama", intermediate_size=80, eos_token_id=3)
    plan = LLM(tmp_path / "other").plan
    with pytest.raises(PlanError, match="intermediate_size=80"):
        LLM(tiny, plan=plan)


def test_what_cannot_be_loaded_says_why(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        LLM(tmp_path / "nothing")
    (tmp_path / "mamba").mkdir()
    config = '{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}'
    (tmp_path / "mamba" / "config.json").write_text(config)
    with pytest.raises((UnsupportedModelError, CheckpointError)):
        LLM(tmp_path / "mamba")
    with pytest.raises(PlanError, match=r"plan.context_len=512 is beyond the 256 tokens"):
        LLM(tiny, context_len=512)
    with pytest.raises(PlanError, match=r"plan.max_rows=-1 must be a whole number of at least 1"):
        LLM(tiny, max_rows=-1)
    with pytest.raises(PlanError, match=r"kv\.memory_gib"):
        LLM(tiny, kv_memory_gib=1e-9)
    with pytest.raises(PlanError, match="holds no plan"):
        LLM(tiny, plan=tmp_path)
