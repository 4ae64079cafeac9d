"""Drafts on a GPU: beside rows without and within grammars, whose drafts the host reads before the model has run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from smollm2 import smollm2
from test_speculative_grammar import LIMITS, PROMPTS, assert_valid, sampling

from makeready.engine.llm import LLM, Output, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.graphs.plan.targets import TARGETS


@pytest.fixture(scope="module", params=[True, False])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Under a deterministic plan, and under an ordinary one, whose attention is that of verify_triton.py."""
    major, minor = torch.cuda.get_device_capability()
    target = next((t.name for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if target is None:
        pytest.skip(f"no target for compute capability {major}.{minor}")
    limits: dict[str, Any] = LIMITS | {"page_size": 16, "weight_dtype": "bfloat16", "kv_memory_gib": 1}
    asked = {"method": "ngram", "num_draft_tokens": 5}
    with LLM(
        smollm2(), target=target, deterministic=request.param, speculative=asked,
        max_decode_buckets=2, max_extend_buckets=3, **limits,
    ) as made:  # fmt: skip
        yield made


def outputs(llm: LLM, temperature: float, **options: Any) -> list[Output]:
    llm.engine = Engine(llm.engine.executable, SchedulerOptions(**options))
    made = llm.generate(PROMPTS, sampling(temperature))
    llm.engine.pools.check()
    return made


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_grammars_hold_and_drafts_come_true(llm: LLM, temperature: float, overlap: bool) -> None:
    plain = outputs(llm, temperature, overlap=overlap, speculation="never")
    made = outputs(llm, temperature, overlap=overlap, speculation="always")
    assert_valid(made)
    if llm.plan.options.deterministic:
        assert [o.token_ids for o in made] == [o.token_ids for o in plain]
    assert sum(output.meta_info.get("spec_accept_token_num", 0) for output in made[:4]) > 4
