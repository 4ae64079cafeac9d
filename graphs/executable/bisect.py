"""Which launch is wrong: a step on a device, launch by launch beside the interpreter of the same plan.

Every launch is judged by itself. What the device gave is copied to the interpreter before the next launch, so
that rounding does not add up from launch to launch, and the first result beyond its contract's tolerance
comes from a launch whose operands were those of the interpreter, bit for bit.

At the end the step runs once more as a whole. Where that gives other bits, launches disturb each other side by
side, and the shortest beginning of the program that shows it is searched for by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from makeready.graphs.executable.base import Executable
from makeready.graphs.executable.example import Row, example_step
from makeready.graphs.inspect.segments import segments
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import Chain, Launch
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.kernels.contract import CONTRACTS, Tolerance
from makeready.kernels.registry import REFERENCE
from makeready.kernels.spec import PAGES, ROWS, TOKENS

Progress = Callable[[str], None]

_OF_A_ROW, _ROW = 1 / 3, 16  # share of a row's error that counts, elements that make a row; fewer may cancel


class Walking(Executable, Protocol):
    """An executable that can pause in a step, and whose values can be read and written then."""

    def calls(self, bucket: Bucket) -> list[Chain]:
        """What a step runs, in order: launches, or chains of them that run as one."""
        ...

    def walk(
        self, bucket: Bucket, step: Mapping[str, np.ndarray], stops: Iterable[int] | None = None
    ) -> Iterator[int]:
        """Run a step up to each of ``stops`` in turn, or call by call; yields how many launches have run."""
        ...

    def peek(self, bucket: Bucket, name: str) -> np.ndarray:
        """The bits of a value; KeyError for a parameter in a layout of its kernel's own."""
        ...

    def poke(self, bucket: Bucket, name: str, bits: np.ndarray) -> None:
        """Set the bits of a value."""
        ...


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as it should be.

    Attributes:
        what: ``result``: a launch gives something else from the same operands; ``parameter``: an operand was
            loaded as something else; ``order``: launches give something else together than one by one.
        step: how many steps went before.
        at: place of the launch in the program, from 0.
        layer: part of the model that it belongs to.
        name: the operand or result, as the contract calls it.
        error: ``|device - interpreter| / |interpreter|``, or a third of that of a single row if it is larger;
            infinite where one of them has no number.
        allowed: largest such error; 0 where every element has to be equal.
        row: where along the first axis it is largest.
    """

    what: str
    step: int
    bucket: Bucket
    at: int
    layer: str
    launch: Launch
    name: str
    error: float
    allowed: float
    row: int

    def sentence(self, plan: Plan) -> str:
        """All of it in a few lines."""
        launch, program = self.launch, plan.programs[self.bucket.phase]
        value = {**launch.operands, **launch.results}[self.name]
        which = f"launch {self.at + 1} of {len(program.launches)}: {launch.op}, {self.layer}"
        where = f"step {self.step + 1} ({self.bucket}), {which}"
        beside = {
            "result": f"result {self.name} is off by {self.error:.3g}, {self.allowed:.3g} is allowed",
            "parameter": f"parameter {value} is off by {self.error:.3g}, {self.allowed:.3g} is allowed",
            "order": f"result {self.name} is off by {self.error:.3g} from what the launches give one by one",
        }[self.what]
        lines = [where, f"  {beside}; most in row {self.row}"]
        for kind, names in (("operand", launch.operands), ("result", launch.results)):
            lines += [f"  {kind} {n} = {v}: {plan.spec(self.bucket.phase, v)}" for n, v in names.items()]
        lines += [f"  {name} = {value}" for name, value in launch.attrs.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Found:
    """What a comparison came to.

    Attributes:
        difference: None where there is none.
        steps, launches: compared.
        nearest: largest part of what was allowed that a result was off by.
        tokens: that the device sampled, by step.
    """

    difference: Difference | None
    steps: int
    launches: int
    nearest: float
    tokens: tuple[int, ...]


def as_references(plan: Plan) -> Plan:
    """``plan`` as the interpreter runs it: every launch by its contract's reference, parameters as rows."""
    programs = {
        phase: replace(
            program, launches=tuple(replace(launch, kernel=REFERENCE) for launch in program.launches)
        )
        for phase, program in plan.programs.items()
    }
    weights = tuple(replace(w, param=replace(w.param, layout="rows")) for w in plan.weights)
    return replace(plan, programs=programs, weights=weights)


def pages_needed(plan: Plan, prompt: int, count: int, rows: int) -> int:
    """Pages of an executable that runs ``rows`` times a prompt of ``prompt`` tokens and ``count`` more.

    Raises:
        PlanError: the plan is for fewer.
    """
    limits = plan.limits
    if prompt < 1 or count < 1 or not 1 <= rows <= limits.max_rows:
        raise PlanError(
            f"{rows} rows of {prompt} + {count} tokens: rows go from 1 to {limits.max_rows}, tokens from 1"
        )
    if prompt + count > limits.context_len:
        raise PlanError(
            f"{prompt} tokens and {count} more exceed the plan's context of {limits.context_len}; shorten them"
        )
    return 1 + rows * -(-(prompt + count) // limits.page_size)


def bisect(
    device: Walking,
    reference: Walking,
    prompt: Sequence[int],
    count: int = 1,
    *,
    rows: int = 1,
    progress: Progress = lambda where: None,
) -> Found:
    """Run a prompt and greedy tokens after it on both executables, and find the first launch that differs.

    Args:
        device: what is suspected; its slots and pages are used, so nothing else may run.
        reference: the interpreter of the same plan: :class:`~.cpu.CpuExecutable` of :func:`as_references`.
        count: tokens to generate; all but the first take a decode step each.
        rows: how many times the prompt runs side by side.
        progress: told where the comparison is.

    Raises:
        PlanError: prompt and tokens do not fit the plan or its pages.
    """
    plan = device.plan
    each = pages_needed(plan, len(prompt), count, rows) // rows
    for slot in range(rows):
        for executable in (device, reference):
            executable.write_slot(
                slot, {"pages": 1 + slot * each + np.arange(each), "prompt_len": len(prompt)}
            )
    table, chunk = BucketTable(plan.buckets), plan.limits.max_tokens // rows
    ids, done, made, launches, nearest = [list(prompt)] * rows, 0, [], 0, 0.0
    checked: set[str] = set()
    steps = -(-len(prompt) // chunk) + count - 1
    for number in range(steps):
        phase = EXTEND if done < len(prompt) else DECODE
        upto = min(done + chunk, len(prompt)) if phase == EXTEND else done + 1
        batch = [Row(slot, ids[slot][done:upto], done) for slot in range(rows)]
        bucket = table.covering(phase, rows, rows * (upto - done))
        live = {ROWS: rows, TOKENS: rows * (upto - done)}
        pair = _Pair(device, reference, bucket, example_step(plan, bucket, batch), live, number, checked)
        difference = pair.compare(progress)
        launches, nearest, done = launches + pair.launches, max(nearest, pair.nearest), upto
        tokens = [] if difference is not None else pair.tokens
        if difference is not None or (done >= len(prompt) and min(tokens) < 0):
            return Found(difference, number + 1, launches, nearest, tuple(made))
        if done >= len(prompt):
            made.append(tokens[0])
            ids = [[*row, token] for row, token in zip(ids, tokens, strict=True)]
    return Found(None, steps, launches, nearest, tuple(made))


class _Pair:
    """One step on both executables."""

    def __init__(
        self,
        device: Walking,
        reference: Walking,
        bucket: Bucket,
        step: Mapping[str, np.ndarray],
        live: Mapping[str, int],
        number: int,
        checked: set[str],
    ) -> None:
        self._device, self._reference = device, reference
        self._bucket, self._step, self._live, self._number = bucket, step, live, number
        self._checked = checked  # parameters that were compared before
        self._plan = device.plan
        self._program = device.plan.programs[bucket.phase]
        self._calls = device.calls(bucket)
        self._parameters = {w.param.name for w in device.plan.weights}
        self.launches, self.nearest = 0, 0.0

    @property
    def tokens(self) -> list[int]:
        """What the device sampled for each row."""
        return self._device.peek(self._bucket, "tokens").view(np.int32)[: self._live[ROWS]].tolist()

    def compare(self, progress: Progress) -> Difference | None:
        count, stops = len(self._program.launches), [call.stop for call in self._calls]
        walks = [each.walk(self._bucket, self._step, stops) for each in (self._device, self._reference)]
        states = self._states()
        for call in self._calls:
            at, launch = call.first, call.launch
            progress(f"step {self._number + 1} ({self._bucket}), launch {at + 1} of {count}: {launch.op}")
            found = self._parameter(call)
            before = {name: self._device.peek(self._bucket, v) for name, v in self._written(launch).items()}
            for walk in walks:
                next(walk)
            self.launches += 1
            found = found or self._result(call, before)
            if found is not None:
                return found
        alone = self._results()
        for name, bits in states.items():  # which the step has written over
            self._device.poke(self._bucket, name, bits)
        self._device.launch(self._bucket, self._step).wait()
        together = self._results()
        if all(np.array_equal(alone[name], together[name]) for name in alone):
            return None
        return self._order()

    def _states(self) -> dict[str, np.ndarray]:
        """Copies of the device's states, which a step may leave where it read them."""
        parts = [part for group in self._plan.kv.states for part in group.parts]
        return {part.name: self._device.peek(self._bucket, part.name) for part in parts}

    def _written(self, launch: Launch) -> dict[str, str]:
        return {
            name: launch.operands[name] for name in CONTRACTS[launch.op].writes if name in launch.operands
        }

    def _parameter(self, call: Chain) -> Difference | None:
        """Whether parameters that no launch read before are the same on both."""
        for name, value in call.launch.operands.items():
            if value not in self._parameters or value in self._checked:
                continue
            self._checked.add(value)
            try:
                ours, theirs = (e.peek(self._bucket, value) for e in (self._device, self._reference))
            except KeyError:
                continue
            dtype = self._plan.spec(self._bucket.phase, value).dtype
            error, row = _error(ours, theirs, dtype, None)
            allowed = getattr(Tolerance(), dtype, 0.0)  # conversions on a device round in their own order
            if error > allowed:
                return self._difference("parameter", call, name, error, row, allowed)
        return None

    def _result(self, call: Chain, before: Mapping[str, np.ndarray]) -> Difference | None:
        """Whether what the launch wrote is within the contract's tolerance; the reference goes on with it."""
        launch, tolerance = call.launch, CONTRACTS[call.launch.op].tolerance
        for name, value in {**launch.results, **self._written(launch)}.items():
            ours, theirs = (e.peek(self._bucket, value) for e in (self._device, self._reference))
            theirs = theirs.view(ours.dtype)
            spec, keep = self._plan.spec(self._bucket.phase, value), self._somebodys(value)
            changed = None
            if name in before:  # a cache: what was there before says nothing
                old = before[name].view(ours.dtype)
                changed = ((ours != old) | (theirs != old))[keep]
            error, row = _error(ours[keep], theirs[keep], spec.dtype, changed)
            allowed = 0.0 if tolerance.exact else getattr(tolerance, spec.dtype, 0.0)
            if error > allowed:
                return self._difference("result", call, name, error, row, allowed)
            if allowed:
                self.nearest = max(self.nearest, error / allowed)
            self._reference.poke(self._bucket, value, ours)
        return None

    def _somebodys(self, value: str) -> slice:
        """Entries along the first axis that are no padding: no page 0, no null slot."""
        if any(field.name == value for field in self._plan.slots):
            return slice(0, self._plan.limits.null_slot)
        axis = str(self._plan.spec(self._bucket.phase, value).shape[0])
        return slice(1, None) if axis == PAGES else slice(0, self._live.get(axis))

    def _results(self) -> dict[str, np.ndarray]:
        kind = self._plan.steps[self._bucket.phase]
        return {
            f.name: self._device.peek(self._bucket, f.name)[self._somebodys(f.name)] for f in kind.results
        }

    def _order(self) -> Difference:
        """The last call of the shortest beginning of the step that gives other bits as a whole.

        Steps say where their rows start, so they can be run again and again.
        """
        agree, differ = 0, len(self._calls)
        while differ - agree > 1:
            middle = (agree + differ) // 2
            agree, differ = (agree, middle) if self._disturbed(middle) else (middle, differ)
        launch = self._calls[differ - 1].launch
        nowhere = (next(iter({**launch.results, **launch.operands})), np.inf, 0)  # it comes and goes
        return self._difference("order", self._calls[differ - 1], *(self._disturbed(differ) or nowhere))

    def _disturbed(self, count: int) -> tuple[str, float, int] | None:
        """What the last of the first ``count`` calls gives otherwise if they run as a whole."""
        launch, every = self._calls[count - 1].launch, [call.stop for call in self._calls[:count]]
        values = {**launch.results, **self._written(launch)}
        seen = []
        for stops in (every[-1:], every):
            for _ in self._device.walk(self._bucket, self._step, stops):
                pass
            left = {n: self._device.peek(self._bucket, v)[self._somebodys(v)] for n, v in values.items()}
            seen.append(left)
        for name, value in values.items():
            if not np.array_equal(seen[0][name], seen[1][name]):
                dtype = self._plan.spec(self._bucket.phase, value).dtype
                return name, *_error(seen[0][name], seen[1][name], dtype, None)
        return None

    def _difference(
        self, what: str, call: Chain, name: str, error: float, row: int, allowed: float = 0.0
    ) -> Difference:
        at = call.first
        layer = next(s.name for s in segments(self._program) if s.start <= at < s.stop)
        return Difference(what, self._number, self._bucket, at, layer, call.launch, name, error, allowed, row)


def _error(ours: np.ndarray, theirs: np.ndarray, dtype: str, only: np.ndarray | None) -> tuple[float, int]:
    """How far apart two values are, and the row that is off most.

    The larger of ``|ours - theirs| / |theirs|`` over all elements, or over those of ``only``, and of a part of
    the same of a single row: one wrong row among many is as wrong as a matrix.
    """
    if not ours.size or np.array_equal(ours, theirs.view(ours.dtype)):
        return 0.0, 0
    a, b = (_numbers(bits, dtype).reshape(len(bits), -1) for bits in (ours, theirs))
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    apart = np.where(np.isnan(apart), np.inf, apart)
    size = np.where(np.isfinite(b), np.abs(b), 0.0)
    if only is not None:
        apart, size = (np.where(only.reshape(apart.shape), x, 0.0) for x in (apart, size))
    off, norm = np.linalg.norm(apart, axis=1), np.linalg.norm(size, axis=1)
    each = _OF_A_ROW * _ratio(off, norm) if a.shape[1] >= _ROW else np.zeros(1)
    whole = _ratio(np.linalg.norm(off), np.linalg.norm(norm))
    return max(float(whole), float(each.max())), int(off.argmax())


def _ratio(off: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """``off / norm``; infinite where nothing should be there."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(off == 0, 0.0, np.where(norm == 0, np.inf, off / norm))


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values of elements given as bits."""
    signed = np.ascontiguousarray(bits).view(
        {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[bits.itemsize]
    )
    return torch.from_numpy(signed).view(getattr(torch, dtype)).double().numpy()
