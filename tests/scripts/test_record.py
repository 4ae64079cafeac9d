"""The commit that a result names: git's, else the one the environment gives, else none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from benchmarks import record


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "copy").mkdir(parents=True)
    (folder / "file").write_text("one")
    git(folder, "init")
    git(folder, "add", "file")
    git(folder, "commit", "-m", "one")
    return folder


def test_git_knows_its_commit_and_what_differs(repository, monkeypatch):
    monkeypatch.setenv("MAKEREADY_COMMIT", "other")
    head = git(repository, "rev-parse", "--short", "HEAD")
    assert record.commit(repository) == head
    (repository / "file").write_text("two")
    assert record.commit(repository) == f"{head}-dirty"


@pytest.mark.parametrize("given", ["abc1234", None])
def test_without_git_the_environment_says_it_or_nobody(given, repository, tmp_path, monkeypatch):
    if given is None:
        monkeypatch.delenv("MAKEREADY_COMMIT", raising=False)
    else:
        monkeypatch.setenv("MAKEREADY_COMMIT", given)
    assert record.commit(repository / "copy") == given, (
        "a copy inside of another repository is not its commit"
    )
    assert record.commit(tmp_path) == given
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert record.commit(repository) == given
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.describe(["x"])["commit"] == given
