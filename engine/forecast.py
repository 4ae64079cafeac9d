"""What a plan is predicted to do before any device is there: the real scheduler on a clock of predicted steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from makeready.engine.errors import RequestError
from makeready.engine.loop import Engine
from makeready.engine.options import NEVER, SchedulerOptions
from makeready.engine.planned import shareable
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.virtual import VirtualExecutable
from makeready.graphs.executable.cuda.memory import kv_memory
from makeready.graphs.executable.load import kv_pages
from makeready.graphs.inspect.split import beside_pages
from makeready.graphs.inspect.step_time import StepTimes
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DECODE
from makeready.graphs.plan.targets import target_of


@dataclass(frozen=True)
class Arrival:
    """A sequence that is there ``seconds`` after the start."""

    seconds: float
    sequence: TokenSequence


@dataclass
class Outcome:
    """What became of a load on the virtual clock.

    Attributes:
        seconds: from the start to the end of the last request.
        steps: that were run.
        requests: that ran.
        refused: that never can, such as those over the context.
        prompt_tokens, cached_tokens, output_tokens: of those that ran; the second are found in the prefix cache.
        first: seconds from each arrival to its first token.
    """

    seconds: float = 0.0
    steps: int = 0
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Figures by name; times in milliseconds where they say so."""
        p50, p99 = (float(1e3 * np.percentile(self.first, q)) if self.first else 0.0 for q in (50, 99))
        seconds = max(self.seconds, 1e-12)
        figures = {name: value for name, value in asdict(self).items() if name != "first"}
        return figures | {
            "output_throughput": self.output_tokens / seconds,
            "total_throughput": (self.prompt_tokens + self.output_tokens) / seconds,
            "ttft_milliseconds": {"p50": p50, "p99": p99},
        }


class Forecast:
    """Predictions of one plan, on the device that it was chosen for.

    Args:
        plan: compiled; neither its weights nor its device are needed.
        options: of the scheduler.
        kv_bytes: memory for KV pages; None as :func:`makeready.graphs.executable.load.load` takes it, of an empty
            device.
        times: what steps take; None predicts it.
        report: told in a sentence of what the plan does not allow the scheduler.

    Attributes:
        pages: of the cache, page 0 included.
        check: raises :class:`RequestError` for a sequence that could never run.

    Raises:
        PlanError: the device has too little memory.
        RequestError: the options do not fit the plan.
    """

    def __init__(
        self,
        plan: Plan,
        options: SchedulerOptions | None = None,
        kv_bytes: int | None = None,
        *,
        times: StepTimes | None = None,
        report: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.plan = plan
        self.times = times or StepTimes(plan)
        # How many drafts are right depends on texts, of which nothing is known here.
        options = replace(options or SchedulerOptions(), speculation=NEVER)
        self.options = shareable(plan, options, report)
        self.options.check(plan)
        target = target_of(plan)
        self._reserved = 0
        if target.is_cuda:
            found = kv_memory(plan, target.device.memory, kv_bytes)
            self.pages, self._reserved = found.pages, found.reserve
        else:
            self.pages = kv_pages(plan, kv_bytes)
        self.check = Engine(
            VirtualExecutable(plan, self.pages, self.times.seconds), self.options
        ).scheduler.check

    def memory(self) -> dict[str, Any]:
        """Bytes of the plan's regions and of the cache, and tokens that it holds."""
        plan = self.plan
        kv = plan.kv.nbytes(self.pages, plan.limits)
        return {
            "device": target_of(plan).device.name,
            "device_bytes": target_of(plan).device.memory,
            "weights": plan.memory.weights,
            "arena": plan.memory.arena,
            "other": plan.memory.fixed - plan.memory.weights - plan.memory.arena,
            "reserved": self._reserved,
            "kv": kv,
            "kv_beside_pages": beside_pages(plan, self.pages),
            "kv_tokens": (self.pages - 1) * plan.limits.page_size,
            "total": plan.memory.fixed + self._reserved + kv,
        }

    def token_seconds(self, rows: int, context: int) -> float:
        """Seconds a token where ``rows`` generate, each of ``context`` tokens.

        Raises:
            RequestError: more than the plan allows.
        """
        limits = self.plan.limits
        if rows > limits.max_rows or context > limits.context_len:
            raise RequestError(
                f"{rows} rows of {context:,} tokens are more than the plan's {limits.max_rows} of "
                f"{limits.context_len:,}; ask for less, or compile with plan.max_rows and plan.context_len"
            )
        return self.times.alike(BucketTable(self.plan.buckets).covering(DECODE, rows, rows), rows, context)

    def first_token_seconds(self, prompt: int) -> float:
        """How many seconds a single prompt of this length waits for its first token, with nothing else running.

        Raises:
            RequestError: it is longer than the context.
        """
        return self.run([Arrival(0.0, sequence([0] * prompt, 1))], strict=True).seconds

    def run(
        self,
        load: Sequence[Arrival],
        note: Callable[[str], None] = lambda detail: None,
        *,
        strict: bool = False,
    ) -> Outcome:
        """Run a load, which generates as many tokens as it may, through the real scheduler.

        Args:
            load: by their arrivals, ascending.
            note: told now and then how far it is.
            strict: raise what refuses a request, instead of counting it.
        """
        executable = VirtualExecutable(self.plan, self.pages, self.times.seconds)
        engine, outcome, at = Engine(executable, self.options), Outcome(), 0
        arrived: dict[TokenSequence, float] = {}  # those without a token
        while at < len(load) or engine.busy:
            if not engine.busy:
                executable.now = max(executable.now, load[at].seconds)
            while at < len(load) and load[at].seconds <= executable.now:
                one, at = load[at], at + 1
                try:
                    engine.submit(one.sequence)
                except RequestError:
                    if strict:
                        raise
                    outcome.refused += 1
                else:
                    arrived[one.sequence] = one.seconds
            if not engine.busy:
                continue
            ended = engine.step()
            for made in (*ended, *engine.scheduler.running):
                if made.output and made in arrived:
                    outcome.first.append(executable.now - arrived.pop(made))
            for made in ended:
                outcome.requests += 1
                outcome.prompt_tokens += len(made.prompt)
                outcome.cached_tokens += made.cached_tokens
                outcome.output_tokens += len(made.output)
            if ended and not outcome.requests % 50:
                note(f"{outcome.requests:,} of {len(load):,} requests")
        outcome.seconds, outcome.steps = executable.now, executable.steps
        return outcome


def sequence(prompt: list[int], output: int, like: TokenSequence | None = None) -> TokenSequence:
    """One that generates exactly ``output`` tokens; it shares and is ranked as ``like`` is."""
    params = SamplingParams(temperature=0, max_new_tokens=output, ignore_eos=True)
    salt, priority = ("", 0) if like is None else (like.salt, like.priority)
    return TokenSequence(prompt, params, 0, frozenset(), salt, priority)
