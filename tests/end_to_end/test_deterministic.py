"""Deterministic plans on the CPU: what a request gets in any batch equals what it gets alone, bit for bit.

Pages are few, so that requests are sent back and computed again, and cached prefixes are evicted, all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from small_configs import QWEN3, VOCABULARY

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.planner.compile import compile_plan

CONTEXT, PAGE = 96, 8
HALVES = {"torch_dtype": "bfloat16"}
CONFIG, WINDOWED, LATENT = (
    config | HALVES for config in (QWEN3, small_configs.WINDOWED, small_configs.LATENT)
)
HYBRID = {
    **CONFIG,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
LIMITS = {
    "max_rows": 7,
    "max_tokens": 48,
    "context_len": CONTEXT,
    "page_size": PAGE,
    "max_logprob_tokens": 20,
}
# Other buckets, steps and pages: on the CPU even another plan gives the same.
ALONE = {"max_rows": 1, "max_tokens": 19, "context_len": CONTEXT, "page_size": 16, "max_logprob_tokens": 5}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bfloat16": (CONFIG, {}),
    "float32": (CONFIG, {"weight_dtype": "float32"}),
    "window": (WINDOWED, {"kv_dtype": "bfloat16"}),
    "unfused": (CONFIG, {"disabled_passes": ("merge_linears", "fuse_add_norm", "hoist_gather")}),
    "fp8": (CONFIG, {"quant": "fp8", "kv_dtype": "float8_e4m3fn"}),
    "int8_cache": (CONFIG, {"kv_dtype": "int8_per_token_head"}),
    "int4_cache": (WINDOWED, {"kv_dtype": "int4_per_token_head"}),
    "int8": (CONFIG, {"quant": "int8"}),
    "latent": (LATENT, {}),
    "latent_int8": (LATENT, {"kv_dtype": "int8_per_token_head"}),
    "hybrid": (HYBRID, {}),
    "hybrid_bfloat16": (HYBRID, {"kv_state_dtype": "bfloat16"}),
}


@dataclass
class Pair:
    """A model under a batching plan and under one for a row at a time, and what the latter gave so far."""

    batched: LLM
    single: LLM
    known: dict[tuple[Any, ...], Output] = field(default_factory=dict)

    def alone(self, prompt: list[int], params: SamplingParams) -> Output:
        key = (tuple(prompt), repr(params))
        if key not in self.known:
            (self.known[key],) = self.single.generate(token_ids=[prompt], sampling=params)
        return self.known[key]

    def together(
        self, asked: list[tuple[list[int], SamplingParams, int]], pages: int, **options: Any
    ) -> list[Output]:
        """All at once, with so many pages, under steps that count as under way until the next is launched."""
        executable: Any = self.batched.engine.executable
        executable.pages, executable.asynchronous = pages, True
        self.batched.engine = Engine(executable, SchedulerOptions(**options))
        prompts, sampling, priority = zip(*asked, strict=True)
        made = self.batched.generate(
            token_ids=list(prompts), sampling=list(sampling), priority=list(priority)
        )
        self.batched.engine.pool.check()
        assert self.batched.engine.pool.held == 0
        return made


def load(name: str, **options: Any) -> Pair:
    config, fields = MODELS[name]
    fields = {**fields, **options}
    checkpoint = DummyCheckpoint(dict(config))
    share = SchedulerOptions(overlap=False, prefix_cache=False)
    plans = (compile_plan(checkpoint, **limits, **fields) for limits in (LIMITS, ALONE))
    return Pair(*(LLM(checkpoint, plan, scheduler=share) for plan in plans))


@pytest.fixture(scope="module", autouse=True)
def large_weights() -> Iterator[None]:
    """Weights of the usual size leave the logits so small that all tokens are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield


# References of latent attention are slow: one busy batch is enough of them.
BUSY = [name for name in MODELS if name not in ("latent", "int8", "int8_cache", "hybrid")]
BUSY_TOO = [pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "int8_cache")]


@pytest.fixture(scope="module", params=[*BUSY, *BUSY_TOO])
def pair(request: pytest.FixtureRequest, large_weights: None) -> Pair:
    return load(request.param, deterministic=True)


STEMS = [[(7 * i * i + 3 * s) % VOCABULARY for i in range(70)] for s in range(3)]
prompts = st.builds(
    lambda stem, most, rest: [*STEMS[stem][:most], *rest],
    st.integers(0, 2),
    st.integers(0, 60),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], SamplingParams, int]:
    prompt = draw(prompts)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([-1, 20])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
        max_new_tokens=draw(st.integers(1, CONTEXT - 67)),
        sampling_seed=draw(st.integers(0, 5)),
        return_logprob=True,
        top_logprobs_num=4,
        logprob_start_len=draw(st.sampled_from([-1, -1, 0])),
        ignore_eos=True,
    )
    return prompt, params, draw(st.integers(0, 3))


options = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["fcfs", "lpm", "dfs-weight", "priority", "lof"]),
        "chunked_prefill_size": st.sampled_from([None, 1, 5, 16, 33]),
        "decode_interval": st.sampled_from([0, 0, 2]),
        "preemption_threshold": st.just(1),
        "new_token_ratio": st.sampled_from([0.0, 0.7]),
        "min_new_token_ratio": st.just(0.0),
        "overlap": st.booleans(),
    }
)


def same(made: Output, alone: Output) -> bool:
    assert made.error is None
    assert alone.error is None
    return (made.token_ids, made.logprobs, made.input_logprobs) == (
        alone.token_ids,
        alone.logprobs,
        alone.input_logprobs,
    )


@settings(max_examples=5)
@given(asked=st.lists(requests(), min_size=2, max_size=12), pages=st.integers(13, 24), options=options)
def test_a_request_gets_the_same_bits_in_every_batch(
    pair: Pair, asked: list[tuple[list[int], SamplingParams, int]], pages: int, options: dict[str, Any]
) -> None:
    for (prompt, params, _), output in zip(asked, pair.together(asked, pages, **options), strict=True):
        assert same(output, pair.alone(prompt, params))


def busy() -> list[tuple[list[int], SamplingParams, int]]:
    """Twenty requests that share beginnings and outgrow the pages."""
    return [
        (
            [*STEMS[i % 3][: 5 * (i % 11)], i],
            SamplingParams(
                temperature=i % 2,
                max_new_tokens=20 + i,
                sampling_seed=i,
                return_logprob=True,
                top_logprobs_num=4,
                ignore_eos=True,
                stop_token_ids=[VOCABULARY - 1],  # so that nobody knows how long they will be
            ),
            i % 4,
        )
        for i in range(20)
    ]


TIGHT = {"policy": "priority", "preemption_threshold": 1, "new_token_ratio": 0.0, "min_new_token_ratio": 0.0}


@pytest.mark.parametrize("pair", ["bfloat16", "window", "int4_cache", "latent", "hybrid"], indirect=True)
def test_retraction_eviction_and_sharing_change_no_bit(pair: Pair) -> None:
    asked = busy()
    made = pair.together(asked, 14, **TIGHT, chunked_prefill_size=11)
    assert sum(output.meta_info["num_retractions"] for output in made) > 3
    assert sum(output.meta_info["cached_tokens"] for output in made) > 100
    assert all(
        same(output, pair.alone(prompt, params))
        for output, (prompt, params, _) in zip(made, asked, strict=True)
    )


def test_an_ordinary_plan_does_not_pass(large_weights: None) -> None:
    """What is tested here can be seen: log-probabilities of the ordinary plan differ in their last bits."""
    ordinary = load("bfloat16")
    made = ordinary.together(busy(), 14, **TIGHT, chunked_prefill_size=11)
    alike = [same(o, ordinary.alone(p, params)) for o, (p, params, _) in zip(made, busy(), strict=True)]
    assert not all(alike)


def test_a_deterministic_scheduler_needs_such_a_plan(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path))
    checkpoint, options = DummyCheckpoint(dict(CONFIG)), SchedulerOptions(deterministic=True)
    ordinary = compile_plan(checkpoint, **LIMITS)
    with pytest.raises(RequestError, match=r"recompile it with plan\.deterministic=true"):
        LLM(checkpoint, ordinary, scheduler=options)
    with pytest.raises(RequestError, match=r"recompile it with plan\.deterministic=true"):
        Engine(LLM(checkpoint, ordinary).engine.executable, options)
    assert LLM(checkpoint, scheduler=options, **LIMITS).plan.options.deterministic
