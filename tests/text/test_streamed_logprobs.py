"""Log-probabilities of a streamed completion: whatever the pieces, they join to those of the whole."""

from __future__ import annotations

import random
from typing import Any

import pytest
from smollm2 import smollm2

from makeready.engine.output import Output, TokenLogprob
from makeready.engine.protocol.openai.logprobs import CompletionLogprobs, completion_logprobs
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

TEXTS = [
    "",
    " Paris.",
    "a",
    "  two spaces",
    "🦙🦙 llamas, ñ 日本語\n\n",
    "<|im_start|>user\nx<|im_end|>",
    "é" * 9,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = load_tokenizer(open_checkpoint(smollm2()))
    assert made is not None
    return made


def joined(columns: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    told = [each for each in columns if each]
    return {name: [item for each in told for item in each[name]] for name in told[0]} if told else {}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("echo", [False, True])
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, text: str, skip: bool, echo: bool) -> None:
    rng = random.Random(3)
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = tokenizer.decode(ids, skip_special_tokens=skip)
    prompt = "To be 🦙" if echo else ""
    before = [TokenLogprob(token, None) for token in tokenizer.encode(prompt)] if echo else []
    for cut in {len(shown), len(shown) // 2}:  # a stop string ends it before its last tokens
        final = shown[:cut]
        logprobs = tuple(TokenLogprob(token, -rng.random(), ((token, -0.5),)) for token in ids)
        meta = {"finish_reason": {"type": "length", "length": len(ids)}}
        output = Output(
            final, tuple(ids), "length", 1, logprobs, tuple(before) if echo else None, meta_info=meta
        )
        whole = completion_logprobs(output, tokenizer, echo=prompt, prompt=prompt, skip_special_tokens=skip)
        for _ in range(8):
            writer = CompletionLogprobs(tokenizer, prompt, prompt, before, skip)
            columns, token, place = [], 0, 0
            while token < len(ids):
                end = rng.randrange(token + 1, len(ids) + 1)
                # Text is behind the tokens: what is shown is a beginning of what they write.
                written = tokenizer.decode(ids[:end], skip_special_tokens=skip).rstrip("\ufffd")
                reached = max(place, min(len(written), len(final), place + rng.randrange(0, 6)))
                last = end == len(ids)
                reached = len(final) if last else reached
                columns.append(
                    writer.take(logprobs[token:end], final[place:reached], final if last else None)
                )
                token, place = end, reached
            if not ids:
                columns.append(writer.take((), "", final))
            assert joined(columns) == (whole if whole and whole["tokens"] else {})
