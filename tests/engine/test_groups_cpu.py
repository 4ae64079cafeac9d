"""A model whose sliding layers have a cache group of their own, on the CPU executable.

Its tokens are those of the same weights in one group that keeps everything, though free pages hold NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ERROR, TokenSequence
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.models import decoder
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import CacheGroup
from makeready.graphs.planner.compile import compile_plan

WINDOW, SIZE = 20, 8
CONFIG: dict[str, Any] = {
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
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "context_len": 96, "page_size": SIZE}


class Grouped(decoder.Decoder):
    """Layers with a window keep their pages in the group ``near``, others in ``kv``."""

    def cache_groups(self, page_size: int, dtype: str, state_dtype: str) -> tuple[CacheGroup, ...]:
        parts: dict[str, list[Any]] = {"": [], "near": []}
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            attention: Any = layer.attention
            attention.group = "near" if window else ""
            parts[attention.group] += attention.kv_parts(page_size, dtype)
        near = CacheGroup("near", tuple(parts["near"]), page_size, WINDOW)
        if parts[""]:
            return CacheGroup("kv", tuple(parts[""]), page_size), near
        return (near,)


@pytest.fixture(autouse=True)
def decisive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the usual size leave the logits so small that rounding decides."""
    monkeypatch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)


def compiled(config: dict[str, Any], grouped: bool, patch: pytest.MonkeyPatch) -> Plan:
    with patch.context() as inner:
        if grouped:
            inner.setattr(decoder, "Decoder", Grouped)
        return compile_plan(DummyCheckpoint(dict(config)), target="cpu", **PLAN)


def sequences() -> list[TokenSequence]:
    """Conversations that share beginnings, longer than the window."""
    rng = np.random.default_rng(3)
    stems = rng.integers(0, 96, (2, 50)).tolist()
    made = []
    for i in range(10):
        prompt = [*stems[i % 2][: 10 + 4 * i], *rng.integers(0, 96, 1 + i % 3).tolist()]
        made.append(
            TokenSequence(
                prompt, SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True), 0, frozenset()
            )
        )
    return made


def tokens(plan: Plan, config: dict[str, Any], blocks: dict[str, int], **options: Any) -> list[list[int]]:
    pages = blocks[plan.kv.groups[0].name]
    executable = CpuExecutable(plan, DummyCheckpoint(dict(config)), pages=pages, blocks=blocks)
    executable.asynchronous = True  # type: ignore[misc]
    executable.poison()
    engine = Engine(executable, SchedulerOptions(**options))
    made = sequences()
    for each in made:
        engine.submit(each)
    while engine.busy:
        engine.step()
        for group in plan.kv.groups:
            free = engine.pools.by_name[group.name]._free
            for part in group.parts:
                executable._tensors[part.name][free] = float("nan")
    assert not any(each.finish_reason == ERROR for each in made)
    shared = sum(each.cached_tokens for each in made)
    assert (shared > 3 * WINDOW) == options.get("prefix_cache", True)
    return [each.output for each in made]


@pytest.mark.parametrize("layers", ["alternating", "all"])
def test_tokens_are_those_of_one_group(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dict(CONFIG)
    if layers == "all":
        config["layer_types"] = ["sliding_attention"] * 3
    alone, grouped = (compiled(config, own, monkeypatch) for own in (False, True))
    assert [g.name for g in grouped.kv.groups] == (["near"] if layers == "all" else ["kv", "near"])
    expected = tokens(alone, config, {"kv": 99}, prefix_cache=False, max_running_requests=1)
    blocks = {"near": 22} if layers == "all" else {"kv": 40, "near": 22}
    assert tokens(grouped, config, blocks) == expected
