"""One normal form for Hugging Face `config.json`, whichever transformers release wrote it.

transformers 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype` and
`rope_parameters`. Fields that a config may leave out take the values that transformers' config classes
give them. Unknown fields are kept: the model definition decides what they mean. What one family's configs have
of their own is said in its module of graphs/models/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.checkpoint.rope import normalise_rope
from makeready.graphs.models.family import FULL, SLIDING, Family, families, family_of_type, family_within

DTYPES = ("float32", "float16", "bfloat16")  # what a model's weights are computed in
MAX_LAYERS = 10_000  # far above any model; a damaged file that says 2**31 must not become a list as long
LANGUAGE = "model.language_model."  # how tensors of the text model begin in models that also see

REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# Families that are not computed here, but whose heads are tied where their configs do not say so.
_TIED = ("gemma", "gemma2", "cohere", "cohere2", "smollm3", "starcoder2")
_COMMON_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # Some files say that they do not have these.
    "rope_interleaved": False,
    "use_mrope": False,
}


def normalise_config(
    raw: dict[str, Any], *, source: str = "config.json", default_dtype: str = "float32"
) -> dict[str, Any]:
    """Bring a Hugging Face config of transformers 4 or 5 into one form.

    Args:
        raw: the parsed `config.json`; not changed.
        source: what to call it in errors.
        default_dtype: the dtype if the config states none.

    Returns:
        A JSON-able dict, equal for equal models: every field of `raw`, with `dtype` (one of `DTYPES`),
        `rope_parameters` (see `rope.normalise_rope`), `head_dim`, `num_key_value_heads`,
        `max_position_embeddings`, `rms_norm_eps`, `hidden_act`, `tie_word_embeddings`, `attention_bias`
        and `mlp_bias` filled in, and without `torch_dtype`, `rope_theta` and `rope_scaling`. For the
        families of graphs/models/ also `architectures`, `layer_types` (one entry per layer) and
        `sliding_window` (None unless a layer uses it).

    Raises:
        CheckpointError: a field is missing, malformed or contradicts another.
    """
    config = dict(raw) if raw.get("text_config") is None else _text_config(raw, source)
    model_type = _model_type(config, source)
    family = family_of_type(model_type)
    if family is not None:
        family.rename(config, source)
    own = family.defaults if family is not None else {"tie_word_embeddings": model_type in _TIED}
    for key, value in {**_COMMON_DEFAULTS, **own}.items():
        config.setdefault(key, value)
    config["dtype"] = _dtype(config, default_dtype, source)
    for field in (*REQUIRED_SIZES, "max_position_embeddings"):
        positive_int(config, field, source)
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise CheckpointError(
            f"{source}: num_hidden_layers {config['num_hidden_layers']} exceeds the limit of {MAX_LAYERS}; "
            "correct the config"
        )
    _check_heads(config, source)
    for field in (*REQUIRED_SIZES, "max_position_embeddings", "num_key_value_heads", "head_dim"):
        if config[field] >= 2**31:
            raise CheckpointError(
                f"{source}: {field} {config[field]} must be below 2**31; correct the config"
            )
    _check_scalars(config, source)
    config["rope_parameters"] = (family.rope if family is not None else normalise_rope)(config, source)
    for field in ("torch_dtype", "rope_theta", "rope_scaling"):
        config.pop(field, None)
    if family is not None:
        config.setdefault("architectures", [family.architecture])
        _fill_windows(config, family, source)
    for field, value in config.items():
        if not _is_finite(value):
            raise CheckpointError(
                f"{source}: {field} is {value!r:.80}, which is no number in JSON; correct the config"
            )
    return config


def _text_config(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The config of the text model within a multimodal one, with what that says of the weights of all.

    Raises:
        CheckpointError: its text model is none of those that are known to be in another model.
    """
    model_type, text = raw.get("model_type"), raw["text_config"]
    family = family_within(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(text, dict) or text.get("model_type", "") != family.model_type:
        known = [f.within for f in families().values() if f.within]
        raise CheckpointError(
            f"{source}: multimodal configs (field text_config) are not supported but for the text models of "
            f"{', '.join(known)}; use a text model"
        )
    config = {k: v for k, v in text.items() if k != "architectures"}
    for field in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "eos_token_id"):
        if raw.get(field) is not None:
            config[field] = raw[field]
    if config.get("quantization_config") is not None:
        config["quantization_config"] = without_language(config["quantization_config"])
    return config


def without_language(value: Any) -> Any:
    """A JSON value whose texts name tensors of the text model as it calls them by itself; patterns, too."""
    if isinstance(value, dict):
        return {key: without_language(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_language(item) for item in value]
    if isinstance(value, str):
        pattern = LANGUAGE.replace(".", "\\.")
        return value.replace(LANGUAGE, "model.").replace(pattern, "model\\.")
    return value


def positive_int(config: dict[str, Any], field: str, source: str) -> int:
    """Return an integer field that must be present and at least 1.

    Raises:
        CheckpointError: it is missing, not an integer or below 1.
    """
    value = config.get(field)
    if value is None:
        raise CheckpointError(f"{source} lacks {field}; add it to the config")
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{source}: {field} must be a positive integer, not {value!r}; correct the config"
        )
    return value


def _is_finite(value: Any) -> bool:
    """Whether all numbers in a JSON value are: Python reads Infinity, NaN and 1e400, and JSON cannot hold them."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _model_type(config: dict[str, Any], source: str) -> str:
    model_type = config.get("model_type")
    if model_type is None:
        named = config.get("architectures") or []
        model_type = next((f.model_type for name, f in families().items() if [name] == named), None)
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{source} lacks model_type; add it to the config, e.g. "
            f"{', '.join(f.model_type for f in families().values())}"
        )
    config["model_type"] = model_type
    return model_type


def _dtype(config: dict[str, Any], default: str, source: str) -> str:
    stated = [config[key] for key in ("dtype", "torch_dtype") if config.get(key) not in (None, "auto")]
    names = {str(value).removeprefix("torch.") for value in stated} or {default}
    if len(names) > 1:
        raise CheckpointError(
            f"{source}: dtype and torch_dtype differ ({', '.join(sorted(names))}); keep one"
        )
    name = names.pop()
    if name not in DTYPES:
        raise CheckpointError(f"{source}: dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return name


def _check_heads(config: dict[str, Any], source: str) -> None:
    """Fill `num_key_value_heads` and `head_dim`, and check that heads divide."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    kv_heads = positive_int(config, "num_key_value_heads", source)
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads}); "
            "correct the config"
        )
    if config.get("head_dim") is None:
        if hidden % heads:
            raise CheckpointError(
                f"{source}: hidden_size {hidden} is not a multiple of {heads} attention heads; state head_dim"
            )
        config["head_dim"] = hidden // heads
    if positive_int(config, "head_dim", source) % 2:
        raise CheckpointError(
            f"{source}: head_dim must be even for rotary embeddings, not {config['head_dim']}; correct it"
        )


def _check_scalars(config: dict[str, Any], source: str) -> None:
    def require(field: str, allowed: Callable[[Any], bool], wanted: str) -> None:
        if not allowed(config.get(field)):
            raise CheckpointError(
                f"{source}: {field} must be {wanted}, not {config.get(field)!r}; correct the config"
            )

    def is_token(value: Any) -> bool:
        return value is None or (type(value) is int and -(2**31) <= value < 2**31)

    eps = config["rms_norm_eps"]
    require(
        "rms_norm_eps",
        lambda _: type(eps) in (int, float) and math.isfinite(eps) and eps > 0,
        "a positive number",
    )
    config["rms_norm_eps"] = float(eps)
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        require(field, lambda value: type(value) is bool, "true or false")
    require(
        "architectures",
        lambda value: (
            value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
        ),
        "a list of names",
    )
    require("hidden_act", lambda value: isinstance(value, str), "a string")
    require("bos_token_id", is_token, "an integer or null")
    require(
        "eos_token_id",
        lambda value: (
            is_token(value) or (isinstance(value, list) and None not in value and all(map(is_token, value)))
        ),
        "an integer, a list of integers or null",
    )


def _fill_windows(config: dict[str, Any], family: Family, source: str) -> None:
    """Fill `layer_types` and `sliding_window` as transformers derives them for this family."""
    layers = config["num_hidden_layers"]
    if config.setdefault("sliding_window", None) is not None:
        positive_int(config, "sliding_window", source)
    family.windows(config, source)
    window = config["sliding_window"]
    if config.get("layer_types") is None:
        config["layer_types"] = [FULL] * layers
    types = config["layer_types"]
    if not isinstance(types, list) or len(types) != layers or any(kind not in family.kinds for kind in types):
        raise CheckpointError(
            f"{source}: layer_types must name one of {', '.join(family.kinds)} for each of the "
            f"{layers} layers; correct it"
        )
    slides = SLIDING in types
    if slides and window is None:
        raise CheckpointError(
            f"{source}: layer_types has {SLIDING} but no sliding_window is in use; "
            "set sliding_window (and use_sliding_window for Qwen) or change layer_types"
        )
    if not slides:
        config["sliding_window"] = None
