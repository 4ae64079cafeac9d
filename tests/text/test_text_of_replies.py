"""What a request makes of its tokens: the first space, special tokens as stops, stop tokens that stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from test_text_gguf_tokenizer import sentencepiece_metadata
from tokenizers_fixture import Folder, Gguf, byte_fallback_json, byte_level_json, wrap
from transformers import PreTrainedTokenizerFast

from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer

BYTE_LEVEL = wrap(byte_level_json())
ENDOFTEXT, START, END = 0, 1, 2  # of the byte-level vocabulary


def spm_folder(path: Path) -> Tokenizer:
    """Llama 2's kind of folder."""
    spec = json.loads(byte_fallback_json())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    made = load_tokenizer(Folder(path, {"tokenizer.json": spec, "tokenizer_config.json": config}, "llama"))
    assert made is not None
    return made


@pytest.fixture(scope="module", params=["folder", "gguf", "metaspace"])
def spm(request, tmp_path_factory) -> Tokenizer:
    if request.param == "folder":
        return spm_folder(tmp_path_factory.mktemp("spm"))
    if request.param == "gguf":
        made = load_tokenizer(Gguf(sentencepiece_metadata()))
        assert made is not None
        return made
    backend = tokenizers.Tokenizer.from_str(byte_fallback_json())
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return wrap(backend.to_str())


def run(tokenizer: Tokenizer, prompt, output, ends=(), **sampling) -> tuple[Reply, list[str]]:
    """The reply after its tokens, and the pieces that a reader was told; however many tokens come at once."""
    params = SamplingParams(max_new_tokens=len(output), **sampling)
    pieces: list[str] = []
    made = [TokenSequence(list(prompt), params, 0, frozenset(ends)) for _ in range(3)]
    watched = Reply(made[0], tokenizer, on_text=pieces.append)
    alone, late = Reply(made[1], tokenizer), Reply(made[2], tokenizer)
    for reply, at_once in ((watched, 1), (alone, 1), (late, 3)):
        sequence = reply.sequence
        for at, token in enumerate(output, start=1):
            if sequence.done:
                break
            sequence.append(token)
            if reply.follows and (at % at_once == 0 or sequence.done):
                reply.read()
        reply.finish()
        assert sequence.done
    assert watched.result().text == alone.result().text == late.result().text == "".join(pieces)
    assert watched.matched == alone.matched == late.matched
    assert made[0].output == made[1].output == made[2].output
    return watched, pieces


def test_an_answer_begins_with_its_space(spm):
    theirs = PreTrainedTokenizerFast(tokenizer_object=spm.backend)
    prompt = spm.encode("the quick")
    answer = spm.encode("brown fox", add_special_tokens=False)
    whole = theirs.decode([*prompt, *answer], skip_special_tokens=True)
    reply, pieces = run(spm, prompt, answer)
    assert "the quick" + reply.result().text == whole == "the quick brown fox"
    assert pieces[0].startswith(" ")


def test_a_stop_string_may_begin_with_that_space(spm):
    answer = spm.encode("brown fox", add_special_tokens=False)
    reply, pieces = run(spm, spm.encode("the quick"), answer, stop=[" b"])
    assert (reply.finish_reason, reply.matched, pieces) == ("stop", " b", [])
    assert len(reply.sequence.output) < len(answer)


@given(st.data())
def test_the_text_is_that_of_the_whole_sequence(data):
    tokenizer = wrap(byte_fallback_json())
    prompt = tokenizer.encode("the quick")
    output = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12))
    skip = data.draw(st.booleans())
    stop = ["no text has this"] if data.draw(st.booleans()) else []
    reply, _ = run(tokenizer, prompt, output, skip_special_tokens=skip, stop=stop)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    before = theirs.decode(prompt, skip_special_tokens=skip)
    assert before + reply.result().text == theirs.decode([*prompt, *output], skip_special_tokens=skip)


def ids(*parts: str | int) -> list[int]:
    return [
        token for part in parts for token in ([part] if isinstance(part, int) else BYTE_LEVEL.encode(part))
    ]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("trim", [True, False])
def test_the_text_of_a_special_token_stops(skip, trim):
    output = ids("one", START, "two")
    reply, _ = run(
        BYTE_LEVEL, ids("x"), output, stop=["<|start|>"], skip_special_tokens=skip, no_stop_trim=not trim
    )
    assert (reply.finish_reason, reply.matched) == ("stop", "<|start|>")
    assert reply.sequence.output == ids("one", START)
    assert reply.result().text == ("one" if trim or skip else "one<|start|>")


@pytest.mark.parametrize("stop", ["e<|start|>t", "|start|>tw", "<|start|><|end|>"])
def test_a_stop_string_may_hold_a_special_token(stop):
    output = ids("one", START, "two", START, END, "three")
    reply, _ = run(BYTE_LEVEL, ids("x"), output, stop=[stop])
    assert reply.matched == stop
    whole = BYTE_LEVEL.backend.decode(output, skip_special_tokens=False)
    before = whole[: whole.index(stop)]
    for special in ("<|start|>", "<"):  # what is before the stop loses its special tokens
        before = before.replace(special, "")
    assert reply.result().text == before


def test_a_special_token_that_stops_nothing_is_skipped():
    output = ids("one", START, "two <|", END)
    reply, _ = run(BYTE_LEVEL, ids("x"), output, stop=["<|start|>x", "<|x"])
    assert reply.finish_reason == "length"
    assert reply.result().text == "onetwo <|"


def test_a_pattern_sees_special_tokens():
    reply, _ = run(BYTE_LEVEL, ids("x"), ids("one", START, "two"), stop_regex=[r"<\|\w+\|>"])
    assert (reply.finish_reason, reply.result().text) == ("stop", "one")


def test_a_character_before_a_special_stop_is_kept():
    tokenizer = wrap(byte_fallback_json())
    output = [*(3 + byte for byte in "好".encode()), 2]
    reply, _ = run(tokenizer, tokenizer.encode("The"), output, stop=["</s>"])
    assert (reply.matched, reply.result().text) == ("</s>", "好")


def test_a_stop_token_stays_where_that_is_asked_for():
    word = ids("k")[-1]
    for stop in ([], ["never"]):
        for keep, expected in ((False, "one "), (True, "one " + BYTE_LEVEL.decode([word]))):
            reply, _ = run(BYTE_LEVEL, ids("x"), ids("one ", word), ends=[word], no_stop_trim=keep, stop=stop)
            assert (reply.matched, reply.result().text) == (word, expected)
        for skip, expected in ((True, "one"), (False, "one<|end|>")):
            reply, _ = run(
                BYTE_LEVEL,
                ids("x"),
                ids("one", END),
                ends=[END],
                no_stop_trim=True,
                skip_special_tokens=skip,
                stop=stop,
            )
            assert (reply.matched, reply.result().text) == (END, expected)
