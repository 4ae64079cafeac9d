"""Hugging Face folders: the same ids, text and special tokens as transformers' AutoTokenizer."""

import json
import random

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from tokenizers_fixture import CORPUS, TEXTS, Folder, byte_fallback_json, byte_level_json, wrap
from transformers import AutoTokenizer, Qwen2Tokenizer

from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import load_tokenizer


def with_bos() -> str:
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    bos = backend.token_to_id("<|start|>")
    backend.post_processor = processors.TemplateProcessing(
        single=["<|start|>", "$A"], special_tokens=[("<|start|>", bos)]
    )
    return backend.to_str()


def qwen_like() -> str:
    theirs = Qwen2Tokenizer(vocab=json.loads(byte_level_json())["model"]["vocab"])
    return theirs.backend_tokenizer.to_str()


def word_level() -> str:
    words = sorted(
        {word for line in CORPUS for word in line.split()} | set("abcdefghijklmnopqrstuvwxyz.,!?'")
    )
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: words.index(word) for word in words}, unk_token="dog")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend.to_str()


def token(content: str, **flags: bool) -> dict:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    return {"content": content, **plain, **flags}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# name: (files, model_type)
FOLDERS = {
    "no_config": ({"tokenizer.json": byte_level_json()}, "llama"),
    "no_config_gpt2": ({"tokenizer.json": byte_level_json()}, "gpt2"),
    "no_config_qwen": ({"tokenizer.json": qwen_like()}, "qwen3"),
    "llama_default_tokens": (
        {
            "tokenizer.json": byte_fallback_json(),
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
        },
        None,
    ),
    "add_bos_is_ignored": (
        {
            "tokenizer.json": byte_level_json(),
            "tokenizer_config.json": {**FAST, "bos_token": "<|start|>", "add_bos_token": True},
        },
        "llama",
    ),
    "post_processor_adds_bos": (
        {"tokenizer.json": with_bos(), "tokenizer_config.json": {**FAST, "add_bos_token": False}},
        "llama",
    ),
    "older_special_tokens_map": (
        {
            "tokenizer.json": byte_level_json(),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "fox"},
            "special_tokens_map.json": {
                "bos_token": token("<|start|>"),
                "eos_token": "<|end|>",
                "pad_token": "<pad>",
                "additional_special_tokens": ["<tool>", "quick"],
            },
        },
        "llama",
    ),
    "added_tokens_of_config": (
        {
            "tokenizer.json": byte_level_json(),
            "tokenizer_config.json": {
                **FAST,
                "pad_token": {"__type": "AddedToken", **token("<pad>")},
                "added_tokens_decoder": {
                    "1": token("<|start|>", special=True, lstrip=True),
                    "507": token("<think>", special=True),
                    "509": token("<new> word", normalized=True),
                },
                "extra_special_tokens": {"image_token": "<image>"},
                "audio_token": "<audio>",
            },
        },
        "llama",
    ),
    "split_special_tokens": (
        {
            "tokenizer.json": byte_level_json(),
            "tokenizer_config.json": {**FAST, "split_special_tokens": True},
        },
        "llama",
    ),
    "clean_up_is_ignored_for_bpe": (
        {
            "tokenizer.json": byte_level_json(),
            "tokenizer_config.json": {**FAST, "clean_up_tokenization_spaces": True},
        },
        "llama",
    ),
    "clean_up": (
        {
            "tokenizer.json": word_level(),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": True,
            },
        },
        "llama",
    ),
    "llama": ({"tokenizer.json": byte_fallback_json(), "tokenizer_config.json": LLAMA}, "llama"),
    "llama_legacy": (
        {"tokenizer.json": byte_fallback_json(), "tokenizer_config.json": {**LLAMA, "legacy": True}},
        "llama",
    ),
    "llama_without_prefix": (
        {
            "tokenizer.json": byte_fallback_json(),
            "tokenizer_config.json": {**LLAMA, "add_prefix_space": False},
        },
        "llama",
    ),
    "llama_class_of_mistral": (
        {"tokenizer.json": byte_fallback_json(), "tokenizer_config.json": LLAMA},
        "mistral",
    ),
}


def vocab_and_merges() -> dict[str, str]:
    model = json.loads(byte_level_json())["model"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "\n".join(["#version: 0.2", *pairs, ""])}


FOLDERS["qwen2_files"] = (
    {
        **vocab_and_merges(),
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"},
    },
    "qwen2",
)
FOLDERS["gpt2_files"] = (
    {
        **vocab_and_merges(),
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
    },
    "gpt2",
)
FOLDERS["gpt2_files_with_added_tokens"] = (
    {
        **vocab_and_merges(),
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2TokenizerFast",
            "add_prefix_space": True,
            "add_bos_token": True,
            "add_eos_token": True,
            "bos_token": "<|start|>",
            "added_tokens_decoder": {"1": token("<|start|>", special=True), "507": token("<think>")},
        },
    },
    "gpt2",
)


@pytest.fixture(params=FOLDERS)
def pair(request, tmp_path):
    files, model_type = FOLDERS[request.param]
    ours = load_tokenizer(Folder(tmp_path, files, model_type))
    assert ours is not None
    return ours, AutoTokenizer.from_pretrained(tmp_path)


def test_encode_and_decode_as_transformers(pair):
    ours, theirs = pair
    for text in [*TEXTS, *CORPUS[:5]]:
        for add in (True, False):
            ids = theirs.encode(text, add_special_tokens=add)
            assert ours.encode(text, add_special_tokens=add) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    choose = random.Random(0)
    for _ in range(100):  # ids beyond the vocabulary too
        ids = [choose.randrange(len(theirs) + 3) for _ in range(choose.randrange(20))]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_as_transformers(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == dict(theirs.special_tokens_map)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.special_ids == {i for i, added in theirs.added_tokens_decoder.items() if added.special}
    for i in range(len(theirs) + 3):
        assert ours.id_to_token(i) == theirs.convert_ids_to_tokens(i)


def test_end_tokens_of_all_configs_in_order(tmp_path):
    files = {
        "tokenizer.json": byte_level_json(),
        "tokenizer_config.json": FAST,
        "generation_config.json": {"eos_token_id": [7, 2]},
    }
    folder = Folder(tmp_path, files)
    folder.config["eos_token_id"] = 0
    assert load_tokenizer(folder).eos_ids == (7, 2, 0)  # <|end|>, the tokenizer's own, is 2
    folder.generation_config["eos_token_id"] = "</s>"
    with pytest.raises(TextError, match=r"generation_config.eos_token_id must be an id or a list"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {**FAST, "chat_template": "config"}},
        {"tokenizer_config.json": {**FAST, "chat_template": "config"}, "chat_template.jinja": "file"},
        {
            "tokenizer_config.json": {
                **FAST,
                "chat_template": [
                    {"name": "default", "template": "one"},
                    {"name": "tool_use", "template": "two"},
                ],
            }
        },
        {
            "tokenizer_config.json": {**FAST, "chat_template": "config"},
            "chat_template.jinja": "file",
            "additional_chat_templates/rag.jinja": "rag",
        },
        {"tokenizer_config.json": FAST},
    ],
)
def test_chat_template_comes_from_where_transformers_takes_it(tmp_path, files):
    ours = load_tokenizer(Folder(tmp_path, {"tokenizer.json": byte_level_json(), **files}, "llama"))
    assert ours.chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_no_tokenizer_is_none(tmp_path):
    folder = Folder(tmp_path, {"generation_config.json": {"eos_token_id": 2}})
    assert load_tokenizer(folder) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer.model": "spm"},
            r"only as tokenizer.model; write a tokenizer.json once .*save_pretrained",
        ),
        ({"tokenizer_config.json": {}}, r"no vocabulary; add its tokenizer.json"),
        ({"tokenizer.json": '{"model": '}, r"tokenizer.json cannot be read as a tokenizer .*download"),
        (
            {"tokenizer.json": byte_level_json(), "tokenizer_config.json": "[1]"},
            r"must hold a JSON object, not list",
        ),
        (
            {"tokenizer.json": byte_level_json(), "tokenizer_config.json": "{"},
            r"tokenizer_config.json cannot be read as JSON",
        ),
        (
            {**vocab_and_merges(), "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
            r"tokenizer_class BertTokenizer cannot be built from vocab.json",
        ),
        ({**vocab_and_merges(), "merges.txt": "#version\nno such\n"}, r"do not make a BPE"),
    ],
)
def test_broken_folders_name_the_file_and_the_remedy(tmp_path, files, message):
    with pytest.raises(TextError, match=message):
        load_tokenizer(Folder(tmp_path, files))


def test_bad_text_and_ids():
    tokenizer = wrap(byte_level_json())
    with pytest.raises(TextError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TextError, match="must be a text, not list"):
        tokenizer.encode(["a"])
    for bad in (-1, 2**32):
        with pytest.raises(TextError, match=r"from 0 to 2\*\*32 - 1"):
            tokenizer.decode([1, bad])
        with pytest.raises(TextError, match=r"from 0 to 2\*\*32 - 1"):
            tokenizer.id_to_token(bad)


def test_truncation_and_padding_of_the_file_do_not_cut_prompts():
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=8)
    long = "The quick brown fox " * 20
    assert wrap(backend.to_str()).encode(long) == wrap(byte_level_json()).encode(long)
