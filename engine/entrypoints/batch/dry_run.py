"""What a batch job would take, before anything is rented or run: no weights are read, nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from makeready.engine.conversation import Parsers
from makeready.engine.entrypoints.batch.base import Damaged
from makeready.engine.entrypoints.batch.job import Input
from makeready.engine.entrypoints.batch.rows import RowFormat, parse
from makeready.engine.entrypoints.batch.worker import FORMATS
from makeready.engine.entrypoints.generate_options import GenerateJob
from makeready.engine.entrypoints.predicted_text import memory_lines
from makeready.engine.entrypoints.status import duration
from makeready.engine.forecast import Arrival, Forecast, sequence
from makeready.engine.front import Bounds, Defaults, Front
from makeready.engine.options import AUTO, OFFLINE
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.targets import target_of

SIMULATED = (
    8192  # requests of a job that are run on the virtual clock; the others take what these take a token
)


@dataclass(frozen=True)
class DryRun:
    """What a job would take.

    Attributes:
        rows: of the input.
        refused: of these, how many cannot be served.
        requests: samples of all prompts.
        simulated: of these, how many ran on the virtual clock.
        prompt_tokens, output_tokens: of all requests, outputs at their limits.
        cached_tokens: of prompts of what was simulated, found in the prefix cache.
        seconds: of all, on one engine of the plan's device, behind loading.
        memory: of :meth:`makeready.engine.forecast.Forecast.memory`.
        device: that the plan was chosen for.
    """

    rows: int
    refused: int
    requests: int
    simulated: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: float
    memory: dict[str, Any]
    device: str

    def lines(self) -> list[str]:
        """As text."""
        refused = f" ({self.refused:,} cannot be served)" if self.refused else ""
        cached = f" ({self.cached_tokens:,} cached)" if self.cached_tokens else ""
        rate = self.output_tokens / self.seconds if self.seconds else 0.0
        made = [
            f"{self.rows:,} rows{refused}, {self.requests:,} requests: {self.prompt_tokens:,} prompt tokens{cached}, "
            f"at most {self.output_tokens:,} output tokens",
            f"predicted for one {self.device}: at most {duration(self.seconds)} behind loading, "
            f"{rate:,.0f} output tokens/s",
        ]
        if self.simulated < self.requests:
            made.append(f"of {self.simulated:,} requests, and the others by their tokens")
        return [*made, *memory_lines(self.memory)]


def dry_run(job: GenerateJob, plan: Plan, given: Input, say: Callable[[str], None]) -> DryRun:
    """Predict a job over ``given``: every row is read and tokenized as the job would, and nothing else.

    Raises:
        PlanError: the plan's device has too little memory.
        RequestError, TextError: the options do not fit the plan or the checkpoint.
    """
    checkpoint = job.open()
    front = Front(
        checkpoint,
        Bounds(plan.limits, plan.config["vocab_size"], plan.steps),
        Parsers(job.tool_call_parser, job.reasoning_parser),
        chat_template=job.chat_template,
        generation_config=job.generation_config,
        warn=say,
    )
    stated = front.generation_defaults
    defaults = Defaults(
        job.row_fields(given.format, stated),
        job.chat_template_kwargs,
        job.add_special_tokens,
        job.fits(stated),
    )
    rows = FORMATS[given.format] if job.carry or given.format != RowFormat.name else RowFormat(carry=False)
    scheduling = job.scheduling()
    if scheduling.policy == AUTO:  # as the job's feed has it
        scheduling = replace(scheduling, policy=OFFLINE)
    forecast = Forecast(plan, scheduling, job.kv_bytes, report=say)
    load: list[Arrival] = []
    refused = requests = prompt_tokens = output_tokens = 0
    for _, row in given.source.rows():
        try:
            if isinstance(row, Damaged):
                refused += 1
                continue
            ask = rows.read(parse(row) if isinstance(row, bytes) else row)
            asked = [reply.sequence for reply in front.asked(ask, defaults)[1]]
            for one in asked:
                forecast.check(one)
        except Exception:  # whatever is wrong with one row is that row's answer, in the job as here
            refused += 1
            continue
        for one in asked:
            most = one.sampling.max_new_tokens
            requests += 1
            prompt_tokens += len(one.prompt)
            output_tokens += most
            if len(load) < SIMULATED:
                load.append(Arrival(0.0, sequence(one.prompt, most, like=one)))
    outcome = forecast.run(load)
    ran = outcome.prompt_tokens + outcome.output_tokens
    scale = (prompt_tokens + output_tokens) / ran if requests > len(load) and ran else 1.0
    return DryRun(
        rows=given.survey.count,
        refused=refused,
        requests=requests,
        simulated=len(load),
        prompt_tokens=prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        output_tokens=output_tokens,
        seconds=scale * outcome.seconds,
        memory=forecast.memory(),
        device=target_of(plan).device.name,
    )
