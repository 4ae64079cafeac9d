"""Inputs that are no plain JSON lines: compressed ones are read, others refused before anything is written."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from scripts_in_process import TINY, script

OPTIONS = (*TINY, "sampling=greedy", "sampling.ignore_eos=true", "sampling.max_new_tokens=2")
ROWS = [{"id": number, "token_ids": [number, 5]} for number in range(1, 4)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}


def run(*arguments: str) -> int:
    return script("generate")(*OPTIONS, "prompts=in.jsonl", "output=out.jsonl", *arguments)


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_compressed_input_is_the_same_job_as_what_it_holds(kind, capsys):
    whole, half = COMPRESS[kind](LINES), COMPRESS[kind](LINES[: len(LINES) // 2])
    Path("in.jsonl").write_bytes(half + COMPRESS[kind](LINES[len(LINES) // 2 :]))  # two streams are one text
    assert run() == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(answer["id"], len(answer["token_ids"])) for answer in answers] == [(1, 2), (2, 2), (3, 2)]
    for content in (whole, LINES):
        Path("in.jsonl").write_bytes(content)
        assert run() == 0
        assert "is complete: 3 rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_compressed_input_is_said_before_anything_is_written(kind, damage, capsys):
    made = COMPRESS[kind](LINES * 500)
    middle = len(made) // 2
    flipped = made[:middle] + bytes(255 - byte for byte in made[middle : middle + 8]) + made[middle + 8 :]
    Path("in.jsonl").write_bytes(made[:-9] if damage == "cut" else flipped)
    assert run() == 1
    assert "in.jsonl cannot be decompressed" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROWS).encode(), "one array"),
        (json.dumps(ROWS, indent=2).encode(), "one array"),
        (json.dumps(ROWS).replace("}, ", "},\n").encode(), "one array"),
        (b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode(), "one array"),
        (json.dumps(ROWS[0], indent=2).encode(), "JSON over several lines"),
        *((LINES.decode().encode(name), "UTF-16") for name in ("utf-16", "utf-16-le", "utf-16-be")),
        *((LINES.decode().encode(name), "UTF-32") for name in ("utf-32", "utf-32-le", "utf-32-be")),
        (gzip.compress(json.dumps(ROWS).encode(), mtime=0), "one array"),  # no time of day in the test's name
        (b"PAR1\x15\x04", "a Parquet table"),
        (b"PK\x03\x04\x14\0", "a zip archive"),
    ],
)
def test_what_holds_no_lines_of_json_is_named_before_anything_is_written(content, message, capsys):
    Path("in.jsonl").write_bytes(content)
    assert run() == 1
    said = capsys.readouterr().err
    assert "prompts=in.jsonl does not hold JSON lines" in said
    assert message in said
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def test_a_list_among_rows_costs_its_own_row():
    Path("in.jsonl").write_bytes(b"[1, 2]\n" + LINES)
    assert run() == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [True, False, False, False]


@pytest.mark.parametrize(("good", "code"), [(0, 1), (1, 0)])
def test_a_job_of_which_every_row_failed_has_failed(good, code, capsys):
    lines: list[dict[str, Any]] = [{"prompt": 3}, {"token_ids": [1], "temperature": "hot"}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines + ROWS[:good]))
    for _ in range(2):  # also when it is asked for again
        assert run() == code
        assert ("error: no row could be served; out.jsonl says" in capsys.readouterr().err) == bool(code)
    assert len(Path("out.jsonl").read_text().splitlines()) == 2 + good
