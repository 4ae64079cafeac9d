"""Which architectures there are: for each how its config is read and how its model is built.

A model is a module of this folder that registers a builder with :func:`model`; modules are found by themselves.
The runtime reads checkpoints' configs by the same modules, so none of them imports torch at the top: builders
import the layers that they put together.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from makeready.graphs import models
from makeready.graphs.checkpoint.rope import normalise_rope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from makeready.graphs.checkpoint.gguf_names import Fields
    from makeready.graphs.layers.inputs import Inputs
    from makeready.graphs.plan.spec import CacheGroup


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"  # kinds of layers


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that no model here computes."""


class Model(Protocol):
    """What is traced: an ``nn.Module`` whose parameters carry their declarations (graphs/layers/parameter.py)."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Parameters by name, each once, in the order of the model."""
        ...

    def parameters(self) -> Iterator[Any]:
        """The same without names."""
        ...

    def cache_groups(self, page_size: int, dtype: str, state_dtype: str) -> tuple[CacheGroup, ...]:
        """Cache tensors of all layers, in the order of the layers, by what is kept of a sequence.

        ``dtype`` is that of keys and values, ``state_dtype`` that of recurrent states.
        """
        ...

    def __call__(self, ids_T: Any, inputs: Inputs) -> Any:
        """Token ids ``[T]`` to the logits of the token behind each, ``[T, vocabulary]`` float32."""
        ...


class Build(Protocol):
    """Of a normalised config to the model that it describes, on the meta device.

    ``context_len`` is the plan's, which rotary tables are as long as; ``activation`` names the dtype of
    everything between the embedding and the logits.
    """

    def __call__(self, config: Mapping[str, Any], *, context_len: int, activation: str) -> Model: ...


Rewrite = Callable[[dict[str, Any], str], None]
"""Brings a config into the common form in place; the text names its file in errors."""


def nothing(config: dict[str, Any], source: str) -> None:
    """The config is in the common form already."""


def no_windows(config: dict[str, Any], source: str) -> None:
    """Every layer sees all tokens, whatever ``sliding_window`` says."""
    config["sliding_window"] = None


def every_layer_slides(config: dict[str, Any], source: str) -> None:
    """``sliding_window``, where there is one, holds for all layers that ``layer_types`` does not name."""
    if config.get("layer_types") is None and config.get("sliding_window") is not None:
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]


def longest_context(config: Mapping[str, Any]) -> int:
    """Tokens that the rotary embedding was stretched to, as vLLM reads a config.

    Linear and dynamic factors count from the config's positions, which are those before scaling. Yarn's
    counts from the original positions, wherever they are stated: Qwen adds the scaling to a config of 32,768
    or 40,960 positions, DeepSeek states positions that are scaled already. Llama 3's are, too.
    """
    rope, positions = config["rope_parameters"], config["max_position_embeddings"]
    if rope["rope_type"] in ("linear", "dynamic"):
        scaled = positions * rope["factor"]
    elif rope["rope_type"] == "yarn":
        scaled = rope.get("original_max_position_embeddings", positions) * rope["factor"]
    else:
        return positions
    return int(scaled + 1e-6)  # a factor that was made by a division may fall short of a whole number


def refuse_windows(fields: Fields, config: dict[str, Any], source: str) -> None:
    """Raise CheckpointError where the file has a window: GGUF does not say which layers use it."""
    from makeready.graphs.checkpoint.base import CheckpointError

    if config["sliding_window"]:
        raise CheckpointError(
            f"{source}: {config['model_type']}.attention.sliding_window is not supported, as GGUF does not say "
            "which layers use it; use the Hugging Face folder of this model"
        )


@dataclass(frozen=True)
class ExpertNames:
    """What a family's checkpoints call the parts of a mixture of experts.

    An expert's up projection is ``<layer>.<module>.experts.<e>.<up>.weight``.

    Attributes:
        module: of a layer, in the place of its MLP.
        gate, up, down: an expert's projections.
        router: the projection to the experts' logits, within the module.
        interleaved: whether stacked files have gates and ups in turns, and wide weights with inputs before outputs
            (gpt-oss); else gates come first, and outputs before inputs.
    """

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    interleaved: bool = False

    def gguf(self) -> dict[str, str]:
        """What GGUF's parts of a layer are called; ``{e}`` is the expert, which GGUF stacks."""
        experts = f"{self.module}.experts.{{e}}"
        return {
            "ffn_gate_inp": f"{self.module}.{self.router}",
            "ffn_gate_exps": f"{experts}.{self.gate}",
            "ffn_up_exps": f"{experts}.{self.up}",
            "ffn_down_exps": f"{experts}.{self.down}",
        }


@dataclass(frozen=True)
class GGUF:
    """How the GGUF files of a family differ from the common form (graphs/checkpoint/gguf_config.py).

    Attributes:
        architecture: ``general.architecture``.
        names: parts of a layer, in Hugging Face's spelling, that are called otherwise than usual; and tensors of a
            layer, such as ``exp_probs_b.bias``.
        interleaved: whether each head's rows of q and k are reordered, so that the two halves that rotary
            embedding pairs alternate.
        experts: whether files of that architecture with experts are meant, and not those without.
        reads: keys, without the architecture, that ``complete`` gives a meaning: among them
            ``attention.key_length`` where heads are of several sizes.
        complete: completes the config from the metadata, in place; ``sliding_window`` is the file's.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    experts: bool = False
    reads: frozenset[str] = frozenset()
    complete: Callable[[Fields, dict[str, Any], str], None] = refuse_windows


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        architecture, model_type: as ``config.json`` names it.
        build: makes its model.
        defaults: of config fields, as transformers' config class has them where the common ones differ.
        rename: brings the config's fields, as the file states them, into the common spelling.
        windows: fills ``layer_types`` where the config lacks it; ``sliding_window`` is None where none is used.
        kinds: of layers that ``layer_types`` may name.
        rope: reads the rotary settings; see :func:`~makeready.graphs.checkpoint.rope.normalise_rope`.
        longest: tokens of context that the model was made for, of a normalised config.
        experts: what its checkpoints call the parts of mixtures of experts; None where it has none.
        gguf: how its GGUF files are read; None where they are not, or as another family's.
        within: ``model_type`` of configs that hold one of this family as ``text_config``, for models that also see;
            empty for none. Their tensors begin with ``model.language_model``.
    """

    architecture: str
    model_type: str
    build: Build
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rename: Rewrite = nothing
    windows: Rewrite = no_windows
    kinds: tuple[str, ...] = (FULL, SLIDING)
    rope: Callable[[dict[str, Any], str], dict[str, Any]] = normalise_rope
    longest: Callable[[Mapping[str, Any]], int] = longest_context
    experts: ExpertNames | None = None
    gguf: GGUF | None = None
    within: str = ""


_FAMILIES: dict[str, Family] = {}

Builder = TypeVar("Builder", bound=Build)


def model(architecture: str, *, model_type: str, **reading: Any) -> Callable[[Builder], Builder]:
    """Register the decorated function as the builder of ``architecture``; see :class:`Family` for ``reading``."""

    def register(build: Builder) -> Builder:
        _FAMILIES[architecture] = Family(architecture, model_type, build, **reading)
        return build

    return register


def families() -> dict[str, Family]:
    """Every supported architecture, by name."""
    for module in pkgutil.iter_modules(models.__path__):
        if module.name not in ("family", "decoder", "moe"):
            importlib.import_module(f"{models.__name__}.{module.name}")
    return dict(sorted(_FAMILIES.items()))


def family_of_type(model_type: str) -> Family | None:
    """The architecture that ``model_type`` stands for."""
    return next((f for f in families().values() if f.model_type == model_type), None)


def family_within(model_type: str) -> Family | None:
    """The architecture whose configs those of ``model_type`` hold as ``text_config``."""
    return next((f for f in families().values() if f.within and f.within == model_type), None)


def family_of(config: Mapping[str, Any]) -> Family:
    """The architecture of a normalised config.

    Raises:
        UnsupportedModelError: there is none of that name.
    """
    known = families()
    named = config.get("architectures") or ["(none)"]
    found = next((known[name] for name in named if name in known), None)
    if found is None:
        raise UnsupportedModelError(
            f"architecture {', '.join(named)} is not supported; supported are {', '.join(known)}"
        )
    return found


def build(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """The model that a normalised config describes, on the meta device.

    Raises:
        UnsupportedModelError: unknown architecture, or something in its config that is not computed here.
    """
    return family_of(config).build(config, context_len=context_len, activation=activation)


def windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that a token of each layer sees, itself included; 0 for all."""
    window = config["sliding_window"] or 0
    return tuple(window if kind == SLIDING else 0 for kind in config["layer_types"])
