"""Parquet tables in and out, against the same job in JSON lines."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from scripts_in_process import TINY, script

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")

OPTIONS = (*TINY, "sampling=greedy", "sampling.ignore_eos=true", "sampling.max_new_tokens=3")
ROWS: list[dict[str, Any]] = [
    {"id": 7, "token_ids": [1, 2], "max_new_tokens": 5},
    {"id": 8, "token_ids": [3], "n": 2, "temperature": 1.0, "sampling_seed": 4},
    {"id": 9, "token_ids": [99]},
    {"id": 10, "token_ids": [4], "return_logprob": True, "top_logprobs_num": 2},
]


def run(prompts: str, output: str, *more: str) -> int:
    return script("generate")(*OPTIONS, f"prompts={prompts}", f"output={output}", *more)


def test_a_table_is_answered_as_the_same_rows_in_json_are():
    names = dict.fromkeys(name for row in ROWS for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in ROWS] for name in names}), "in.parquet")
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert run("in.parquet", "out.parquet") == run("in.jsonl", "out.jsonl") == 0
    plain = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    table = pq.read_table("out.parquet").to_pylist()
    assert [row["id"] for row in table] == [7, 8, 9, 10]
    for row, expected in zip(table, plain, strict=True):
        expected["error"] = expected["error"]["message"] if "error" in expected else None
        for token in expected.get("logprobs", []):
            token["top"] = [{"token_id": i, "logprob": value} for i, value in token["top"]]
        given = {name: value for name, value in row.items() if value is not None}
        if "samples" in given:
            given["samples"] = [
                {k: v for k, v in sample.items() if v is not None} for sample in given["samples"]
            ]
        assert given == {name: value for name, value in expected.items() if value is not None}
    assert run("in.parquet", "out.jsonl", "overwrite=true") == 0
    assert [json.loads(line)["id"] for line in Path("out.jsonl").read_text().splitlines()] == [7, 8, 9, 10]


def test_messages_and_options_are_read_without_the_nulls_of_their_structs():
    from makeready.engine.entrypoints.batch.parquet import ParquetSource

    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "name": None},
                {"role": "x", "content": None, "name": "y"},
            ]
        },
        {"messages": None, "prompt": "b", "stop": ["c"]},
    ]
    pq.write_table(
        pa.Table.from_pylist(
            rows,
            schema=pa.schema(
                [
                    (
                        "messages",
                        pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", "name")])),
                    ),
                    ("prompt", pa.string()),
                    ("stop", pa.list_(pa.string())),
                    ("logit_bias", pa.map_(pa.int32(), pa.float32())),
                ]
            ),
        ),
        "in.parquet",
    )
    first, second = ParquetSource(Path("in.parquet")).rows()
    assert first == {"messages": [{"role": "user", "content": "a"}, {"role": "x", "name": "y"}]}
    assert second == {"prompt": "b", "stop": ["c"]}


def test_a_table_is_cut_off_and_continued(monkeypatch):
    from makeready.engine.entrypoints.batch.journal import Journal

    pq.write_table(pa.Table.from_pylist([{"id": f"r{i}", "token_ids": [i]} for i in range(40)]), "in.parquet")
    assert run("in.parquet", "whole.parquet") == 0
    append = Journal.append

    def interrupted(self: Journal, rows: Any) -> None:
        if self.totals.rows > 9:
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        assert run("in.parquet", "out.parquet") == 128 + signal.SIGINT
    assert not Path("out.parquet").exists()
    assert run("in.parquet", "out.parquet") == 0
    assert pq.read_table("out.parquet").equals(pq.read_table("whole.parquet"))


@pytest.mark.parametrize(
    ("columns", "more", "reason"),
    [
        ({"prompt": ["a"], "source": ["b"]}, [], "has a column 'source', which is no field"),
        ({"prompt": ["a"], "id": [1.5]}, [], "a column id of type double; make it text or whole numbers"),
        ({"prompt": ["a"]}, ["format=openai"], "OpenAI's batch format is JSON lines"),
    ],
)
def test_a_table_that_cannot_be_is_refused_before_anything_is_loaded(columns, more, reason, capsys):
    pq.write_table(pa.table(columns), "in.parquet")
    assert run("in.parquet", "out.parquet", *more) == 1
    assert reason in capsys.readouterr().err
    Path("in.parquet").write_text("not a table")
    assert run("in.parquet", "out.parquet") == 1
    assert "in.parquet is no Parquet file" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["in.parquet"]
