"""Streaming text: what push and flush give, joined, is decode of all ids, and nothing is taken back."""

import json

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from tokenizers_fixture import CORPUS, byte_fallback_json, byte_level_json, wrap

from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import Tokenizer


def with_decoder(text: str, decoder) -> str:
    backend = tokenizers.Tokenizer.from_str(text)
    backend.decoder = decoder
    return backend.to_str()


def word_piece() -> str:
    words = ["the", "dog", "##s", ".", "'", "it", "s", "n't", "do"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="dog")
    )
    backend.decoder = decoders.WordPiece()
    return backend.to_str()


def gemma_like() -> str:
    """As Gemma's and transformers' own conversion of GGUF: the mark is replaced after fusing."""
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
    return with_decoder(byte_fallback_json(), decoders.Sequence(steps))


def stripped_after_replace() -> str:
    """A step that looks across tokens after fusing, which cannot stream."""
    steps = [decoders.Fuse(), decoders.Replace("▁the", " THE")]
    return with_decoder(byte_fallback_json(), decoders.Sequence(steps))


def metaspace(scheme: str) -> str:
    return with_decoder(byte_fallback_json(), decoders.Metaspace(prepend_scheme=scheme))


KINDS = {
    "byte_level": wrap(byte_level_json()),
    "byte_fallback": wrap(byte_fallback_json()),
    "gemma_like": wrap(gemma_like()),
    "metaspace": wrap(metaspace("always")),
    "metaspace_never": wrap(metaspace("never")),
    "word_piece": wrap(word_piece()),
    "clean_up": wrap(word_piece(), clean_up=True),
    "no_stream": wrap(stripped_after_replace()),
    "no_decoder": wrap(json.dumps({**json.loads(byte_level_json()), "decoder": None})),
}
WHOLE_TEXT = {"word_piece", "clean_up", "no_stream", "no_decoder"}
BYTES = {
    "byte_level": [
        tokenizers.Tokenizer.from_str(byte_level_json()).token_to_id(char)
        for char in sorted(pre_tokenizers.ByteLevel.alphabet())
    ],
    "byte_fallback": list(range(3, 259)),
}


@st.composite
def id_lists(draw, kind: str):
    """Any ids, texts as they encode, single bytes in any order, and characters cut anywhere."""
    tokenizer = KINDS[kind]
    size = tokenizer.vocab_size
    raw = BYTES.get(kind, list(range(size)))
    ids = []
    for _ in range(draw(st.integers(0, 6))):
        shape = draw(st.integers(0, 3))
        if shape == 0:
            ids += draw(st.lists(st.integers(0, size + 2), max_size=8))
        elif shape == 1:
            ids += draw(st.lists(st.sampled_from(raw), max_size=8))
        else:
            text = draw(st.text(max_size=6)) if shape == 2 else draw(st.sampled_from(CORPUS))[:20]
            encoded = (
                tokenizer.encode(text.encode("utf-8", "ignore").decode()) if kind != "word_piece" else []
            )
            cut = draw(st.integers(0, len(encoded)))
            ids += encoded[cut:] if draw(st.booleans()) else encoded[:cut]
    return ids


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_pieces_join_to_decode(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(id_lists(kind))
    skip = data.draw(st.booleans())
    stream = StreamDetokenizer(tokenizer, skip_special_tokens=skip)
    text, place = "", 0
    while place < len(ids):
        count = data.draw(st.integers(0, 4))
        text += stream.push(ids[place : place + count])
        place += count
    assert text + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
    if kind in WHOLE_TEXT:
        assert text == ""


@settings(deadline=None)
@given(data=st.data())
def test_byte_level_keeps_only_an_unfinished_character(data):
    tokenizer = KINDS["byte_level"]
    ids = data.draw(id_lists("byte_level"))
    stream = StreamDetokenizer(tokenizer)
    text = ""
    for count, token in enumerate(ids, 1):
        text += stream.push([token])
        so_far = tokenizer.decode(ids[:count])
        # Two replacement characters: the first two bytes of a surrogate, which the third may not mend.
        assert so_far in (text, text + "\ufffd", text + "\ufffd\ufffd")


@settings(deadline=None)
@given(data=st.data())
def test_byte_fallback_keeps_only_a_run_of_bytes(data):
    tokenizer = KINDS["byte_fallback"]
    ids = data.draw(id_lists("byte_fallback"))
    stream = StreamDetokenizer(tokenizer)
    text = ""
    for count, token in enumerate(ids, 1):
        text += stream.push([token])
        kept = ids[:count]
        while kept and (3 <= kept[-1] < 259 or kept[-1] < 3 or kept[-1] >= tokenizer.vocab_size):
            kept.pop()  # bytes, and tokens without text between them
        assert len(text) >= len(tokenizer.decode(kept))


def test_one_emoji_comes_out_whole():
    tokenizer = KINDS["byte_level"]
    ids = [BYTES["byte_level"][sorted(pre_tokenizers.ByteLevel.alphabet()).index(char)] for char in "ðŁĻĤ"]
    stream = StreamDetokenizer(tokenizer)
    assert [stream.push([token]) for token in ids] == ["", "", "", "🙂"]
    assert stream.push(ids[:2]) == ""
    assert stream.flush() == "\ufffd"


def test_one_bad_byte_changes_the_run_before_it():
    tokenizer = KINDS["byte_fallback"]
    run = [3 + byte for byte in "好".encode()]
    stream = StreamDetokenizer(tokenizer)
    assert stream.push(run) == ""
    assert stream.push([3 + 0xFF, tokenizer.token_to_id("d")]) == "\ufffd" * 4 + "d"


PROMPTS = ["The quick", "The quick brown fox jumps over the lazy dog", "The ", " ", "o", "<s>The", "o" * 9]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_an_answer_is_the_whole_without_the_prompt(kind, data):
    tokenizer = KINDS[kind]
    if kind == "word_piece" or kind == "clean_up":
        prompt = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=5))
    else:
        prompt = tokenizer.encode(data.draw(st.sampled_from(PROMPTS)))
    # A bad byte would change a run of bytes before it, which here is the prompt's.
    assume(not str(tokenizer.id_to_token(prompt[-1])).startswith("<0x"))
    ids, skip = data.draw(id_lists(kind)), data.draw(st.booleans())
    before = tokenizer.backend.decode(prompt, skip_special_tokens=skip)
    expected = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    stream = StreamDetokenizer(tokenizer, skip, prompt)
    streamed = "".join(stream.push([token]) for token in ids) + stream.flush()
    if kind != "clean_up":  # which may take a space away from the prompt
        assert before + streamed == expected
    assert StreamDetokenizer(tokenizer, skip, prompt).whole(ids) == streamed


def test_the_space_before_an_answer_is_kept():
    tokenizer = KINDS["byte_fallback"]
    prompt = tokenizer.encode("The quick")
    answer = tokenizer.encode("brown", add_special_tokens=False)
    assert tokenizer.decode(answer) == "brown"
    stream = StreamDetokenizer(tokenizer, prompt=prompt)
    assert stream.push(answer) + stream.flush() == " brown"
    # Behind a bos alone nothing goes before the answer.
    assert StreamDetokenizer(tokenizer, prompt=[1]).push(answer) == "brown"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_the_prompt_begins_is_whole(kind):
    tokenizer, order = KINDS[kind], sorted(pre_tokenizers.ByteLevel.alphabet())
    smile = [
        BYTES[kind][order.index(char) if kind == "byte_level" else ord_]
        for char, ord_ in zip("ðŁĻĤ", "🙂".encode(), strict=True)
    ]
    prompt = [*tokenizer.encode("The"), *smile[:2]]
    stream = StreamDetokenizer(tokenizer, prompt=prompt)
    assert stream.push(smile[2:]) + stream.flush() == "🙂"
    assert StreamDetokenizer(tokenizer, prompt=prompt).whole(smile[2:]) == "🙂"


def test_a_bad_byte_leaves_the_prompt_as_it_was():
    tokenizer = KINDS["byte_fallback"]
    prompt = [*tokenizer.encode("The"), *(3 + byte for byte in "好".encode())]
    for ids in ([3 + 0xFF], [3 + 0xFF, *(3 + byte for byte in "好".encode())]):
        assert StreamDetokenizer(tokenizer, prompt=prompt).whole(ids) == "\ufffd" * len(ids)


def test_what_is_kept_back_for_a_bad_byte_can_be_had():
    tokenizer = KINDS["byte_fallback"]
    stream = StreamDetokenizer(tokenizer)
    assert stream.push([3 + byte for byte in "好🙂".encode()[:-1]]) == ""
    assert (stream.settle(), stream.kept) == ("好", "🙂".encode()[:-1])
    assert stream.push([3 + "🙂".encode()[-1]]) + stream.flush() == "🙂"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_a_stream_never_decodes_old_tokens_again(kind, monkeypatch):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(" ".join(CORPUS))
    expected = tokenizer.decode(ids)
    monkeypatch.delattr(Tokenizer, "decode")
    stream = StreamDetokenizer(tokenizer)
    assert "".join(stream.push([token]) for token in ids) + stream.flush() == expected


def test_bad_ids():
    with pytest.raises(TextError, match=r"from 0 to 2\*\*32 - 1; got -1"):
        StreamDetokenizer(KINDS["byte_level"]).push([-1])
