"""GGUF tensor names and metadata in Hugging Face's terms.

Names: gguf-py/gguf/tensor_mapping.py of ggml-org/llama.cpp; metadata keys: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import Family, families

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, one divisor per frequency

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERT = "{e}"  # in the name of what GGUF stacks: the expert's number
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")


def hugging_face_name(name: str, own: Mapping[str, str]) -> str | None:
    """Translate a GGUF tensor name; None if it has no counterpart. ``own`` are the names of the architecture's parts,
    or of whole tensors of a layer, that are not the usual ones.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _OUTER.get(name)
    layer, part, leaf = match.groups()
    known = {**_LAYER, **own}
    if f"{part}.{leaf}" in known:
        return f"model.layers.{layer}.{known[f'{part}.{leaf}']}"
    return f"model.layers.{layer}.{known[part]}.{leaf}" if part in known else None


def interleaved_heads(name: str, config: Mapping[str, Any]) -> int | None:
    """Return into how many heads a Hugging Face tensor's rows were interleaved, None if they were not.

    Where an architecture's converter reorders each head's rows of q and k, the two halves that rotary embedding
    pairs alternate: row `2 i + j` of a head was row `j * head_dim / 2 + i`.
    """
    if ".self_attn.q_proj." in name:
        return config["num_attention_heads"]
    if ".self_attn.k_proj." in name:
        return config["num_key_value_heads"]
    return None


def interleaved_rows(head_dim: int, start: int, stop: int) -> np.ndarray:
    """Return which stored rows hold the Hugging Face rows `start` to `stop`; int64 [stop - start]."""
    row = np.arange(start, stop)
    head, within = row // head_dim, row % head_dim
    half, index = within // (head_dim // 2), within % (head_dim // 2)
    return head * head_dim + 2 * index + half


class Fields:
    """Typed access to metadata; every error names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def integer(self, key: str) -> int | None:
        """An integer; a list of one repeated integer counts as that integer."""
        value = self._metadata.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None and type(value) is not int:
            raise CheckpointError(
                f"{self._source}: {key} must be one integer, not {str(value)[:60]}; convert it again"
            )
        return value

    def number(self, key: str) -> float | None:
        """A number. Stored as float32: the shortest decimal that rounds to it is what the config said."""
        value = self._metadata.get(key)
        if value is None:
            return None
        if type(value) not in (int, float):
            raise CheckpointError(
                f"{self._source}: {key} must be a number, not {str(value)[:60]}; convert it again"
            )
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else float(value)

    def flag(self, key: str) -> bool | None:
        """Yes or no."""
        value = self._metadata.get(key)
        if value is not None and type(value) is not bool:
            raise CheckpointError(
                f"{self._source}: {key} must be true or false, not {str(value)[:60]}; convert it again"
            )
        return value

    def text(self, key: str) -> str | None:
        """A string."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(
                f"{self._source}: {key} must be a string, not {str(value)[:60]}; convert it again"
            )
        return value


def architecture_of(fields: Fields, source: str) -> Family:
    """The family that `general.architecture` names.

    Raises:
        CheckpointError: missing or unsupported.
    """
    name = fields.text("general.architecture")
    known = {(f.gguf.architecture, f.gguf.experts): f for f in families().values() if f.gguf is not None}
    experts = bool(name) and bool(fields.integer(f"{name}.expert_count"))
    found = known.get((name or "", experts))
    if found is None:
        names = sorted({name for name, _ in known})
        if name in names:
            kind = "with" if experts else "without"
            raise CheckpointError(
                f"{source}: {name} models {kind} experts are not supported; use another model"
            )
        raise CheckpointError(
            f"{source}: general.architecture {name!r} is not supported; use one of {', '.join(names)}"
        )
    return found


def special_tokens(fields: Fields) -> dict[str, Any]:
    """Return `bos_token_id`, `eos_token_id` and `pad_token_id` as `generation_config.json` spells them.

    End of sequence, of turn and of message all end a generation: `eos_token_id` is a list if they differ.
    """
    ends = [fields.integer(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    tokens = {
        "bos_token_id": fields.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": fields.integer("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in tokens.items() if value is not None}
