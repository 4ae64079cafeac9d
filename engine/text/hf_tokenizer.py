"""Read the tokenizer of a Hugging Face folder, following transformers 5's AutoTokenizer.

`tokenizer.json` is the truth: as transformers 5 does, `add_bos_token` and `add_eos_token` of
tokenizer_config.json count only where there is no tokenizer.json, and tokenizer_config's added and
special tokens are added where tokenizer.json lacks them. Where there is no tokenizer.json, a byte-level
BPE is built from vocab.json and merges.txt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from makeready.engine.text.byte_level import QWEN2_SPLIT, split_then_bytes
from makeready.engine.text.file_types import check_added_tokens, check_tokenizer_config, library_errors
from makeready.engine.text.parts import NAMED_TOKENS, TextError, TokenizerParts
from makeready.engine.text.response.template import ResponseTemplate, read_response_template

# Vocabulary files that only other libraries read.
_FOREIGN = ("tokenizer.model", "tiktoken.model", "tekken.json")
# Special tokens of transformers' classes, where tokenizer_config.json names none.
_DEFAULT_TOKENS = {
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}
_TOKEN_FIELDS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def read_hf_tokenizer(
    files: Mapping[str, Path], folder: Path, model_type: str | None = None
) -> TokenizerParts | None:
    """Read a folder's tokenizer files.

    Args:
        files: those that exist of tokenizer.json, tokenizer_config.json, special_tokens_map.json,
            chat_template.jinja, vocab.json and merges.txt, by name.
        folder: where they lie; added_tokens.json and additional_chat_templates are looked for there.
        model_type: `model_type` of config.json.

    Returns:
        None if the folder has no tokenizer.

    Raises:
        TextError: a file is broken, or the tokenizer is of a kind that is not supported.
    """
    has_json = "tokenizer.json" in files
    if not has_json and not {"vocab.json", "merges.txt"} <= files.keys():
        _refuse_foreign(files, folder)
        return None
    config = _read_json(files.get("tokenizer_config.json"))
    check_tokenizer_config(config, str(folder / "tokenizer_config.json"))
    if config.get("added_tokens_decoder") is None:
        config.pop("added_tokens_decoder", None)
    kind = _kind(config, model_type)
    if has_json:
        backend = _read_backend(files["tokenizer.json"])
        if kind == "LlamaTokenizer":
            _rebuild_llama(backend, config)
    else:
        backend = _byte_level_bpe(files, kind, config)
    config = {**_DEFAULT_TOKENS.get(kind, {}), **config}
    named, extra, added = _declared_tokens(config, files, folder)
    _add_tokens(backend, named, extra, added)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    special_tokens = {name: str(token) for name, token in named.items()}
    if not has_json:
        backend.post_processor = _template(backend, config, special_tokens)
    eos = special_tokens.get("eos_token")
    eos_id = None if eos is None else backend.token_to_id(eos)
    response_template, warnings = _response_template(config)
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_ids=() if eos_id is None else (eos_id,),
        chat_template=_chat_template(files, folder, config),
        clean_up=_cleans_up(backend, config),
        response_template=response_template,
        warnings=warnings,
    )


def _kind(config: Mapping[str, Any], model_type: str | None) -> str:
    """The tokenizer class that transformers takes, as far as it matters here; "" for its plain one."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "LlamaTokenizer" and model_type not in (None, "llama"):
        return ""  # Mistral and DeepSeek folders carry this name, and transformers then ignores it
    if not kind and model_type == "gpt2":
        return "GPT2Tokenizer"
    if not kind and model_type is not None and model_type.startswith(("qwen2", "qwen3")):
        return "Qwen2Tokenizer"
    return kind


def _refuse_foreign(files: Mapping[str, Path], folder: Path) -> None:
    """Tell a tokenizer that cannot be read from no tokenizer at all."""
    for name in _FOREIGN:
        if (folder / name).is_file():
            raise TextError(
                f"{folder} has its vocabulary only as {name}; write a tokenizer.json once with "
                "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    if "tokenizer_config.json" in files:
        raise TextError(
            f"{folder} has tokenizer_config.json but no vocabulary; add its tokenizer.json "
            "(or vocab.json and merges.txt)"
        )


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TextError(f"{path} cannot be read as JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise TextError(
            f"{path} must hold a JSON object, not {type(value).__name__}; download the file again"
        )
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    with library_errors(f"{path} cannot be read as a tokenizer ({{error}}); download the file again"):
        return tokenizers.Tokenizer.from_file(str(path))


def _rebuild_llama(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Replace normalizer, pre-tokenizer and decoder as transformers 5's LlamaTokenizer does.

    Files of the Llama 2 family prepend a space by a normalizer, in front of every stretch of text
    between special tokens; transformers 5 ignores that and splits by its own Metaspace.
    """
    model = backend.model
    if not isinstance(model, models.BPE) or not model.byte_fallback:
        return  # a byte-level tokenizer labelled LlamaTokenizer, as DeepSeek's: the label is wrong
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = ("always" if config.get("legacy", False) else "first") if prefix else "never"
    backend.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)


def _byte_level_bpe(files: Mapping[str, Path], kind: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE of Qwen2 or GPT-2."""
    with library_errors(
        f"{files['vocab.json']} and merges.txt do not make a BPE ({{error}}); download both again"
    ):
        model = models.BPE.from_file(str(files["vocab.json"]), str(files["merges.txt"]))
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    prefix = bool(config.get("add_prefix_space"))
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = split_then_bytes(QWEN2_SPLIT, add_prefix_space=prefix)
        return backend
    if kind in ("", "GPT2Tokenizer"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        return backend
    raise TextError(
        f"tokenizer_class {kind} cannot be built from vocab.json and merges.txt (only Qwen2Tokenizer and "
        "GPT2Tokenizer can); add its tokenizer.json"
    )


def _token(value: Any, field: str, **defaults: bool) -> AddedToken:
    """An added token as configs write it: a text, or an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value, **(defaults or {"special": True}))
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: bool(value[name]) for name in _TOKEN_FIELDS if name in value}
        return AddedToken(value["content"], **{**flags, **defaults})
    raise TextError(f"{field} must be a text or an object with content, not {value!r}; correct the file")


def _declared_tokens(
    config: dict[str, Any], files: Mapping[str, Path], folder: Path
) -> tuple[dict[str, AddedToken], list[AddedToken], list[AddedToken]]:
    """Named special tokens, further special tokens, and added tokens in order of their ids."""
    declared = dict(config)
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        for key, value in config["added_tokens_decoder"].items():
            added[int(key)] = _token(value, f"added_tokens_decoder[{key}]")
        special = {}
    else:
        # Older folders keep special tokens in a file of their own, which then overrides the config.
        special = _read_json(files.get("special_tokens_map.json"))
        check_tokenizer_config(special, str(folder / "special_tokens_map.json"))
        declared.update(special)
    extra = declared.get("extra_special_tokens", declared.get("additional_special_tokens")) or []
    by_name: dict[str, Any] = {}
    names = [name for name in declared if name.endswith("_token") and name not in NAMED_TOKENS]
    for name in (*NAMED_TOKENS, *names):
        value = declared.get(name)
        if isinstance(value, (str, dict)):  # not null, and not a switch such as add_bos_token
            by_name[name] = value
    if isinstance(extra, dict):
        by_name.update(extra)
    named = {
        name: _token(value, name, special=True) if name in special else _token(value, name)
        for name, value in by_name.items()
    }
    listed = [] if isinstance(extra, dict) else extra
    extra_tokens = [_token(value, "extra_special_tokens") for value in listed]
    if "added_tokens_decoder" not in config and (folder / "added_tokens.json").is_file():
        texts = {token.content for token in (*named.values(), *extra_tokens)}
        numbered = _read_json(folder / "added_tokens.json")
        check_added_tokens(numbered, str(folder / "added_tokens.json"))
        for text, key in numbered.items():
            added[int(key)] = AddedToken(text, special=text in texts, normalized=text not in texts)
    return named, extra_tokens, [added[key] for key in sorted(added)]


def _add_tokens(
    backend: tokenizers.Tokenizer,
    named: Mapping[str, AddedToken],
    extra: list[AddedToken],
    added: list[AddedToken],
) -> None:
    """Add what the vocabulary file lacks; an added token whose flags differ takes the config's flags."""
    present = backend.get_added_tokens_decoder().values()
    flags = {repr(token) for token in present}
    missing = [token for token in added if repr(token) not in flags]
    known = {token.content for token in (*present, *missing)}
    for token in (*named.values(), *extra):
        if token.content not in known:
            known.add(token.content)
            missing.append(token)
    names = {token.content for token in named.values()}
    for token in missing:
        if token.content in names:
            token.special = True
    if missing:
        with library_errors(
            "the tokens of tokenizer_config.json cannot be added ({error}); correct the file"
        ):
            backend.add_tokens(missing)


def _template(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> processors.TemplateProcessing:
    """Put bos and eos around a text as `add_bos_token` and `add_eos_token` ask."""
    before, after, used = [], [], []
    for side in ("bos", "eos"):
        token = special_tokens.get(f"{side}_token")
        if token is not None and config.get(f"add_{side}_token", False):
            (before if side == "bos" else after).append(token)
            used.append((token, backend.token_to_id(token)))
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=used)


def _chat_template(
    files: Mapping[str, Path], folder: Path, config: Mapping[str, Any]
) -> str | dict[str, str] | None:
    """Template files win over tokenizer_config.json; several templates come as a dict by name."""
    by_name: dict[str, str] = {}
    if "chat_template.jinja" in files:
        by_name["default"] = files["chat_template.jinja"].read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        by_name[path.stem] = path.read_text(encoding="utf-8")
    if by_name:
        return by_name["default"] if by_name.keys() == {"default"} else by_name
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template


def _response_template(config: Mapping[str, Any]) -> tuple[ResponseTemplate | None, tuple[str, ...]]:
    """A template of answers, and what is to be said where it cannot be followed: answers can be had without it."""
    if config.get("response_template") is None:
        return None, ()
    try:
        return read_response_template(config["response_template"]), ()
    except TextError as error:
        return None, (
            f"response_template of tokenizer_config.json is not followed, since {error}; reasoning and calls are "
            "read by tool_call_parser and reasoning_parser alone",
        )


def _cleans_up(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """transformers 5 ignores clean_up_tokenization_spaces for BPE, where it would lose real spaces."""
    if not config.get("clean_up_tokenization_spaces", False):
        return False
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(forced) or not isinstance(backend.model, models.BPE)
