"""A job on many engines: one actor of Ray's for each, led from this process, which alone writes.

Rows go to engines in pieces that shrink towards the end, so that all of them end together. An engine that
dies (its machine, its GPU) gives its rows back to the others.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.entrypoints.batch.base import Done, JobError, Numbered, optional
from makeready.engine.entrypoints.batch.job import Rows
from makeready.engine.entrypoints.batch.worker import Worker
from makeready.engine.llm import LLM
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.formats.base import AUTO
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.paired import Beside
from makeready.graphs.children import Leader, follow, this_process
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.targets import TARGETS

CALL_SECONDS = 0.25  # an engine works so long between two reports
REACH_SECONDS = 10.0  # for a cluster to answer at all; Ray itself tries for a quarter of an hour
CALLS = 2  # on their way to an engine at once, so that it has the next while this process reads the last


@dataclass(frozen=True)
class EngineSpec:
    """What every engine is made of; travels to its machine, the plan included.

    Attributes:
        checkpoint: path of the checkpoint, which every machine must see; or dummy.
        model: config of a dummy checkpoint.
        beside: the checkpoint that drafts, which every machine must see, too.
        format, sampling, template, carry: as for :class:`Worker`.
        scheduler: how requests share each engine.
        chat_template: text of the chat template, or name of one of the model's; None for the model's own.
        tool_call_parser, reasoning_parser: as for :class:`LLM`.
        add_special_tokens, fit: as for :class:`Worker`.
        leader: the process that leads the job, which makes this; an engine on the same machine ends with it, also by
            kill -9. Ray ends those on others.
    """

    checkpoint: str
    model: Mapping[str, Any] | None
    plan: Plan
    kv_memory_gib: float | None
    format: str
    sampling: SamplingParams | Mapping[str, Any]
    template: Mapping[str, Any]
    scheduler: SchedulerOptions
    chat_template: str | None = None
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    add_special_tokens: bool = True
    fit: bool = False
    leader: Leader = field(default_factory=this_process)
    carry: bool = True
    beside: Beside = field(default_factory=Beside)


@dataclass(frozen=True)
class Report:
    """What a call to an engine came to; ``output_tokens`` are those of rows that are not final."""

    done: list[Done]
    output_tokens: int


class RayEngine:
    """One engine, as an actor."""

    def __init__(self, spec: EngineSpec) -> None:
        follow(spec.leader)
        config = None if spec.model is None else dict(spec.model)
        checkpoint = spec.beside.open(open_checkpoint(spec.checkpoint, config=config))
        llm = LLM(
            checkpoint,
            spec.plan,
            kv_memory_gib=spec.kv_memory_gib,
            scheduler=spec.scheduler,
            chat_template=spec.chat_template,
            tool_call_parser=spec.tool_call_parser,
            reasoning_parser=spec.reasoning_parser,
            generation_config=False,  # its values are in spec.sampling
        )
        self._worker = Worker(
            llm,
            spec.format,
            spec.sampling,
            spec.template,
            carry=spec.carry,
            add_special_tokens=spec.add_special_tokens,
            fit=spec.fit,
        )

    def depth(self) -> int:
        """Rows that it takes before any is final; answers when the model is loaded."""
        return self._worker.depth

    def work(self, rows: Sequence[Numbered]) -> Report:
        """Take rows and run for a moment."""
        self._worker.put(rows)
        done: list[Done] = []
        until = time.monotonic() + CALL_SECONDS
        while self._worker.busy and time.monotonic() < until:
            done += self._worker.step()
        return Report(done, self._worker.output_tokens)


@dataclass
class _Engine:
    """An engine as seen from here."""

    actor: Any
    depth: int = 0
    calls: int = 0
    rows: dict[int, Numbered] = field(default_factory=dict)  # what it has, by number
    output_tokens: int = 0


class Fleet:
    """Engines on a Ray cluster; use as a context manager, which lets go of the cluster.

    Args:
        spec: what each engine is.
        engines: how many; None for one a GPU of the cluster.
        cpus: cores that Ray sets aside for each.
        address: of a running cluster; None for the one that RAY_ADDRESS names, or one of this machine alone.

    Raises:
        JobError: ray is not installed, the cluster has too little, or an engine does not start.
    """

    def __init__(self, spec: EngineSpec, *, engines: int | None, cpus: float, address: str | None) -> None:
        self._ray = optional("ray", "ray", "scale=ray")
        gpus = 1 if TARGETS[spec.plan.target].is_cuda else 0
        self._connect(address)
        try:
            count = self._count(engines, gpus, cpus)
            made = self._ray.remote(num_gpus=gpus, num_cpus=cpus)(RayEngine)
            shared = self._ray.put(spec)
            self.engines = [_Engine(made.remote(shared)) for _ in range(count)]
            depths = self._ray.get([engine.actor.depth.remote() for engine in self.engines])
        except self._ray.exceptions.RayError as error:
            self._ray.shutdown()
            raise JobError(f"an engine did not start: {_cause(error)}") from None
        except BaseException:
            self._ray.shutdown()
            raise
        for engine, depth in zip(self.engines, depths, strict=True):
            engine.depth = depth

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ray.shutdown()

    def run(self, rows: Rows) -> None:
        """Answer every row.

        Raises:
            JobError: the last engine died.
        """
        back: deque[Numbered] = deque()  # of engines that died
        flying: dict[Any, _Engine] = {}
        with rows.shown():
            self._call(rows, back, flying)
            while flying:
                ready, _ = self._ray.wait(list(flying), num_returns=1)
                engine = flying.pop(ready[0])
                engine.calls -= 1
                try:
                    report = self._ray.get(ready[0])
                except self._ray.exceptions.RayError as error:
                    self._bury(engine, back, flying, rows, _cause(error))
                else:
                    rows.done(report.done)
                    engine.output_tokens = report.output_tokens
                    for done in report.done:
                        del engine.rows[done.number]
                self._call(rows, back, flying)
                rows.tell(lambda: sum(engine.output_tokens for engine in self.engines))

    def _connect(self, address: str | None) -> None:
        _reach(address or os.environ.get("RAY_ADDRESS", ""))
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(
                address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise JobError(f"no Ray cluster was reached ({_first_line(error)}); see scale.address") from None
        finally:
            # Ray takes SIGTERM for a crash: it aborts the process, which then cannot say what it keeps.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _call(self, rows: Rows, back: deque[Numbered], flying: dict[Any, _Engine]) -> None:
        """Keep every engine busy: with new rows where it has room, else with those that it has."""
        for engine in self.engines:
            while engine.calls < CALLS:
                left = rows.left + len(back)
                share = -(-left // (2 * len(self.engines)))
                piece = min(engine.depth - len(engine.rows), max(share, 1), left)
                given = [back.popleft() for _ in range(min(piece, len(back)))]
                given += rows.take(max(piece - len(given), 0))
                if not given and (engine.calls or not engine.rows):
                    break
                engine.rows |= {row[0]: row for row in given}
                flying[engine.actor.work.remote(given)] = engine
                engine.calls += 1

    def _bury(
        self, engine: _Engine, back: deque[Numbered], flying: dict[Any, _Engine], rows: Rows, reason: str
    ) -> None:
        self.engines.remove(engine)
        for call in [call for call, other in flying.items() if other is engine]:
            del flying[call]
        back.extend(engine.rows.values())
        if not self.engines:
            raise JobError(f"the last engine died ({reason}); {rows.state}")
        rows.say(f"an engine died ({reason}); {len(engine.rows)} rows go to the other {len(self.engines)}")

    def _count(self, engines: int | None, gpus: int, cpus: float) -> int:
        has = self._ray.cluster_resources()
        if engines is None:
            engines = int(has.get("GPU", 0)) if gpus else 0
            if not engines:
                raise JobError(
                    "the Ray cluster has no GPU for a plan of a GPU target; join machines that have one"
                    if gpus
                    else "scale=ray needs scale.engines= for target=cpu: how many engines to run"
                )
        for name, each in (("GPU", gpus), ("CPU", cpus)):
            if engines * each > has.get(name, 0):
                raise JobError(
                    f"scale.engines={engines} of {each:g} {name} each exceed the cluster's {has.get(name, 0):g}; "
                    "ask for fewer"
                )
        return engines


def _reach(address: str) -> None:
    """Raise :class:`JobError` where nobody listens at ``address``, if it names a host and a port."""
    named = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d{1,5})", address)
    if named is None:
        return
    try:
        socket.create_connection((named[1], int(named[2])), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise JobError(f"no Ray cluster was reached at {address} ({error}); see scale.address") from None


def _cause(error: Exception) -> str:
    """The reason at the bottom of Ray's report, in a line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return _first_line(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("makeready.") or "Error: " in line]
    return (told or lines or [type(error).__name__])[-1].partition(". ")[0]  # Ray goes on for a page


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
