"""Build a tokenizer from GGUF metadata.

Keys and their meaning: the GGUF specification (ggml, docs/gguf.md, "Tokenizer"). What the specification
leaves open (whether bos is added by default, what precedes a text) follows llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from makeready.engine.text.byte_level import BYTE_LEVEL_KINDS, DEFAULT
from makeready.engine.text.parts import TextError, TokenizerParts

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# Name of a special token here -> key of its id.
_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Ids that end a sequence: the text, a chat turn, a message that calls a tool.
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Texts of tokens that end a text, a turn or a call, whatever else the file says; as llama.cpp has them.
_END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
)
_SPACE = "▁"


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> TokenizerParts | None:
    """Build the tokenizer that GGUF metadata describes.

    Args:
        metadata: GGUF key to value, arrays as lists.

    Returns:
        None if the file has no tokenizer.

    Raises:
        TextError: metadata are inconsistent, or of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise TextError(
            f"tokenizer.ggml.model {kind!r} is not supported (gpt2 and llama are); use the model's "
            "Hugging Face folder with its tokenizer.json"
        )
    tokens = _tokens(metadata)
    build = _byte_level if kind == "gpt2" else _sentencepiece
    vocabulary = _vocabulary(tokens)
    backend, add_bos, ids = build(metadata, tokens, vocabulary)
    ids = {**ids, **_special_ids(metadata, len(tokens))}
    ends = tuple(dict.fromkeys((*(ids[key] for key in _END_IDS if key in ids), *_ends_by_text(vocabulary))))
    backend.add_tokens(_added_tokens(metadata, tokens, {*ids.values(), *ends}))
    backend.post_processor = _template(metadata, tokens, ids, add_bos)
    return TokenizerParts(
        backend=backend,
        special_tokens={name: tokens[ids[key]] for name, key in _NAMED_IDS.items() if key in ids},
        eos_ids=ends,
        chat_template=_chat_template(metadata),
        warnings=_warnings(metadata) if kind == "gpt2" else (),
    )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TextError("GGUF metadata tokenizer.ggml.tokens must list texts; convert the model again")
    return tokens


def _array(metadata: Mapping[str, Any], name: str, length: int) -> Sequence[Any]:
    """An array with one entry for each token."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None or len(values) != length:
        found = "is missing" if values is None else f"has {len(values)} entries"
        raise TextError(
            f"GGUF metadata tokenizer.ggml.{name} {found} where the vocabulary has {length} tokens; "
            "convert the model again"
        )
    return values


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Text to id; of equal texts (padding entries) the first keeps the text."""
    vocabulary: dict[str, int] = {}
    for token, text in enumerate(tokens):
        vocabulary.setdefault(text, token)
    return vocabulary


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocabulary: dict[str, int]
) -> tuple[tokenizers.Tokenizer, bool, dict[str, int]]:
    """The tokenizer, whether it adds bos by default, and ids of special tokens that go without saying."""
    name = metadata.get("tokenizer.ggml.pre") or DEFAULT
    if name not in BYTE_LEVEL_KINDS:
        raise TextError(
            f"tokenizer.ggml.pre {name!r} is not supported ({', '.join(sorted(BYTE_LEVEL_KINDS))} are); use "
            "the model's Hugging Face folder with its tokenizer.json"
        )
    kind = BYTE_LEVEL_KINDS[name]
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise TextError("GGUF metadata tokenizer.ggml.merges is missing; convert the model again")
    try:
        model = models.BPE(vocabulary, [_pair(merge) for merge in merges], ignore_merges=kind.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise TextError(f"GGUF metadata tokenizer.ggml.merges are broken ({error}); convert again") from None
    backend = tokenizers.Tokenizer(model)
    if kind.normalizer is not None:
        backend.normalizer = kind.normalizer()
    backend.pre_tokenizer = kind.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, kind.add_bos, {}


def _pair(merge: str) -> tuple[str, str]:
    """A merge is "left right"; only a space after the first character can be the border."""
    left, *right = merge.split(" ")
    if left and len(right) == 1:
        return left, right[0]
    border = merge.find(" ", 1)
    return merge[:border], merge[border + 1 :]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocabulary: dict[str, int]
) -> tuple[tokenizers.Tokenizer, bool, dict[str, int]]:
    """As `_byte_level`, for pieces with scores."""
    scores = _array(metadata, "scores", len(tokens))
    types = _types(metadata, len(tokens))
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocabulary,
        _merges_of_scores(tokens, scores, types),
        unk_token=tokens[unknown] if unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # As llama.cpp: the space goes before every stretch of text between special tokens.
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend, True, {key: token for key, token in defaults.items() if token < len(tokens)}


def _merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece implies: any two pieces that make a piece, best score first.

    Of the merges that make equally good pieces, the one with the longest left side goes first.
    """
    pieces = {text: score for text, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    ranked = []
    for text, score in pieces.items():
        for border in range(1, len(text)):
            left, right = text[:border], text[border:]
            if left in pieces and right in pieces:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in ranked]


def _types(metadata: Mapping[str, Any], length: int) -> Sequence[int]:
    if "tokenizer.ggml.token_type" not in metadata:
        return [_NORMAL] * length
    return _array(metadata, "token_type", length)


def _special_ids(metadata: Mapping[str, Any], length: int) -> dict[str, int]:
    """Ids of named special tokens that the file states, by the last part of their key."""
    ids = {}
    for key in dict.fromkeys((*_NAMED_IDS.values(), *_END_IDS)):
        token = metadata.get(f"tokenizer.ggml.{key}")
        if token is None:
            continue
        if not 0 <= token < length:
            raise TextError(
                f"GGUF metadata tokenizer.ggml.{key} {token} is outside the vocabulary of {length} tokens; "
                "convert the model again"
            )
        ids[key] = int(token)
    return ids


def _ends_by_text(vocabulary: Mapping[str, int]) -> list[int]:
    """Ids of the tokens that end a turn by what they are called.

    Files often name the end of the text as eos where a chat ends its turns with another token.
    """
    places = {text: vocabulary[text] for text in _END_TEXTS if text in vocabulary}
    # A harmony vocabulary ends a message, not a turn, with this one.
    if "<|end|>" in places and {"<|return|>", "<|flush|>"} & places.keys():
        del places["<|end|>"]
    return [places[text] for text in _END_TEXTS if text in places]


def _warnings(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in (None, "", DEFAULT):
        return ()
    found = "has no tokenizer.ggml.pre" if not name else f"has tokenizer.ggml.pre {name!r}"
    return (
        f"the GGUF file {found}, which says how text is split into words: llama.cpp's default patterns are used, "
        "and tokens may differ from those of the model's training; convert the model again with a recent llama.cpp",
    )


def _added_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], named: Set[int]) -> list[AddedToken]:
    """Tokens that text is searched for before it is split: special ones and user-defined ones.

    Args:
        named: ids of tokens that are special whatever their type says.
    """
    added = []
    for token, kind in enumerate(_types(metadata, len(tokens))):
        special = kind in (_CONTROL, _UNKNOWN) or token in named
        if tokens[token] and (special or kind == _USER_DEFINED):
            added.append(AddedToken(tokens[token], special=special, normalized=False))
    return added


def _template(
    metadata: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int], add_bos: bool
) -> processors.TemplateProcessing:
    before, after, used = [], [], []
    for side, default in (("bos", add_bos), ("eos", False)):
        key = f"{side}_token_id"
        if key in ids and metadata.get(f"tokenizer.ggml.add_{side}_token", default):
            text = tokens[ids[key]]
            (before if side == "bos" else after).append(text)
            used.append((text, ids[key]))
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=used)


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """`tokenizer.chat_template`, and further ones as `tokenizer.chat_template.NAME`."""
    key = "tokenizer.chat_template"
    default = metadata.get(key)
    named = {name[len(key) + 1 :]: metadata[name] for name in metadata if name.startswith(f"{key}.")}
    if not named:
        return default
    return named if default is None else {"default": default, **named}
