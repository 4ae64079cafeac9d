"""A small model's checkpoint, and steps written by hand that every executable can be driven with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.example import Row, example_step
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.graphs.planner.compile import compile_plan

SAMPLED = -1  # instead of a token id: what the device sampled last
SMALL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PROMPTS = (1, 7, 33, 100, 64)  # tokens
FORCED = 12  # tokens that follow each prompt


def write_checkpoint(folder: Path, config: dict[str, Any], scale: float | None = None) -> Checkpoint:
    """Random weights of a config as safetensors; matrices keep the size of what they multiply.

    Args:
        scale: standard deviation of matrices instead.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(config).items():
        if name.endswith((".weight_blocks", ".weight_scales")):
            tensors[name] = _mxfp4(name, shape, generator)
            continue
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 1 + 0.2 * values
        elif "embed_tokens" not in name:
            values *= shape[1] ** -0.5 if scale is None else scale
        tensors[name] = values.to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def _mxfp4(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random numbers of 4 bits, whose scales keep the size of what they multiply."""
    if name.endswith("blocks"):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    usual = 127 - round(math.log2(2.9 * (32 * shape[1]) ** 0.5))
    return torch.randint(usual - 1, usual + 2, shape, dtype=torch.uint8, generator=generator)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a config's model reads."""
    dummy = DummyCheckpoint(dict(config), None, 0)
    compile_plan(dummy, target="cpu", max_rows=1, max_tokens=16, context_len=64)
    return {name: info.shape for name, info in dummy.tensors.items()}


@dataclass(frozen=True)
class Step:
    """A batch, the bucket it runs in and its arrays."""

    bucket: Bucket
    rows: tuple[Row, ...]
    arrays: dict[str, np.ndarray]


def make_step(plan: Plan, phase: str, rows: Sequence[Row]) -> Step:
    """A batch as the engine stages it, in its bucket."""
    bucket = BucketTable(plan.buckets).covering(phase, len(rows), sum(len(r.ids) for r in rows))
    return Step(bucket, tuple(rows), example_step(plan, bucket, rows))


def open_slot(executable: Any, slot: int, **values: Any) -> None:
    """Admit a sequence: slot s owns the pages behind s full contexts."""
    count = executable.plan.limits.pages_per_row
    executable.write_slot(slot, {"pages": 1 + slot * count + np.arange(count), **values})


def script(plan: Plan, *, feed: bool = False) -> Iterator[Step]:
    """Prompts in two chunks, the second beside rows that decode, then decode steps for all rows.

    Args:
        feed: later tokens are what the device sampled, instead of random ones.
    """
    random = np.random.default_rng(0)
    vocabulary = plan.config["vocab_size"]
    tokens = [random.integers(0, vocabulary, length + FORCED).tolist() for length in PROMPTS]
    done = [0] * len(PROMPTS)

    def row(slot: int, count: int) -> Row:
        before = done[slot]
        done[slot] += count
        ids = tokens[slot][before : before + count]
        return Row(slot, [SAMPLED] if feed and before >= PROMPTS[slot] else ids, before)

    yield make_step(plan, EXTEND, [row(slot, max(1, n // 2)) for slot, n in enumerate(PROMPTS)])
    left = [max(1, n - before) for n, before in zip(PROMPTS, done, strict=True)]
    yield make_step(plan, EXTEND, [row(slot, n) for slot, n in enumerate(left)])
    for _ in range(FORCED - 2):
        yield make_step(plan, DECODE, [row(slot, 1) for slot in range(len(PROMPTS))])


@dataclass(frozen=True)
class Played:
    """What a step gave: logits and sampled tokens of its rows."""

    logits: np.ndarray
    tokens: np.ndarray


def play(executable: Any, *, poison: bool = False) -> list[Played]:
    """Run the script step by step."""
    played = []
    for slot, length in enumerate(PROMPTS):
        open_slot(executable, slot, prompt_len=length)
    for step in script(executable.plan):
        if poison:
            executable.poison()
        tokens = executable.launch(step.bucket, step.arrays).wait()["tokens"]
        logits = executable.operand(step.bucket, "sample", "logits")
        count = len(step.rows)
        played.append(Played(logits[:count].copy(), tokens[:count].copy()))
    return played
