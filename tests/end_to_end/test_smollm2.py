"""SmolLM2-135M-Instruct with its real weights, against transformers' own reading of the same file."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference import Recorder
from smollm2 import smollm2

from makeready.engine.llm import LLM, SamplingParams

STORED = 0.1  # most that rounded activations move logits, of their standard deviation
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "SELECT name, COUNT(*) FROM users",
    "To be, or not to be:",
    "Q: What is 17 + 25?\nA:",
    "La vie est",
    "    ",
    "Ingredients:\n- 2 eggs\n- 100 g flour\n",
    "🙂 means",
)
CHATS = (
    "What is gravity?",
    "Write a haiku about rain.",
    "Translate 'good morning' to Spanish.",
    "List three prime numbers.",
    "Why is the sky blue? Answer in one sentence.",
    "Say hello.",
)


@lru_cache
def oracle() -> tuple[Any, Any]:
    """transformers' model in fp32 and its tokenizer, both read from the GGUF by transformers itself."""
    path = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(smollm2(), max_rows=8, weight_dtype="float32", context_len=512)


def assert_greedy(prompt: list[int], tokens: tuple[int, ...]) -> None:
    """Every token is what transformers takes after the prompt and the tokens before it.

    One forward over all of it decides the same as token-by-token generation would.
    """
    model, _ = oracle()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    assert tokens == tuple(logits.argmax(-1).tolist())


@pytest.mark.parametrize(("every", "count"), [(5, 32), pytest.param(1, 64, marks=pytest.mark.slow)])
def test_greedy_tokens(llm: LLM, every: int, count: int) -> None:
    """On some prompts, or 64 tokens on all 20."""
    _, tokenizer = oracle()
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    assert llm.tokenizer is not None
    assert prompts == [llm.tokenizer.encode(text) for text in PROMPTS]
    for text in CHATS:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert llm.render(messages) == rendered
        prompts.append(rendered)
    prompts = prompts[::every]
    params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True, skip_special_tokens=False)
    outputs = llm.generate(token_ids=prompts, sampling=params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(prompt, output.token_ids)
        assert output.text == tokenizer.decode(output.token_ids)


def test_blocks_as_stored_say_nearly_the_same() -> None:
    """Activations of 8 bits move logits by hundredths of their spread (0.03 to 0.05), and seldom change a choice."""
    model, tokenizer = oracle()
    prompts = [tokenizer(text).input_ids for text in PROMPTS[:4]]
    llm = LLM(smollm2(), max_rows=4, context_len=256, quant="stored")
    assert any(launch.op == "linear_gguf" for launch in llm.plan.programs["decode"].launches)
    made = Recorder(llm).generate(prompts, 12)
    equal = 0
    for prompt, ours in zip(prompts, made, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ours.tokens]])).logits[0, len(prompt) - 1 : -1]
        mine = torch.from_numpy(np.array(ours.logits))
        error = (mine - logits).std(1) / logits.std(1)
        assert error.max() <= STORED, error
        equal += int((mine.argmax(1) == logits.argmax(1)).sum())
    assert equal >= 42, f"{equal} of 48"
