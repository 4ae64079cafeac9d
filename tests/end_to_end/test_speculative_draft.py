"""A small model drafts: tokens are those without drafts, and a drafter that is the model itself is always right.

That proves the drafter's cache, places and noise: it is behind nowhere, whatever steps its tokens were run in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_configs import LATENT, QWEN3, VOCABULARY, WINDOWED
from speculative_requests import CONTEXT, LIMITS, assert_alike, requests, together

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.base import CheckpointError, Ranges
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND, VERIFY
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.plan_cache import plan_key
from makeready.graphs.planner.request import Request

SMALL = {**QWEN3, "num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 52, "head_dim": 12}


class Perturbed(DummyCheckpoint):
    """A model that is nearly another: its weights, and noise."""

    share = 0.12  # of a weight's size

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        made, noise = super().read(name, box), DummyCheckpoint(dict(self.config), seed=7)
        noise.declare({name: self.tensors[name].shape})
        return made + np.float32(self.share) * (noise.read(name, box) - float("norm" in name))


@pytest.fixture(scope="module", autouse=True)
def large_weights() -> Iterator[None]:
    """Weights of the usual size leave the logits so small that all tokens are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield


def load(
    config: Mapping[str, Any], draft: DummyCheckpoint | None = None, drafts: int = 4, **options: Any
) -> LLM:
    """The model alone, or with one that drafts beside it."""
    checkpoint: Any = DummyCheckpoint(dict(config))
    if draft is not None:
        checkpoint = PairedCheckpoint(checkpoint, draft)
        options |= {"speculative": {"method": "draft", "num_draft_tokens": drafts}}
    return LLM(checkpoint, compile_plan(checkpoint, **LIMITS, **options))


def alone(config: Mapping[str, Any], **options: Any) -> list[Output]:
    llm = load(config, **options)
    return [llm.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]


@pytest.fixture(scope="module")
def plain(large_weights: None) -> list[Output]:
    return alone(QWEN3)


TIGHT = {"new_token_ratio": 0.0, "min_new_token_ratio": 0.0}


@pytest.mark.parametrize(("page_size", "drafts"), [(1, 3), (7, 1), (7, 5)])
def test_tokens_are_those_without_drafts(plain: list[Output], page_size: int, drafts: int) -> None:
    llm = load(QWEN3, Perturbed(dict(QWEN3)), drafts, page_size=page_size)
    found, retractions, cached = Counter[tuple[int, int]](), 0, 0
    row = -(-CONTEXT // page_size)
    for overlap, chunk, pages in ((True, None, None), (True, 5, 1 + 2 * row), (False, 11, 1 + 2 * row)):
        made, accepted = together(
            llm, pages, overlap=overlap, chunked_prefill_size=chunk, **(TIGHT if pages else {})
        )
        assert_alike(made, plain)
        found += accepted
        retractions += sum(output.meta_info["num_retractions"] for output in made)
        cached += sum(output.meta_info["cached_tokens"] for output in made)
    assert {right for right, _ in found} == set(range(drafts + 1))
    assert retractions
    assert cached


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_model_itself_is_always_right(deterministic: bool) -> None:
    """Through cut prompts, retractions, prefix hits and steps that decode, for any way of sampling."""
    expected = alone(QWEN3, deterministic=deterministic)
    llm = load(QWEN3, DummyCheckpoint(dict(QWEN3)), 4, page_size=4, deterministic=deterministic)
    for pages, chunk in ((None, None), (1 + 2 * CONTEXT // 4, 9)):
        made, found = together(llm, pages, chunked_prefill_size=chunk, **TIGHT)
        assert_alike(made, expected, exact=deterministic)
        assert sum(found.values()) > 50
        wrong = {pair: times for pair, times in found.items() if pair[0] != pair[1]}
        # Numbers of steps of many tokens and of few differ in their last bits, unless a plan says that they do not.
        assert sum(wrong.values()) <= (0 if deterministic else 2), wrong
    assert sum(output.meta_info["cached_tokens"] for output in made) > 50
    assert sum(output.meta_info["num_retractions"] for output in made)


def test_another_small_model_drafts(plain: list[Output]) -> None:
    llm = load(QWEN3, DummyCheckpoint(dict(SMALL), seed=3), 2, page_size=8)
    made, found = together(llm)
    assert_alike(made, plain)
    assert {right for right, _ in found} == {0, 1, 2}


@pytest.mark.parametrize(
    ("config", "draft", "options"),
    [
        (WINDOWED, WINDOWED, {}),
        (QWEN3, WINDOWED, {"kv_dtype": "int4_per_token_head"}),
        (LATENT, LATENT, {}),
        (LATENT, QWEN3, {"deterministic": True}),
        (QWEN3, QWEN3, {"quant": "fp8"}),
    ],
    ids=["windows", "windows-draft", "latents", "keys-beside-latents", "quantized"],
)
def test_pages_hold_both_models(config: dict[str, Any], draft: dict[str, Any], options: Any) -> None:
    expected = alone(config, page_size=4, **options)
    made, found = together(load(config, DummyCheckpoint(dict(draft)), 3, page_size=4, **options))
    assert_alike(made, expected, exact="deterministic" in options)
    if config is draft:
        assert sum(n for (right, drafted), n in found.items() if right != drafted) <= 3
        assert sum(right * n for (right, _), n in found.items()) > 50


def test_steps_that_decode_leave_nothing_out() -> None:
    """Between steps that verify, in which the drafter is right at once."""
    llm = load(QWEN3, DummyCheckpoint(dict(QWEN3)), 4, page_size=4, deterministic=True)
    kinds: list[str] = []
    takes = iter([True, False, False, True, False] * 20)
    verify: Any = next(kind for kind in llm.engine.scheduler._kinds if kind.name == VERIFY)
    verify.takes = lambda decoding, chunks: not chunks and next(takes)
    llm.engine.observer = lambda record: kinds.append(record.bucket.phase)
    params = SamplingParams(temperature=1.0, max_new_tokens=60, ignore_eos=True, sampling_seed=5)
    (made,) = llm.generate(token_ids=[[4, 9, 2]], sampling=params)
    assert {DECODE, EXTEND, VERIFY} == set(kinds)
    assert made.meta_info["spec_accept_rate"] == 1.0
    (expected,) = load(QWEN3, deterministic=True).generate(token_ids=[[4, 9, 2]], sampling=params)
    assert made.token_ids == expected.token_ids


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_acceptance_can_be_forced_for_measurements(share: float) -> None:
    """Of a drafter that is always right, and of a step in which nothing is."""
    checkpoint = PairedCheckpoint(DummyCheckpoint(dict(QWEN3)), DummyCheckpoint(dict(QWEN3)))
    asked = {"method": "draft", "num_draft_tokens": 3, "forced_acceptance": share}
    llm = LLM(
        checkpoint,
        compile_plan(checkpoint, **LIMITS, speculative=asked),
        scheduler=SchedulerOptions(speculation="always"),
    )
    params = SamplingParams(temperature=1.0, max_new_tokens=90, ignore_eos=True)
    made = llm.generate(token_ids=[[i] for i in range(24)], sampling=params)
    steps = sum(output.meta_info["spec_verify_ct"] for output in made)
    length = 1 + sum(output.meta_info["spec_accept_token_num"] for output in made) / steps
    assert all(len(output.token_ids) == 90 for output in made)
    assert length == pytest.approx(1 + share + share**2 + share**3, rel=0.06)


REFUSED: list[tuple[dict[str, Any] | None, dict[str, Any], str]] = [
    (None, {"method": "draft"}, r"guesses with a second model; add speculative\.checkpoint=PATH"),
    (QWEN3, {}, r"speculative\.checkpoint is of no use without a method; add speculative\.method=draft"),
    (QWEN3, {"method": "ngram"}, r"speculative\.checkpoint is of no use to ngram; leave it out"),
    (QWEN3, {"method": "draft", "ngram_min": 2}, r"ngram_min=2 is of no use to draft; leave it out"),
    (
        QWEN3,
        {"method": "draft", "forced_acceptance": 1.5},
        r"forced_acceptance=1\.5 must be a number from 0 to 1",
    ),
    (None, {"forced_acceptance": 0.5}, r"forced_acceptance=0\.5 is of no use without a method"),
    ({**QWEN3, "vocab_size": 99}, {"method": "draft"}, r"same vocabulary: it has 99 tokens, the model 96"),
    (
        {**QWEN3, "max_position_embeddings": 64},
        {"method": "draft"},
        r"made for 64 tokens, fewer than plan\.context_len=96",
    ),
]


@pytest.mark.parametrize(("draft", "speculative", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    draft: dict[str, Any] | None, speculative: dict[str, Any], message: str
) -> None:
    checkpoint: Any = DummyCheckpoint(dict(QWEN3))
    if draft is not None:
        checkpoint = PairedCheckpoint(checkpoint, DummyCheckpoint(dict(draft)))
    with pytest.raises(PlanError, match=message):
        compile_plan(checkpoint, **LIMITS, speculative=speculative)


def test_a_drafter_with_states_is_refused() -> None:
    hybrid = {
        **QWEN3,
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "layer_types": ["linear_attention", "full_attention"],
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 10,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    }
    checkpoint = PairedCheckpoint(DummyCheckpoint(dict(QWEN3)), DummyCheckpoint(hybrid))
    with pytest.raises(PlanError, match=r"its cache \(kv, state\) has states or pages that go"):
        compile_plan(checkpoint, **LIMITS, speculative={"method": "draft"})


def test_a_plan_belongs_to_both_checkpoints(tmp_path: Path) -> None:
    target, asked = DummyCheckpoint(dict(QWEN3)), Request(speculative={"method": "draft"})  # pyright: ignore
    both = [
        PairedCheckpoint(target, DummyCheckpoint(dict(c)))
        for c in (QWEN3, SMALL, {**QWEN3, "torch_dtype": "float16"})
    ]
    keys = [plan_key(checkpoint, asked) for checkpoint in both]
    assert len(set(keys)) == 2, "another config is another plan, other weights are not"
    plan = compile_plan(both[0], **LIMITS, speculative={"method": "draft"})
    behind = [launch.op for launch in plan.programs[VERIFY].launches[plan.cut(VERIFY) :]]
    assert behind == ["sample", "token_logprobs", "accept_drafts"], "drafts wait for masks"
    with pytest.raises(
        PlanError, match=r"drafts with a second checkpoint \(speculative\.method=draft\); add"
    ):
        LLM(target, plan)
    with pytest.raises(PlanError, match="another checkpoint: its config has draft="):
        LLM(both[1], plan)
    with pytest.raises(PlanError, match=r"no second checkpoint; leave speculative\.checkpoint out"):
        LLM(both[0], compile_plan(target, **LIMITS))
    llm = LLM(target, plan.save(tmp_path), speculative={"checkpoint": "dummy", "model": dict(QWEN3)})
    (output,) = llm.generate(token_ids=[[1, 2]], sampling=SamplingParams(max_new_tokens=9, ignore_eos=True))
    assert len(output.token_ids) == 9
    with pytest.raises(CheckpointError, match=r"dummy needs the model that drafts; add speculative\.model="):
        LLM(target, speculative={"method": "draft", "checkpoint": "dummy"})


def test_the_vocabulary_is_the_usual_one() -> None:
    assert QWEN3["vocab_size"] == VOCABULARY == LATENT["vocab_size"]
