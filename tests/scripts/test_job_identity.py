"""A job goes on only with the model that it began with: weights, config, tokenizer and templates at the same path."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scripts_in_process import script
from tokenizers import Tokenizer, models

from makeready.engine.entrypoints import generate
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.identity import checkpoint_identity

JOB = (
    "checkpoint=model",
    "prompts=in.jsonl",
    "output=out.jsonl",
    "sampling=greedy",
    "sampling.max_new_tokens=2",
    "plan.max_rows=2",
)
WEIGHTS = Path("model/model.safetensors")


@pytest.fixture
def model() -> Path:
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained("model")
    folder = Path("model")
    vocabulary = {chr(97 + place): place for place in range(26)} | {"<unk>": 26}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    return folder


def other_weights() -> None:
    """Of the same shapes and size, at another time."""
    save_file({name: tensor + 1 for name, tensor in load_file(WEIGHTS).items()}, WEIGHTS, {"format": "pt"})


def other_text(name: str) -> Callable[[], None]:
    def change() -> None:
        path, held = Path("model") / name, (Path("model") / name).stat()
        path.write_text(path.read_text().replace("messages[0]", "messages[-1]").replace('"a"', '"A"') + " ")
        os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))  # by what they say, whatever their time

    return change


def another_file(name: str, text: str) -> Callable[[], None]:
    def change() -> None:
        (Path("model") / name).parent.mkdir(exist_ok=True)
        (Path("model") / name).write_text(text)

    return change


def config_field() -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


CHANGES: dict[str, Callable[[], None]] = {
    "model.safetensors": other_weights,
    "chat_template.jinja": other_text("chat_template.jinja"),
    "tokenizer.json": other_text("tokenizer.json"),
    "tokenizer_config.json": another_file("tokenizer_config.json", "{}"),
    "additional_chat_templates/rag.jinja": another_file("additional_chat_templates/rag.jinja", "x"),
    "config.json": config_field,
}


def cut_off(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Leave a journal with both rows, as a job that ends before its output is made."""

    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "publish", interrupted)
        assert script("generate")(*JOB, *options) == 130


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("config.json", "model.safetensors") else pytest.param(name, marks=pytest.mark.slow)
        for name in CHANGES
    ],
)
def test_a_job_does_not_go_on_with_another_model_at_the_same_path(name, model, monkeypatch, capsys):
    cut_off(monkeypatch)
    CHANGES[name]()
    assert script("generate")(*JOB) == 1
    said = capsys.readouterr().err
    assert re.search(
        rf"out.jsonl.partial holds rows of another job \(checkpoint's {re.escape(name)} is", said
    )
    assert not Path("out.jsonl").exists()
    assert script("generate")(*JOB, "overwrite=true") == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 2


def test_the_same_model_goes_on_and_a_digest_holds_through_copies(model, monkeypatch, capsys):
    cut_off(monkeypatch)
    assert script("generate")(*JOB) == 0
    assert "2 of 2 rows are done" in capsys.readouterr().err

    Path("out.jsonl").unlink()
    cut_off(monkeypatch, "weights_digest=true")
    shutil.copytree(model, "copy")  # without times
    shutil.rmtree(model)
    os.rename("copy", "model")
    os.utime(WEIGHTS, ns=(0, 0))
    assert script("generate")(*JOB, "weights_digest=true") == 0

    Path("out.jsonl").unlink()
    cut_off(monkeypatch, "weights_digest=true")
    held = WEIGHTS.stat()
    other_weights()
    os.utime(WEIGHTS, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert script("generate")(*JOB, "weights_digest=true") == 1
    assert "another job (checkpoint's model.safetensors is" in capsys.readouterr().err


def test_weights_are_not_read_unless_asked(model):
    """A file of a terabyte, almost all of it a hole, is told in no time by its header."""
    before = checkpoint_identity(open_checkpoint(model))
    header = int.from_bytes(WEIGHTS.read_bytes()[:8], "little")
    tensors = json.loads(WEIGHTS.read_bytes()[8 : 8 + header])
    end = max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
    tensors["hole"] = {"dtype": "U8", "shape": [2**40], "data_offsets": [end, end + 2**40]}
    made = json.dumps(tensors).encode()
    with WEIGHTS.open("wb") as file:
        file.write(len(made).to_bytes(8, "little") + made)
        file.truncate(8 + len(made) + end + 2**40)
    after = checkpoint_identity(open_checkpoint(model))
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after["tokenizer.json"] == before["tokenizer.json"]
