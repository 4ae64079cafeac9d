"""CONTRIBUTING's table of touched files is true: each row's example is named in these files and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS, SUFFIXES = ("engine", "graphs", "kernels", "conf"), (".py", ".yaml", ".c")
ROW = re.compile(
    r"\| (?P<what>[^|]+) \| `(?P<example>\w+)` \| (?P<count>\d+) \| (?P<files>[^|]+) \| (?P<outside>[^|]*)\|"
)
WANTED = (  # what the table has to speak of
    *("dense variant", "new block", "op with kernels", "quantization", "sampling parameter", "plan option"),
    *("kind of step", "cache group", "policy", "target", "text format"),
)


def naming(word: str) -> set[str]:
    """Files that name ``word`` as a whole."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return {str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text(encoding="utf-8"))}


def table() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("| ") and ("`" in line or "| –" in line)]


ROWS = {row["what"]: row for row in map(ROW.match, table()) if row is not None}


@pytest.mark.parametrize("what", ROWS)
def test_a_row_counts_the_files_that_name_its_example(what: str) -> None:
    row = ROWS[what]
    stated = re.findall(r"`([^`]+)`", row["files"])
    true = naming(row["example"])
    listing = " ".join(f"`{file}`" for file in sorted(true))
    assert set(stated) == true, f"write: | {what} | `{row['example']}` | {len(true)} | {listing} |"
    assert int(row["count"]) == len(true) == len(stated)


@pytest.mark.parametrize("what", ROWS)
def test_what_comes_from_outside_is_tested(what: str) -> None:
    for path in re.findall(r"`(tests/[^`]+)`", ROWS[what]["outside"]):
        assert "toy" in (ROOT / path).read_text(encoding="utf-8"), path


def test_nothing_is_left_out() -> None:
    lines = table()
    for what in WANTED:
        assert any(line.startswith(f"| {what}") for line in lines), what
    unread = [line for line in lines if ROW.match(line) is None and "| – |" not in line]
    assert not unread, "a row is not counted: it needs five cells"
