"""Speculative decoding: whatever is guessed, requests get the tokens that they get without, one by one.

Requests run alone under an ordinary plan, then together under plans that guess, with few pages, cut prompts and
cached prefixes. A deterministic plan gives the same log-probabilities to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from small_configs import LATENT, QWEN3, WINDOWED
from speculative_requests import CONTEXT, LIMITS, assert_alike, requests, together

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import VERIFY, CacheGroup, CacheSpec, Limits
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.request import Request
from makeready.graphs.steps.base import declare


@pytest.fixture(scope="module", autouse=True)
def large_weights() -> Iterator[None]:
    """Weights of the usual size leave the logits so small that all tokens are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield


def load(config: dict[str, Any], drafts: int = 0, **options: Any) -> LLM:
    checkpoint = DummyCheckpoint(dict(config))
    if drafts:
        options |= {"speculative": {"method": "ngram", "num_draft_tokens": drafts}}
    return LLM(checkpoint, compile_plan(checkpoint, **LIMITS, **options))


@pytest.fixture(scope="module")
def alone(large_weights: None) -> dict[str, list[Output]]:
    """What requests get one by one and without drafts, by model."""
    made = {}
    for name, config, options in (("qwen3", QWEN3, {}), ("exact", QWEN3, {"deterministic": True})):
        llm = load(config, **options)
        made[name] = [llm.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]
    return made


@pytest.mark.parametrize(("page_size", "drafts"), [(1, 3), (7, 1), (7, 8), (64, 3)])
def test_tokens_are_those_without_drafts(alone: dict[str, list[Output]], page_size: int, drafts: int) -> None:
    llm = load(QWEN3, drafts, page_size=page_size)
    tight = {"new_token_ratio": 0.0, "min_new_token_ratio": 0.0}
    found, retractions, cached = Counter[tuple[int, int]](), 0, 0
    row = -(-CONTEXT // page_size)
    for overlap, chunk, pages in ((True, None, None), (True, 5, 1 + 2 * row), (False, 11, 1 + 2 * row)):
        made, accepted = together(
            llm, pages, overlap=overlap, chunked_prefill_size=chunk, **(tight if pages else {})
        )
        assert_alike(made, alone["qwen3"])
        found += accepted
        retractions += sum(output.meta_info["num_retractions"] for output in made)
        cached += sum(output.meta_info["cached_tokens"] for output in made)
    assert {right for right, _ in found} == set(range(drafts + 1))
    assert retractions
    assert cached or page_size == 64
    assert len([1 for _, guessed in found if guessed == 0]), "no row was without drafts"


def test_a_deterministic_plan_gives_the_same_bits(alone: dict[str, list[Output]]) -> None:
    llm = load(QWEN3, 3, page_size=8, deterministic=True)
    for pages in (None, 27):
        made, found = together(
            llm, pages, new_token_ratio=0.0, min_new_token_ratio=0.0, chunked_prefill_size=9
        )
        assert_alike(made, alone["exact"], exact=True)
        assert sum(right for right, _ in found.elements()) > 50


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (WINDOWED, {}),
        (WINDOWED, {"deterministic": True, "kv_dtype": "int4_per_token_head"}),
        (LATENT, {"deterministic": True}),
    ],
)
def test_windows_and_latents(config: dict[str, Any], options: dict[str, Any]) -> None:
    plain, llm = load(config, page_size=4, **options), load(config, 4, page_size=4, **options)
    expected = [plain.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]
    made, found = together(llm)
    assert_alike(made, expected, exact=bool(options))
    assert sum(right for right, _ in found.elements()) > 50


def test_a_second_round_finds_prefixes_and_guesses_from_them(alone: dict[str, list[Output]]) -> None:
    """Tokens that no step ran, since they were cached, are in the history that drafts come from."""
    llm = load(QWEN3, 3, page_size=4)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12] * 4
    heard: list[tuple[int, int]] = []
    for _ in range(2):
        llm.engine.observer = lambda record: heard.append((record.cached_tokens, record.drafted))
        params = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True, logit_bias={5: 90.0})
        (output,) = llm.generate(token_ids=[prompt], sampling=params)
        assert output.token_ids == (5, 5)
    assert [cached for cached, _ in heard if cached] == [28]
    # One token is left to be sampled then, which nothing is guessed for; with three there is.
    more = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True, logit_bias={5: 90.0})
    heard.clear()
    (output,) = llm.generate(token_ids=[prompt], sampling=more)
    assert [cached for cached, _ in heard if cached] == [28]
    assert sum(drafted for _, drafted in heard) >= 2


def test_requests_that_leave_change_nothing_for_others(alone: dict[str, list[Output]]) -> None:
    """Every second request is ended while it runs: its pages, with drafts in them, become others'."""
    llm = load(QWEN3, 3, page_size=4)
    executable: Any = llm.engine.executable
    executable.pages, executable.asynchronous = 60, True
    llm.engine = Engine(executable, SchedulerOptions(speculation="always"))
    replies = [llm.replies(prompt, sampling)[0] for prompt, sampling in requests()]
    for reply in replies:
        llm.engine.submit(reply.sequence, reply)
    left = replies[1::2]
    while llm.engine.busy:
        llm.engine.step()
        for reply in left:
            if len(reply.sequence.output) > 4 and not reply.done:
                llm.engine.abort(reply.sequence)
    for reply, wanted in zip(replies, alone["qwen3"], strict=True):
        made = tuple(reply.sequence.output)
        assert made == (wanted.token_ids[: len(made)] if reply in left else wanted.token_ids)
    assert sum(reply.finish_reason == "abort" for reply in left) >= 3


def test_what_was_guessed_is_told(alone: dict[str, list[Output]]) -> None:
    llm = load(QWEN3, 4, page_size=8)
    made, found = together(llm)
    metas = [output.meta_info for output in made if "spec_verify_ct" in output.meta_info]
    assert len(metas) >= 8
    for meta in metas:
        steps, right = meta["spec_verify_ct"], meta["spec_accept_token_num"]
        assert 0 <= right <= meta["spec_draft_token_num"] <= 4 * steps
        assert meta["spec_accept_length"] == pytest.approx(1 + right / steps)
    # Steps that were under way when a request ended count for none.
    assert sum(meta["spec_accept_token_num"] for meta in metas) <= sum(r for r, _ in found.elements())
    (plain,) = llm.generate(token_ids=[[1, 2]], sampling=SamplingParams(max_new_tokens=1))
    assert not any(name.startswith("spec_") for name in plain.meta_info)


def test_the_scheduler_may_do_without(alone: dict[str, list[Output]]) -> None:
    llm = load(QWEN3, 4, page_size=8)
    made, found = together(llm, speculation="never")
    assert_alike(made, alone["qwen3"])
    assert not found


def test_steps_are_tried_now_and_then_where_they_do_not_pay() -> None:
    """A model that never repeats itself is run token by token, but for a try in some dozens of steps."""
    llm = load(QWEN3, 4, page_size=8)
    records: list[Any] = []
    llm.engine.observer = records.append
    # An alphabet that is used up: no token comes twice, so that no draft is right.
    params = SamplingParams(temperature=1.0, presence_penalty=2.0, repetition_penalty=9.0, max_new_tokens=90)
    llm.generate(token_ids=[[1]] * 2, sampling=params)
    kinds = [record.bucket.phase for record in records if not record.prompt_tokens]
    assert kinds[0] == VERIFY
    last = kinds[len(kinds) // 2 :]
    assert 0 < last.count(VERIFY) <= 1 + len(last) // 20
    llm.generate(
        token_ids=[[1]], sampling=SamplingParams(max_new_tokens=90, ignore_eos=True, logit_bias={5: 90.0})
    )
    kinds = [record.bucket.phase for record in records if not record.prompt_tokens]
    assert kinds[-3:] == [VERIFY] * 3, "a sequence that repeats itself is not noticed"


STATED: list[tuple[dict[str, Any], str]] = [
    ({"method": "medusa"}, r"speculative\.method=medusa is not built; choose .*ngram"),
    ({"num_draft_tokens": 8}, r"speculative\.num_draft_tokens=8 is of no use without a method"),
    ({"method": "ngram", "num_draft_tokens": 0}, r"num_draft_tokens=0 must be a whole number of at least 1"),
    ({"method": "ngram", "num_draft_tokens": "4"}, r"num_draft_tokens=4 must be a whole number"),
    ({"method": "ngram", "ngram_min": 5}, r"ngram_min=5 is above ngram_max=4"),
    ({"method": "ngram", "ngram_max": 99}, r"ngram_max=99 is above 32"),
    ({"method": "ngram", "num_draft_tokens": 40}, r"do not fit into steps of plan\.max_tokens=40"),
]


@pytest.mark.parametrize(("speculative", "message"), STATED)
def test_what_cannot_be_is_refused(speculative: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compile_plan(DummyCheckpoint(dict(QWEN3)), **LIMITS, speculative=speculative)


def test_states_are_refused_by_name() -> None:
    cache = CacheSpec(8, (CacheGroup("kv", (), 8), CacheGroup("conv", (), None)))
    limits = Limits(max_rows=2, max_tokens=16, context_len=32, page_size=8, max_gain=5)
    with pytest.raises(PlanError, match="the model's state conv cannot be taken back"):
        declare(limits, Request(speculative=Speculative("ngram")), cache)


def test_a_plan_that_verifies_nothing_cannot_always() -> None:
    checkpoint = DummyCheckpoint(dict(QWEN3))
    plan = compile_plan(checkpoint, **LIMITS)
    with pytest.raises(RequestError, match=r"recompile it with speculative\.method=ngram"):
        LLM(checkpoint, plan, scheduler=SchedulerOptions(speculation="always"))
    with pytest.raises(RequestError, match=r"there is no scheduler\.speculation='on'"):
        SchedulerOptions(speculation="on")
    with pytest.raises(RequestError, match="there is no such plan option"):
        LLM(checkpoint, speculative={"method": "ngram", "depth": 3})


def test_a_plan_remembers_it_and_keeps_few_rows() -> None:
    checkpoint = DummyCheckpoint(dict(QWEN3))
    asked = {"method": "ngram", "num_draft_tokens": 9, "max_rows": 2}
    plan = compile_plan(checkpoint, **LIMITS, speculative=asked)
    step = plan.steps[VERIFY]
    assert (step.rows, step.tokens, step.each, plan.options.speculative.max_rows) == (2, 20, 10, 2)
    assert set(step.ratios) == {b.rows for b in plan.buckets if b.phase == VERIFY}
    assert all(ratio > 0.5 for ratio in step.ratios.values())
    assert VERIFY not in compile_plan(checkpoint, **LIMITS).steps
