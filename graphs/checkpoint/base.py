"""What every checkpoint offers, whatever its format: a config, a tensor table, and reads by name.

Tensor names are Hugging Face's. Shapes are row-major, outermost axis first.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

# Every field of a config enters the fingerprint, unknown ones too, except these, which cannot change the
# numbers that a model gives for tokens. All that a plan keeps of a config is the others.
FINGERPRINT_EXEMPT = frozenset(
    {
        # Names, and who wrote the file.
        *(
            "_name_or_path",
            "_commit_hash",
            "transformers_version",
            "transformers.js_config",
            "is_llama_config",
        ),
        # How it was trained.
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        *("initializer_range", "gradient_checkpointing"),
        # How transformers holds and runs it. A plan says itself in what dtype it keeps weights.
        *("dtype", "use_cache", "pretraining_tp", "output_attentions", "output_hidden_states", "return_dict"),
        *("torchscript", "_attn_implementation_autoset"),
        # Where texts begin and end, and how tokens are drawn: the engine asks the checkpoint, not the plan.
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "do_sample", "temperature", "top_k"),
        *("top_p", "repetition_penalty"),
        # What `layer_types` and `sliding_window` were derived from, which do count.
        *("use_sliding_window", "max_window_layers"),
    }
)

# How a tensor's dtype reads into numpy. numpy has no bfloat16 or 8-bit floats: those come as raw bits.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "float8_e8m0fnu": np.dtype("u1"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}


PLAIN_DTYPES = ("float32", "float16", "bfloat16", "float64")  # numbers that stand for themselves
PLAIN, BLOCKS = "plain", "blocks"
AS_STORED = "#"  # between the name of a tensor and the block type whose bytes are meant

# What of a tensor is read: ranges of its first axes; a bare slice is one of axis 0.
Ranges: TypeAlias = slice | Sequence[slice]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; one sentence names the file or field and the remedy."""


class CheckpointWarning(UserWarning):
    """A checkpoint is used, but something about it deserves a look."""


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
        name: Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`.
        dtype: a key of `NUMPY_DTYPES`, or a GGUF block type in lower case such as `q4_1`.
        shape: row-major shape in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """What stored dtypes of weights have in common: `PLAIN`, GGUF's `BLOCKS`, or the dtype itself."""
        if self.dtype in PLAIN_DTYPES:
            return PLAIN
        return self.dtype if self.dtype in NUMPY_DTYPES else BLOCKS


class Checkpoint(ABC):
    """Weights, config and tokenizer reference of one model, opened but not yet read.

    Attributes:
        path: the folder or file it was opened from (`dummy` for dummy weights).
        format: `safetensors`, `pytorch`, `gguf` or `dummy`.
        config: Hugging Face `config.json` in the normal form of `config.normalise_config`.
        generation_config: `generation_config.json` (ids of end tokens, sampling defaults); `{}` if none.
    """

    path: Path
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def parts(self) -> Mapping[str, Checkpoint]:
        """Checkpoints that it is put together of, by what the names of their tensors begin with here."""
        return {"": self}

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensor table, by Hugging Face name."""

    def find(self, name: str) -> TensorInfo | None:
        """The tensor called ``name``; None where there is none.

        ``NAME#KIND`` is what the file holds of a tensor of blocks of that type: uint8, its rows one after the other.
        """
        return self.tensors.get(name)

    def dtype_of(self, name: str) -> str:
        """Dtype of what `find` finds.

        Raises:
            CheckpointError: no such tensor.
        """
        return self._find(name).dtype

    @abstractmethod
    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """Read one tensor, or a box of it without touching the rest.

        Args:
            name: what `find` finds.
            box: `slice(start, stop)` of axis 0, or one for each of the first axes; the others are read whole.
                None reads everything.

        Returns:
            Plain dtypes: an array of `NUMPY_DTYPES[dtype]`, where the file allows a read-only view of
            the mapped file, strided where the box is (bfloat16 as its 16 bits, 8-bit floats as
            theirs). GGUF block types: dequantized float32.

        Raises:
            CheckpointError: no such tensor, or a range that leaves it.
        """

    def tokenizer_files(self) -> dict[str, Path]:
        """Files that describe the tokenizer, by file name (`gguf` for a GGUF file); {} if none."""
        return {}

    def weight_files(self) -> dict[str, tuple[Path, int]]:
        """Files that hold weights by name, each with the bytes of the header before its data; {} if none."""
        return {}

    def fingerprint(self, read: Collection[str] | None = None) -> str:
        """Hash what a plan depends on: the config and the tensor table, but no weights.

        Args:
            read: tensors that count; None takes all.

        Returns:
            sha256 in hex over the normalised config without `FINGERPRINT_EXEMPT` and the sorted
            (name, kind, shape) table. Paths, times and data bytes do not enter, nor does which plain dtype
            a tensor has, or axes of length 1: the same model in another folder has the same fingerprint.
        """
        table = sorted(
            (info.name, info.kind, tuple(size for size in info.shape if size != 1))
            for info in (self.tensors.values() if read is None else filter(None, map(self.find, read)))
        )
        text = json.dumps([counted(self.config), table], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _find(self, name: str) -> TensorInfo:
        info = self.find(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}; check that the model definition fits the checkpoint"
            )
        return info


def by_part(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[Checkpoint, dict[str, str]]]:
    """Of every part of ``checkpoint``, by its prefix: the part, and those of ``names`` that are its own, by what it
    calls them itself.
    """
    found: dict[str, tuple[Checkpoint, dict[str, str]]] = {
        prefix: (part, {}) for prefix, part in checkpoint.parts.items()
    }
    longest = sorted(found, key=len, reverse=True)
    for name in names:
        prefix = next(p for p in longest if name.startswith(p))
        found[prefix][1][name.removeprefix(prefix)] = name
    return found


def tensor_of(name: str) -> str:
    """The tensor that a name of :meth:`Checkpoint.find` is about."""
    return name.partition(AS_STORED)[0]


def counted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that may change what is computed."""
    return {key: value for key, value in config.items() if key not in FINGERPRINT_EXEMPT}


def ranges(info: TensorInfo, box: Ranges | None) -> tuple[tuple[int, int], ...]:
    """Resolve `box` to (start, stop) on every axis of a tensor.

    Raises:
        CheckpointError: more ranges than axes, a step other than 1, or a range that leaves the tensor.
    """
    given = () if box is None else (box,) if isinstance(box, slice) else tuple(box)
    if len(given) > len(info.shape):
        raise CheckpointError(
            f"{len(given)} ranges do not fit tensor {info.name!r} of shape {info.shape}; "
            f"ask for at most {len(info.shape)}"
        )
    found = []
    for axis, count in enumerate(info.shape):
        part = given[axis] if axis < len(given) else slice(None)
        start = 0 if part.start is None else part.start
        stop = count if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= count:
            raise CheckpointError(
                f"range {part} of axis {axis} does not fit tensor {info.name!r} of shape {info.shape}; "
                f"ask for slice(start, stop) with 0 <= start <= stop <= {count}"
            )
        found.append((start, stop))
    return tuple(found)


def map_file(path: Path) -> np.ndarray:
    """Map a file read-only.

    Returns:
        uint8 [bytes]; pages are read when touched and shared between processes.

    Raises:
        CheckpointError: the file cannot be read or is empty.
    """
    try:
        return np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the checkpoint") from None
    except ValueError:  # numpy's answer to an empty file
        raise CheckpointError(f"{path} is empty; download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the checkpoint folder"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON; download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not {type(value).__name__}; download it again"
        )
    return value


def open_checkpoint(path: str | Path, *, config: dict[str, Any] | None = None, seed: int = 0) -> Checkpoint:
    """Open a checkpoint for reading; weights are mapped, not read.

    Args:
        path: a folder with `config.json` and weights (safetensors, or files of `torch.save`), a GGUF file, or the
            word `dummy`.
        config: a Hugging Face config, for `dummy` only.
        seed: seed of the weights, for `dummy` only.

    Raises:
        CheckpointError: nothing usable at `path`; the message says what is missing.
    """
    # Imported here because each reader imports this module; under the second name that the type checker
    # then sees it by, Checkpoint is another class to it: hence Any.
    from makeready.graphs.checkpoint.dummy import DummyCheckpoint
    from makeready.graphs.checkpoint.gguf_checkpoint import GGUFCheckpoint
    from makeready.graphs.checkpoint.huggingface import HuggingFaceCheckpoint

    opened: Any
    if str(path) == "dummy":
        if config is None:
            raise CheckpointError("checkpoint=dummy needs a config; pass the model's config.json as config")
        opened = DummyCheckpoint(config, None, seed)
        return opened
    if config is not None:
        raise CheckpointError(
            f"config is for checkpoint=dummy only, but the checkpoint is {path}; drop one of them"
        )
    path = Path(path).expanduser()
    if not os.path.exists(path):  # False, too, for names that no file can have
        raise CheckpointError(
            f"{path} does not exist; "
            "pass a folder with config.json and weights, a .gguf file, or the word dummy"
        )
    opened = HuggingFaceCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)
    return opened
