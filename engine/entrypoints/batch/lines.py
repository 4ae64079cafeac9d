"""Files of JSON lines, plain or compressed, by what their first bytes say; other files are refused by name."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from makeready.engine.entrypoints.batch.base import JobError

GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
HEAD_BYTES = 2**16  # of a file, to tell what it is; a longer first line is taken for a row

_ENCODINGS = (  # UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_OTHERS = (
    (b"PAR1", "a Parquet table; give it a name that ends in .parquet"),
    (b"ARROW1", "an Arrow file; convert it to Parquet or JSON lines"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or export JSON lines"),
    (b"SQLite format 3", "a database; export JSON lines"),
)


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file, for its size and time, and the bytes that it holds, decompressed where gzip, bzip2, xz or zstd made it.

    Raises:
        JobError: compressed data that is damaged or cut off, also while it is read.
    """
    with open(path, "rb") as file:
        head = file.read(len(XZ))
        file.seek(0)
        opened, errors = _decompressed(file, head, path)
        try:
            with opened:
                yield file, opened
        except errors as error:
            # A disk's own errors have a number; those of bz2 and gzip about their data have none.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise JobError(f"{path} cannot be decompressed ({error}); is it complete") from None


def check_lines(path: Path, head: bytes, rows: int) -> None:
    """Refuse what is no JSON lines at all before a job begins; each of its lines would be an error.

    Args:
        path: the file, for the message.
        head: its first :data:`HEAD_BYTES`, decompressed.
        rows: its lines that are not blank.

    Raises:
        JobError: what the file is instead, and the remedy.
    """
    found = _kind(head, rows)
    if found is not None:
        raise JobError(f"prompts={path} does not hold JSON lines but {found}")


def _kind(head: bytes, rows: int) -> str | None:
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            return f"{name} text; save it as UTF-8"
    for mark, known in _OTHERS:
        if head.startswith(mark):
            return known
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:2] in (b"{\0", b"[\0", b"\0{", b"\0[") or text[:4] in (b"\0\0\0{", b"\0\0\0["):
        return "UTF-16 or UTF-32 text; save it as UTF-8"
    line, newline, rest = text.partition(b"\n")
    first = line.strip()
    if first.startswith(b"[") and (rows == 1 or (newline and not _is_json(first))):
        return "one array; write its entries a line each, as jq -c '.[]' FILE does"
    if first == b"{" and not _is_json(rest.lstrip().partition(b"\n")[0]):
        return "JSON over several lines; write each object on a line of its own, as jq -c . FILE does"
    return None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _decompressed(file: IO[bytes], head: bytes, path: Path) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    """What ``file`` holds, and the errors that mean damaged data."""
    opened: Any = file
    errors: tuple[type[Exception], ...] = ()
    if head.startswith(GZIP):
        opened, errors = gzip.GzipFile(fileobj=file), (EOFError, zlib.error, OSError)
    elif head.startswith(BZIP2):
        opened, errors = bz2.BZ2File(file), (EOFError, OSError)
    elif head.startswith(XZ):
        opened, errors = lzma.LZMAFile(file), (EOFError, lzma.LZMAError)  # noqa: SIM115, the caller closes it
    elif head.startswith(ZSTD):
        zstd = _zstd(path)
        opened, errors = zstd.ZstdFile(file), (EOFError, zstd.ZstdError)
    return opened, errors


def _zstd(path: Path) -> Any:
    """Python has such a module of its own from 3.14 on."""
    try:
        return importlib.import_module("backports.zstd")
    except ImportError:
        raise JobError(f"{path} is compressed by zstd; pip install backports.zstd to read it") from None
