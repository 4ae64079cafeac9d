"""Deterministic plans for GPUs: a call runs the same kernels, with the same arithmetic, in every bucket and phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import small_programs

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.cuda import emit, offers
from makeready.graphs.planner.cuda.aot import Compiled, Kernel, MapLayout
from makeready.kernels import registry
from makeready.kernels.device import Scalar
from makeready.kernels.elementwise import silu

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LIMITS: dict[str, Any] = {
    "target": "sm_90a",
    "max_rows": 100,  # more than 64, and an odd number of tokens, change what kernels are compiled for
    "max_tokens": 1000,
    "context_len": 1024,
    "max_logprob_tokens": 300,
    "max_decode_buckets": 3,
    "max_extend_buckets": 3,
    "traffic": Traffic(decode_rows={1: 1.0, 16: 1.0, 100: 1.0}, extend_tokens={16: 1.0, 128: 1.0, 1000: 1.0}),
}
# Say what exists; and how a row's chunks are shared among blocks, each of which is summed by itself.
SIZES = {"rows", "tokens", "count", "T", "splits"}


def compiled_with(monkeypatch: Any, **options: Any) -> tuple[Any, dict[Any, list[offers.Offer]]]:
    """A plan, and what was chosen for every class and bucket."""
    chosen: dict[Any, list[offers.Offer]] = {}

    def select(*args: Any, **kwargs: Any) -> Any:
        found = offers.select(*args, **kwargs)
        chosen.update(found[0])
        return found

    monkeypatch.setattr(emit, "select", select)
    return compile_plan(DummyCheckpoint(dict(CONFIG)), **{**LIMITS, **options}), chosen


def without_compiler(monkeypatch: Any) -> None:
    """Kernels that nothing is known of: what is chosen does not depend on them."""

    def compile_each(kernels: list[Kernel], cache: Path, progress: Any) -> dict[Kernel, Compiled]:
        return {k: _compiled(k) for k in kernels}

    monkeypatch.setattr(offers, "compile_each", compile_each)


def _compiled(kernel: Kernel) -> Compiled:
    kinds = dict(kernel.signature)
    maps = {n: MapLayout((1,), 0, 9) for n, kind in kinds.items() if kind.startswith("tensordesc")}
    return Compiled(
        repr(kernel).encode(), "f", tuple(kinds), kernel.num_warps, 0, 0, 0, kernel.dependent, maps
    )


def check(plan: Any, chosen: Mapping[Any, list[offers.Offer]]) -> None:
    """The launches of all phases, one by one, run the same binaries with the same numbers but for sizes."""
    of_input = {"target_logprob", "target_top_ids", "target_top_values"}
    lists = {
        phase: [
            launch
            for launch in program.launches
            if launch.op not in ("gather_last", "draft_ngram", "accept_drafts")
            and not of_input & set(launch.results.values())
        ]
        for phase, program in plan.programs.items()
    }
    assert set(lists) == set(plan.steps) >= {"decode", "extend", "input_logprobs"}
    assert len({len(launches) for launches in lists.values()}) == 1
    for step in zip(*lists.values(), strict=True):
        assert len({launch.op for launch in step}) == 1
        binaries, arguments, names = set(), [], set()
        for launch, phase in zip(step, lists, strict=True):
            for bucket in (b for b in plan.buckets if b.phase == phase):
                (choice,) = plan.programs[phase].classes[launch.op_class].candidates[str(bucket)]
                binaries.add(tuple(node.binary for node in choice.nodes))
                (offer,) = chosen[phase, launch.op_class, bucket]
                assert offer.call.invariant
                arguments.append(numbers(offer))
                names.add(choice.name)
        assert len(binaries) == 1, f"{step[0].op} runs {names}"
        for key in arguments[0].keys() - {(at, n) for at, n in arguments[0] if n in SIZES or n == "share"}:
            assert len({a[key] for a in arguments}) == 1, f"{key[1]} of {step[0].op} differs"


def numbers(offer: offers.Offer) -> dict[tuple[int, str], int | float]:
    """Scalars that an offer's launches are given, by place and name; no block's share of a product cuts a sum."""
    found = {}
    for at, launch in enumerate(offer.candidate.launches):
        found |= {(at, n): a.value for n, a in launch.arguments.items() if isinstance(a, Scalar)}
        if (at, "share") in found:
            assert found[at, "share"] % math.ceil(found[at, "K"] / int(launch.constants["BK"] or 0)) == 0
    return found


def test_every_call_runs_the_same_binary_in_all_buckets_and_phases(monkeypatch):
    plan, chosen = compiled_with(monkeypatch, deterministic=True)
    check(plan, chosen)
    attention = [name for name in plan.binaries if "attention" in name]
    assert len(attention) == 1
    assert attention[0].startswith("extend_attention")
    assert all(binary.spill_bytes <= 96 for binary in plan.binaries.values())


def test_an_ordinary_plan_does_not(monkeypatch):
    without_compiler(monkeypatch)
    plan, chosen = compiled_with(monkeypatch)
    with pytest.raises(AssertionError):
        check(plan, chosen)


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "fp8", "kv_dtype": "float8_e4m3fn"},
        {"kv_dtype": "int4_per_token_head"},
        {"quant": "fp8_block"},
        {"disabled_passes": ("fuse_qkv", "fuse_silu_mul", "fuse_add_norm", "hoist_gather", "fuse_quantize")},
        {"speculative": {"method": "ngram", "num_draft_tokens": 3}},
        {"quant": "fp8", "target": "sm_120a"},
        {"target": "sm_80"},
    ],
    ids=str,
)
def test_so_it_is_with_other_kernels(monkeypatch, options):
    without_compiler(monkeypatch)
    plan, chosen = compiled_with(monkeypatch, deterministic=True, **options)
    check(plan, chosen)


@pytest.fixture
def small(monkeypatch):
    small_programs.register(monkeypatch)
    return monkeypatch


def test_ops_whose_kernels_do_not_say_so_are_refused(small, tmp_path):
    with pytest.raises(
        PlanError, match="no deterministic sm_90a implementation for multiply, silu; for instance"
    ):
        small_programs.emitted(tmp_path, deterministic=True)


def test_kernels_that_no_two_buckets_share_are_refused(small, tmp_path):
    def by_rows(call):
        constants = {"STRIDE": call.rows, "C": 256, "PDL": True}
        return small_programs.scale_rows(call, constants=constants)

    small.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "by_rows", invariant=True)(by_rows)
    with pytest.raises(
        PlanError, match=r"silu has no way to run that serves all batch shapes; .*plan\.max_tokens"
    ):
        small_programs.emitted(tmp_path, deterministic=True)


def test_candidates_for_tuning_do_not_go_with_it():
    with pytest.raises(PlanError, match=r"plan\.candidates=4 does not go with plan\.deterministic"):
        compile_plan(DummyCheckpoint(dict(CONFIG)), **LIMITS, deterministic=True, candidates=4)
