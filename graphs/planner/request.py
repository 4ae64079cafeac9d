"""What a plan is asked for, and what follows from it for a target and a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from makeready.graphs.checkpoint.base import NUMPY_DTYPES, Checkpoint
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import CacheSpec, Limits
from makeready.graphs.plan.speculative import CHAIN, Speculative
from makeready.graphs.plan.targets import Target
from makeready.graphs.quant.scheme import ON_LOAD, Quantization
from makeready.kernels.attention.formats import ALIASES, PER_TOKEN_HEAD

if TYPE_CHECKING:
    from makeready.graphs.models.family import Model

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
AS_BLOCKS = "stored"  # what quant= calls GGUF's blocks as the file has them
CUDA_ACTIVATION_DTYPES = ("bfloat16", "float16")  # what attention kernels multiply
STATE_DTYPES = ("float32", "bfloat16")
FP8_CACHE = {"float8_e4m3fn": "float8_e4m3fn", "float8_e4m3": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}


@dataclass(frozen=True)
class Request:
    """What a plan is asked for; None leaves the choice to the model or the target.

    The command line has these fields, and these sentences, as ``plan.*``; see engine/entrypoints/options.py.

    Attributes:
        target: a name of graphs/plan/targets.py.
        device: which device of the target to choose kernels and batch shapes for, of graphs/plan/devices.py; None
            takes the target's default. The plan runs on the others, too.
        max_rows: requests that run at once.
        max_tokens: tokens of one step over all rows; longer prompts go in chunks. null: the target's.
        context_len: tokens of one request, prompt and output together. null: all that the model allows.
        page_size: tokens of a KV page. null: the target's.
        max_logprob_tokens: tokens of one step that reports log-probabilities of its input, for requests with
            logprob_start_len; 0: no such steps. All their logits exist at once, 4 bytes a vocabulary entry.
        weight_dtype: float32, bfloat16 or float16. null: the checkpoint's; the activations' on a GPU. GGUF's blocks
            stay as they are on the CPU where this is null, and activations are rounded to 8 bits for them; what
            there is no such product for becomes float16.
        activation_dtype: what flows between kernels: bfloat16 or float16 on a GPU, float32 on the CPU. null: the
            target's. float16 is eight times as fine as bfloat16 and overflows at 65,504.
        quant: ``fp8`` (a scale for each output and each token) or ``fp8_block`` (for each 128 by 128 weights
            and each token's 128 inputs) quantizes the linears of a wide checkpoint when it is loaded, to 8-bit
            floats; ``int8`` to integers with scales as ``fp8``'s; ``int4`` their weights alone (symmetric, for each
            output and 128 inputs), ``mxfp4`` to 4-bit floats (for each output and 32 inputs), ``nvfp4`` to such
            with finer scales (for each output and 16 inputs); ``stored`` multiplies GGUF's blocks as the file has
            them, on a GPU as integers with scales by groups; None computes as the checkpoint stores them, and widens
            GGUF's.
        kv_dtype: how keys and values are kept: float32, bfloat16, float16; ``float8_e4m3fn`` (or ``fp8_e4m3``), 8-bit
            floats as they are, which saturate at 448; ``int8_per_token_head`` (or ``int8``), ``fp8_per_token_head``
            and ``int4_per_token_head`` (or ``int4``) with a scale for each token and head, the first two also of
            latents, for each token. None takes the activations'.
        kv_state_dtype: how recurrent states are kept, of models that have them: float32, or bfloat16, half the bytes:
            states are rounded whenever a step leaves them, so that an answer may depend on where its prompt was cut,
            but for deterministic plans, which round behind every token.
        kv_state_snapshots: recurrent states that are kept behind cached prefixes for later requests, beside those of
            rows. null: one for each ``plan.traffic.context`` tokens of pages that ``plan.max_rows`` rows do not take.
        deterministic: a token's numbers depend on its request alone, to the last bit: not on the batch, on
            how its prompt was cut, nor on what was cached; slower.
        disabled_passes: rewrites of the program to leave out, by name.
        max_decode_buckets: most batch sizes that decode steps are compiled for.
        max_extend_buckets: most batch shapes that prefill steps are compiled for.
        candidates: ways of running each call that a plan for a GPU carries, best first by the cost model.
        lanes: on a GPU, independent branches of a layer, such as a shared expert and the routed ones, run beside each
            other: the same numbers, and more memory for activations. A CPU runs one launch after the other.
        traffic: batches to expect; they decide where buckets are dense, never what is legal.
        speculative: how tokens are guessed before they are sampled, and fields of it by name. The command line has
            them as ``speculative.*``.
    """

    target: str = "cpu"
    device: str | None = None
    max_rows: int = 8
    max_tokens: int | None = None
    context_len: int | None = None
    page_size: int | None = None
    max_logprob_tokens: int = 0
    weight_dtype: str | None = None
    activation_dtype: str | None = None
    quant: str | None = None
    kv_dtype: str | None = None
    kv_state_dtype: str = "float32"
    kv_state_snapshots: int | None = None
    deterministic: bool = False
    disabled_passes: tuple[str, ...] = ()
    max_decode_buckets: int = 16
    max_extend_buckets: int = 24
    candidates: int = 1
    lanes: bool = True
    traffic: Traffic = field(default_factory=Traffic)
    speculative: Speculative = field(default_factory=Speculative)

    def __post_init__(self) -> None:
        if isinstance(self.speculative, Mapping):
            if self.speculative.get("tree") and CHAIN in self.speculative:
                raise PlanError(
                    f"speculative.{CHAIN} is of chains, and there is a speculative.tree; leave one out"
                )
            object.__setattr__(self, "speculative", Speculative(**self.speculative))


def limits_of(request: Request, target: Target, longest: int, vocabulary: int) -> Limits:
    """What the runtime may ask for.

    Args:
        longest: tokens of context that the model was made for.
        vocabulary: tokens that have a logit.

    Raises:
        PlanError: a limit is not positive or beyond what the model allows.
    """
    if request.candidates < 1:
        raise PlanError(f"plan.candidates={request.candidates} must be a whole number of at least 1")
    if request.deterministic and request.candidates != 1:
        raise PlanError(
            f"plan.candidates={request.candidates} does not go with plan.deterministic, where every call has one way "
            "to run for all batch shapes; leave one of them out"
        )
    for name in (
        *("max_rows", "max_tokens", "context_len", "page_size"),
        *("max_decode_buckets", "max_extend_buckets"),
    ):
        asked = getattr(request, name)
        if asked is not None and (type(asked) is not int or asked < 1):
            raise PlanError(f"plan.{name}={asked} must be a whole number of at least 1")
    context = request.context_len or longest
    if context > longest:
        raise PlanError(
            f"plan.context_len={context} is beyond the {longest} tokens that the model's positions allow; "
            f"lower it to {longest}"
        )
    guesses = request.speculative
    drafts = guesses.drafts if guesses.method is not None else 0
    return Limits(
        max_rows=request.max_rows,
        max_tokens=request.max_tokens or max(target.max_tokens, request.max_rows),
        context_len=context,
        page_size=request.page_size or target.page_size,
        vocabulary=vocabulary,
        max_gain=1 + drafts if type(drafts) is int else 1,  # what is wrong with it is said where it acts
        branches=bool(guesses.tree),
    )


def activation_dtype(request: Request, target: Target) -> str:
    """What flows between kernels.

    Raises:
        PlanError: the target's kernels do not take it.
    """
    asked = request.activation_dtype or target.activation_dtype
    _known(
        "plan.activation_dtype",
        asked,
        CUDA_ACTIVATION_DTYPES if target.is_cuda else (target.activation_dtype,),
    )
    return asked


def weight_dtype(request: Request, target: Target, checkpoint: Checkpoint, sources: Collection[str]) -> str:
    """What matrices are stored in, unless they are quantized.

    Args:
        sources: tensors of the checkpoint that the model reads; others have no say.

    Raises:
        PlanError: it is unknown.
    """
    usual = activation_dtype(request, target) if target.is_cuda else _stored_dtype(checkpoint, sources)
    asked = request.weight_dtype or usual
    _known("plan.weight_dtype", asked, WEIGHT_DTYPES)
    return asked


def kv_dtype(request: Request, target: Target) -> str:
    """The cache's dtype, or its format where it has scales.

    Raises:
        PlanError: it is unknown, or the target has no 8-bit floats.
    """
    asked = request.kv_dtype or activation_dtype(request, target)
    _known("kv.dtype", asked, (*WEIGHT_DTYPES, *FP8_CACHE, *PER_TOKEN_HEAD, *ALIASES))
    name = {**FP8_CACHE, **ALIASES}.get(asked, asked)
    if "float8_e4m3fn" in (name, PER_TOKEN_HEAD[name].dtype if name in PER_TOKEN_HEAD else ""):
        _needs_fp8(target, f"kv.dtype={asked}")
    return name


def cache_of(request: Request, model: Model, page_size: int, dtype: str) -> CacheSpec:
    """The model's cache, whose keys and values are in ``dtype``.

    Raises:
        PlanError: states are asked for otherwise than is known, or of a model without any; or no context is expected.
    """
    states, snapshots, context = request.kv_state_dtype, request.kv_state_snapshots, request.traffic.context
    _known("kv.state_dtype", states, STATE_DTYPES)
    if snapshots is not None and (type(snapshots) is not int or snapshots < 0):
        raise PlanError(f"kv.state_snapshots={snapshots} must be a whole number of at least 0, or null")
    if type(context) is not int or context < 1:
        raise PlanError(f"plan.traffic.context={context} must be a whole number of at least 1")
    cache = CacheSpec(page_size, model.cache_groups(page_size, dtype, states), context, snapshots)
    for name, asked, usual in (("dtype", states, STATE_DTYPES[0]), ("snapshots", snapshots, None)):
        if asked != usual and not cache.states:
            raise PlanError(
                f"kv.state_{name}={asked} is for models with recurrent states, and this one has none; leave it out"
            )
    return cache


def quantization(request: Request, target: Target, checkpoint: Checkpoint) -> Quantization | None:
    """How linears are quantized, in the checkpoint or when it is loaded; None where they are not.

    A second checkpoint is quantized as it is stored, or else as is asked for.

    Raises:
        PlanError: an unknown scheme, a target without 8-bit floats, or both a stored one and one asked for.
        UnsupportedModelError: the checkpoint stores something else.
    """
    # Import torch: command lines do without.
    from makeready.graphs.quant.by_part import by_part
    from makeready.graphs.quant.gguf import stored_blocks
    from makeready.graphs.quant.smoothed import smoothed
    from makeready.graphs.quant.stored import discover, stored_scheme

    discover()
    asked = request.quant
    if asked is not None:
        _known("quant", asked, sorted((*ON_LOAD, AS_BLOCKS)))
    found: dict[str, Quantization | None] = {}
    blocks: list[Quantization | None] = []
    for prefix, part in checkpoint.parts.items():
        stored = stored_scheme(part.config)
        if stored is not None and asked is not None and not prefix:
            raise PlanError(
                f"quant={asked} was asked for, but {part.path} is quantized already; "
                "leave quant out to run it as it is"
            )
        if stored is not None:
            found[prefix] = smoothed(stored, part.tensors)
        elif asked == AS_BLOCKS:
            found[prefix] = stored_blocks(part, packed=target.is_cuda)
            blocks.append(found[prefix])
        else:
            found[prefix] = None if asked is None else ON_LOAD[asked]
    if asked == AS_BLOCKS and not any(blocks):
        raise PlanError(
            f"quant={AS_BLOCKS} multiplies GGUF's blocks as they are, and {checkpoint.path} has none that "
            "there are products for; leave it out"
        )
    scheme = by_part(found)
    if scheme is not None and "fp8" in scheme.features:
        _needs_fp8(target, "this quantized checkpoint" if asked is None else f"quant={asked}")
    return scheme


def _needs_fp8(target: Target, what: str) -> None:
    if target.is_cuda and "fp8" not in target.features:
        raise PlanError(
            f"{what} needs 8-bit floats, which {target.name} does not compute with; "
            "choose a target from sm_90a on, or 16-bit weights and cache"
        )


def _stored_dtype(checkpoint: Checkpoint, sources: Collection[str]) -> str:
    """The config's dtype; fp16 for block-quantized files, whose values are products of fp16 scales."""
    read = (checkpoint.tensors[name].dtype for name in sources if name in checkpoint.tensors)
    if any(dtype not in NUMPY_DTYPES for dtype in read):
        return "float16"
    return checkpoint.config.get("dtype") or "bfloat16"


def _known(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise PlanError(f"{name}={value} is not supported; choose one of {', '.join(allowed)}")
