"""The engine on a GPU: steps that overlap, prefixes that are shared, and a history that the host writes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from safetensors.torch import load_file, save_file
from scripted_steps import SMALL, write_checkpoint

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.targets import TARGETS

# Log-probabilities over bfloat16 activations, whatever kernel and batch they come from.
TOLERANCE = 0.06


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    major, minor = torch.cuda.get_device_capability()
    target = next((t.name for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if target is None:
        pytest.skip(f"no target for compute capability {major}.{minor}")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)
    limits = {"max_rows": 8, "max_tokens": 256, "context_len": 512, "page_size": 64, "max_logprob_tokens": 96}
    return LLM(
        checkpoint, target=target, max_decode_buckets=2, max_extend_buckets=3, kv_memory_gib=1, **limits
    )


def with_options(llm: LLM, **options: object) -> LLM:
    """The same loaded model under another engine, whose cache is empty."""
    llm.engine = Engine(llm.engine.executable, SchedulerOptions(**options))  # type: ignore[arg-type]
    return llm


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, 1024, length).tolist()


def first(output: Output) -> dict[int, float]:
    """The most probable tokens in the place of the first generated one."""
    assert output.logprobs is not None
    return dict(output.logprobs[0].top)


def same(ours: dict[int, float], theirs: dict[int, float]) -> None:
    common = set(ours) & set(theirs)
    assert len(common) >= len(ours) - 3, "other tokens are the most probable ones"
    for token in common:
        assert abs(ours[token] - theirs[token]) <= TOLERANCE


def test_overlap_changes_no_token_and_launches_ahead(llm: LLM) -> None:
    """Lengths are known, so both run the very same steps: tokens agree to the last bit."""
    prompts = [prompt_of(length, seed=length) for length in (1, 5, 300, 64, 65, 17, 200, 3, 90, 128, 40, 7)]
    sampling = [
        SamplingParams(temperature=i % 2, max_new_tokens=5 + 7 * i, sampling_seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    made = []
    for overlap in (False, True, True):
        records: list[StepRecord] = []
        engine = with_options(llm, overlap=overlap).engine
        engine.observer = records.append
        made.append([o.token_ids for o in llm.generate(token_ids=prompts, sampling=sampling)])
        ahead = [after.launch_end <= before.wait_start for before, after in pairwise(records)]
        assert all(ahead) if overlap else not any(ahead)
        engine.pool.check()
        assert engine.pool.held == 0
    assert made[0] == made[1] == made[2]


def test_samples_share_a_prompt_that_their_own_step_computes(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, n=4, max_new_tokens=2, return_logprob=True, top_logprobs_num=12, ignore_eos=True
    )
    for length in (65, 130, 200, 256):
        alone = with_options(llm, prefix_cache=False, max_running_requests=1)
        expected = alone.generate(token_ids=[prompt_of(length)], sampling=params)[0]
        made = with_options(llm).generate(token_ids=[prompt_of(length)], sampling=params)
        shared = (length - 1) // 64 * 64
        assert [o.meta_info["cached_tokens"] for o in made] == [0] + [shared] * 3
        for output in made:
            same(first(output), first(expected))


def test_prompts_are_scored_as_their_beginnings_are_continued(llm: LLM) -> None:
    """In steps that are shared with rows that ask for nothing; what is cached changes nothing."""
    lengths = (2, 64, 65, 97, 250)
    asked = SamplingParams(
        temperature=0, max_new_tokens=1, return_logprob=True, top_logprobs_num=12, logprob_start_len=0
    )
    plain = SamplingParams(temperature=0, max_new_tokens=1, return_logprob=True, top_logprobs_num=12)
    prompts = [prompt for length in lengths for prompt in (prompt_of(length), prompt_of(length, seed=1))]
    outputs = with_options(llm).generate(token_ids=prompts, sampling=[asked, plain] * len(lengths))
    for prompt, output in zip(prompts[::2], outputs[::2], strict=True):
        assert output.input_logprobs is not None
        assert [entry.token_id for entry in output.input_logprobs] == prompt
        for at in {1, len(prompt) // 2, len(prompt) - 1}:
            entry = output.input_logprobs[at]
            (beginning,) = llm.generate(token_ids=[prompt[:at]], sampling=plain)
            same(dict(entry.top), first(beginning))
            assert entry.logprob is not None
            assert entry.logprob <= entry.top[0][1]
            assert abs(entry.logprob - dict(entry.top).get(prompt[at], entry.logprob)) < 1e-6


def test_a_cached_prefix_gives_what_computing_it_gives(llm: LLM) -> None:
    """A conversation: every turn begins with all that was said before."""
    params = SamplingParams(
        temperature=0, max_new_tokens=30, return_logprob=True, top_logprobs_num=12, ignore_eos=True
    )
    said, cached = prompt_of(150), []
    with_options(llm)
    for turn in range(4):
        (ours,) = llm.generate(token_ids=[said], sampling=params)
        (anew,) = llm.generate(token_ids=[said], sampling=params, extra_key=str(turn))
        assert anew.meta_info["cached_tokens"] == 0
        same(first(ours), first(anew))
        cached.append(ours.meta_info["cached_tokens"])
        said = [*said, *ours.token_ids, *prompt_of(20, seed=turn)]
    assert cached[0] == 0
    assert all(after > before for before, after in pairwise(cached))


def test_penalties_see_a_cached_prompt(llm: LLM) -> None:
    """A penalty that forbids whatever was said: the prompt is half of the vocabulary, most of it cached."""
    prompt = np.random.default_rng(3).permutation(1024)[:400].tolist()
    params = SamplingParams(temperature=0, max_new_tokens=40, repetition_penalty=1e6, ignore_eos=True)
    with_options(llm)
    for cached in (0, 384):
        (output,) = llm.generate(token_ids=[prompt], sampling=params)
        assert output.meta_info["cached_tokens"] == cached
        assert not set(output.token_ids) & set(prompt), "a token of the prompt was generated"
        assert len(set(output.token_ids)) == 40, "a token was generated twice"


def test_pages_that_run_out_lose_nothing(llm: LLM) -> None:
    """With pages for two full requests: all finish, and greedy tokens agree with the log-probabilities alone."""
    executable = llm.engine.executable
    pages, executable.pages = executable.pages, 18
    try:
        engine = with_options(llm, new_token_ratio=0.0, min_new_token_ratio=0.0).engine
        # One that might end early, for all that the scheduler knows: else pages would not run out.
        params = SamplingParams(
            temperature=0, max_new_tokens=300, min_new_tokens=300, return_logprob=True, stop_token_ids=[3]
        )
        made = llm.generate(token_ids=[prompt_of(60, seed=s) for s in range(8)], sampling=params)
    finally:
        executable.pages = pages
    assert sum(output.meta_info["num_retractions"] for output in made) > 0
    engine.pool.check()
    worst = 0.0
    for seed, output in enumerate(made):
        tokens, start = list(output.token_ids), prompt_of(60, seed=seed)
        assert len(tokens) == 300
        assert output.logprobs is not None
        for at in (0, 77, 150, 299):
            # The same place, from the whole context as a new prompt.
            once = SamplingParams(temperature=0, max_new_tokens=1, return_logprob=True, top_logprobs_num=20)
            (other,) = with_options(llm).generate(token_ids=[start + tokens[:at]], sampling=once)
            top = first(other)
            worst = max(worst, abs(output.logprobs[at].logprob - top.get(tokens[at], np.inf)))
    assert worst <= TOLERANCE


def test_a_row_that_is_not_finite_ends_alone(llm: LLM, tmp_path: Path) -> None:
    """One token's embedding is NaN; prompts with it in the midst of common beginnings run beside others."""
    write_checkpoint(tmp_path, SMALL)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][1000] = torch.nan
    save_file(tensors, file)
    greedy = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True, logit_bias={1000: -1e6})
    sound = [[t % 1000 for t in prompt_of(n, seed=n)] for n in (9, 64, 200, 70, 300, 33)]
    sound += [[*sound[2][:150], *sound[3]]] * 2
    bad = [[*prompt[:-1], 1000, prompt[-1]] for prompt in sound]
    wanted = [o.token_ids for o in with_options(llm).generate(token_ids=sound, sampling=greedy)]
    broken = LLM(tmp_path, plan=llm.plan)
    for _ in range(2):
        asked = [prompt for pair in zip(bad, sound, strict=True) for prompt in pair]
        outputs = broken.generate(token_ids=asked, sampling=greedy)
        for failed in outputs[::2]:
            assert failed.finish_reason == "error"
            assert "not finite" in (failed.error or "")
        equal = [output.token_ids == tokens for output, tokens in zip(outputs[1::2], wanted, strict=True)]
        assert all(output.finish_reason == "length" for output in outputs[1::2])
        # Other batches round otherwise: near ties may fall the other way.
        assert sum(equal) >= len(equal) - 2
