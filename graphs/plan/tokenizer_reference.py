"""How a plan names the tokenizer that belongs to it without holding it."""

from __future__ import annotations

import hashlib

from makeready.graphs.checkpoint.base import Checkpoint


def tokenizer_reference(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each of the checkpoint's tokenizer files, by name; empty where it has none.

    A GGUF file carries its tokenizer inside, next to the weights; it is named without a hash, since its
    metadata is part of the checkpoint that is opened anyway.
    """
    return {
        name: "" if name == "gguf" else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(checkpoint.tokenizer_files().items())
    }
