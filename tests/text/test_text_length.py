"""How many tokens a text has at least, against what tokenizers make of it."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers_fixture import TEXTS, byte_fallback_json, byte_level_json, wrap

from makeready.engine.text import length, tokenizer
from makeready.engine.text.parts import TextError


def changed(text: str, **parts: object) -> str:
    """A serialized tokenizer with other parts."""
    backend = tokenizers.Tokenizer.from_str(text)
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend.to_str()


def stripping() -> str:
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    backend.add_special_tokens([AddedToken("<|pad|>", lstrip=True, rstrip=True)])
    return backend.to_str()


def incomplete() -> str:
    """Without tokens for some of the bytes, as SmolLM2's vocabulary."""
    spec = json.loads(byte_level_json())
    dropped = {letter for letter in spec["model"]["vocab"] if letter in ("z", "Ã", "å")}
    vocab = {token: i for i, token in enumerate(t for t in spec["model"]["vocab"] if not set(t) & dropped)}
    merges = [merge for merge in spec["model"]["merges"] if not set("".join(merge)) & dropped]
    spec["model"]["vocab"], spec["model"]["merges"], spec["added_tokens"] = vocab, merges, []
    return json.dumps(spec)


BOUNDED = {
    "byte_level": byte_level_json(),
    "byte_fallback": byte_fallback_json(),
    "nfc": changed(byte_level_json(), normalizer=normalizers.NFC()),
    "nfkc": changed(byte_level_json(), normalizer=normalizers.NFKC()),
    "strip": changed(byte_level_json(), normalizer=normalizers.Strip()),
    "stripping_token": stripping(),
    "incomplete": incomplete(),
}
UNBOUNDED = {
    "drops spaces": changed(byte_level_json(), pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "joins": changed(byte_level_json(), normalizer=normalizers.Replace(tokenizers.Regex(" +"), " ")),
    "lower": changed(byte_level_json(), normalizer=normalizers.Lowercase()),
    "words": tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str(),
    "unknown": tokenizers.Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)).to_str(),
}
ODD = st.text(alphabet="az éÃå中🙂ΐ\u0301\u0345\u212b\u212aﷺ\n\t\u3000<|pad|>", max_size=60)


@pytest.mark.parametrize("piece", [3, length.PIECE])
@pytest.mark.parametrize("kind", BOUNDED)
@given(text=st.sampled_from(TEXTS) | ODD | st.text(max_size=60))
def test_no_text_has_fewer_tokens(kind: str, piece: int, text: str) -> None:
    made = wrap(BOUNDED[kind])
    assert made.length_bound.longest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "PIECE", piece)
        fewest = made.length_bound.fewest(text)
    assert 0 <= fewest <= len(made.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_long_text_has_many(kind: str) -> None:
    """No token of these vocabularies has more than 24 bytes; `<|endoftext|>` has 13."""
    bound = wrap(BOUNDED[kind]).length_bound
    assert bound.longest is not None
    assert (8 if kind in ("byte_fallback", "incomplete") else 13) <= bound.longest <= 24
    assert 100_000 // 24 - 2 <= bound.fewest("ab" * 50_000) <= 100_000 // 8


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_parts_of_a_text_may_vanish_nothing_is_said(kind: str) -> None:
    bound = wrap(UNBOUNDED[kind]).length_bound
    assert bound.longest is None
    assert bound.fewest("a" * 1000) == 0


def test_a_long_text_has_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = wrap(byte_level_json())
    expected = [made.backend.encode(text).ids for text in TEXTS]
    monkeypatch.setattr(tokenizer, "LONG", 1)
    assert [made.encode(text) for text in TEXTS] == expected
    with pytest.raises(TextError, match="lone surrogate at character 2"):
        made.encode("ab\ud800")
