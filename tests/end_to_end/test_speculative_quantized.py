"""Drafters in quantized weights, beside a wide model with the same numbers, other quantizations, and asked-for ones.

A drafter that computes what the model does is right but where numbers of steps of many tokens and of few differ in
their last bits.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import LLAMA, state_dict, write_quantized
from gguf import GGMLQuantizationType as Types
from int_models import IntFormat, quantize_ints, save_ints
from quantized_models import Format, quantize_model, save_quantized
from reference import make_model
from small_configs import VOCABULARY
from speculative_requests import LIMITS, assert_alike, requests, together

from makeready.engine.llm import LLM, Output
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.planner.compile import compile_plan

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
OPTIONS: dict[str, Any] = {**LIMITS, "page_size": 8, "weight_dtype": "float32"}
AWQ, GPTQ = IntFormat("awq", group=32, zeros=True), IntFormat("gptq", group=64, zeros=True, ordered=True)
FP8 = Format("channel", tool="compressed-tensors")


def integers(folder: Path, form: IntFormat, *, seed: int = 0) -> Any:
    """A quantized file in ``folder``, and the model that it stands for."""
    model = make_model(folder, "llama", seed=seed, **SIZES)
    save_ints(folder, quantize_ints(model, form), form)
    return model


def floats(folder: Path, *, seed: int = 0) -> None:
    model = make_model(folder, "llama", seed=seed, **SIZES)
    save_quantized(folder, quantize_model(model, FP8), FP8)


def alone(path: Path, **options: Any) -> list[Output]:
    checkpoint = open_checkpoint(path)
    llm = LLM(checkpoint, compile_plan(checkpoint, **OPTIONS | options))
    return [llm.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]


def drafted(
    target: Path, draft: Path, **options: Any
) -> tuple[list[Output], Counter[tuple[int, int]], Counter[str]]:
    """Answers, how often so many drafts were right of so many, and the ops of a step that verifies."""
    both = PairedCheckpoint(open_checkpoint(target), open_checkpoint(draft))
    asked = {"method": "draft", "num_draft_tokens": 3}
    llm = LLM(both, compile_plan(both, **OPTIONS | options, speculative=asked))
    return *together(llm), Counter(launch.op for launch in llm.plan.programs["decode"].launches)


def check_right(found: Counter[tuple[int, int]]) -> None:
    assert sum(right * times for (right, _), times in found.items()) > 50
    assert sum(times for (right, made), times in found.items() if right != made) <= 3, found


@pytest.mark.parametrize("form", [AWQ, GPTQ], ids=["awq", "gptq-ordered"])
def test_few_bits_beside_the_same_numbers(form: IntFormat, tmp_path: Path) -> None:
    """All scales, zeros and orders of the drafter are those of its file."""
    model = integers(tmp_path / "draft", form)
    model.save_pretrained(tmp_path / "model")
    expected = alone(tmp_path / "model")
    made, found, ops = drafted(tmp_path / "model", tmp_path / "draft")
    assert_alike(made, expected)
    check_right(found)
    assert ops["linear_int"] > 0
    assert ops["linear"] > 1


def test_the_same_file_twice_in_8_bits(tmp_path: Path) -> None:
    floats(tmp_path / "m")
    made, found, ops = drafted(tmp_path / "m", tmp_path / "m", deterministic=True)
    assert_alike(made, alone(tmp_path / "m", deterministic=True), exact=True)
    check_right(found)
    assert ops["linear_fp8"] > 7


@pytest.mark.parametrize("swapped", [False, True])
def test_models_that_are_quantized_differently(swapped: bool, tmp_path: Path) -> None:
    floats(tmp_path / "floats")
    integers(tmp_path / "integers", AWQ)
    target, draft = (tmp_path / name for name in ("integers", "floats")[:: -1 if swapped else 1])
    made, found, ops = drafted(target, draft, deterministic=True)
    assert_alike(made, alone(target, deterministic=True), exact=True)
    assert len({right for right, _ in found}) > 2
    assert ops["linear_fp8"]
    assert ops["linear_int"]


def test_one_asked_for_beside_a_stored_one(tmp_path: Path) -> None:
    """What is asked for is for weights that are wide."""
    make_model(tmp_path / "model", "llama", seed=1, **SIZES)
    integers(tmp_path / "draft", AWQ)
    options: dict[str, Any] = {"quant": "int8", "deterministic": True}
    made, _, ops = drafted(tmp_path / "model", tmp_path / "draft", **options)
    assert_alike(made, alone(tmp_path / "model", **options), exact=True)
    assert ops["linear_int8"]
    assert ops["linear_int"]


def test_a_wide_drafter_beside_a_stored_model_stays_wide(tmp_path: Path) -> None:
    model = integers(tmp_path / "model", AWQ)
    model.save_pretrained(tmp_path / "draft")
    made, found, ops = drafted(tmp_path / "model", tmp_path / "draft")
    assert_alike(made, alone(tmp_path / "model"))
    check_right(found)
    assert ops["linear_int"]
    assert ops["linear"] > 1


def test_ggufs_blocks_twice(tmp_path: Path) -> None:
    config = LLAMA | {"tie_word_embeddings": False, "vocab_size": VOCABULARY}
    tensors = {
        name: x / 8 if x.dim() > 1 else 1 + x / 8
        for name, x in state_dict(config).items()
        if "inv" not in name
    }
    kinds = {"ffn_up": Types.Q8_0, "ffn_gate": Types.Q8_0, "attn_v": Types.Q4_0, "token_embd": Types.Q8_0}
    path = write_quantized(tmp_path / "m.gguf", config, tensors, kinds)
    made, found, ops = drafted(path, path, quant="stored", deterministic=True)
    assert_alike(made, alone(path, quant="stored", deterministic=True), exact=True)
    check_right(found)
    assert ops["linear_gguf"] > 2
    assert ops["embedding_gguf"] == 2


def test_the_model_beside_is_not_looked_at(tmp_path: Path) -> None:
    """Lists of modules that stay wide are each file's own."""
    model = make_model(tmp_path / "draft", "llama", **SIZES)
    kept = "model.layers.0.mlp.down_proj"
    tensors = quantize_ints(model, AWQ, skip=("lm_head", kept))
    save_ints(tmp_path / "draft", tensors, AWQ, modules_to_not_convert=[kept])
    model.save_pretrained(tmp_path / "model")
    with torch.inference_mode():
        made, found, _ = drafted(tmp_path / "model", tmp_path / "draft")
    assert_alike(made, alone(tmp_path / "model"))
    check_right(found)
