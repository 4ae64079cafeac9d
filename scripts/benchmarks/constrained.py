"""What it costs that outputs follow a grammar: JSON of a schema beside plain text, the same prompts, in turns.

Masks are filled while the model runs, so a step should take as long; and tokens that the grammar leaves no choice of
go in with the next step, so there are fewer steps. Both are told: milliseconds a token, and steps for all tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from makeready.engine.entrypoints.options import UsageError
from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.huggingface import TOKENIZER_FILES
from makeready.graphs.executable.base import Executable

# Records as tools are given them. None of the prompts' answers is complete before its tokens are spent.
SCHEMA: Mapping[str, Any] = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "city": {"enum": ["Lisbon", "Nairobi", "Osaka", "Quito"]},
            "temperature_celsius": {"type": "integer", "minimum": -60, "maximum": 60},
            "windows_closed": {"type": "boolean"},
        },
        "required": ["name", "city", "temperature_celsius", "windows_closed"],
        "additionalProperties": False,
    },
}


def speak(checkpoint: Checkpoint, folder: Path) -> None:
    """Give random weights the tokenizer of a Hugging Face folder.

    Raises:
        UsageError: there is none.
    """
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise UsageError(f"constrained.tokenizer={folder} has no tokenizer.json")
    setattr(checkpoint, "tokenizer_files", lambda: files)  # noqa: B010  # a method is no attribute to type checkers


class Launches:
    """Counts the steps that an executable runs, from entering to leaving."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._launch = executable.launch
        self.count = 0

    def __enter__(self) -> Launches:
        setattr(self._executable, "launch", self._counted)  # noqa: B010  # as above
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        delattr(self._executable, "launch")

    def _counted(self, *given: Any, **named: Any) -> Any:
        self.count += 1
        return self._launch(*given, **named)


def constrained(
    llm: LLM, *, rows: Sequence[int], context: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Measure ``llm``, greedy, on random token ids.

    Args:
        rows: batch sizes.
        context: prompt tokens a row.
        tokens: new tokens of a row, less the first.
        repeats: measurements of each kind.

    Returns:
        By batch: ``milliseconds`` a token and ``steps`` of all tokens, ``plain`` and as ``json``.

    Raises:
        UsageError: the model has no tokenizer.
    """
    if llm.tokenizer is None:
        raise UsageError("suite constrained needs a tokenizer; give constrained.tokenizer=FOLDER")
    generator = np.random.default_rng(0)
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "json": {"json_schema": SCHEMA}}
    found = []
    for count in rows:
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        steps: dict[str, list[int]] = {kind: [] for kind in kinds}
        for turn in range(
            1 + repeats
        ):  # grammars are compiled and first calls allocate: the first is not counted
            for kind, fields in kinds.items():
                took, ran = [], []
                for new in (1, tokens + 1):
                    prompts = generator.integers(0, llm.tokenizer.vocab_size, (count, context)).tolist()
                    params = SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True, **fields)
                    with Launches(llm.engine.executable) as launches:
                        began = time.perf_counter()
                        outputs = llm.generate(token_ids=prompts, sampling=params)
                        took.append(time.perf_counter() - began)
                    ran.append(launches.count)
                    assert all(output.finish_reason == "length" for output in outputs)
                if turn:
                    seconds[kind].append((took[1] - took[0]) / tokens)
                    steps[kind].append(ran[1] - ran[0])
        found.append(
            {
                "rows": count,
                **{
                    kind: {
                        "milliseconds": 1e3 * statistics.median(seconds[kind]),
                        "steps": statistics.median(steps[kind]),
                    }
                    for kind in kinds
                },
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]], tokens: int) -> list[str]:
    """A line a batch."""
    lines = []
    for row in found:
        plain, json = row["plain"], row["json"]
        a_step = [one["milliseconds"] * tokens / one["steps"] for one in (plain, json)]
        lines.append(
            f"{row['rows']:4d} rows: plain {plain['milliseconds']:.2f} ms a token; JSON {json['milliseconds']:.2f} "
            f"({json['milliseconds'] / plain['milliseconds']:.2f}), {json['steps']:.0f} steps of "
            f"{plain['steps']:.0f}, each {a_step[1] / a_step[0]:.2f} times as long"
        )
    return lines
