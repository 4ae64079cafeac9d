"""Parquet tables of requests and of answers, by pyarrow (the extra ``parquet``).

The input has the columns that a JSON row has fields: prompt, messages or token_ids, and sampling fields; a
null is a field that is not there. A whole number may be a float, since pandas makes floats of a column of
whole numbers and nulls. Other columns, id and custom_id among them, are handed through; times and decimals become
text. Beside them the output has the same columns for every job:

    text                 string; null where there is no tokenizer, or several samples
    token_ids            list<int32>; where there is no tokenizer
    content, reasoning_content                string; where reasoning and tool calls are told apart
    tool_calls           list<struct<id, type, function: struct<name, arguments>>>; where tools were called
    finish_reason        string
    prompt_tokens, completion_tokens, seed    int64
    input_logprobs, logprobs                  list<struct<token_id, logprob, top: list<struct<token_id,
                         logprob>>>>; where the row asked for them
    samples              list<struct<...>> of the fields above; where the row asked for several
    error                string; null where the row was served
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from makeready.engine.entrypoints.batch.base import Damaged, JobError, RowError, optional
from makeready.engine.entrypoints.batch.rows import ANSWER, CONSUMED, PASSED_THROUGH, check_column

ROWS = 4096  # of a row group: few enough for the memory, enough for the columns to compress
LOGPROBS = ("input_logprobs", "logprobs")


def arrow_module(name: str = "pyarrow") -> Any:
    """pyarrow or a module of it; raises :class:`JobError` where it is not installed."""
    return optional(name, "parquet", "a Parquet file")


class ParquetSource:
    """A table of requests.

    Args:
        path: the file.
        carry: hand columns that are no fields through to the answers; else they are refused.

    Raises:
        JobError: it is no Parquet file, or has a column that no row may have.
    """

    def __init__(self, path: Path, carry: bool = True) -> None:
        self._path = path
        arrow, parquet = arrow_module(), arrow_module("pyarrow.parquet")
        try:
            with parquet.ParquetFile(path) as file:
                self.schema, self.count = file.schema_arrow, file.metadata.num_rows
        except (FileNotFoundError, PermissionError):
            raise
        except (arrow.ArrowException, OSError) as error:  # what is no table, and one whose end is garbage
            raise JobError(f"{path} is no Parquet file ({_first_line(error)})") from None
        twice = {name for name in self.schema.names if self.schema.names.count(name) > 1}
        if twice:
            raise JobError(f"{path} has a column {min(twice)!r} twice; drop or rename one")
        for name in self.schema.names:
            try:
                check_column(name, carry=carry)
            except RowError as error:
                raise JobError(f"{path} has a column {name!r}: {error}") from None
        for name, kind in self.names().items():
            if kind is None:
                raise JobError(
                    f"{path} has a column {name} of type {self.schema.field(name).type}, which cannot be handed "
                    "through; make it text or numbers, or drop it"
                )

    def rows(self, file: IO[bytes]) -> Iterator[dict[str, Any] | Damaged]:
        """Its rows as fields; nulls are left out, in messages too.

        Args:
            file: the table, opened.

        Raises:
            JobError: a part of the file is damaged.
        """
        arrow, parquet = arrow_module(), arrow_module("pyarrow.parquet")
        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=ROWS):
                    yield from _rows(batch)
        except (arrow.ArrowException, OSError) as error:
            raise JobError(f"{self._path} is damaged ({_first_line(error)}); write it again") from None

    def names(self) -> dict[str, Any]:
        """Arrow types of the columns that are handed through."""
        return {
            name: _carried(self.schema.field(name).type) for name in self.schema.names if name not in CONSUMED
        }


def _carried(kind: Any) -> Any:
    """What a column of a type is written as, JSON in between; None where its values cannot be."""
    arrow = arrow_module()
    types = arrow.types
    if types.is_dictionary(kind):  # few values, each written once, are the same values
        return _carried(kind.value_type)
    if types.is_temporal(kind) or types.is_decimal(kind):
        return arrow.string()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _carried(kind.value_type)
        return None if inner is None else arrow.list_(inner)
    if types.is_struct(kind):
        inner = [(field.name, _carried(field.type)) for field in kind]
        return None if any(each is None for _, each in inner) else arrow.struct(inner)
    plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    return kind if plain or types.is_string(kind) or types.is_large_string(kind) else None


def _rows(batch: Any) -> Iterator[dict[str, Any] | Damaged]:
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except Exception:  # a cell that Python has no value for: it must not cost the other rows their text
        yield from (_row(batch, at) for at in range(batch.num_rows))
        return
    for row in rows:
        yield _fields(row)


def _row(batch: Any, at: int) -> dict[str, Any] | Damaged:
    """A row of a batch that cannot be converted as a whole."""
    fields: dict[str, Any] = {}
    reason = ""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = column[at].as_py(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            reason = f"{name} is not UTF-8 (byte {error.start + 1}); write the text as UTF-8"
        except KeyError:  # how pyarrow says it of a map
            reason = f"{name} has a key twice; give it once"
        except Exception as error:
            reason = f"{name} cannot be read ({_first_line(error)}); correct it"
    return Damaged(_fields(fields), reason) if reason else _fields(fields)


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as if it were of JSON."""
    fields = _given({name: value for name, value in row.items() if name in CONSUMED})
    return fields | {name: _portable(value) for name, value in row.items() if name not in CONSUMED}


def _portable(value: Any) -> Any:
    """A value that is handed through, as JSON can hold it."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _portable(item) for name, item in value.items()}
    return [_portable(item) for item in value] if isinstance(value, list) else value


def further_columns(answers: Iterator[bytes]) -> dict[str, Any]:
    """Arrow types of what JSON lines hand through: text, for a file cannot promise more."""
    string = arrow_module().string()
    found: dict[str, Any] = dict.fromkeys(PASSED_THROUGH, string)
    for answer in answers:
        found |= {_storable(name): string for name in json.loads(answer) if name not in ANSWER}
    return found


def write_table(
    path: Path,
    answers: Iterator[bytes],
    names: Mapping[str, Any] | None,
    lines: Mapping[str, Any] | None = None,
) -> None:
    """Write answers as a table.

    Args:
        answers: rows of our own format, as JSON.
        names: Arrow types of what is handed through where the input is a table; None where it is JSON lines.
        lines: where it is, the same by :func:`further_columns`; a value that is no text is written as JSON.
    """
    arrow, parquet = arrow_module(), arrow_module("pyarrow.parquet")
    schema = _schema(arrow, names or lines or dict.fromkeys(PASSED_THROUGH, arrow.string()))
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := [json.loads(answer) for answer in islice(answers, ROWS)]:
            made = [_columns(row, as_text=names is None) for row in rows]
            writer.write_table(arrow.Table.from_pylist(made, schema=schema))


def _schema(arrow: Any, names: Mapping[str, Any]) -> Any:
    pair = arrow.struct([("token_id", arrow.int32()), ("logprob", arrow.float64())])
    token = arrow.struct([*pair, arrow.field("top", arrow.list_(pair))])
    function = arrow.struct([("name", arrow.string()), ("arguments", arrow.string())])
    call = arrow.struct([("id", arrow.string()), ("type", arrow.string()), ("function", function)])
    sample = [
        ("text", arrow.string()),
        ("token_ids", arrow.list_(arrow.int32())),
        ("content", arrow.string()),
        ("reasoning_content", arrow.string()),
        ("tool_calls", arrow.list_(call)),
        ("finish_reason", arrow.string()),
        ("completion_tokens", arrow.int64()),
        ("seed", arrow.int64()),
        *((name, arrow.list_(token)) for name in LOGPROBS),
    ]
    return arrow.schema(
        [
            *names.items(),
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
        made["error"] = _storable(row["error"]["message"])
    if as_text:
        for name, value in row.items():
            if name not in ANSWER:
                text = value if value is None or isinstance(value, str) else json.dumps(value)
                made[_storable(name)] = text if text is None else _storable(text)
    return made


def _storable(text: str) -> str:
    """A lone surrogate, which UTF-8 has not, is written as JSON would."""
    return text.encode(errors="backslashreplace").decode()


def _tops(sample: dict[str, Any]) -> dict[str, Any]:
    """Pairs of the most probable tokens as structs."""
    made = dict(sample)
    for name in LOGPROBS:
        if name in sample:
            made[name] = [
                token | {"top": [{"token_id": i, "logprob": value} for i, value in token["top"]]}
                for token in sample[name]
            ]
    return made


def _given(value: Any) -> Any:
    """A value without the nulls that a table's structs have for fields that are not there."""
    if isinstance(value, Mapping):
        return {name: _given(item) for name, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_given(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
