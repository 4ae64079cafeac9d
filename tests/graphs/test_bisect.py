"""A fault planted into one launch of one executable is the one that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable import bisect as bisection
from makeready.graphs.executable.bisect import Found, as_references, bisect, pages_needed
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PROMPT = [(7 * i) % 96 for i in range(1, 30)]
LIMITS: dict[str, Any] = {"max_rows": 3, "max_tokens": 24, "context_len": 64, "page_size": 8}

Change = Callable[[dict[str, Any], tuple[Any, ...]], None]


@pytest.fixture(scope="module", autouse=True)
def large_weights() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield


def compare(plan: Plan, checkpoint: Any, count: int = 4, rows: int = 1, **planted: Any) -> Found:
    pages = pages_needed(plan, len(PROMPT), count, rows)
    reference = CpuExecutable(as_references(plan), checkpoint, pages=pages)
    device = CpuExecutable(plan, checkpoint, pages=pages)
    for bucket in plan.buckets:  # looks its kernels up
        reference._program(bucket)
        with pytest.MonkeyPatch.context() as patch:
            if planted:
                patch.setattr(registry, "find", faulty(plan, bucket.phase, **planted))
            device._program(bucket)
    return bisect(device, reference, PROMPT, count, rows=rows)


def faulty(plan: Plan, phase: str, *, at: dict[str, int], change: Change) -> Any:
    """``registry.find``, but the launches ``at`` by kind of step change what they made."""
    found, launches = registry.find, plan.programs[phase].launches
    count = iter(range(len(launches)))

    def find(op: str, name: str, target: str) -> registry.Kernel:
        kernel, number = found(op, name, target), next(count)
        if number != at.get(phase):
            return kernel
        launch = launches[number]

        def bind(operands: Any, results: Any, attrs: Any) -> Callable[[], None]:
            usual = kernel.bound(operands, results, attrs)
            contract = CONTRACTS[launch.op]
            named = dict(zip((o.name for o in contract.inputs), operands, strict=True))

            def call() -> None:
                usual()
                change(named, results)

            return call

        return registry.Kernel(op, name, target, kernel.run, bind=bind)

    return find


def place(plan: Plan, phase: str, op: str, nth: int) -> int:
    return [i for i, launch in enumerate(plan.programs[phase].launches) if launch.op == op][nth]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weight_dtype": "float32"},
        {"quant": "fp8", "kv_dtype": "float8_e4m3fn"},
        {"kv_dtype": "int4_per_token_head"},
    ],
)
def test_sound_kernels_agree_with_the_references(fields: dict[str, Any]) -> None:
    checkpoint = DummyCheckpoint(dict(CONFIG))
    plan = compile_plan(checkpoint, **LIMITS, **fields)
    found = compare(plan, checkpoint, rows=2)
    assert found.difference is None
    assert found.steps == 3 + 3  # chunks of 12 tokens of 29, then decode steps
    counts = {phase: len(program.launches) for phase, program in plan.programs.items()}
    assert found.launches == 3 * counts["extend"] + 3 * counts["decode"]
    assert 0 < found.nearest < 1
    assert len(found.tokens) == 4


def scale(named: dict[str, Any], results: tuple[Any, ...]) -> None:
    results[0].mul_(1.01)


def last_row(named: dict[str, Any], results: tuple[Any, ...]) -> None:
    results[0][-1] += 1


def another_token(named: dict[str, Any], results: tuple[Any, ...]) -> None:
    results[0][0] = (results[0][0] + 1) % 96


def lost_key(named: dict[str, Any], results: tuple[Any, ...]) -> None:
    slot = int(named["kv_slot"][0])
    named["k_cache"].flatten(0, 1)[slot].zero_()


def nothing_finite(named: dict[str, Any], results: tuple[Any, ...]) -> None:
    results[0][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("phase", "op", "nth", "change", "step", "name"),
    [
        ("extend", "silu_mul", 1, scale, 0, "y"),
        ("decode", "silu_mul", 2, scale, 2, "y"),
        ("decode", "decode_attention", 0, scale, 2, "y"),
        ("extend", "extend_attention", 2, nothing_finite, 0, "y"),
        ("decode", "norm_rope_kv_write", 1, lost_key, 2, "k_cache"),
        ("decode", "sample", 0, another_token, 2, "tokens"),
        ("extend", "locate", 0, last_row, 1, "ids"),
    ],
)
def test_the_planted_fault_is_named(
    phase: str, op: str, nth: int, change: Change, step: int, name: str
) -> None:
    checkpoint = DummyCheckpoint(dict(CONFIG))
    plan = compile_plan(checkpoint, **LIMITS)
    at = place(plan, phase, op, nth)
    found = compare(plan, checkpoint, at={phase: at}, change=change)
    difference = found.difference
    assert difference is not None
    assert (difference.what, difference.at, difference.launch.op) == ("result", at, op)
    assert (difference.bucket.phase, difference.name) == (phase, name)
    assert difference.error > difference.allowed
    layered = op not in ("locate", "sample")
    assert difference.layer == (f"layer {nth}" if layered else {"locate": "embedding", "sample": "head"}[op])
    text = difference.sentence(plan)
    assert f"launch {at + 1} of {len(plan.programs[phase].launches)}: {op}, {difference.layer}" in text
    for operand, value in difference.launch.operands.items():
        assert f"operand {operand} = {value}: " in text


def test_a_wrong_parameter_is_no_wrong_kernel() -> None:
    checkpoint = DummyCheckpoint(dict(CONFIG))
    plan = compile_plan(checkpoint, **LIMITS)
    pages = pages_needed(plan, len(PROMPT), 1, 1)
    device, reference = (CpuExecutable(p, checkpoint, pages=pages) for p in (plan, as_references(plan)))
    bucket = plan.buckets[0]
    (name,) = (w.param.name for w in plan.weights if "layers.1" in w.param.name and "k_norm" in w.param.name)
    device.poke(bucket, name, device.peek(bucket, name)[::-1].copy() + 1)
    difference = bisect(device, reference, PROMPT).difference
    assert difference is not None
    assert (difference.what, difference.layer, difference.name) == ("parameter", "layer 1", "k_norm")
    assert name in difference.sentence(plan)


def test_launches_that_disturb_each_other_are_found_by_halving() -> None:
    checkpoint = DummyCheckpoint(dict(CONFIG))
    plan = compile_plan(checkpoint, **LIMITS)
    pages = pages_needed(plan, len(PROMPT), 1, 1)

    class Disturbed(CpuExecutable):
        """Launch 20 of a program gives something else unless there is a pause before it."""

        def walk(self, bucket: Any, step: Any, stops: Any = None) -> Iterator[int]:
            launches = plan.programs[bucket.phase].launches
            wanted = set(range(len(launches) + 1) if stops is None else stops)
            for done in super().walk(bucket, step):
                if done == 20 and 19 not in wanted:
                    for name in launches[19].results.values():
                        self.poke(bucket, name, self.peek(bucket, name) ^ 0x400000)
                if done in wanted:
                    yield done

        def launch(self, bucket: Any, step: Any) -> Any:
            list(self.walk(bucket, step, (len(plan.programs[bucket.phase].launches),)))
            return self

        def wait(self) -> None:
            pass

    device = Disturbed(plan, checkpoint, pages=pages)
    difference = bisect(
        device, CpuExecutable(as_references(plan), checkpoint, pages=pages), PROMPT
    ).difference
    assert difference is not None
    assert (difference.what, difference.at) == ("order", 19)
    assert "one by one" in difference.sentence(plan)


@pytest.mark.parametrize(
    ("count", "rows", "sentence"), [(60, 1, "exceed the plan's context of 64"), (1, 4, "rows go from 1 to 3")]
)
def test_what_does_not_fit_is_refused(count: int, rows: int, sentence: str) -> None:
    plan = compile_plan(DummyCheckpoint(dict(CONFIG)), **LIMITS)
    with pytest.raises(PlanError, match=sentence):
        pages_needed(plan, len(PROMPT), count, rows)


HYBRID = {
    **CONFIG,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_only_layers": [0, 1, 2],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
}


def test_states_that_a_step_writes_over_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is run twice, launch by launch and at once: the second time from the states that it began with."""
    checkpoint = DummyCheckpoint(dict(HYBRID))
    plan = compile_plan(checkpoint, **LIMITS)
    assert compare(plan, checkpoint, rows=2).difference is None
    monkeypatch.setattr(bisection._Pair, "_states", lambda self: {})
    assert compare(plan, checkpoint, rows=2).difference is not None


def test_a_fault_in_a_recurrence_is_found() -> None:
    checkpoint = DummyCheckpoint(dict(HYBRID))
    plan = compile_plan(checkpoint, **LIMITS)
    at = place(plan, "decode", "recurrent_delta_rule", 1)

    def forgets(named: dict[str, Any], results: tuple[Any, ...]) -> None:
        named["state"][int(named["state_out"][0])] *= 0.9

    found = compare(plan, checkpoint, at={"decode": at}, change=forgets).difference
    assert found is not None
    assert (found.what, found.at, found.name) == ("result", at, "state")
