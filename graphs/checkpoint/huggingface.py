"""A Hugging Face folder: config.json, weights (one file or shards), tokenizer files."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    Ranges,
    TensorInfo,
    ranges,
    read_json,
)
from makeready.graphs.checkpoint.config import DTYPES, LANGUAGE, normalise_config
from makeready.graphs.checkpoint.generation_config import check_generation_config
from makeready.graphs.checkpoint.safetensors_file import SafetensorsFile
from makeready.graphs.checkpoint.stacked import Part, split_experts
from makeready.graphs.checkpoint.weight_files import open_weights
from makeready.graphs.models.family import family_of_type

QUANTIZATION = "hf_quant_config.json"  # modelopt's, beside config.json's part or in its place
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED = 2**20  # elements of two tensors that are compared at once
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
TEMPLATES = "additional_chat_templates"


class HuggingFaceCheckpoint(Checkpoint):
    """A folder as `save_pretrained` of transformers 4 or 5 writes it.

    Args:
        path: folder that holds `config.json` and the weights; `hf_quant_config.json` where `config.json` has no
            quantization_config.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config_path = path / "config.json"
        if not config_path.is_file():
            raise CheckpointError(_without_config(path))
        raw = read_json(config_path)
        if (path / QUANTIZATION).is_file():
            raw["quantization_config"] = _quantization(raw.get("quantization_config"), path / QUANTIZATION)
        self._sources = open_weights(path)
        self.format = next((file.format for file in self._sources.values()), SafetensorsFile.format)
        self._tensors = {name: file.infos[name] for name, file in sorted(self._sources.items())}
        self._stored_names: dict[str, str] = {}  # where a tensor is another one
        self.config = normalise_config(
            raw, source=str(config_path), default_dtype=_stored_dtype(self._tensors)
        )
        self._parts: dict[str, Part] = {}  # where a tensor is some rows of another one
        if raw.get("text_config") is not None:
            self._unwrap()
        self._split_experts()
        if self.config["tie_word_embeddings"]:
            self._tie_head()
        generation = path / "generation_config.json"
        self.generation_config: dict[str, Any] = {}
        if generation.is_file():
            self.generation_config = check_generation_config(read_json(generation), str(generation))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensor table, by Hugging Face name."""
        return self._tensors

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """Read one tensor or a box of it; see `Checkpoint.read`."""
        info = self._find(name)
        part = self._parts.get(name)
        if part is not None:
            return part.read(self._sources[part.stored], ranges(info, box))
        stored = self._stored_names.get(name, name)
        return self._sources[stored].read(stored, box)

    def tokenizer_files(self) -> dict[str, Path]:
        """The files of `TOKENIZER_FILES` and the further chat templates that exist, by name."""
        templates = sorted((self.path / TEMPLATES).glob("*.jinja"))
        names = (*TOKENIZER_FILES, *(f"{TEMPLATES}/{path.name}" for path in templates))
        return {name: self.path / name for name in names if (self.path / name).is_file()}

    def weight_files(self) -> dict[str, tuple[Path, int]]:
        """The files that a tensor is read from."""
        files = {file.path: file for file in self._sources.values()}
        return {path.name: (path, files[path].data_start) for path in sorted(files)}

    def _unwrap(self) -> None:
        """Call tensors of the text model as they are called where it is by itself."""
        stored = {
            name.replace(LANGUAGE, "model.", 1): name for name in self._tensors if name.startswith(LANGUAGE)
        }
        kept = {name: info for name, info in self._tensors.items() if not name.startswith(LANGUAGE)}
        named = {name: replace(self._tensors[old], name=name) for name, old in stored.items()}
        self._stored_names |= stored
        self._tensors = dict(sorted({**kept, **named}.items()))

    def _split_experts(self) -> None:
        """Present stacked experts one by one, in the spelling of the family."""
        family = family_of_type(self.config["model_type"])
        if family is None or family.experts is None:
            return
        parts, routers = split_experts(self._tensors, family.experts, str(self.path))
        if not parts:
            return
        gone = {part.stored for part in parts.values()} | set(routers.values())
        stored = self._stored_names  # of the text model within another
        self._parts = {
            n: replace(part, stored=stored.get(part.stored, part.stored)) for n, part in parts.items()
        }
        self._stored_names = stored | {name: stored.get(old, old) for name, old in routers.items()}
        kept = {name: info for name, info in self._tensors.items() if name not in gone}
        made = {name: part.info for name, part in self._parts.items()}
        named = {name: replace(self._tensors[old], name=name) for name, old in routers.items()}
        self._tensors = dict(sorted({**kept, **made, **named}.items()))

    def _tie_head(self) -> None:
        """Do with a tied head what transformers does, which believes the stored tensors.

        A head that is stored beside the embeddings and differs is used; where only the head is stored, it
        is the embeddings.
        """
        embedding, head = (self._tensors.get(name) for name in (EMBEDDING, HEAD))
        if head is None:
            return
        if embedding is None:
            self._stored_names[EMBEDDING] = HEAD
            self._tensors = dict(sorted({**self._tensors, EMBEDDING: replace(head, name=EMBEDDING)}.items()))
        elif not self._equal(embedding, head):
            self.config["tie_word_embeddings"] = False
            warnings.warn(
                f"{self.path} has a {HEAD} that differs from {EMBEDDING}, though its config says "
                "tie_word_embeddings: the stored head is used; set tie_word_embeddings to false if that is meant",
                CheckpointWarning,
                stacklevel=1,
            )

    def _equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors hold the same bits; reads no more of them than until they differ."""
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not one.shape:
            return False
        step = max(1, COMPARED // max(1, math.prod(one.shape[1:])))
        for start in range(0, one.shape[0], step):
            rows = slice(start, min(start + step, one.shape[0]))
            first, second = (self.read(info.name, rows).view(np.uint8) for info in (one, other))
            if not np.array_equal(first, second):
                return False
        return True


def _quantization(said: Any, beside: Path) -> Any:
    """What config.json says, or modelopt's own file where it says nothing; of groups' size, where it says no more."""
    if not said:
        return {**read_json(beside), "quant_method": "modelopt"}
    size = read_json(beside).get("quantization")
    size = size.get("group_size") if isinstance(size, dict) else None
    if size is None or not isinstance(said, dict) or said.get("config_groups"):
        return said
    return {"group_size": size, **said}


def _without_config(path: Path) -> str:
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        return f"{path} has no config.json but GGUF files; pass the file itself, e.g. {ggufs[0]}"
    return f"{path} has no config.json; pass the folder that save_pretrained wrote or a .gguf file"


def _stored_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The commonest floating dtype of a decoder's weights, for configs that state none."""
    counts = Counter(
        info.dtype
        for info in tensors.values()
        if info.dtype in DTYPES and info.name.startswith(("model.", "transformer.", "lm_head."))
    )
    return counts.most_common(1)[0][0] if counts else "float32"
