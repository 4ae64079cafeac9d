"""What tells one checkpoint's content from another's at the same path, without reading the weights."""

from __future__ import annotations

import datetime
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from makeready.graphs.checkpoint.base import Checkpoint, CheckpointError

PIECE = 2**22  # bytes read at once


def checkpoint_identity(checkpoint: Checkpoint, *, digest: bool = False) -> dict[str, str]:
    """Name → what is known of it, for all that answers depend on: config, weights, tokenizer, templates.

    Args:
        checkpoint: opened.
        digest: read all weights and take their SHA-256, instead of each file's size, time of change and
            header. The same weights copied anew are then the same.

    Raises:
        CheckpointError: a file cannot be read any more.
    """
    made = {"config.json": f"fingerprint {checkpoint.fingerprint()[:32]}"}
    weights = checkpoint.weight_files()
    texts = {
        name: path
        for name, path in checkpoint.tokenizer_files().items()
        if path not in dict(weights.values())
    }
    try:
        with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
            one = _content if digest else _appearance
            made |= zip(weights, pool.map(lambda file: one(*file), weights.values()), strict=True)
            made |= zip(texts, pool.map(lambda path: _content(path, 0), texts.values()), strict=True)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read ({error.strerror}); check the checkpoint"
        ) from None
    return made


def _appearance(path: Path, header: int) -> str:
    """Size and time of change of a file and the digest of its first ``header`` bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(header)).hexdigest()[:16]
    held = path.stat()
    seconds, nanoseconds = divmod(held.st_mtime_ns, 10**9)
    changed = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return f"{held.st_size} bytes changed at {changed}.{nanoseconds:09d}Z, header {digest}"


def _content(path: Path, header: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return f"sha256 {total.hexdigest()[:32]}"
