"""What crosses the boundary of an engine's process, as MessagePack.

    to the host     Load, then Submit, Abort, Flush, Watch in any order
    from the host   Note (any number), Loaded or Failed; then Step, after every step and as a heartbeat; Flushed

Seconds are durations: clocks of two processes need not agree.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from makeready.engine.options import SchedulerOptions
from makeready.engine.step_record import StepRecord
from makeready.graphs.checkpoint.paired import Beside
from makeready.graphs.plan.spec import Limits

Logprob: TypeAlias = tuple[int, float | None, list[tuple[int, float]]]
"""Fields of a :class:`~makeready.engine.output.TokenLogprob`."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """One of those below; arrays on the wire, told apart by their first element."""


class Load(Message, frozen=True, tag="load"):
    """Load a model; the first message of all.

    Attributes:
        checkpoint: path, or dummy.
        model: config of a dummy checkpoint.
        plan: folder of a compiled plan; None for the plan that ``request`` asks for.
        request: fields of the planner's Request, ``traffic`` as a mapping.
        kv_memory_gib, scheduler: as for :class:`makeready.engine.llm.LLM`.
        beside: the checkpoint that drafts.
    """

    checkpoint: str
    model: dict[str, Any] | None
    plan: str | None
    request: dict[str, Any]
    kv_memory_gib: float | None
    scheduler: SchedulerOptions
    beside: Beside = Beside()


class Submit(Message, frozen=True, tag="submit"):
    """Run the samples of a request.

    Attributes:
        key: names it from now on.
        prompts: token ids of each.
        seeds: one a sample: those of the first prompt, then those of the next.
        sampling: fields of SamplingParams that matter to tokens and are not their defaults.
        end_ids: token ids that end a sample.
        grammar: what the output has to follow, as a reply has it; None for nothing.
    """

    key: int
    prompts: list[list[int]]
    seeds: list[int]
    sampling: dict[str, Any]
    end_ids: list[int]
    extra_key: str
    priority: int
    grammar: tuple[str, Any, str] | None


class Abort(Message, frozen=True, tag="abort"):
    """End a request, or one sample of it; nothing more is told of what was ended."""

    key: int
    sample: int | None = None


class Flush(Message, frozen=True, tag="flush"):
    """Forget cached prefixes that nobody holds; answered by :class:`Flushed`."""


class Watch(Message, frozen=True, tag="watch"):
    """Tell of chunks from now on, or no longer: somebody looks at them."""

    on: bool


ToHost: TypeAlias = Load | Submit | Abort | Flush | Watch


class Note(Message, frozen=True, tag="note"):
    """What is going on while the model loads.

    Attributes:
        kind: stage (what begins), detail (how far it is), report (worth keeping).
    """

    kind: str
    text: str


class Loaded(Message, frozen=True, tag="loaded"):
    """The model is loaded.

    Attributes:
        limits, vocabulary, steps: what its plan can run; see :class:`makeready.engine.front.Bounds`.
        plan: digest of the plan.
        facts: further ones, for whoever asks about the server.
    """

    limits: Limits
    vocabulary: int
    steps: list[str]
    plan: str
    facts: dict[str, Any]


class End(Message, frozen=True):
    """Why a sample ended, and what is known of it then.

    Attributes:
        reason: a finish reason of :mod:`makeready.engine.sequence`.
        error: a sentence, where that is ``error``.
        own: whether that is the request's own fault, and not the model's.
        cached_tokens, retractions: as for a sequence.
        queue_seconds: from arrival at the host until it ran.
        drafts: steps that verified drafts, drafts, and those that were right.
    """

    reason: str
    error: str | None
    own: bool
    cached_tokens: int
    retractions: int
    queue_seconds: float
    drafts: tuple[int, int, int]


class Update(Message, frozen=True):
    """What is new of a sample.

    Attributes:
        tokens: sampled and kept, in their order.
        logprobs: one a token, where asked for.
        input_logprobs: of its prompt, whole, once, where asked for.
        end: with its last tokens.
    """

    key: int
    sample: int
    tokens: list[int]
    logprobs: list[Logprob]
    input_logprobs: list[Logprob]
    end: End | None


class Refusal(Message, frozen=True):
    """A request that is not run.

    Attributes:
        retry_seconds: after which there may be room; None where it can never be run.
        foreseen: whether it is the request's own fault.
    """

    key: int
    reason: str
    retry_seconds: float | None
    foreseen: bool


class Ran(Message, frozen=True):
    """A chunk of a prompt was run.

    Attributes:
        record: place of its step among the message's records.
        key, sample: whose prompt.
        start, tokens: where in the prompt it begins, and how long it is.
    """

    record: int
    key: int
    sample: int
    start: int
    tokens: int


class Step(Message, frozen=True, tag="step"):
    """What steps came to since the last message; without any it says that the host is alive.

    Attributes:
        accepted: keys of requests that wait or run from now on; not of those that ended in their first step.
        records: of steps.
        waiting, running: sequences now.
        pages: free, cached and held now.
        chunks: that these steps ran; none unless somebody watches.
    """

    updates: list[Update]
    accepted: list[int]
    refused: list[Refusal]
    records: list[StepRecord]
    waiting: int
    running: int
    pages: tuple[int, int, int]
    chunks: list[Ran]


class Flushed(Message, frozen=True, tag="flushed"):
    """The answer to :class:`Flush`.

    Attributes:
        pages: that were dropped.
    """

    pages: int


class Failed(Message, frozen=True, tag="failed"):
    """The host cannot go on, and ends.

    Attributes:
        foreseen: whether ``reason`` is a sentence that says all that there is to say.
    """

    reason: str
    foreseen: bool


FromHost: TypeAlias = Note | Loaded | Step | Flushed | Failed
