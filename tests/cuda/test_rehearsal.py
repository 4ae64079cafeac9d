"""Tests for a GPU rehearsed without one (tests/gpu/rehearsal.py): right limits hold, wrong ones show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def rehearse(file: Path, *options: str, cache: Path, **variables: str) -> tuple[int, str]:
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "rehearsal",
            "-p",
            "no:cacheprovider",
            *settings,
            str(file),
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/gpu"), "MAKEREADY_CACHE": str(cache), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_kernels_are_compiled_and_results_are_the_references(tmp_path: Path) -> None:
    file = ROOT / "tests/gpu/test_gpu_moe_mx.py"
    code, said = rehearse(file, "-k", "first_look and linear", cache=tmp_path, REHEARSE="compile")
    assert code == 0, said
    assert re.search(r"2 passed|\.\.\s+\[100%\]", said), said
    assert len(list((tmp_path / "kernels").iterdir())) >= 4  # a kernel for each tile


def test_a_limit_that_the_reference_does_not_keep_shows(tmp_path: Path) -> None:
    text = (ROOT / "tests/gpu/test_gpu_moe_mx.py").read_text()
    assert "error <= ALLOWED[op]" in text
    spoiled = tmp_path / "test_gpu_spoiled.py"
    spoiled.write_text(text.replace("error <= ALLOWED[op]", "error < 0"))
    code, said = rehearse(spoiled, "-k", "first_look and linear", cache=tmp_path)
    assert code == 1
    assert "is off by" in said
