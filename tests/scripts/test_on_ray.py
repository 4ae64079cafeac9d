"""A job on many engines: on Ray where it is installed, and the leading of it on a stand-in that can fail."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts_in_process import TINY, script

from makeready.engine.entrypoints.batch import on_ray
from makeready.engine.entrypoints.batch.base import Done, JobError
from makeready.engine.entrypoints.batch.job import Rows, open_input
from makeready.engine.entrypoints.batch.journal import Journal
from makeready.engine.entrypoints.batch.on_ray import Fleet, Report
from makeready.engine.entrypoints.batch.output import Files, open_journal

OPTIONS = (
    *TINY,
    "sampling=greedy",
    "sampling.ignore_eos=true",
    "plan.max_rows=4",
    "plan.weight_dtype=float32",
)


class RayError(Exception):
    """As Ray's."""


class FakeEngine:
    """Finishes some of its rows a call, in any order; dies at the call that ``fate`` names."""

    def __init__(self, fate: int, pick: random.Random) -> None:
        self.rows: list[int] = []
        self.fate, self.pick = fate, pick
        self.most = 0

    def depth(self) -> int:
        return 20

    def work(self, rows: list[Any]) -> Report:
        self.fate -= 1
        if not self.fate:
            raise RayError("the machine is gone")
        self.rows += [number for number, _ in rows]
        self.most = max(self.most, len(self.rows))
        self.pick.shuffle(self.rows)
        count = self.pick.randrange(len(self.rows) + 1)
        done, self.rows = self.rows[:count], self.rows[count:]
        return Report(
            [Done(number, b'{"n": %d}' % number, False, 4, 1, 2) for number in done], len(self.rows)
        )


class FakeRay:
    """What the fleet uses of Ray, in this process: a call runs when it is waited for."""

    def __init__(self, engines: list[FakeEngine], resources: dict[str, float]) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError)
        self._engines, self._resources = iter(engines), resources
        self.shut = False

    def init(self, **options: Any) -> None:
        pass

    def shutdown(self) -> None:
        self.shut = True

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **resources: float) -> Callable[[type], Any]:
        return lambda kind: SimpleNamespace(remote=lambda spec: self._actor(next(self._engines)))

    def get(self, calls: Any) -> Any:
        return [call() for call in calls] if isinstance(calls, list) else calls()

    def wait(self, calls: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def _actor(self, engine: FakeEngine) -> Any:
        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: lambda: getattr(engine, name)(*arguments))

        return SimpleNamespace(depth=method("depth"), work=method("work"))


@pytest.fixture
def rows() -> Iterator[tuple[Rows, Journal]]:
    Path("in.jsonl").write_text("".join('{"token_ids": [1]}\n' for _ in range(300)))
    given = open_input(Path("in.jsonl"), Path("out.jsonl"), "auto")
    files = Files(Path("out.jsonl"))
    journal = open_journal(files, given.identity, given.survey, overwrite=False)
    assert isinstance(journal, Journal)
    with journal, Rows(given, journal, files) as made:
        yield made, journal


def fleet(
    monkeypatch: Any, fates: list[int], resources: dict[str, float] | None = None, **options: Any
) -> Any:
    engines = [FakeEngine(fate, random.Random(i)) for i, fate in enumerate(fates)]
    fake = FakeRay(engines, {"CPU": 8.0} if resources is None else resources)
    monkeypatch.setattr(on_ray, "optional", lambda *names: fake)
    spec: Any = SimpleNamespace(plan=SimpleNamespace(target=options.pop("target", "cpu")))
    return engines, fake, lambda: Fleet(spec, **{"engines": len(fates), "cpus": 1, "address": None} | options)


def test_every_row_is_answered_once_and_no_engine_has_more_than_it_takes(rows, monkeypatch):
    engines, fake, make = fleet(monkeypatch, [0, 0, 0])
    with make() as made:
        made.run(rows[0])
    assert fake.shut
    assert len(list(rows[1].answers())) == rows[1].totals.rows == 300
    assert rows[1].totals.tokens == 600
    assert 0 < max(engine.most for engine in engines) <= 20
    assert not any(engine.rows for engine in engines)


@pytest.mark.parametrize("fates", [[3, 0, 0], [1, 5, 0], [1, 1, 0]])
def test_rows_of_an_engine_that_dies_go_to_the_others(fates, rows, monkeypatch, capsys):
    _, _, make = fleet(monkeypatch, fates)
    with make() as made:
        made.run(rows[0])
    assert rows[1].totals.rows == 300
    said = capsys.readouterr().err
    assert said.count("an engine died (the machine is gone)") == sum(map(bool, fates))


def test_when_the_last_engine_dies_what_is_done_is_kept(rows, monkeypatch):
    _, fake, make = fleet(monkeypatch, [4, 6])
    with (
        pytest.raises(JobError, match=r"the last engine died .* of 300 rows are kept in out.jsonl.partial"),
        make() as m,
    ):
        m.run(rows[0])
    assert fake.shut
    assert 0 < rows[1].totals.rows < 300


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engines": None}, "scale=ray needs scale.engines= for target=cpu"),
        ({"engines": None, "target": "sm_90a"}, "the Ray cluster has no GPU"),
        ({"engines": 9}, "scale.engines=9 of 1 CPU each exceed the cluster's 8"),
        ({"engines": 3, "target": "sm_90a", "resources": {"GPU": 2.0, "CPU": 8.0}}, "exceed the cluster's 2"),
    ],
)
def test_a_cluster_that_is_too_small_is_said(options, reason, monkeypatch):
    _, fake, make = fleet(monkeypatch, [], **options)
    with pytest.raises(JobError, match=reason):
        make()
    assert fake.shut


@pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}", "[{}]:{}"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_cluster_that_is_not_there_is_said_at_once(form, by_environment, monkeypatch):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = form.format(*taken.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address if by_environment else "127.0.0.1:1")
        _, _, make = fleet(monkeypatch, [], address=None if by_environment else address)
        with pytest.raises(JobError, match=f"no Ray cluster was reached at {re.escape(address)} .*refused"):
            make()


@pytest.mark.parametrize("address", ["auto", "local", "", None])
def test_an_address_that_names_no_port_is_for_ray_to_understand(address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _, fake, make = fleet(monkeypatch, [0], address=address)
    with make():
        assert not fake.shut


def test_where_ray_is_missing_its_extra_is_named():
    with pytest.raises(
        JobError, match=r"scale=ray needs no_such_ray; install it with pip install 'makeready\[ray\]'"
    ):
        on_ray.optional("no_such_ray", "ray", "scale=ray")


@pytest.mark.slow
def test_two_engines_on_ray_give_what_one_gives(monkeypatch, capsys):
    """For real: two actors, of which one is killed while it works."""
    ray: Any = pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = [
        json.dumps({"id": i, "token_ids": [1 + i % 90, 3], "max_new_tokens": 1 + i % 17}) for i in range(400)
    ]
    Path("in.jsonl").write_text("\n".join([*lines, "{"]))
    job = (*OPTIONS, "prompts=in.jsonl")
    assert script("generate")(*job, "output=one.jsonl") == 0
    killed = 0
    done = Rows.done

    def kill_once(self: Rows, rows: list[Done]) -> None:
        nonlocal killed
        done(self, rows)
        if rows and not killed:
            killed += 1
            ray.kill(fleets[0].engines[0].actor)

    fleets: list[Fleet] = []
    enter = Fleet.__enter__
    monkeypatch.setattr(Fleet, "__enter__", lambda self: (fleets.append(self), enter(self))[1])
    monkeypatch.setattr(Rows, "done", kill_once)
    assert script("generate")(*job, "output=two.jsonl", "scale=ray", "scale.engines=2") == 0
    assert killed
    assert Path("two.jsonl").read_bytes() == Path("one.jsonl").read_bytes()
    assert "rows go to the other 1" in capsys.readouterr().err
    assert not Path("two.jsonl.partial").exists()
