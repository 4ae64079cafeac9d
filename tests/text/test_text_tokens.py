"""Single tokens of a text: their bytes, where they begin, and OpenAI's log-probabilities made of them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers_fixture import CORPUS, TEXTS, byte_fallback_json, byte_level_json, wrap
from transformers import PreTrainedTokenizerFast

from makeready.engine.output import Output, TokenLogprob
from makeready.engine.protocol.openai.logprobs import chat_logprobs, completion_logprobs
from makeready.engine.text.token_text import prompt_starts, prompt_text, starts, token_bytes

BYTE_LEVEL, BYTE_FALLBACK = wrap(byte_level_json()), wrap(byte_fallback_json())
PARTY = "Party 🎉 time 你好, <|end|> no </s> é"


def trimmed():
    """Spaces before a word are not in its offsets."""
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrap(backend.to_str())


@pytest.mark.parametrize("text", [*TEXTS, *CORPUS[:5], PARTY])
def test_bytes_join_to_the_text(text):
    for tokenizer, before in ((BYTE_LEVEL, ""), (BYTE_FALLBACK, " ")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(token_bytes(tokenizer, token) or b"" for token in ids)
        if tokenizer is BYTE_LEVEL or ("</s>" not in text and text and "▁" not in text):
            assert joined == (before + text).encode()


def test_a_token_that_is_the_replacement_character_has_its_bytes():
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    backend.add_tokens([AddedToken("\ufffd", normalized=False)])
    tokenizer = wrap(backend.to_str())
    (token,) = tokenizer.encode("\ufffd")
    assert token_bytes(tokenizer, token) == "\ufffd".encode() == bytes([0xEF, 0xBF, 0xBD])
    assert token_bytes(tokenizer, 100_000) is None


@pytest.mark.parametrize("text", [*TEXTS[1:], *CORPUS[:5], PARTY])
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_a_prompts_tokens_begin_where_transformers_says(tokenizer, text):
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    made = theirs(text, return_offsets_mapping=True)
    assert prompt_starts(tokenizer, made["input_ids"], text) == [start for start, _ in made["offset_mapping"]]


def test_spaces_that_a_tokenizer_does_not_count_are_its_words():
    tokenizer, text = trimmed(), "the  quick dog"
    ids = tokenizer.encode(text)
    pieces = [token_bytes(tokenizer, token) or b"" for token in ids]
    assert prompt_starts(tokenizer, ids, text) == [len(b"".join(pieces[:at])) for at in range(len(ids))]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
@given(text=st.text(alphabet=[*"the quick dog", "🎉", "好", "é", "\n"], min_size=1, max_size=20))
def test_an_answers_tokens_begin_where_their_characters_do(tokenizer, text):
    prompt = tokenizer.encode("the")
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.backend.decode([*prompt, *ids])[len("the") :]
    data, expected = b"", []
    for token in ids:
        expected.append(len(data.decode(errors="ignore")))  # of the characters before, those that are whole
        data += token_bytes(tokenizer, token) or b""
    assert data.decode() == whole
    assert starts(tokenizer, ids, whole, skip_special_tokens=True) == expected


@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_the_first_of_several_spaces_is_dropped(spaces):
    ids = [BYTE_FALLBACK.token_to_id(token) for token in [*"▁" * spaces, "t", "h"]]
    text = BYTE_FALLBACK.backend.decode(ids)
    assert text == " " * (spaces - 1) + "th"
    expected = [0, *range(spaces - 1), spaces - 1, spaces]
    assert starts(BYTE_FALLBACK, ids, text, skip_special_tokens=True) == expected


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
@given(data=st.data())
def test_tokens_of_any_bytes_are_found_where_they_begin(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    skip = data.draw(st.booleans())
    text = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    made = starts(tokenizer, ids, text, skip)
    assert len(made) == len(ids)
    assert all(left <= right for left, right in pairwise(made))
    for at, token in enumerate(ids):
        name = tokenizer.id_to_token(token) or ""
        written = (token_bytes(tokenizer, token) or b"").decode(errors="replace")
        if "\ufffd" in written or name.startswith("<0x") or (skip and token in tokenizer.special_ids):
            continue
        begins = text[made[at] : made[at] + len(written)]
        assert begins == written or (made[at] == 0 and " " + begins[: len(written) - 1] == written)


def entries(ids, top=()):
    return tuple(TokenLogprob(token, -0.5, tuple(top)) for token in ids)


def output(ids, text, **more):
    meta = {"finish_reason": {"type": "length"}}
    return Output(text, tuple(ids), "length", 1, meta_info=meta, **{"logprobs": entries(ids), **more})


def test_halves_of_a_character_are_written_as_their_bytes():
    ids = [BYTE_LEVEL.token_to_id(char) for char in "ðŁİī"]  # the four bytes of the party popper
    assert [token_bytes(BYTE_LEVEL, token) for token in ids] == [bytes([byte]) for byte in "🎉".encode()]
    top = [(token, -float(place)) for place, token in enumerate(ids, 1)]
    made = output(ids, "🎉", logprobs=entries(ids, top))
    chat = chat_logprobs(made, BYTE_LEVEL)
    completion = completion_logprobs(made, BYTE_LEVEL)
    assert chat is not None
    assert completion is not None
    assert [entry["bytes"] for entry in chat["content"]] == [[240], [159], [142], [137]]
    assert [entry["token"] for entry in chat["content"]] == [r"\xf0", r"\x9f", r"\x8e", r"\x89"]
    names = [rf"bytes:\x{byte:02x}" for byte in "🎉".encode()]
    assert completion["tokens"] == names
    assert completion["text_offset"] == [0, 0, 0, 0]
    assert completion["top_logprobs"] == [dict(zip(names, (-1.0, -2.0, -3.0, -4.0), strict=True))] * 4


def test_alternatives_of_one_text_stay_apart():
    tokenizer = BYTE_FALLBACK
    letter = tokenizer.token_to_id("d")
    outside = tokenizer.vocab_size + 3
    top = [(letter, -1.0), (3 + ord("d"), -2.0), (outside, -3.0), (outside + 1, -4.0), (2, -5.0)]
    made = completion_logprobs(output([letter], "d", logprobs=entries([letter], top)), tokenizer)
    assert made is not None
    (alternatives,) = made["top_logprobs"]
    assert list(alternatives.values()) == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert list(alternatives) == [
        "d",
        r"bytes:\x64",
        f"token_id:{outside}",
        f"token_id:{outside + 1}",
        "</s>",
    ]
    json.dumps(made)


def test_offsets_count_the_characters_of_the_text_and_no_bos():
    text, tokenizer = "the 🎉 quick", BYTE_FALLBACK
    ids = tokenizer.encode(text)
    answer = tokenizer.encode("dog", add_special_tokens=False)
    assert ids[0] == tokenizer.token_to_id("<s>")
    scored = (TokenLogprob(ids[0], None), *entries(ids[1:]))
    made = completion_logprobs(
        output(answer, " dog", input_logprobs=scored), tokenizer, echo=text, prompt=text
    )
    assert made is not None
    whole = f"{text} dog"
    assert made["tokens"][0] == "<s>"
    assert "".join(made["tokens"][1:]) == whole
    at = 0
    for token, offset in zip(made["tokens"][1:], made["text_offset"][1:], strict=True):
        assert (offset, whole[offset : offset + len(token)]) == (at, token)
        at += len(token)
    assert made["text_offset"][0] == 0


def test_ids_echo_as_their_text():
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = tokenizer.encode("the 🎉")
        assert prompt_text(tokenizer, ids) == tokenizer.backend.decode(ids, skip_special_tokens=False)
    half = [BYTE_LEVEL.token_to_id(char) for char in "ðŁ"]
    assert prompt_text(BYTE_LEVEL, half) == ""  # the answer has the whole character
