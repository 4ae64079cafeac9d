"""Parquet tables of requests and of answers, by pyarrow (the extra ``parquet``).

The input has the columns that a JSON row has fields: prompt, messages or token_ids, and sampling fields; a
null is a field that is not there. The output has the same columns for every job, so that tables of several
jobs can be joined:

    id, custom_id        as in the input, where it has them
    text                 string; null where there is no tokenizer, or several samples
    token_ids            list<int32>; where there is no tokenizer
    finish_reason        string
    prompt_tokens, completion_tokens, seed    int64
    logprobs             list<struct<token_id, logprob, top: list<struct<token_id, logprob>>>>
    samples              list<struct<...>> of the fields above; where the row asked for several
    error                string; null where the row was served
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from makeready.engine.entrypoints.batch.base import JobError, optional
from makeready.engine.entrypoints.batch.rows import FIELDS, PASSED_THROUGH

ROWS = 4096  # of a row group: few enough for the memory, enough for the columns to compress


def arrow_module(name: str = "pyarrow") -> Any:
    """pyarrow or a module of it; raises :class:`JobError` where it is not installed."""
    return optional(name, "parquet", "a Parquet file")


class ParquetSource:
    """A table of requests.

    Args:
        path: the file.

    Raises:
        JobError: it is no Parquet file, or has a column that no row may have.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        arrow, parquet = arrow_module(), arrow_module("pyarrow.parquet")
        try:
            with parquet.ParquetFile(path) as file:
                self.schema, self.count = file.schema_arrow, file.metadata.num_rows
        except arrow.ArrowInvalid as error:
            raise JobError(f"{path} is no Parquet file ({_first_line(error)})") from None
        unknown = [name for name in self.schema.names if name not in FIELDS]
        if unknown:
            raise JobError(
                f"{path} has a column {unknown[0]!r}, which is no field; drop or rename it (id and custom_id are "
                f"handed through; fields are {', '.join(FIELDS)})"
            )
        for name, kind in self.names().items():
            if not (
                arrow.types.is_integer(kind)
                or arrow.types.is_string(kind)
                or arrow.types.is_large_string(kind)
            ):
                raise JobError(f"{path} has a column {name} of type {kind}; make it text or whole numbers")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its rows as fields; nulls are left out, in messages too."""
        with arrow_module("pyarrow.parquet").ParquetFile(self._path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield {name: _given(value) for name, value in row.items() if value is not None}

    def names(self) -> dict[str, Any]:
        """Arrow types of the columns that are handed through."""
        return {name: self.schema.field(name).type for name in PASSED_THROUGH if name in self.schema.names}


def write_table(path: Path, answers: Iterator[bytes], names: Mapping[str, Any] | None) -> None:
    """Write answers as a table.

    Args:
        answers: rows of our own format, as JSON.
        names: Arrow types of id and custom_id where the input is a table; None where it is JSON lines:
            then both are strings, and a value that is none is written as JSON.
    """
    arrow, parquet = arrow_module(), arrow_module("pyarrow.parquet")
    schema = _schema(arrow, names)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := [json.loads(answer) for answer in islice(answers, ROWS)]:
            made = [_columns(row, as_text=names is None) for row in rows]
            writer.write_table(arrow.Table.from_pylist(made, schema=schema))


def _schema(arrow: Any, names: Mapping[str, Any] | None) -> Any:
    pair = arrow.struct([("token_id", arrow.int32()), ("logprob", arrow.float64())])
    token = arrow.struct([*pair, arrow.field("top", arrow.list_(pair))])
    sample = [
        ("text", arrow.string()),
        ("token_ids", arrow.list_(arrow.int32())),
        ("finish_reason", arrow.string()),
        ("completion_tokens", arrow.int64()),
        ("seed", arrow.int64()),
        ("logprobs", arrow.list_(token)),
    ]
    own = dict.fromkeys(PASSED_THROUGH, arrow.string()) if names is None else names
    return arrow.schema(
        [
            *own.items(),
            *sample,
            ("prompt_tokens", arrow.int64()),
            ("samples", arrow.list_(arrow.struct(sample))),
            ("error", arrow.string()),
        ]
    )


def _columns(row: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    made = _tops(row)
    if "samples" in row:
        made["samples"] = [_tops(sample) for sample in row["samples"]]
    if "error" in row:
        made["error"] = row["error"]["message"]
    if as_text:
        for name in PASSED_THROUGH:
            if name in row and not isinstance(row[name], str):
                made[name] = json.dumps(row[name])
    return made


def _tops(sample: dict[str, Any]) -> dict[str, Any]:
    """Pairs of the most probable tokens as structs."""
    if "logprobs" not in sample:
        return dict(sample)
    made = [
        token | {"top": [{"token_id": i, "logprob": value} for i, value in token["top"]]}
        for token in sample["logprobs"]
    ]
    return sample | {"logprobs": made}


def _given(value: Any) -> Any:
    """A value without the nulls that a table's structs have for fields that are not there."""
    if isinstance(value, Mapping):
        return {name: _given(item) for name, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_given(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
