"""What plan.deterministic asks of the planner: the same ops in every phase, kernels that say they are invariant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.passes.expand import expand
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner import compile as stages
from makeready.graphs.planner.compile import Request, compile_plan, trace_checkpoint
from makeready.graphs.planner.ir import Program
from makeready.graphs.planner.verify import VerificationError, verify_alike
from makeready.kernels import registry

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
LIMITS = {"max_rows": 4, "max_tokens": 24, "context_len": 96, "max_logprob_tokens": 8}


def checkpoint() -> DummyCheckpoint:
    return DummyCheckpoint(dict(CONFIG))


def programs(**fields: Any) -> dict[str, Program]:
    traced = trace_checkpoint(checkpoint(), Request(**LIMITS, **fields))
    return dict(traced.lower().programs)


def test_all_phases_run_the_same_calls():
    made = programs(deterministic=True)
    assert set(made) == {"decode", "extend", "input_logprobs"}
    for program in made.values():
        assert "decode_attention" not in {call.op for call in program.calls}
    attention = next(call for call in made["decode"].calls if call.op == "extend_attention")
    assert {"query_start", "query_len"} <= set(attention.operands)


def test_steps_that_verify_drafts_run_them_too_and_say_otherwise_what_they_run():
    made = programs(deterministic=True, speculative={"method": "ngram"})
    assert set(made) == {"decode", "extend", "input_logprobs", "verify"}
    ops = {name: [call.op for call in program.calls] for name, program in made.items()}
    assert [op for op in ops["verify"] if op not in ("draft_ngram", "accept_drafts")] == ops["decode"]


def test_phases_that_differ_are_found():
    with pytest.raises(VerificationError, match=r"decode and extend compute tokens differently: .*attention"):
        verify_alike(programs())
    made = programs(deterministic=True)
    calls = made["input_logprobs"].calls
    left = tuple(call for call in calls if call.op != "embedding")
    assert len(left) == len(calls) - 1
    shorter = replace(made["input_logprobs"], calls=left)
    with pytest.raises(VerificationError, match="decode and input_logprobs"):
        verify_alike({**made, "input_logprobs": shorter})


def test_the_planner_looks(monkeypatch):
    monkeypatch.setattr(stages, "expand", lambda program, **_: expand(program))
    with pytest.raises(VerificationError, match="compute tokens differently"):
        programs(deterministic=True)


@pytest.mark.parametrize(
    "fields", [{}, {"weight_dtype": "float32"}, {"quant": "fp8"}, {"quant": "fp8_block"}]
)
def test_every_kernel_is_invariant_and_the_same_in_all_phases(fields):
    plan = compile_plan(checkpoint(), deterministic=True, **LIMITS, **fields)
    used: dict[str, set[str]] = {}
    for program in plan.programs.values():
        for launch in program.launches:
            used.setdefault(launch.op, set()).add(launch.kernel)
            assert registry.find(launch.op, launch.kernel, "cpu").invariant, f"{launch.op}/{launch.kernel}"
    assert all(len(names) == 1 for names in used.values()), used


def test_an_ordinary_plan_takes_no_kernel_that_is_for_these():
    for program in compile_plan(checkpoint(), **LIMITS).programs.values():
        for launch in program.launches:
            assert registry.find(launch.op, launch.kernel, "cpu").ordinary


def test_an_op_without_an_invariant_kernel_is_refused(monkeypatch):
    known = [replace(k, invariant=False) for k in registry._KERNELS["cpu", "norm_rope_kv_write"]]
    monkeypatch.setitem(registry._KERNELS, ("cpu", "norm_rope_kv_write"), known)
    with pytest.raises(
        PlanError, match=r"norm_rope_kv_write has no invariant kernel .* without plan\.deterministic"
    ):
        compile_plan(checkpoint(), deterministic=True, **LIMITS)


def test_it_is_part_of_the_plan():
    ordinary, deterministic = (compile_plan(checkpoint(), deterministic=d, **LIMITS) for d in (False, True))
    assert deterministic.options.deterministic
    assert not ordinary.options.deterministic
    assert ordinary.digest != deterministic.digest
