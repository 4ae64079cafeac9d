"""What configs of mixtures of experts have in common: sizes that are checked, and which layers are mixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import Model

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields
    from makeready.graphs.layers.latent_attention import LatentAttention
    from makeready.graphs.layers.moe import ExpertsConfig
    from makeready.graphs.models.decoder import DecoderConfig

MAX_EXPERTS = 1024  # far above any model; route's kernels hold a token's logits in registers


def one_spelling(config: dict[str, Any], name: str, other: str, source: str) -> None:
    """The field ``other`` becomes ``name``, which a newer or older transformers writes.

    Raises:
        CheckpointError: both are there and differ.
    """
    stated = config.pop(other, None)
    if stated is None:
        return
    if config.setdefault(name, stated) != stated:
        raise CheckpointError(f"{source}: {name} and {other} differ; keep one")


def check_experts(config: Mapping[str, Any], experts: str, top_k: str, *sizes: str) -> None:
    """Check the number of experts, of a token's experts and further sizes, by the config's names for them.

    Raises:
        CheckpointError: one is missing, not a positive integer, or too large.
    """
    for field in (experts, top_k, *sizes):
        value = config.get(field)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"config.json: {field} must be a positive integer, not {value!r}; correct the config"
            )
    if config[experts] > MAX_EXPERTS:
        raise CheckpointError(
            f"config.json: {experts} {config[experts]} exceeds the limit of {MAX_EXPERTS}; correct the config"
        )
    if config[top_k] > config[experts]:
        raise CheckpointError(
            f"config.json: {top_k} ({config[top_k]}) exceeds {experts} ({config[experts]}); correct the config"
        )


def sparse_layers(config: Mapping[str, Any]) -> Callable[[int], bool]:
    """DeepSeek's: layers from ``first_k_dense_replace`` on, every ``moe_layer_freq``-th by its index.

    Raises:
        CheckpointError: one of the two is no such number.
    """
    first, step = config["first_k_dense_replace"], config["moe_layer_freq"]
    for name, value, least in (("first_k_dense_replace", first, 0), ("moe_layer_freq", step, 1)):
        if type(value) is not int or value < least:
            raise CheckpointError(
                f"config.json: {name} must be an integer of at least {least}, not {value!r}; correct the config"
            )
    return lambda index: index >= first and index % step == 0


def shared_experts(config: Mapping[str, Any]) -> int:
    """DeepSeek's ``n_shared_experts``, which are one MLP as wide as they are together; 0 for none.

    Raises:
        CheckpointError: it is no such number.
    """
    shared = config["n_shared_experts"] or 0
    if type(shared) is not int or shared < 0:
        raise CheckpointError(
            f"config.json: n_shared_experts must be an integer of at least 0, not {shared!r}; correct the config"
        )
    return shared


def read_sizes(
    fields: Fields, config: dict[str, Any], source: str, architecture: str, names: Mapping[str, str]
) -> None:
    """Fill the config's fields ``names`` from a GGUF file's keys of the architecture.

    Raises:
        CheckpointError: the file lacks one.
    """
    for name, key in names.items():
        config[name] = fields.integer(f"{architecture}.{key}")
        if config[name] is None:
            raise CheckpointError(f"{source} lacks {architecture}.{key}; convert it again")


def sparse_decoder(
    read: DecoderConfig,
    experts: ExpertsConfig,
    sparse: Callable[[int], bool],
    *,
    context_len: int,
    activation: str,
    attention: Callable[[int], LatentAttention] | None = None,
) -> Model:
    """A decoder whose layers are mixtures where ``sparse`` says so of their index, and dense elsewhere.

    ``attention`` makes that of the layer of an index; None is grouped-query attention.
    """
    from makeready.graphs.layers.moe import MixtureOfExperts
    from makeready.graphs.models.decoder import Decoder, DecoderLayer

    def layer(config: DecoderConfig, index: int) -> DecoderLayer:
        mlp = None
        if sparse(index):
            mlp = MixtureOfExperts(f"model.layers.{index}", config.hidden, experts)
        return DecoderLayer(config, index, mlp, None if attention is None else attention(index))

    return Decoder(read, context_len=context_len, activation=activation, layer=layer)
