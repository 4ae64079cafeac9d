"""Loads to measure: random prompts, prompts that begin alike, recorded traces. All by a seed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import numpy as np

from makeready.engine.entrypoints.options import UsageError


@dataclass(frozen=True)
class Work:
    """A request to make: ``arrival`` seconds after the start, a prompt, and how many tokens to generate."""

    prompt: list[int]
    output: int
    arrival: float = 0.0


@dataclass(frozen=True)
class TraceRow:
    """A recorded request: seconds after the first one, lengths in tokens, and ids of its prompt's blocks.

    ``blocks`` is empty where the trace knows nothing of the prompt's content.
    """

    arrival: float
    input: int
    output: int
    blocks: tuple[int, ...] = ()


def random_prompts(
    vocabulary: int, *, prompts: int, input: int, output: int, ratio: float, seed: int
) -> list[Work]:
    """Prompts of random token ids; lengths are even from ``ratio`` × the most (at least 1) to the most."""
    generator = np.random.default_rng(seed)

    def lengths(most: int) -> list[int]:
        return generator.integers(max(1, int(most * ratio)), most + 1, prompts).tolist()

    sizes = zip(lengths(input), lengths(output), strict=True)
    return [Work(generator.integers(0, vocabulary, size).tolist(), out) for size, out in sizes]


def shared_prefixes(
    vocabulary: int, *, groups: int, prompts: int, shared: int, own: int, output: int, seed: int
) -> list[Work]:
    """``groups`` × ``prompts`` prompts in random order, alike within a group in their first ``shared`` tokens."""
    generator = np.random.default_rng(seed)
    begins = generator.integers(0, vocabulary, (groups, shared)).tolist()
    order = generator.permutation(np.repeat(np.arange(groups), prompts)).tolist()
    return [Work(begins[group] + generator.integers(0, vocabulary, own).tolist(), output) for group in order]


def replayed(rows: Sequence[TraceRow], vocabulary: int, *, block: int, speed: float, seed: int) -> list[Work]:
    """Prompts for a trace; ``block`` tokens are drawn for each block id, so equal ids are equal tokens."""
    tokens = _drawn(vocabulary, block, seed)
    generator = np.random.default_rng(seed)
    works = []
    for row in rows:
        if row.blocks:
            prompt = [token for one in row.blocks for token in tokens(one)][: row.input]
        else:
            prompt = generator.integers(0, vocabulary, row.input).tolist()
        works.append(Work(prompt, row.output, row.arrival / speed))
    return works


def _drawn(vocabulary: int, block: int, seed: int) -> Callable[[int], list[int]]:
    made: dict[int, list[int]] = {}

    def tokens(one: int) -> list[int]:
        if one not in made:
            made[one] = np.random.default_rng((seed, one)).integers(0, vocabulary, block).tolist()
        return made[one]

    return tokens


def read_trace(path: Path, most: int | None, block: int) -> list[TraceRow]:
    """The first ``most`` requests of a trace, the first one at 0 s.

    A CSV has a header and three columns: arrival (a date and time, or seconds), prompt tokens, generated
    tokens. JSON lines have ``timestamp`` (ms), ``input_length``, ``output_length`` and perhaps ``hash_ids``,
    one for every ``block`` tokens.

    Raises:
        UsageError: a row is something else; the sentence names its line.
    """
    read = _from_csv if path.suffix.lower() == ".csv" else _from_json
    with path.open(encoding="utf-8", newline="") as lines:
        rows = sorted(islice(read(path, lines, block), most), key=lambda row: row.arrival)
    if not rows:
        raise UsageError(f"replay.trace={path} has no requests; give a recorded load")
    first = rows[0].arrival
    return [TraceRow(row.arrival - first, row.input, row.output, row.blocks) for row in rows]


def _from_csv(path: Path, lines: Iterator[str], block: int) -> Iterator[TraceRow]:
    reader = csv.reader(lines)
    next(reader, None)
    for cells in reader:
        if not cells:
            continue
        try:
            arrival, prompt, output = cells
            yield _checked(TraceRow(_seconds(arrival), int(prompt), int(output)), block)
        except ValueError as error:
            raise UsageError(
                f"replay.trace={path}, line {reader.line_num}: {error}; a row is arrival, prompt tokens, "
                "generated tokens"
            ) from None


def _from_json(path: Path, lines: Iterator[str], block: int) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            made = json.loads(line)
            arrival, blocks = float(made["timestamp"]) / 1000, tuple(map(int, made.get("hash_ids", ())))
            yield _checked(
                TraceRow(arrival, int(made["input_length"]), int(made["output_length"]), blocks), block
            )
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UsageError(
                f"replay.trace={path}, line {number}: {what}; a row has timestamp, input_length, output_length "
                "and perhaps hash_ids"
            ) from None


def _checked(row: TraceRow, block: int) -> TraceRow:
    if row.input < 1 or row.output < 1:
        raise ValueError(f"{row.input} prompt tokens and {row.output} generated ones; both are at least 1")
    if row.blocks and len(row.blocks) * block < row.input:
        raise ValueError(f"{len(row.blocks)} blocks of replay.block={block} are less than {row.input} tokens")
    return row


def _seconds(text: str) -> float:
    """Seconds of a number or of a date and time, whose fraction may have any number of digits."""
    try:
        return float(text)
    except ValueError:
        # Python 3.10 reads fractions of six digits and no Z.
        text = re.sub(r"\.(\d+)", lambda found: f".{found[1][:6]:0<6}", text.strip()).replace("Z", "+00:00")
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
