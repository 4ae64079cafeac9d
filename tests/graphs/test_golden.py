"""Golden tokens: predicted by the interpreter, and refused where anything is not as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_programs import LIMITS, QWEN3, dummy

from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable import golden
from makeready.graphs.executable.golden import Golden
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.compile import compile_plan

PROMPT = (3, 1, 4, 1, 5)
COUNT = 8


@pytest.fixture(scope="module")
def checkpoint():
    return dummy(QWEN3)


@pytest.fixture(scope="module")
def plan(checkpoint):
    return compile_plan(checkpoint, **LIMITS)


@pytest.fixture(scope="module")
def predicted(plan, checkpoint) -> Golden:
    told: list[tuple[int, int]] = []
    made = golden.predict(plan, checkpoint, PROMPT, COUNT, progress=lambda *counts: told.append(counts))
    assert told == [(n, COUNT) for n in range(1, COUNT + 1)]
    return made


@pytest.fixture(scope="module")
def executable(plan, checkpoint):
    return load_executable(plan, checkpoint)


def test_predicted_tokens_are_those_of_the_engine(plan, checkpoint, predicted):
    params = SamplingParams(
        temperature=0, max_new_tokens=COUNT, ignore_eos=True, return_logprob=True, top_logprobs_num=2
    )
    output = LLM(checkpoint, plan).generate(token_ids=[list(PROMPT)], sampling=params)[0]
    assert tuple(step.token for step in predicted.steps) == output.token_ids
    # Margins are differences of logits over one deviation: in proportion to those of log-probabilities.
    gaps = np.array([entry.top[0][1] - entry.top[1][1] for entry in output.logprobs])
    margins = np.array([step.margin for step in predicted.steps])
    scale = gaps / margins
    assert scale.std() < 0.2 * scale.mean()
    assert predicted.decided == sum(not step.near for step in predicted.steps) > 0


def test_the_executable_is_as_predicted_after_other_work(predicted, checkpoint, executable):
    for _ in range(2):
        golden.check(predicted, executable, checkpoint)


def test_a_prediction_survives_the_disk(predicted, tmp_path):
    path = golden.save(predicted, tmp_path)
    assert golden.load(tmp_path) == predicted
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_another_token_is_refused_unless_it_was_near(predicted, checkpoint, executable, plan):
    class Wrong:
        """The executable, but for the token that its third step gives."""

        def __init__(self, token: int) -> None:
            self.plan, self.pages, self._steps, self._token = plan, executable.pages, 0, token
            self.write_slot = executable.write_slot

        def launch(self, bucket, step):
            pending = executable.launch(bucket, step)
            self._steps += 1
            if self._steps == 3:
                pending.wait()["tokens"][0] = self._token
            return pending

    step = predicted.steps[2]
    other = (step.token + 1) % plan.config["vocab_size"]
    margin = f"{step.margin:.2f}"
    with pytest.raises(
        PlanError, match=rf"failed at token 3 of 8: .* gives {other}, .* {step.token} by .* {margin}"
    ):
        golden.check(predicted, Wrong(other), checkpoint)
    near = replace(step, near=(other,))
    steps = (*predicted.steps[:2], near, *predicted.steps[3:])
    golden.check(replace(predicted, steps=steps), Wrong(other), checkpoint)


@pytest.mark.parametrize(
    ("logits", "token", "near"),
    [([0.0, 3.0, 1.0, -4.0], 1, ()), ([5.0, 5.0, 1.0, 0.0], 0, (1,)), ([2.0, 2.95, 3.0, -90.0], 2, (1, 0))],
)
def test_a_step_names_what_is_as_good(logits, token, near):
    row = np.array(logits, np.float32)
    step = golden._step(row)
    assert (step.token, step.near) == (token, near)
    best = np.sort(row)[::-1]
    assert step.margin == pytest.approx((best[0] - best[1]) / row.std())


def test_other_weights_are_refused(predicted, plan):
    other = DummyCheckpoint(dict(QWEN3), None, seed=1)
    executable = load_executable(plan, other)
    with pytest.raises(PlanError, match=r"weights in dummy are not those that golden\.json was made for"):
        golden.check(predicted, executable, other)


def test_weights_are_told_apart_by_any_tensor(plan, checkpoint):
    seen = {golden.weights_checksum(plan, checkpoint)}
    read = type(checkpoint).read
    for name in checkpoint.tensors:

        class Changed(DummyCheckpoint):
            changed = name

            def read(self, name, rows=None):
                made = read(self, name, rows)
                return made + 1 if name == self.changed else made

        other = Changed(dict(QWEN3), {n: i.shape for n, i in checkpoint.tensors.items()}, 0)
        seen.add(golden.weights_checksum(plan, other))
    assert len(seen) == len(checkpoint.tensors) + 1


def test_plans_that_compute_the_same_share_a_prediction(predicted, checkpoint):
    alike = compile_plan(checkpoint, **(LIMITS | {"max_rows": 2, "max_decode_buckets": 1}))
    golden.check(predicted, load_executable(alike, checkpoint), checkpoint)
    other = compile_plan(checkpoint, **(LIMITS | {"weight_dtype": "bfloat16"}))
    with pytest.raises(PlanError, match="made for a plan of another checkpoint or other dtypes"):
        golden.check(predicted, load_executable(other, checkpoint), checkpoint)


def test_a_run_that_does_not_fit_is_refused(predicted, plan, checkpoint):
    with pytest.raises(PlanError, match=r"golden run of 60 \+ 8 tokens does not fit a plan of 16 tokens"):
        golden.predict(plan, checkpoint, [1] * 60, 8)
    small = load_executable(plan, checkpoint, kv_bytes=2 * plan.kv.page_bytes)
    long = replace(predicted, prompt=tuple(range(10)), steps=predicted.steps * 2)
    with pytest.raises(PlanError, match=r"golden run needs . KV pages, there are 1"):
        golden.check(long, small, checkpoint)


def test_a_prediction_that_proves_nothing_is_refused(plan, checkpoint, monkeypatch):
    monkeypatch.setattr(golden, "TIE", 1e9)
    with pytest.raises(PlanError, match="all 2 golden tokens are near ties"):
        golden.predict(plan, checkpoint, PROMPT, 2)


@pytest.mark.parametrize("change", ["cut", "version", "field", "list"])
def test_damaged_files_are_refused(predicted, tmp_path, change):
    path = golden.save(predicted, tmp_path)
    data = json.loads(path.read_text())
    made = {
        "cut": path.read_text()[:-20],
        "version": json.dumps({**data, "schema": 99}),
        "field": json.dumps({**data, "extra": 1}),
        "list": "[]",
    }
    path.write_text(made[change])
    with pytest.raises(PlanError, match=r"golden\.json cannot be used .*; compile with golden=true again"):
        golden.load(tmp_path)


def test_a_plan_without_one_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"holds no golden\.json; compile the plan with golden=true"):
        golden.load(tmp_path)
