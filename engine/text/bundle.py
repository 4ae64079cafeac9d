"""A tokenizer as files that other programs load: those of the checkpoint, or of the same kind made of a GGUF file."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

from makeready.engine.text.tokenizer import Tokenizer, TokenizerSource

CONFIGS = {"config.json": "config", "generation_config.json": "generation_config"}
# Of every entry: the same files make the same archive, on whatever server.
DATE = (1980, 1, 1, 0, 0, 0)


def bundle_files(checkpoint: TokenizerSource, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files by name, with the model's configs, which say what its end tokens are.

    Raises:
        OSError: one cannot be read.
    """
    files = checkpoint.tokenizer_files()
    if "gguf" in files:
        made = {
            "tokenizer.json": tokenizer.backend.to_str().encode(),
            "tokenizer_config.json": _json(_config(tokenizer)),
        }
    else:
        made = {name: path.read_bytes() for name, path in files.items()}
    for name, attribute in CONFIGS.items():
        stored, config = checkpoint.path / name, getattr(checkpoint, attribute)
        if stored.is_file():
            made[name] = stored.read_bytes()
        elif config:
            made[name] = _json(config)
    return made


def bundle(checkpoint: TokenizerSource, tokenizer: Tokenizer) -> bytes:
    """These files as a zip archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(bundle_files(checkpoint, tokenizer).items()):
            archive.writestr(zipfile.ZipInfo(name, DATE), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    """As transformers writes it; several templates are a list there."""
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "clean_up_tokenization_spaces": tokenizer.clean_up,
        **({} if template is None else {"chat_template": template}),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()
