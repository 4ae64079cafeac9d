"""A kind of step from outside the packages, by its two registrations alone: decode that reports the entropy.

What it touches is what CONTRIBUTING's table says: a planner's half, an engine's half, and here an op of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.steps import base as engine_steps
from makeready.engine.steps.generate import Generate
from makeready.graphs.inspect.html import plan_html
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.plan import artifact
from makeready.graphs.plan.buckets import Shapes
from makeready.graphs.plan.spec import Limits, StepSpec, fields
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.steps import base as graphs_steps
from makeready.graphs.steps.generate import Decode, run, sample, sequence_fields, token_results
from makeready.kernels.contract import CONTRACTS, contract
from makeready.kernels.spec import ROWS

NAME = "toy_entropy"
LIMITS = {"max_rows": 3, "max_tokens": 16, "context_len": 64, "page_size": 8, "weight_dtype": "float32"}
PROMPTS = [[3, 5, 8, 13], [21, 34], [55, 89, 1, 1, 2, 4, 6]]


@dataclass(frozen=True)
class PlannersHalf:
    """Graphs' half: one more result than decode steps have, and how it is computed."""

    name: str = NAME

    def spec(self, limits: Limits, request: Any, cache: Any) -> StepSpec:
        rows, reported = limits.max_rows, fields(("entropy", (ROWS,), "float32", 0.0))
        return StepSpec(rows, rows, 1, sequence_fields(limits, cache, ROWS), token_results(limits) + reported)

    def slot(self, limits: Limits, cache: Any) -> tuple[Any, ...]:
        return Decode().slot(limits, cache)

    def trace(self, model: Any, inputs: Inputs, limits: Limits, request: Any) -> Mapping[str, torch.Tensor]:
        logits, i = run(model, inputs, limits)
        return sample(logits, i, limits) | {"entropy": CONTRACTS[NAME](logits)}

    def shapes(self, sizing: Any) -> Shapes:
        return Shapes(rows=sizing.traffic.decode_rows, count=2)


@dataclass(frozen=True)
class EnginesHalf(Generate):
    """The engine's half: asked before decode steps, it takes their batches and keeps what it is told."""

    name: str = NAME
    order: int = -1
    heard: dict[TokenSequence, list[float]] = field(default_factory=dict)

    def takes(self, decoding: list[Any], chunks: list[Any]) -> bool:
        return not chunks

    def tokens(self, batch: Any, results: Mapping[str, np.ndarray]) -> Iterable[tuple[TokenSequence, int]]:
        for row, sequence in enumerate(batch.decoding):
            if sequence.finish_reason is None:
                self.heard.setdefault(sequence, []).append(float(results["entropy"][row]))
        return super().tokens(batch, results)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[EnginesHalf]:
    """Both halves and the op, for as long as a test lasts."""
    graphs_steps.step_kinds(), engine_steps.step_kinds({})  # what registers itself has done so
    for module in (graphs_steps, engine_steps):
        monkeypatch.setattr(module, "_KINDS", dict(module._KINDS))

    @contract("logits[R,V]:float32 -> entropy[R]:float32", flops="4*R*V")
    def toy_entropy(logits: torch.Tensor) -> torch.Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    graphs_steps.step_kind(PlannersHalf())
    yield engine_steps.step_kind(EnginesHalf())
    del CONTRACTS[NAME]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=97,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    made.save_pretrained(folder)
    return folder, made


def test_it_is_planned_stored_and_run(
    model: tuple[Path, Any], registered: EnginesHalf, tmp_path: Path
) -> None:
    folder, reference = model
    compiled = compile_plan(folder, **LIMITS)
    plan = artifact.load(artifact.save(compiled, tmp_path / "plan"))
    assert plan.steps == compiled.steps
    assert {f.name for f in plan.steps[NAME].results} - {f.name for f in plan.steps["decode"].results} == {
        "entropy"
    }
    assert [b.rows for b in plan.buckets if b.phase == NAME][-1] == LIMITS["max_rows"]
    llm = LLM(folder, tmp_path / "plan")
    outputs = llm.generate(
        token_ids=PROMPTS, sampling=SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    )
    heard = {tuple(sequence.prompt): told for sequence, told in registered.heard.items()}
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0].double()
        assert output.token_ids == tuple(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
        wanted = torch.distributions.Categorical(logits=logits).entropy()[len(prompt) : len(ids) - 1]
        # The first token comes from a step that has the prompt; then each is of its own kind of step.
        told = heard[tuple(prompt)]
        assert len(told) >= 3
        assert told == pytest.approx(wanted[-len(told) :].tolist(), abs=1e-4)


def test_pictures_know_it(model: tuple[Path, Any], registered: EnginesHalf) -> None:
    plan = compile_plan(model[0], **LIMITS)
    assert NAME in plan.as_text()
    page = plan_html(plan, 64)
    assert NAME in page
