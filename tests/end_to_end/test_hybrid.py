"""Gated delta nets beside attention against transformers in fp32: tiny random Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybrids import LENGTHS, MODELS, PLAN, model_of
from reference import Generation, Recorder, compare, expected, prompt_of
from small_configs import QWEN3
from transformers import cache_utils

from makeready.engine.llm import LLM, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.engine.sequence import TokenSequence
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.passes import REWRITES
from makeready.graphs.plan.artifact import load as load_plan
from makeready.graphs.plan.artifact import save as save_plan
from makeready.graphs.plan.check import check_plan
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Split
from makeready.graphs.planner.compile import compile_plan


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, name)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in LENGTHS:
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 6)
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize("disabled", [*((name,) for name in REWRITES), tuple(REWRITES)], ids="-".join)
def test_every_pass_on_or_off(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = model_of(
        tmp_path, "next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )
    recorder = Recorder(LLM(tmp_path, **PLAN, disabled_passes=disabled))
    prompt = prompt_of(30, 131)
    compare(recorder.generate([prompt], 4)[0], expected(model, prompt, 4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hybrid")
    return folder, model_of(folder, "next")


class Poisoned(Recorder):
    """Fills whatever no sequence holds with NaN before every step; few pages send sequences back."""

    def __init__(self, folder: Path, *, pages: int | None = None, **options: Any) -> None:
        super().__init__(LLM(folder, **PLAN))
        executable: Any = self.llm.engine.executable
        executable.asynchronous = True
        if pages is not None:
            executable.pages = pages
        self.llm.engine = Engine(executable, SchedulerOptions(**options))
        recorded = executable.launch

        def launch(*arguments: Any, **cut: Any) -> Any:
            executable.poison()
            for group in executable.plan.kv.groups:
                free = self.llm.engine.pools.by_name[group.name]._free
                for part in group.parts:
                    executable._tensors[part.name][free] = float("nan")
            return recorded(*arguments, **cut)

        executable.launch = launch

    def follow(self) -> list[TokenSequence]:
        """The sequences that are submitted from now on."""
        submitted, submit = [], self.llm.engine.submit

        def follow(sequence: TokenSequence) -> None:
            submitted.append(sequence)
            submit(sequence)

        self.llm.engine.submit = follow  # type: ignore[method-assign]
        return submitted


def check(made: Sequence[Generation], wanted: Sequence[Generation]) -> None:
    for ours, theirs in zip(made, wanted, strict=True):
        compare(ours, theirs)


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65])
def test_prompts_may_be_cut_anywhere(size: int, tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    prompts = [prompt_of(length, 131, seed=size) for length in ((70, 9) if size == 1 else (150, 64, 2, 67))]
    made = Poisoned(folder, chunked_prefill_size=size).generate(prompts, 4)
    check(made, [expected(model, prompt, 4) for prompt in prompts])


def test_prefixes_are_shared_wherever_a_prompt_ends(tiny: tuple[Path, Any]) -> None:
    """Each prompt parts from the one before it at another place, at page borders and within pages."""
    folder, model = tiny
    recorder, stem = Poisoned(folder), prompt_of(60, 131)
    submitted = recorder.follow()
    for end in (60, 59, 41, 40, 39, 33, 32, 31, 17, 16, 15, 9, 8, 7, 1, 60):
        prompt = [*stem[:end], 5, end]
        made = recorder.generate([prompt], 3)
        check(made, [expected(model, prompt, 3)])
    assert sum(sequence.cached_tokens > 0 for sequence in submitted) > 4


def test_rows_that_are_sent_back_begin_again(tiny: tuple[Path, Any]) -> None:
    """Prompts that share beginnings, in few pages: retraction and eviction, chunks beside decoding rows."""
    folder, model = tiny
    stems = [prompt_of(50, 131, seed=seed) for seed in range(2)]
    prompts = [[*stems[i % 2][: 6 * i], i, 3] for i in range(8)]
    recorder = Poisoned(
        folder, pages=20, chunked_prefill_size=13, new_token_ratio=0.0, min_new_token_ratio=0.0
    )
    sequences = recorder.follow()
    wanted = [expected(model, prompt, 30).tokens for prompt in prompts]
    # With a stop token, which does not come, nobody knows how long outputs will be.
    never = min(set(range(131)).difference(*wanted))
    made = recorder.generate(prompts, 30, stop_token_ids=[never])
    assert sum(sequence.retractions for sequence in sequences) > 0
    assert sum(sequence.cached_tokens for sequence in sequences) > 30
    assert [ours.tokens for ours in made] == wanted  # logits of what ran twice are there twice


def test_a_plan_says_what_states_take(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    """By hand: three layers of 4 heads' states and 3 inputs of a convolution, 2 blocks a row and the first.

    Where memory holds more than the rows' contexts, each further context brings a snapshot.
    """
    plan = LLM(tiny[0], **PLAN).plan
    assert load_plan(save_plan(plan, tmp_path / "plan")) == plan
    (state,) = plan.kv.states
    convolved = 2 * 2 * 20 + 4 * 12
    assert state.block_bytes == 3 * 4 * (4 * 20 * 12 + 3 * convolved)
    blocks = 2 * PLAN["max_rows"] + 1
    bounded = plan.memory_analysis()["kv"]["bounded"]
    assert bounded == {
        "state": {"blocks": blocks, "block_bytes": state.block_bytes, "bytes": blocks * state.block_bytes}
    }
    assert f"of state ({blocks} blocks of" in plan.as_text()
    assert "4 rows in flight, 0 snapshots)" in plan.as_text()
    whole = 32 * plan.kv.page_bytes  # of a context of 256
    few = plan.memory.fixed + plan.kv.page_bytes + 4 * whole + blocks * state.block_bytes
    assert plan.pages_in(few) == 1 + 4 * 32
    assert plan.pages_in(few - 1) == 4 * 32, "the last row's states come with its last page"
    more = few + 3 * (whole + state.block_bytes)
    assert plan.kv.split(plan.pages_in(more), plan.limits) == Split(4, 3)
    least = plan.memory.fixed + 2 * plan.kv.page_bytes + 3 * state.block_bytes
    assert plan.pages_in(least) == 2
    with pytest.raises(
        PlanError, match=r"states of one row .*; free some or compile with kv\.state_dtype=bfloat16"
    ):
        plan.pages_in(least - 1)
    kept = LLM(tiny[0], **PLAN, kv_state_snapshots=7).plan
    assert kept.kv.split(1 + 4 * 32, plan.limits) == Split(4, 7)
    with pytest.raises(
        PlanError, match=r"and of 7 snapshots .*; free some or lower kv\.state_snapshots=7 or"
    ):
        kept.pages_in(least)


@pytest.mark.parametrize("name", MODELS)
def test_states_of_16_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers with states that are rounded behind the prompt and behind every token, as steps leave them."""
    model = model_of(tmp_path, name)
    # One bucket and no cache: a prompt is one step, however long.
    plan, alone = {**PLAN, "max_extend_buckets": 1}, SchedulerOptions(prefix_cache=False)
    recorder = Recorder(LLM(tmp_path, **plan, kv_state_dtype="bfloat16", scheduler=alone))
    parts = recorder.llm.plan.kv.states[0].parts
    kept = {part.name.rpartition(".")[2]: part.dtype for part in parts}
    assert kept == {"conv": "float32", "state": "bfloat16"}
    keep = cache_utils.LinearAttentionLayer.update_recurrent_state

    def rounded(self: Any, recurrent_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return keep(self, recurrent_states.bfloat16().float(), *arguments, **options)

    monkeypatch.setattr(cache_utils.LinearAttentionLayer, "update_recurrent_state", rounded)
    errors = []
    for length in LENGTHS[:-1]:  # the longest takes two steps
        prompt = prompt_of(length, 131)
        (ours,), theirs = recorder.generate([prompt], 6), expected(model, prompt, 6)
        compare(ours, theirs, 1e-2)
        errors += [abs(x - y).max() / abs(y).max() for x, y in zip(ours.logits, theirs.logits, strict=True)]
    # A number on the edge may be rounded to its other neighbour; where nothing is rounded, half are off by 2e-3.
    assert np.median(errors) < 5e-4


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"kv_state_dtype": "bfloat16"}, r"kv\.state_dtype=bfloat16 is for models with recurrent states"),
        ({"kv_state_snapshots": 3}, r"kv\.state_snapshots=3 is for models with recurrent states"),
        (
            {"kv_state_dtype": "float16"},
            r"kv\.state_dtype=float16 is not supported; choose one of float32, bfloat16",
        ),
        ({"kv_state_snapshots": -1}, r"kv\.state_snapshots=-1 must be a whole number of at least 0"),
    ],
)
def test_what_is_asked_of_states_that_are_not_there_is_refused(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        compile_plan(DummyCheckpoint(dict(QWEN3)), target="cpu", **asked)


@pytest.mark.parametrize("field", ["row_slot", "query_len", "grow_at"])
def test_a_plan_that_finds_states_elsewhere_is_refused(field: str, tiny: tuple[Path, Any]) -> None:
    """Blocks of states are named by the fields of their own group alone, which have their numbers."""
    plan = LLM(tiny[0], **PLAN).plan
    decode = plan.programs["decode"]
    at = next(i for i, launch in enumerate(decode.launches) if launch.op == "recurrent_delta_rule")
    launches = [*decode.launches]
    assert launches[at].operands["state_in"] == "state_in.state"
    launches[at] = replace(launches[at], operands={**launches[at].operands, "state_in": field})
    changed = replace(plan, programs={**plan.programs, "decode": replace(decode, launches=tuple(launches))})
    assert check_plan(plan) is plan
    with pytest.raises(PlanError, match=f"recurrent_delta_rule reads '{field}' as state_in"):
        check_plan(changed)
