"""A method of speculation from outside the packages: it is found by its name, and changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.models.family import Model
from makeready.graphs.plan.spec import Limits
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.speculative import base

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Repeats:
    """A toy: what followed the last token follows it again."""

    name: str = "toy_repeats"
    own: tuple[str, ...] = ()
    second: bool = False

    def check(self, asked: Speculative) -> None: ...

    def model(self, target: Model, setting: base.Setting) -> Model:
        return target

    def guess(self, model: Model, inputs: Inputs, limits: Limits, asked: Speculative) -> base.Guesses:
        short = replace(asked, ngram_min=1, ngram_max=1)
        return base.known("ngram").guess(model, inputs, limits, short)


@pytest.fixture
def repeats() -> Iterator[str]:
    yield base.method(Repeats()).name
    del base._METHODS["toy_repeats"]


def test_it_guesses(repeats: str) -> None:
    checkpoint = DummyCheckpoint(CONFIG)
    limits: dict[str, Any] = {"max_rows": 2, "max_tokens": 16, "context_len": 48, "page_size": 8}
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True, logit_bias={5: 90.0})
    (plain,) = LLM(checkpoint, compile_plan(checkpoint, **limits)).generate(
        token_ids=[[7, 5, 5]], sampling=params
    )
    plan = compile_plan(checkpoint, **limits, speculative={"method": repeats, "num_draft_tokens": 3})
    llm = LLM(checkpoint, plan, scheduler=SchedulerOptions(speculation="always"))
    (made,) = llm.generate(token_ids=[[7, 5, 5]], sampling=params)
    assert made.token_ids == plain.token_ids
    assert made.meta_info["spec_accept_length"] > 3
