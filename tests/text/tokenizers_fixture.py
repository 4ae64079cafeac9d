"""Small real tokenizers, trained on the spot, and stand-ins for the checkpoints that carry them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from makeready.engine.text.parts import TokenizerParts
from makeready.engine.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's 1234567 o'clock.",
    "def add(left, right):\n    return left + right  # 3.14\n\n\nprint(add(2, 40))\n",
    "Grüße aus Köln, où est le café? Ça va très bien, merci à tous.",
    "今天天气很好，我们去公园散步。こんにちは、元気ですか。안녕하세요 세계",
    "Emoji: 🙂🙂 👩‍👩‍👧 🏳️‍🌈 and more 🙂 text 🎉🎉, then the quick brown fox again.",
] * 3

# Texts that splitting rules tend to get wrong.
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two spaces,\n\n and\t tabs \r\n",
    "I'm YOU'RE we'll 3rd 1234567 3.14 ٣٤٥ ²",
    "今天天气 café cafe\u0301 Å 🙂👩‍👩‍👧",
    "<|start|>user\nhi<|end|> and <think>so</think>",
    "</s> x <s>hi</s>",
    "def f(x):\n    return x ** 2  # ok\n",
    "▁x ▁▁y <0x41>",
]

SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>"]


@cache
def byte_level_json() -> str:
    """A byte-level BPE of 509 tokens: 3 special ones, and last two ordinary added ones."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=507,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # One whose text is no byte-level text, one that byte-level decoding would take for bytes.
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("a tag 🙂", normalized=False)])
    return backend.to_str()


@cache
def byte_fallback_json() -> str:
    """A SentencePiece-like BPE: spaces are marks, unknown characters fall back to byte tokens."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(marks)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        limit_alphabet=60,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8,
        show_progress=False,
    )
    backend.train_from_iterator([line.replace(" ", " ▁") for line in CORPUS], trainer)
    spec = json.loads(backend.to_str())
    # The trainer takes byte tokens for special ones, which real files do not.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    strip = decoders.Strip(content=" ", left=1)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend.to_str()


def wrap(text: str, **parts: Any) -> Tokenizer:
    """Our tokenizer around a serialized one."""
    return Tokenizer(TokenizerParts(tokenizers.Tokenizer.from_str(text), **parts))


class Folder:
    """A checkpoint that is only a folder of tokenizer files; `files` maps names to text or JSON values."""

    def __init__(self, path: Path, files: dict[str, Any], model_type: str | None = None) -> None:
        self.path = path
        self.config: dict[str, Any] = {} if model_type is None else {"model_type": model_type}
        self.generation_config: dict[str, Any] = files.get("generation_config.json", {})
        if model_type is not None:
            files = {**files, "config.json": self.config}
        for name, value in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")

    def tokenizer_files(self) -> dict[str, Path]:
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        more = ("generation_config.json", "vocab.json", "merges.txt")
        return {name: self.path / name for name in (*names, *more) if (self.path / name).is_file()}


class Gguf:
    """A checkpoint that is only GGUF metadata."""

    path = Path("model.gguf")

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}

    def tokenizer_files(self) -> dict[str, Path]:
        return {"gguf": self.path}
