"""What the engine does, for Prometheus.

>>> metrics = Metrics()
>>> engine.observer = metrics.step          # every step
>>> metrics.finish(reply.result())          # every reply that is final
>>> metrics.render()                        # the text of a scrape, and its type

Rates and shares are left to queries, so that any window can be taken, such as

    tokens/s         rate(makeready_generated_tokens_total[1m])
    cache hit rate   cached / (cached + prompt), of rate(makeready_{cached,prompt}_tokens_total[5m])
    padding waste    padding / (padding + live), of rate(makeready_{padding,live}_tokens_total[5m])
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from makeready.engine.exposition import Counter, Family, Gauge, Histogram, render
from makeready.engine.output import Output
from makeready.engine.sequence import ABORT, ERROR
from makeready.engine.step_record import StepRecord

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Seconds. A decode step of an 8B model takes 5 to 30 ms, a long prefill step 0.2 s, the host's part of
# either 0.05 to 2 ms.
STEP_BOUNDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2)
HOST_BOUNDS = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 5e-3, 0.01, 0.05, 0.2)
REQUEST_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 8, 15, 30, 60, 120, 300, 900)


class Metrics:
    """Counts of one engine.

    Args:
        model: what the model is called; then vLLM's names, by which dashboards look for these figures, are told too.
    """

    def __init__(self, model: str | None = None) -> None:
        bucket, phase = ("bucket",), ("phase",)
        self._waiting = Gauge("makeready_waiting_requests", "Requests that wait.")
        self._running = Gauge("makeready_running_requests", "Requests that run.")
        self._pages = Gauge("makeready_kv_pages", "KV pages: free, cached, or held by requests.", ("state",))
        self._generated = Counter("makeready_generated_tokens_total", "Tokens sampled and kept.")
        self._prompt = Counter("makeready_prompt_tokens_total", "Tokens of prompts that were run.")
        self._cached = Counter(
            "makeready_cached_tokens_total", "Tokens of prompts found in the prefix cache."
        )
        self._drafts = Counter("makeready_drafts_total", "Rows of steps for which tokens were guessed.")
        self._drafted = Counter(
            "makeready_drafted_tokens_total", "Tokens that were guessed before they were sampled."
        )
        self._accepted = Counter("makeready_accepted_tokens_total", "Of these, those that were right.")
        self._retractions = Counter(
            "makeready_retractions_total", "Requests that went back to the queue because pages ran out."
        )
        self._steps = Counter("makeready_steps_total", "Steps, by the bucket they ran in.", bucket)
        self._live = Counter("makeready_live_tokens_total", "Tokens of requests in these steps.", bucket)
        self._padding = Counter(
            "makeready_padding_tokens_total", "Tokens that fill these steps up to the bucket.", bucket
        )
        self._step_seconds = Histogram(
            "makeready_step_seconds",
            "From a step's launch, or the results before it, to its own.",
            STEP_BOUNDS,
            phase,
        )
        self._host_seconds = Histogram(
            "makeready_host_seconds", "The host's part of a step: plan, launch, commit.", HOST_BOUNDS, phase
        )
        self._finished = Counter("makeready_requests_total", "Requests that ended.", ("reason",))
        self._queue = Histogram("makeready_queue_seconds", "From arrival to running.", REQUEST_BOUNDS)
        self._first = Histogram(
            "makeready_time_to_first_token_seconds", "From arrival to the first token.", REQUEST_BOUNDS
        )
        self._between = Histogram(
            "makeready_inter_token_seconds",
            "For each later token, the mean time of its request's.",
            STEP_BOUNDS,
        )
        self._whole = Histogram("makeready_e2e_seconds", "From arrival to the last token.", REQUEST_BOUNDS)
        self._families: list[Family] = list(vars(self).values())
        self._model = model
        self._read = 0.0

    def step(self, record: StepRecord) -> None:
        """Count a step; an engine's observer."""
        bucket, phase = (str(record.bucket),), (record.bucket.phase,)
        self.now(record.waiting, record.running, (record.free, record.cached, record.held))
        self._generated.add(record.new_tokens)
        self._prompt.add(record.prompt_tokens)
        self._cached.add(record.cached_tokens)
        self._drafts.add(record.drafts)
        self._drafted.add(record.drafted)
        self._accepted.add(record.accepted)
        self._retractions.add(record.retractions)
        self._steps.add(1, bucket)
        self._live.add(record.tokens, bucket)
        self._padding.add(record.bucket.tokens - record.tokens, bucket)
        began = max(self._read, record.launch_start)
        self._step_seconds.observe(record.results_read - began, 1, phase)
        host = record.launch_end - record.plan_start + record.commit_end - record.results_read
        self._host_seconds.observe(host, 1, phase)
        self._read = record.results_read

    def now(self, waiting: int, running: int, pages: tuple[int, int, int]) -> None:
        """How many sequences wait and run, and pages are free, cached and held; steps are not all that changes it."""
        self._waiting.set(waiting)
        self._running.set(running)
        for state, count in zip(("free", "cached", "held"), pages, strict=True):
            self._pages.set(count, (state,))

    def finish(self, output: Output) -> None:
        """Count a request that ended, or was refused."""
        self._finished.add(1, (output.finish_reason,))
        meta = output.meta_info
        if output.finish_reason == ERROR or not output.completion_tokens:
            return
        first, whole, more = meta["time_to_first_token"], meta["e2e_latency"], output.completion_tokens - 1
        self._queue.observe(meta["queue_time"])
        self._first.observe(first)
        self._whole.observe(whole)
        if more:
            self._between.observe((whole - first) / more, more)

    def aborted(self, samples: int) -> None:
        """Count samples whose reader has gone."""
        self._finished.add(samples, (ABORT,))

    def latencies(self) -> dict[str, tuple[tuple[float, ...], list[int]]]:
        """How long first tokens took, and later ones: bounds in seconds, and how many were within each."""
        named = {"first_token": self._first, "between_tokens": self._between}
        return {name: (family.bounds, family.counts()) for name, family in named.items()}

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """What a scrape gets, and its type; from any thread.

        Args:
            accept: what the scraper says that it reads.
        """
        return render(self._metrics(), accept)

    def _metrics(self) -> Iterator[Metric]:
        for family in self._families:
            yield family.metric()
        if self._model is not None:
            yield from self._aliases(self._model)

    def _aliases(self, model: str) -> Iterator[Metric]:
        """The same under vLLM's names (its documentation, "Production metrics"), with its labels."""
        fixed = (("model_name", model), ("engine", "0"))
        free, cached, held = (self._pages.value((state,)) for state in ("free", "cached", "held"))
        usage = Gauge("", "Share of KV pages that requests hold.")
        usage.set(held / max(free + cached + held, 1))
        prompts = Counter("", "Tokens of prompts, cached or run.")
        prompts.add(self._prompt.value() + self._cached.value())
        for name, family in (
            ("num_requests_running", self._running),
            ("num_requests_waiting", self._waiting),
            ("kv_cache_usage_perc", usage),
            ("prompt_tokens_total", prompts),
            ("generation_tokens_total", self._generated),
            ("num_preemptions_total", self._retractions),
            ("spec_decode_num_drafts_total", self._drafts),
            ("spec_decode_num_draft_tokens_total", self._drafted),
            ("spec_decode_num_accepted_tokens_total", self._accepted),
            ("prefix_cache_queries_total", prompts),
            ("prefix_cache_hits_total", self._cached),
            ("time_to_first_token_seconds", self._first),
            ("inter_token_latency_seconds", self._between),
            ("e2e_request_latency_seconds", self._whole),
            ("request_queue_time_seconds", self._queue),
        ):
            yield family.metric(f"vllm:{name}", fixed)
        ended = Counter("", self._finished.help, ("finished_reason",))
        for labels, value in self._finished.items():
            ended.add(value, labels)
        yield ended.metric("vllm:request_success_total", fixed)
