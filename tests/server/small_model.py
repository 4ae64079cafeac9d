"""A checkpoint whose steps take no time: a layer of random weights over a vocabulary of bytes and some words."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers_fixture import byte_level_json
from transformers import LlamaConfig, LlamaForCausalLM


def small_model(folder: Path, template: str, positions: int = 256) -> Path:
    """Write it into a folder, with a chat template."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_level_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder
