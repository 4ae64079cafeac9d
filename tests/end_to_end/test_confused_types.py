"""Files of a checkpoint whose fields have other types than they should: a sentence, or the model runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.text.file_types import library_errors
from makeready.engine.text.parts import TextError
from makeready.graphs.checkpoint.base import open_checkpoint

TRIES, SEED = 60, 0  # a file; thousands were tried when this was written
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, float("inf"), "", "x", "\ud800"),
    *([], {}, [None], ["x"], [1], [[]], {"a": 1}, {"a": {}}),
)
ADDED = (
    *("rope_scaling", "layer_types", "quantization_config", "sliding_window", "pad_token", "chat_template"),
    *("torch_dtype", "architectures", "model_type", "tokenizer_class", "split_special_tokens", "truncation"),
)
QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "x"
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=2,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    made = Tokenizer(models.BPE(byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.normalizer = normalizers.Sequence([normalizers.NFC()])  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["hello world a b c"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    made.enable_truncation(20, stride=2)
    made.save(str(folder / "tokenizer.json"))
    write = {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False, "special": True},
            "added_tokens_decoder": {"0": {"content": "<pad>", "special": True, "lstrip": False}},
            "extra_special_tokens": ["<x>"],
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": True,
            "model_max_length": 100,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["<x>"]},
        "generation_config.json": {
            "eos_token_id": [2, 3],
            "temperature": 0.6,
            "top_k": 20,
            "do_sample": True,
        },
    }
    for name, content in write.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key); of a long list or object, such as a vocabulary, only itself."""
    for key, value in list(node.items()) if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list) and len(value) < 60:
            yield from places(value)


def run(folder: Path) -> None:
    llm = LLM(open_checkpoint(folder), max_rows=1, max_tokens=8, page_size=4)
    llm.render([{"role": "user", "content": "hello"}])
    llm.generate(["hello"], SamplingParams(max_new_tokens=1))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "special" in name or "_config" in name else name
        for name in FILES
    ],
)
def test_confused_types_are_said_in_a_sentence(name, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path / "cache"))
    pick, refused = random.Random(f"{name} {SEED}"), 0
    for _ in range(TRIES):
        folder = tmp_path / "copy"
        shutil.copytree(model, folder)
        if name == "special_tokens_map.json":  # only older folders have it count
            config = json.loads((folder / "tokenizer_config.json").read_text())
            del config["added_tokens_decoder"]
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        content = json.loads((folder / name).read_text())
        if name == "config.json" and pick.random() < 0.3:
            content["quantization_config"] = json.loads(json.dumps(QUANTIZED))
        node, key = pick.choice(list(places(content)))
        node[key] = pick.choice(ODD)
        if pick.random() < 0.1:
            content[pick.choice(ADDED)] = pick.choice(ODD)
        (folder / name).write_text(json.dumps(content))
        try:
            run(folder)
        except BaseException as error:
            said = f"{key}={node[key]!r:.60}: {type(error).__name__}: {error}"
            if not type(error).__module__.startswith("makeready.") or "\n" in str(error):
                pytest.fail(said)
            refused += 1
        shutil.rmtree(folder)
    assert refused > 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": ["x"]},
            "'added_tokens_decoder' must be an object of tokens",
        ),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "'chat_template' must be a text, or a list"),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": -1},
            "'extra_special_tokens' must be a list of tokens",
        ),
        ("tokenizer_config.json", {"bos_token": "\ud800"}, "'bos_token' must be a text"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "'add_bos_token' must be true or false"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id must be an id, a list of ids"),
        ("generation_config.json", {"temperature": "hot"}, "temperature='hot' must be a number"),
        ("config.json", {"architectures": 3}, "architectures must be a list of names"),
        ("config.json", {"architectures": [None]}, "architectures must be a list of names"),
        ("config.json", {"vocab_size": 2**63}, "vocab_size 9223372036854775808 must be below"),
        ("config.json", {"quantization_config": ["fp8"]}, "quantization_config must be an object"),
        (
            "config.json",
            {"quantization_config": {**QUANTIZED, "config_groups": {"a": 1}}},
            "config_groups.a must be an",
        ),
    ],
)
def test_the_file_and_the_field_are_named(name, change, message, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "copy")
    path = tmp_path / "copy" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / "copy")
    assert name.partition(".")[0] in str(caught.value) or "quantization_config" in str(caught.value)


def test_a_panic_of_the_library_is_no_end_of_a_job():
    """It derives from BaseException, and its class has no module to import it from."""
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    panic = type("PanicException", (BaseException,), {})

    def encode() -> None:
        raise panic("called `Option::unwrap()` on a `None` value")

    with (
        pytest.raises(TextError, match=r"cannot take this \(called `Option"),
        library_errors("cannot take this ({error})"),
    ):
        encode()
    for passed in (KeyboardInterrupt, SystemExit):
        with pytest.raises(passed), library_errors("{error}"):
            raise passed
    assert made.encode("a").ids == [0]
