"""Every suite by name: it measures, and says what it found as JSON and as lines of text.

A suite's modules are imported when it runs: those that compare with transformers need torch, those that run
a plan on a GPU do without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from benchmarks.bench import Bench, Measured
from benchmarks.gpu.clocks import Clocks
from benchmarks.gpu.step_times import StepTimes
from benchmarks.gpu.suites import GPU_SUITES
from makeready.engine.entrypoints.scheduler_options import scheduler_options


def decode(bench: Bench) -> Measured:
    """See :mod:`benchmarks.decode`."""
    from benchmarks import decode

    job, threads = bench.job, bench.use_threads()
    found = decode.decode(
        bench.checkpoint,
        rows=job.rows,
        tokens=job.tokens,
        repeats=job.repeats,
        weight_dtype=job.weight_dtype,
    )
    return {"threads": threads, **found}, decode.table(found)


def startup(bench: Bench) -> Measured:
    """See :mod:`benchmarks.startup`."""
    from benchmarks import startup

    job, threads = bench.job, bench.use_threads()
    found = startup.startup(bench.checkpoint, repeats=job.repeats, weight_dtype=job.weight_dtype)
    return {"threads": threads, **found}, startup.table(found)


def llama_cpp(bench: Bench) -> Measured:
    """See :mod:`benchmarks.beside_llama_cpp`."""
    from benchmarks import beside_llama_cpp

    job, threads = bench.job, bench.use_threads()
    found = beside_llama_cpp.beside_llama_cpp(
        bench.checkpoint, tokens=job.tokens, repeats=job.repeats, threads=threads
    )
    return {"threads": threads, **found}, beside_llama_cpp.table(found)


def latency(bench: Bench) -> Measured:
    """See :mod:`benchmarks.latency`."""
    from benchmarks import latency

    job, llm = bench.job, bench.llm
    driver = getattr(llm.engine.executable, "driver", None)  # a GPU's
    with (
        nullcontext() if driver is None else Clocks() as clocks,
        nullcontext() if driver is None else StepTimes(driver) as stamps,
    ):
        found = latency.latency(
            llm,
            rows=job.rows,
            context=job.latency.context,
            tokens=job.tokens,
            prompts=job.latency.prompts,
            repeats=job.repeats,
            target=bench.floors_by(llm.plan),
            clocks=clocks,
            stamps=stamps,
        )
    measured = bench.rates
    if measured is None:
        return {"latency": found}, latency.table(found)
    return {"rates": measured.record(), "latency": found}, [measured.line(), *latency.table(found)]


def constrained(bench: Bench) -> Measured:
    """See :mod:`benchmarks.constrained`."""
    from benchmarks import constrained

    job, options = bench.job, asdict(bench.job.constrained)
    found = constrained.constrained(
        bench.llm, rows=job.rows, context=job.constrained.context, tokens=job.tokens, repeats=job.repeats
    )
    return (
        {"constrained": options | {"tokens": job.tokens, "batches": found}},
        constrained.table(found, job.tokens),
    )


def throughput(bench: Bench) -> Measured:
    """Random prompts, all there from the start; see :mod:`benchmarks.serve`."""
    from benchmarks import serve, steps, workloads

    options = asdict(bench.job.throughput)
    served = bench.serve(workloads.random_prompts(bench.llm.plan.config["vocab_size"], **options))
    found = serve.throughput(served) | {"steps": steps.step_figures(served.records)}
    return {"throughput": options | found}, serve.lines("offline", found)


def replay(bench: Bench) -> Measured:
    """A recorded load at its own arrival times; see :mod:`benchmarks.serve`."""
    from benchmarks import serve, steps

    options = asdict(bench.job.replay)
    served = bench.serve(bench.recorded(bench.job.replay.speed))
    found = serve.throughput(served) | serve.latencies(served)
    found["steps"] = steps.step_figures(served.records)
    return {"replay": options | found}, serve.lines(f"replay, {options['speed']:g} times as fast", found)


def prefix(bench: Bench) -> Measured:
    """The same prompts, all there from the start, with the prefix cache on and off."""
    from benchmarks import serve, workloads

    recorded = bench.job.replay.trace is not None
    options = asdict(bench.job.replay if recorded else bench.job.prefix)
    if recorded:
        works = [replace(work, arrival=0.0) for work in bench.recorded(1.0)]
    else:
        works = workloads.shared_prefixes(bench.llm.plan.config["vocab_size"], **options)
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name, changes in (("on", {}), ("off", {"prefix_cache": False})):
        found[name] = serve.throughput(bench.serve(works, **changes))
        lines += serve.lines(f"prefix cache {name}", found[name])
    found["gain"] = found["on"]["total_throughput"] / found["off"]["total_throughput"]
    return {"prefix": options | found}, [*lines, f"  {found['gain']:.2f} times as fast with it"]


def host(bench: Bench) -> Measured:
    """See :mod:`benchmarks.host_cost`."""
    from benchmarks import host_cost

    found = host_cost.host_cost(scheduler_options(bench.job.scheduler), **asdict(bench.job.host))
    return {"host": {"context": bench.job.host.context, "steps": found}}, host_cost.table(found)


SUITES: dict[str, Callable[[Bench], Measured]] = {
    "decode": decode,
    "startup": startup,
    "llama_cpp": llama_cpp,
    "latency": latency,
    "constrained": constrained,
    "throughput": throughput,
    "replay": replay,
    "prefix": prefix,
    "host": host,
    **GPU_SUITES,
}
