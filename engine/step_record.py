"""What the engine tells an observer of each step."""

from __future__ import annotations

from dataclasses import dataclass

from makeready.graphs.plan.spec import Bucket


@dataclass(frozen=True)
class StepRecord:
    """A step whose results were taken in. Times are seconds of ``time.perf_counter``.

    While a step runs on the device the host plans and launches the next one, so the times of two records
    interleave: ``plan_start`` to ``launch_end`` of the next step lie before ``wait_start`` of this one.

    Attributes:
        bucket: whose program ran; its phase, rows and tokens, padding included.
        rows, tokens: that were live.
        prompt_tokens: of these tokens, how many were of prompts (or recomputed), not sampled ones.
        cached_tokens: prompt tokens that sequences admitted with this step did not have to run.
        new_tokens: sampled and kept.
        drafts: rows for which tokens were guessed before they were sampled.
        drafted: these tokens.
        accepted: of these, those that were right.
        retractions: sequences that went back to the queue before this step because pages ran out.
        waiting, running: sequences after it.
        free, cached, held: pages after it.
        plan_start: the host began to choose sequences.
        launch_start, launch_end: it staged the batch and launched it.
        wait_start, results_read: it waited for the results, and had them.
        commit_end: tokens were given to their sequences, and text to their replies.
    """

    bucket: Bucket
    rows: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    drafts: int
    drafted: int
    accepted: int
    retractions: int
    waiting: int
    running: int
    free: int
    cached: int
    held: int
    plan_start: float
    launch_start: float
    launch_end: float
    wait_start: float
    results_read: float
    commit_end: float
