"""Parquet tables in and out, against the same job in JSON lines."""

from __future__ import annotations

import datetime
import decimal
import json
import signal
import struct
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
    {"id": 11, "token_ids": [4, 5, 6], "return_logprob": True, "logprob_start_len": 0},
]


def run(prompts: str, output: str, *more: str) -> int:
    return script("generate")(*OPTIONS, f"prompts={prompts}", f"output={output}", *more)


def test_a_table_is_answered_as_the_same_rows_in_json_are():
    names = dict.fromkeys(name for row in ROWS for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in ROWS] for name in names}), "in.parquet")
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    score = "plan.max_logprob_tokens=512"
    assert run("in.parquet", "out.parquet", score) == run("in.jsonl", "out.jsonl", score) == 0
    plain = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    table = pq.read_table("out.parquet").to_pylist()
    assert [row["id"] for row in table] == [7, 8, 9, 10, 11]
    for row, expected in zip(table, plain, strict=True):
        expected["error"] = expected["error"]["message"] if "error" in expected else None
        for token in [*expected.get("input_logprobs", []), *expected.get("logprobs", [])]:
            token["top"] = [{"token_id": i, "logprob": value} for i, value in token["top"]]
        given = {name: value for name, value in row.items() if value is not None}
        if "samples" in given:
            given["samples"] = [
                {k: v for k, v in sample.items() if v is not None} for sample in given["samples"]
            ]
        assert given == {name: value for name, value in expected.items() if value is not None}
    assert run("in.parquet", "out.jsonl", "overwrite=true") == 0
    ids = [json.loads(line)["id"] for line in Path("out.jsonl").read_text().splitlines()]
    assert ids == [7, 8, 9, 10, 11]


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
    with open("in.parquet", "rb") as file:
        first, second = ParquetSource(Path("in.parquet")).rows(file)
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
        (
            {"prompt": ["a"], "source": ["b"]},
            ["carry=false"],
            "has a column 'source': there is no field 'source'",
        ),
        (
            {"prompt": ["a"], "seed": [1]},
            [],
            "has a column 'seed': there is no field 'seed'; did you mean sampling_seed",
        ),
        ({"prompt": ["a"], "text": ["b"]}, [], "the answer has a field 'text' of its own; rename the column"),
        ({"prompt": ["a"], "id": [b"1"]}, [], "a column id of type binary, which cannot be handed through"),
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


def test_a_cell_that_cannot_be_read_costs_its_row_alone():
    """pyarrow converts a batch as a whole, or not at all."""
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(struct.pack("4i", 0, 1, 3, 4)), pa.py_buffer(b"a\xff\xfec")]
    )
    bias = [[(1, 1.0)], [(2, 1.0)], [(3, 1.0), (3, 2.0)]]
    columns = {
        "id": [1, 2, 3],
        "token_ids": [[1], [2], [3]],
        "extra_key": broken,
        "logit_bias": pa.array(bias, pa.map_(pa.int32(), pa.float64())),
    }
    pq.write_table(pa.table(columns), "in.parquet")
    assert run("in.parquet", "out.parquet") == 0
    first, *others = pq.read_table("out.parquet").to_pylist()
    assert (first["id"], first["error"], len(first["token_ids"])) == (1, None, 3)
    assert [(row["id"], row["error"]) for row in others] == [
        (2, "extra_key is not UTF-8 (byte 1); write the text as UTF-8"),
        (3, "logit_bias has a key twice; give it once"),
    ]


def test_columns_as_other_libraries_write_them():
    """Whole numbers beside nulls as floats, names as a dictionary of few values."""
    columns = {
        "id": pa.array(["a", "b", "a"]).dictionary_encode(),
        "token_ids": [[1], [2], [3]],
        "max_new_tokens": [2.0, None, 2.5],
        "temperature": [0, 0, 0],
    }
    pq.write_table(pa.table(columns), "in.parquet")
    assert run("in.parquet", "out.parquet") == 0
    table = pq.read_table("out.parquet")
    assert table.schema.field("id").type == pa.string()
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "a"]
    assert [row["completion_tokens"] for row in rows] == [2, 3, None]
    assert rows[2]["error"] == "max_new_tokens=2.5 must be a whole number"


def test_what_utf8_has_not_is_escaped_as_in_json():
    """Else a job would run to its end, and its table could never be written."""
    rows = [
        {"id": "\ud800", "token_ids": [1]},
        {"custom_id": "\ud801x", "token_ids": [1], "\ud802": 1},
        {"id": {"a": "\ud803"}, "token_ids": [1], "stop_regex": "(\ud804"},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("in.jsonl", "out.parquet") == 0
    made = pq.read_table("out.parquet").to_pylist()
    assert [(row["id"], row["custom_id"]) for row in made] == [
        (r"\ud800", None),
        (None, r"\ud801x"),
        (r'{"a": "\ud803"}', None),
    ]
    assert made[0]["error"] is None
    assert [row["error"] is None for row in made] == [True, True, False]
    assert [row[r"\ud802"] for row in made] == [None, "1", None]


def test_a_table_that_is_damaged_is_said_with_what_is_kept(capsys):
    rows = [{"id": i, "token_ids": [i % 97, 1 + i // 97]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet", row_group_size=1000, compression="zstd")
    held = bytearray(Path("in.parquet").read_bytes())
    group = pq.ParquetFile("in.parquet").metadata.row_group(2).column(1)
    begin = group.data_page_offset
    held[begin : begin + 60] = b"\x55" * 60
    Path("in.parquet").write_bytes(held)
    assert run("in.parquet", "out.jsonl", "sampling.max_new_tokens=1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: in.parquet is damaged (")
    assert "write it again; " in said
    held[-8:-4] = b"\xff\xff\xff\x00"
    Path("in.parquet").write_bytes(held)
    assert run("in.parquet", "other.jsonl") == 1
    assert "in.parquet is no Parquet file (" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["id", "token_ids"])
def test_a_column_that_is_there_twice_is_refused(name, capsys):
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=[name, name]), "in.parquet")
    assert run("in.parquet", "out.jsonl") == 1
    assert f"in.parquet has a column {name!r} twice; drop or rename one" in capsys.readouterr().err


def test_a_table_that_changes_while_it_is_read_ends_the_job():
    from makeready.engine.entrypoints.batch.base import JobError
    from makeready.engine.entrypoints.batch.source import TableSource

    pq.write_table(pa.table({"token_ids": [[1], [2]]}), "in.parquet")
    source = TableSource(Path("in.parquet"))
    source.survey()
    pq.write_table(pa.table({"token_ids": [[3]]}), "in.parquet")
    with pytest.raises(JobError, match=r"in.parquet was changed while the job ran"):
        next(source.rows())


def test_further_columns_come_back_with_their_values_and_types():
    """Also as pandas writes them: whole numbers beside nulls are floats, a category is a dictionary."""
    when = [datetime.datetime(2026, 1, 2, 3, 4, 5), None]
    columns = {
        "id": pa.array([7.0, None]),
        "token_ids": pa.array([[1.0, 2.0], [3.0]]),
        "max_new_tokens": pa.array([1.0, None]),
        "top_k": pa.array([None, 5.0]),
        "label": pa.array(["x", None]).dictionary_encode(),
        "score": pa.array([0.5, float("nan")], pa.float32()),
        "flag": pa.array([True, None]),
        "nested": pa.array([{"a": [1, None]}, None]),
        "nothing": pa.nulls(2),
        "when": pa.array(when),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "__index_level_0__": pa.array([3, 1]),
    }
    pq.write_table(pa.table(columns), "in.parquet")
    assert run("in.parquet", "out.parquet") == 0
    made = pq.read_table("out.parquet")
    assert made["error"].to_pylist() == [None, None]
    assert made["completion_tokens"].to_pylist() == [1, 3]
    for name in ("id", "flag", "nested", "nothing", "__index_level_0__"):
        assert made.schema.field(name).type == columns[name].type
        assert made[name].to_pylist() == columns[name].to_pylist()
    assert made["label"].to_pylist() == ["x", None]
    assert made["score"].to_pylist() == [0.5, None]
    assert made["when"].to_pylist() == ["2026-01-02T03:04:05", None]
    assert made["price"].to_pylist() == ["1.50", None]
    assert run("in.parquet", "out.jsonl") == 0
    first, second = map(json.loads, Path("out.jsonl").read_text().splitlines())
    assert (first["nested"], first["label"], second["score"]) == ({"a": [1, None]}, "x", None)


def test_further_columns_of_json_lines_are_text_in_a_table():
    rows = [{"token_ids": [1], "a": "x"}, {"token_ids": [1], "b": [1, None]}, {"prompt": "no", "a": None}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("in.jsonl", "out.parquet") == 0
    made = pq.read_table("out.parquet").to_pylist()
    assert [(row["a"], row["b"]) for row in made] == [("x", None), (None, "[1, null]"), (None, None)]
