"""Tensors that a checkpoint has and its model does not read: harmless, doubtful, or proof of a wrong config."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint, CheckpointError, CheckpointWarning, tensor_of

NAMED = 5  # tensors that a warning names

# Buffers that older transformers saved, computed from the config; masks of attention.
_HARMLESS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.bias|masked_bias)$")
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.")
_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "scale")
_SHIFTS = ("bias", "weight_zero_point", "zero_point")


def check_unread(checkpoint: Checkpoint, read: Collection[str]) -> None:
    """Warn of tensors that nothing reads; once, with their number and the first of them. Layers that predict further
    tokens are told apart from others.

    Args:
        checkpoint: whose tensors.
        read: those that the model reads.

    Raises:
        CheckpointError: one of them is sure to change the result: a layer beyond the config's, a layer's
            weight of which the model knows nothing, or a bias or scale of a weight that is read.
    """
    read = {tensor_of(name) for name in read}
    tied = bool(checkpoint.config.get("tie_word_embeddings"))  # an equal copy, or it would not be tied
    unread = [
        name
        for name in checkpoint.tensors
        if name not in read and not _HARMLESS.search(name) and not (tied and name == "lm_head.weight")
    ]
    if checkpoint.format == "dummy" or not unread:
        return
    for name in unread:
        reason = _reason(checkpoint, name, read)
        if reason is not None:
            raise CheckpointError(f"{checkpoint.path} has the tensor {name}, {reason}")
    ahead = [name for name in unread if _predicts_further(checkpoint, name)]
    _tell(checkpoint, ahead, "they predict further tokens, which is not done here")
    others = [name for name in unread if name not in set(ahead)]
    _tell(checkpoint, others, "if they belong to it, config.json is another checkpoint's")


def _tell(checkpoint: Checkpoint, unread: Collection[str], meaning: str) -> None:
    if not unread:
        return
    more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
    warnings.warn(
        f"{checkpoint.path} has {len(unread)} tensor{'s' if len(unread) > 1 else ''} that the model does not read: "
        f"{', '.join([*unread][:NAMED])}{more}; {meaning}",
        CheckpointWarning,
        stacklevel=1,  # from here, so that a process is told once, whether it compiles, loads, or both
    )


def _predicts_further(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is of a layer behind the last, of which the config says how many there are."""
    layers, layer = checkpoint.config["num_hidden_layers"], _LAYER.match(name)
    predicting = checkpoint.config.get("num_nextn_predict_layers")
    return layer is not None and type(predicting) is int and layers <= int(layer[1]) < layers + predicting


def _reason(checkpoint: Checkpoint, name: str, read: Collection[str]) -> str | None:
    """Why the result would be wrong without the tensor; None where that is not sure."""
    config = checkpoint.config
    layers, layer = config["num_hidden_layers"], _LAYER.match(name)
    if _predicts_further(checkpoint, name):
        return None
    if layer is not None and int(layer[1]) >= layers:
        return f"but its config says num_hidden_layers={layers}; correct the config"
    module, _, kind = name.rpartition(".")
    if layer is not None and kind == "weight":
        return (
            f"which {config['architectures'][0]} does not have; use a checkpoint of that architecture, or "
            "correct the config"
        )
    if f"{module}.weight" not in read:
        return None
    if kind in _SCALES and not (_values(checkpoint, name) == 1).all():
        return (
            f"but its config names no quantization that has {kind}; add the quantization_config that it was "
            "stored with"
        )
    if kind in _SHIFTS and _values(checkpoint, name).any():
        if kind == "bias":
            return "which its config leaves out; set attention_bias or mlp_bias as the model was trained"
        return "and asymmetric quantization is not supported; use a checkpoint with symmetric weights"
    return None


def _values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor's numbers; of dtypes that numpy lacks, what their bits are as integers."""
    array = checkpoint.read(name)
    if checkpoint.tensors[name].dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array
