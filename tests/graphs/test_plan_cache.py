"""The cache of plans where nothing can be kept: it costs time and never a run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.planner.plan_cache import cache_folder

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def told() -> tuple[list[str], list[int]]:
    """What a start says, and what it generates."""
    said: list[str] = []
    llm = LLM(open_checkpoint("dummy", config=LLAMA), max_rows=2, report=said.append)
    output = llm.generate(token_ids=[[1, 2]], sampling=SamplingParams(temperature=0, max_new_tokens=3))[0]
    return said, list(output.token_ids)


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("no folder")


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, whom permissions do not keep out, sees a file system that is mounted so."""

    def mkdir(self: Path, *arguments: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of somebody else's, in which one may not even look."""
    exists, mkdir = Path.exists, Path.mkdir

    def refused(original: Any) -> Any:
        def call(self: Path, *arguments: Any, **named: Any) -> Any:
            if self.is_relative_to(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            return original(self, *arguments, **named)

        return call

    monkeypatch.setattr(Path, "exists", refused(exists))
    monkeypatch.setattr(Path, "mkdir", refused(mkdir))


@pytest.mark.parametrize("broken", [a_file, read_only, full, closed])
def test_a_cache_that_cannot_be_written_costs_no_run(broken, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAKEREADY_CACHE", str(folder))
    with monkeypatch.context() as patch:
        broken(folder, patch)
        said, tokens = told()
    assert len(tokens) == 3
    assert len(said) == 1
    assert f"not kept for the next start: {folder / 'plans'} cannot be written" in said[0]
    assert "set MAKEREADY_CACHE" in said[0]
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("MAKEREADY_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where the user has no entry
    assert not cache_folder().is_relative_to(Path.cwd())
    said, tokens = told()
    assert len(tokens) == 3
    assert "set MAKEREADY_CACHE" in said[0]
    assert not Path("~").exists()
