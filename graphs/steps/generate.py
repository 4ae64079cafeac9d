"""Steps that generate: ``decode`` runs one token in every row, ``extend`` rows of any length, flattened.

Both put tokens behind their sequences, run the model, and sample the token behind each row's last. Where a
chunk of a prompt is not the last, its row samples for nobody (the null slot).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.plan.buckets import Shapes
from makeready.graphs.plan.spec import (
    DECODE,
    DEVICE,
    EXTEND,
    LATE,
    CacheSpec,
    Field,
    Limits,
    StepSpec,
    fields,
)
from makeready.graphs.steps.base import Sizing, step_kind
from makeready.kernels import elementwise
from makeready.kernels.sample import logprobs
from makeready.kernels.sample import sample as sampling
from makeready.kernels.spec import ROWS, TOKENS
from makeready.kernels.step import locate

if TYPE_CHECKING:
    from makeready.graphs.models.family import Model
    from makeready.graphs.planner.request import Request


def sequence_fields(limits: Limits, cache: CacheSpec, tokens: str = TOKENS) -> tuple[Field, ...]:
    """What steps stage that run known tokens; padding rows point at the null slot, ``tokens`` is their axis."""
    paged = [cache.field(group.name, "grow_page") for group in cache.paged]
    width = -(-limits.max_gain // limits.page_size)
    states = [cache.field(g.name, name) for g in cache.states for name in ("state_in", "state_out")]
    return fields(
        ("token_ids", (tokens,), "int32", 0),  # negative: the token that the step before sampled
        ("row_slot", (ROWS,), "int32", limits.null_slot),
        ("row_start", (ROWS,), "int32", -1),  # tokens before the row's; negative: as the slot has it
        ("query_start", (ROWS,), "int32", 0),
        ("query_len", (ROWS,), "int32", 0),
        *((("grow_at", (ROWS,), "int32", 0),) if paged else ()),  # entry of the slot's page lists
        *((name, (ROWS, width), "int32", 0) for name in paged),  # pages that come there; 0 is none
        *(
            (name, (ROWS,), "int32", 0) for name in states
        ),  # block that a row's state is read from, written to
        ("sample_slot", (ROWS,), "int32", limits.null_slot),  # the slot whose next token is sampled
    )


def sequence_slot(limits: Limits, cache: CacheSpec) -> tuple[Field, ...]:
    """A sequence on the device."""
    slots = limits.slots
    paged = [cache.field(group.name, "pages") for group in cache.paged]
    return fields(
        ("history", (slots, limits.context_len), "int32", 0),
        ("length", (slots,), "int32", 0),  # tokens that were run
        *((name, (slots, limits.pages_per_row), "int32", 0) for name in paged),
        keeper=DEVICE,
    )


def sampling_slot(limits: Limits) -> tuple[Field, ...]:
    """How a sequence's tokens are drawn and what is reported of them."""
    slots = limits.slots
    return fields(
        ("prompt_len", (slots,), "int32", 0),
        ("temperature", (slots,), "float32", 0.0),
        ("top_k", (slots,), "int32", 0),
        ("top_p", (slots,), "float32", 1.0),
        ("min_p", (slots,), "float32", 0.0),
        ("presence_penalty", (slots,), "float32", 0.0),
        ("frequency_penalty", (slots,), "float32", 0.0),
        ("repetition_penalty", (slots,), "float32", 1.0),
        ("seed", (slots,), "int64", 0),
        ("min_new_tokens", (slots,), "int32", 0),
        ("stop_ids", (slots, limits.max_stop_ids), "int32", -1),
        ("bias_ids", (slots, limits.max_logit_bias), "int32", -1),
        ("bias_values", (slots, limits.max_logit_bias), "float32", 0.0),
        ("top_logprobs", (slots,), "int32", -1),
        ("masked", (slots,), "int32", 0),  # whether only tokens that are allowed are drawn
    ) + fields(("allowed", (slots, limits.mask_places * limits.mask_words), "int32", 0), keeper=LATE)


def token_results(limits: Limits, axis: str = ROWS) -> tuple[Field, ...]:
    """The sampled tokens, and the model's own log-probabilities of them and of their rivals, one of each ``axis``."""
    top = limits.max_top_logprobs
    return fields(
        ("tokens", (axis,), "int32", -1),
        ("logprob", (axis,), "float32", 0.0),
        ("top_ids", (axis, top), "int32", -1),
        ("top_values", (axis, top), "float32", 0.0),
    )


def run(model: Model, i: Inputs, limits: Limits) -> tuple[torch.Tensor, Inputs]:
    """Put the step's tokens behind their sequences and run the model: logits behind each token, float32.

    Also returns the inputs with what :mod:`makeready.kernels.step.locate` derived from them.
    """
    ids, positions, token_slot, context_len = locate.locate(
        i.token_ids, i.row_slot, i.row_start, i.query_start, i.query_len, i.length, i.history
    )
    i = i.adding(positions=positions, token_slot=token_slot, context_len=context_len)
    for group in i.cache.paged:
        i = paged(i.of(group.name), limits)
    i = i.of(i.cache.groups[0].name)
    return model(ids, i), i


def paged(i: Inputs, limits: Limits, places: torch.Tensor | None = None) -> Inputs:
    """The inputs, of a cache group with pages, and where the tokens lie that they have located.

    Args:
        places: of tokens in their row's pages, where these are not their positions.
    """
    kv_slot, page_table = locate.find_pages(
        i.positions if places is None else places, i.row_slot, i.query_start, i.query_len, i.context_len,
        i.grow_at, i.grow_page, i.pages, page_size=limits.page_size,
    )  # fmt: skip
    return i.adding(kv_slot=kv_slot, page_table=page_table)


def draw(logits_RV: torch.Tensor, i: Inputs) -> torch.Tensor:
    """The next token of every row of logits, which is left in the history of ``i.sample_slot``, too, but of trees."""
    return sampling.sample(
        logits_RV, i.sample_slot, i.context_len, i.history, i.prompt_len,
        i.temperature, i.top_k, i.top_p, i.min_p,
        i.presence_penalty, i.frequency_penalty, i.repetition_penalty,
        i.seed, i.min_new_tokens, i.stop_ids, i.bias_ids, i.bias_values, i.masked, i.allowed,
        *((i.path, i.path_len) if i.deep else ()),
    )  # fmt: skip


def sample(logits_RV: torch.Tensor, i: Inputs, limits: Limits) -> dict[str, torch.Tensor]:
    """The next token of every row of logits, and what is reported of it: :func:`token_results`."""
    tokens = draw(logits_RV, i)
    logprob, top_ids, top_values = logprobs.token_logprobs(
        logits_RV, tokens, i.sample_slot, i.top_logprobs, max_top=limits.max_top_logprobs
    )
    return {"tokens": tokens, "logprob": logprob, "top_ids": top_ids, "top_values": top_values}


@dataclass(frozen=True)
class Decode:
    """One token a row, so that the axis of tokens is that of rows."""

    name: str = DECODE

    def spec(self, limits: Limits, request: Request, cache: CacheSpec) -> StepSpec:
        rows = limits.max_rows
        return StepSpec(rows, rows, 1, sequence_fields(limits, cache, ROWS), token_results(limits))

    def slot(self, limits: Limits, cache: CacheSpec) -> tuple[Field, ...]:
        return sequence_slot(limits, cache) + sampling_slot(limits)

    def trace(
        self, model: Model, inputs: Inputs, limits: Limits, request: Request
    ) -> Mapping[str, torch.Tensor]:
        logits, i = run(model, inputs, limits)
        return sample(logits, i, limits)

    def shapes(self, sizing: Sizing) -> Shapes:
        return Shapes(rows=sizing.traffic.decode_rows, count=sizing.max_decode_buckets)


@dataclass(frozen=True)
class Extend:
    """Rows of any length: prompts, chunks of prompts, and generating rows beside them."""

    name: str = EXTEND

    def spec(self, limits: Limits, request: Request, cache: CacheSpec) -> StepSpec:
        return StepSpec(
            limits.max_rows, limits.max_tokens, None, sequence_fields(limits, cache), token_results(limits)
        )

    def slot(self, limits: Limits, cache: CacheSpec) -> tuple[Field, ...]:
        return sequence_slot(limits, cache) + sampling_slot(limits)

    def trace(
        self, model: Model, inputs: Inputs, limits: Limits, request: Request
    ) -> Mapping[str, torch.Tensor]:
        logits, i = run(model, inputs, limits)
        return sample(elementwise.gather_last(logits, i.query_start, i.query_len), i, limits)

    def shapes(self, sizing: Sizing) -> Shapes:
        traffic = sizing.traffic
        return Shapes(
            traffic.extend_rows, traffic.extend_tokens, sizing.max_extend_buckets, sizing.row_counts
        )


step_kind(Decode())
step_kind(Extend())
