"""The engine on the CPU executable with a tiny model: tokens as of each request alone, with few pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.load import load_executable

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
PLAN = {"max_rows": 4, "max_tokens": 24, "context_len": 96, "page_size": 8}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine that shares nothing and runs one request at a time."""
    options = SchedulerOptions(overlap=False, prefix_cache=False, max_running_requests=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAKEREADY_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Weights of the usual size leave the logits so small that rounding decides.
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield LLM(DummyCheckpoint(dict(CONFIG)), scheduler=options, **PLAN)


def llm_of(alone: LLM, pages: int, **options: Any) -> LLM:
    """The same model with few pages, and steps that count as under way until the next is launched."""
    made = LLM.__new__(LLM)
    made.__dict__.update(alone.__dict__)
    executable: Any = load_executable(alone.plan, alone.checkpoint, kv_bytes=pages * alone.plan.kv.page_bytes)
    executable.asynchronous = True
    made.engine = Engine(executable, SchedulerOptions(**options))
    return made


def workload(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that share beginnings, some with samples, penalties, and seeds of their own."""
    rng = np.random.default_rng(7)
    stems = rng.integers(0, 96, (3, 40)).tolist()
    prompts, sampling = [], []
    for i in range(count):
        prompts.append([*stems[i % 3][: int(rng.integers(0, 40))], *rng.integers(0, 96, i % 5 + 1).tolist()])
        sampling.append(
            SamplingParams(
                temperature=[0.0, 1.0, 2.0][i % 3],
                max_new_tokens=int(rng.integers(1, 48)),
                presence_penalty=0.5 * (i % 2),
                repetition_penalty=[1.0, 1.3][i // 2 % 2],
                sampling_seed=i,
                n=1 + i % 2,
                ignore_eos=True,
                stop_token_ids=[95],  # so that nobody knows how long they will be
            )
        )
    return prompts, sampling


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs-weight", "priority"])
def test_tokens_with_few_pages_are_those_alone(alone: LLM, policy: str) -> None:
    prompts, sampling = workload(20)
    options = {
        "policy": policy,
        "new_token_ratio": 0.0,
        "min_new_token_ratio": 0.0,
        "preemption_threshold": 1,
    }
    llm = llm_of(alone, 16, **options)
    made = llm.generate(token_ids=prompts, sampling=sampling, priority=[i % 3 for i in range(20)])
    expected = alone.generate(token_ids=prompts, sampling=sampling)
    assert [output.token_ids for output in made] == [output.token_ids for output in expected]
    assert sum(output.meta_info["num_retractions"] for output in made) > 1
    assert sum(output.meta_info["cached_tokens"] for output in made) > 100
    assert sum(output.meta_info["cached_tokens"] for output in expected) == 0
    llm.engine.pool.check()
    assert llm.engine.pool.held == 0


def test_samples_read_pages_that_their_own_step_fills(alone: LLM) -> None:
    """Four samples of a prompt in one step: the first computes it, the others attend to what it writes."""
    llm = llm_of(alone, 40)
    prompt = np.random.default_rng(1).integers(0, 96, 20).tolist()
    params = SamplingParams(temperature=1.5, n=4, sampling_seed=3, max_new_tokens=12, ignore_eos=True)
    made = llm.generate(token_ids=[prompt], sampling=params)
    assert [output.meta_info["cached_tokens"] for output in made] == [0, 16, 16, 16]
    expected = alone.generate(token_ids=[prompt], sampling=params)
    assert [output.token_ids for output in made] == [output.token_ids for output in expected]
    assert len({output.token_ids for output in made}) == 4


def test_mixed_steps_equal_separate_ones(alone: LLM) -> None:
    prompts, sampling = workload(12)
    mixed = llm_of(alone, 50).generate(token_ids=prompts, sampling=sampling)
    apart = llm_of(alone, 50, decode_interval=2, chunked_prefill_size=5).generate(
        token_ids=prompts, sampling=sampling
    )
    assert [output.token_ids for output in mixed] == [output.token_ids for output in apart]


def test_bounded_queues_hold_back_what_generate_is_given(alone: LLM) -> None:
    llm = llm_of(alone, 50, max_queued_requests=2)
    prompts, sampling = workload(12)
    made = llm.generate(token_ids=prompts, sampling=sampling)
    assert all(output.error is None for output in made)
    assert len(made) == sum(params.n for params in sampling)


def test_an_exception_of_the_callers_ends_what_it_asked_for(alone: LLM) -> None:
    llm = llm_of(alone, 50)
    prompts, sampling = workload(12)

    def stop(place: int, output: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(token_ids=prompts, sampling=sampling, on_finish=stop)
    assert not llm.engine.busy
    assert llm.engine.pool.held == 0


def test_dynamic_rotary_scaling_shares_nothing() -> None:
    """Its keys depend on the length of the prompt, so that equal beginnings differ."""
    scaled = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32}
    told: list[str] = []
    llm = LLM(DummyCheckpoint({**CONFIG, **scaled}), report=told.append, **{**PLAN, "context_len": 64})
    assert not llm.engine.options.prefix_cache
    assert any("prefixes are not shared" in sentence for sentence in told)
