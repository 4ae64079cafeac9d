"""Weights of 4 and 8 bits against transformers models with the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from int_models import IntFormat, quantize_ints, save_ints
from reference import Recorder, compare, expected, make_model, prompt_of

from makeready.engine.llm import LLM

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
# Two groups of 64 and half of a span; k and v have a whole tile of outputs.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 32,
    "initializer_range": 0.1,
}

FORMATS = {
    "awq": IntFormat("awq", group=64, zeros=True),
    "awq-32": IntFormat("awq", group=32, zeros=True),
    "awq-whole": IntFormat("awq", group=-1, zeros=True),
    "gptq": IntFormat("gptq", group=64),
    "gptq-zeros": IntFormat("gptq", group=64, zeros=True),
    "gptq-v2-zeros": IntFormat("gptq_v2", group=32, zeros=True),
    "gptq-8": IntFormat("gptq", bits=8, group=32),
    "gptq-8-zeros": IntFormat("gptq_v2", bits=8, group=-1, zeros=True),
    "gptq-whole": IntFormat("gptq", group=-1),
    "gptq-ordered": IntFormat("gptq", group=64, ordered=True),
    "gptq-8-ordered-zeros": IntFormat("gptq", bits=8, group=32, zeros=True, ordered=True),
    "gptq-whole-ordered": IntFormat("gptq", group=-1, ordered=True),
    "ct": IntFormat("compressed-tensors", group=64),
    "ct-zeros": IntFormat("compressed-tensors", group=32, zeros=True),
    "ct-channel": IntFormat("compressed-tensors", group=-1),
    "ct-8": IntFormat("compressed-tensors", bits=8, group=64),
    "ct-ordered": IntFormat("compressed-tensors", group=64, zeros=True, ordered=True),
}


def check(folder: Path, model: Any, **plan: Any) -> LLM:
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    for length in (1, 9, 30):
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, expected(model, prompt, 5))
    return recorder.llm


@pytest.mark.parametrize("name", FORMATS)
def test_stored_formats(name: str, tmp_path: Path) -> None:
    family = ("llama", "qwen2", "qwen3")[[*FORMATS].index(name) % 3]
    model = make_model(tmp_path, family, **SMALL)
    save_ints(tmp_path, quantize_ints(model, FORMATS[name]), FORMATS[name])
    check(tmp_path, model)
