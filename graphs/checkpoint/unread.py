"""Tensors that a checkpoint has and its model does not read: harmless, doubtful, or proof of a wrong config."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection

import numpy as np

from makeready.graphs.checkpoint.base import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    by_part,
    tensor_of,
)
from makeready.graphs.checkpoint.paired import DRAFT
from makeready.graphs.models.family import family_of_type

NAMED = 5  # tensors that a warning names

# Buffers that older transformers saved, computed from the config; masks of attention; which tokens a head of a part
# of the vocabulary has, as d2t says the other way round.
_HARMLESS = re.compile(r"(^|\.)(t2d|rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.bias|masked_bias)$")
# Further parts of models that are published whole: modules that predict further tokens, and those that see.
_FURTHER, _SEES = re.compile(r"(model\.)?mtp\."), re.compile(r"(model\.)?visual\.")
_SHARED = (".embed_tokens.weight", ".shared_head.head.weight")
# Of a head that drafts with those of the model: copies, which training left as they were.
_COPIED = re.compile(r"(model\.)?(embed_tokens|lm_head)\.weight")
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.")
_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "scale", "pre_quant_scale")
_SHIFTS = ("bias", "weight_zero_point", "zero_point")
# Of activations beside 4-bit floats a quantization's reader says that they are not used.
_CACHE = re.compile(r"\.(k_proj\.(k|output)_scale|v_proj\.(v|output)_scale|self_attn\.(attn\.)?[kv]_scale)$")
_ACTIVATIONS, _WHOLE = ("input_scale", "input_global_scale"), ("weight_scale_2", "weight_global_scale")
# Beside weights of few bits: read only where their config says that they are anything but usual.
_PACKED = ("qweight", "weight_packed")
_ORDERS, _ZEROS, _SHAPES = ("g_idx", "weight_g_idx"), ("qzeros", "weight_zero_point"), ("weight_shape",)
_MIDDLES = (
    0x77777777,
    0x88888888,
    0x7F7F7F7F,
    0x80808080,
)  # zeros of symmetric weights: 4 and 8 bits, less one or not


def check_unread(checkpoint: Checkpoint, read: Collection[str]) -> None:
    """Warn of tensors that nothing reads; once, with their number and the first of them. Layers that predict further
    tokens, and scales of a cache, are told apart from others.

    Args:
        checkpoint: whose tensors.
        read: those that the model reads.

    Raises:
        CheckpointError: one of them is sure to change the result: a layer beyond the config's, a layer's
            weight of which the model knows nothing, or a bias or scale of a weight that is read.
    """
    for prefix, (part, names) in by_part(checkpoint, read).items():
        _check_unread(part, names, copied=prefix == DRAFT)


def _check_unread(checkpoint: Checkpoint, read: Collection[str], *, copied: bool) -> None:
    read = {tensor_of(name) for name in read}
    tied = bool(checkpoint.config.get("tie_word_embeddings"))  # an equal copy, or it would not be tied
    unread = [
        name
        for name in checkpoint.tensors
        if name not in read
        and not _HARMLESS.search(name)
        and not (tied and name == "lm_head.weight")
        and not (copied and _COPIED.fullmatch(name))
    ]
    if checkpoint.format == "dummy" or not unread:
        return
    for name in unread:
        reason = _reason(checkpoint, name, read)
        if reason is not None:
            raise CheckpointError(f"{checkpoint.path} has the tensor {name}, {reason}")
    ahead = [name for name in unread if _predicts_further(checkpoint, name)]
    if any(
        _predicts_further(checkpoint, name) for name in read
    ):  # such a layer's copies of what the model has
        ahead = [name for name in ahead if not name.endswith(_SHARED)]
        unread = [
            name for name in unread if not (_predicts_further(checkpoint, name) and name.endswith(_SHARED))
        ]
    _tell(checkpoint, ahead, "they predict further tokens, as only speculative=mtp of DeepSeek-V3 does")
    cache = [name for name in unread if _CACHE.search(name) and name not in ahead]
    _tell(checkpoint, cache, "they scale a quantized cache; kv.dtype says what the cache is here")
    family = family_of_type(checkpoint.config["model_type"])
    seeing = [name for name in unread if family is not None and family.within and _SEES.match(name)]
    _tell(checkpoint, seeing, "they see images and videos, which is not done here")
    told = {*ahead, *cache, *seeing}
    others = [name for name in unread if name not in told and not _belongs(name, read)]
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
    """Whether the tensor is of a layer behind the last, of which the config says how many there are, or ``mtp``."""
    if _FURTHER.match(name):
        return True
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
    if _belongs(name, read):
        if kind in _ORDERS and (np.diff(_values(checkpoint, name)) < 0).any():
            return "but its config does not say that inputs are in another order; set desc_act (actorder)"
        if kind in _ZEROS and not np.isin(_values(checkpoint, name).view(np.uint32), _MIDDLES).all():
            return "but its config says that weights are symmetric; set sym (symmetric) to false"
        return None
    if not any(f"{module}.{weight}" in read for weight in ("weight", *_PACKED)):
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


def _belongs(name: str, read: Collection[str]) -> bool:
    """Whether the tensor comes with weights of few bits that are read."""
    module, _, kind = name.rpartition(".")
    if kind in _ACTIVATIONS:
        return any(f"{module}.{whole}" in read for whole in _WHOLE)
    return kind in (*_ORDERS, *_ZEROS, *_SHAPES) and any(f"{module}.{packed}" in read for packed in _PACKED)


def _values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor's numbers; of dtypes that numpy lacks, what their bits are as integers."""
    array = checkpoint.read(name)
    if checkpoint.tensors[name].dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array
