"""A load through the engine, and what came of it.

Throughputs carry the names of SGLang's ``bench_offline_throughput``, latencies those of its
``bench_serving``: ttft is the time to the first token, itl the time between two tokens of a request, tpot
its mean over a request, e2e the time to the last token. A request's clock starts when the load says that it
arrives, so a load that falls behind shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.steps import last_throughput, percentiles, step_lines
from benchmarks.workloads import Work
from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM
from makeready.engine.loop import Engine
from makeready.engine.output import Output
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.step_record import StepRecord

LONGEST_SLEEP = 0.02  # seconds; while nothing runs and the next request is still to come


@dataclass
class Served:
    """What came of a load.

    Attributes:
        seconds: from the start to the end of the last request.
        outputs: of the requests that ran.
        refused: requests that never could, such as those over the context.
        gaps: seconds between two tokens, of all requests.
        records: of all steps.
    """

    seconds: float = 0.0
    outputs: list[Output] = field(default_factory=list)
    refused: int = 0
    gaps: list[float] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)


def replies_of(llm: LLM, works: Sequence[Work]) -> list[tuple[float, Reply]]:
    """Greedy replies that generate exactly what each work asks for, with their arrivals."""
    made = []
    for work in works:
        params = SamplingParams(temperature=0, max_new_tokens=work.output, ignore_eos=True)
        made.append((work.arrival, llm.replies(work.prompt, params)[0]))
    return made


def serve(
    engine: Engine,
    load: Sequence[tuple[float, Reply]],
    note: Callable[[str], None] = lambda detail: None,
    watch: Callable[[StepRecord], None] | None = None,
) -> Served:
    """Run requests that arrive at given seconds, in order; returns when the last has ended.

    Args:
        engine: idle.
        load: seconds from now and replies, ascending.
        note: told now and then how far it is.
        watch: told every step.
    """
    served, at, clock, steps = Served(), 0, _TokenClock(), 0
    finished: list[Reply] = []

    def observe(record: StepRecord) -> None:
        served.records.append(record)
        if watch is not None:
            watch(record)

    engine.observer = observe
    began = time.perf_counter()
    while at < len(load) or engine.busy:
        now = time.perf_counter() - began
        while at < len(load) and load[at][0] <= now:
            arrival, reply = load[at]
            reply.arrived, reply.on_finish = began + arrival, finished.append
            at += 1
            try:
                engine.submit(reply.sequence, reply)
            except RequestError:
                served.refused += 1
        if engine.busy:
            clock.read(served.gaps, [*engine.step(), *engine.scheduler.running])
            served.outputs += [reply.result() for reply in finished]
            finished.clear()
            steps += 1
            if not steps % 50:
                note(f"{len(served.outputs)} of {len(load)} requests")
        elif at < len(load):
            time.sleep(max(0.0, min(load[at][0] - now, LONGEST_SLEEP)))
    served.seconds = time.perf_counter() - began
    engine.observer = None
    return served


class _TokenClock:
    """When each sequence was last seen to have a new token."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def read(self, gaps: list[float], sequences: Iterable[TokenSequence]) -> None:
        """Add to ``gaps`` what passed between the tokens of sequences that have new ones."""
        now = time.perf_counter()
        for sequence in sequences:
            count = len(sequence.output)
            before, then = self._seen.get(id(sequence), (0, now))
            if count > before:
                if before:
                    gaps.append(now - then)
                self._seen[id(sequence)] = (count, now)


def throughput(served: Served) -> dict[str, float]:
    """Requests and tokens a second over the whole load."""
    seconds, outputs = served.seconds, served.outputs
    prompt = sum(output.prompt_tokens for output in outputs)
    generated = sum(output.completion_tokens for output in outputs)
    cached = sum(output.meta_info["cached_tokens"] for output in outputs)
    return {
        "successful_requests": len(outputs),
        "refused_requests": served.refused,
        "total_latency": seconds,
        "total_input_tokens": prompt,
        "total_output_tokens": generated,
        "request_throughput": len(outputs) / seconds,
        "input_throughput": prompt / seconds,
        "output_throughput": generated / seconds,
        "total_throughput": (prompt + generated) / seconds,
        "last_gen_throughput": last_throughput(served.records),
        "cache_hit_rate": cached / max(1, prompt),
    }


def latencies(served: Served) -> dict[str, Any]:
    """Percentiles in milliseconds, and how many requests were there at once on average."""
    metas = [output.meta_info for output in served.outputs]
    more = [meta["completion_tokens"] - 1 for meta in metas]
    first = [meta["time_to_first_token"] for meta in metas]
    whole = [meta["e2e_latency"] for meta in metas]
    times = zip(first, whole, more, strict=True)
    found = {
        "queue": [meta["queue_time"] for meta in metas],
        "ttft": first,
        "itl": served.gaps,
        "tpot": [(end - start) / count for start, end, count in times if count],
        "e2e": whole,
    }
    return {
        "concurrency": sum(whole) / served.seconds,
        "milliseconds": {name: percentiles(values) for name, values in found.items()},
    }


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """Throughput, and what else there is, as lines of text."""
    refused = f", {found['refused_requests']} refused" if found["refused_requests"] else ""
    said = [
        f"{name}: {found['successful_requests']} requests in {found['total_latency']:.2f} s "
        f"({found['request_throughput']:.2f} a second{refused})",
        f"  tokens/s: {found['input_throughput']:.0f} in, {found['output_throughput']:.0f} out, "
        f"{found['total_throughput']:.0f} together; {found['last_gen_throughput']:.0f} out in the last steps",
        f"  {found['cache_hit_rate']:.1%} of prompt tokens cached",
    ]
    if "concurrency" in found:
        said.append(f"  {found['concurrency']:.1f} requests at once on average")
    for kind, row in found.get("milliseconds", {}).items():
        said.append(
            f"  {kind:5s} ms: mean {row['mean']:.1f}, p50 {row['p50']:.1f}, p90 {row['p90']:.1f}, "
            f"p99 {row['p99']:.1f}, most {row['max']:.1f}"
        )
    return said + step_lines(found.get("steps", {}))
