"""Files that clients send and fetch, in a folder: their bytes, and beside each a description."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

_IDENTITY = re.compile(r"(file|batch)-[0-9a-f]{24}")


class Record(msgspec.Struct, kw_only=True):
    """What is known of a file; OpenAI's file object.

    Attributes:
        bytes: its size.
        created_at: seconds since 1970.
        purpose: ``batch`` or ``batch_output``.
    """

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"


@dataclass(frozen=True)
class Store:
    """The files of a server, and whatever else is kept beside them under names of its own.

    Attributes:
        folder: which is made where it is missing.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, identity: str) -> Path:
        """Where the bytes of a file are; whether it is there or not."""
        return self.folder / identity

    def put(self, data: bytes, filename: str, purpose: str) -> Record:
        """Keep a new file."""
        identity = new_identity("file")
        write(self.path(identity), data)
        return self.describe(identity, filename, purpose)

    def describe(self, identity: str, filename: str, purpose: str) -> Record:
        """Take in a file whose bytes are there."""
        size = self.path(identity).stat().st_size
        record = Record(
            id=identity, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose
        )
        self.keep(identity, record)
        return record

    def get(self, identity: str) -> Record | None:
        """What is known of a file; None where there is none."""
        return self.kept(identity, Record)

    def all(self) -> Iterator[Record]:
        """All files, the latest first."""
        found = [self.get(path.stem) for path in self.folder.glob("file-*.json")]
        yield from sorted((each for each in found if each), key=lambda each: -each.created_at)

    def remove(self, identity: str) -> None:
        """Forget a file."""
        for path in (self.path(identity), self._beside(identity)):
            path.unlink(missing_ok=True)

    def keep(self, identity: str, value: Any) -> None:
        """Keep a description, whole or not at all."""
        write(self._beside(identity), msgspec.json.encode(value))

    def kept(self, identity: str, kind: Any) -> Any:
        """A description of this kind; None where there is none."""
        if not _IDENTITY.fullmatch(identity):
            return None
        try:
            return msgspec.json.decode(self._beside(identity).read_bytes(), type=kind)
        except FileNotFoundError:
            return None

    def _beside(self, identity: str) -> Path:
        return self.folder / f"{identity}.json"


def new_identity(prefix: str) -> str:
    """A name that no other has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def write(path: Path, data: bytes) -> None:
    """Replace a file as a whole, on the disk when this returns."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
