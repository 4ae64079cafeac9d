"""No script has the name of a module of the standard library: a script's folder leads Python's path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts_in_process import ROOT


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_standard_librarys_module_is_found():
    program = """
import dataclasses, inspect, os, sys
assert os.path.samefile(inspect.__file__, os.path.join(os.path.dirname(os.__file__), "inspect.py")), inspect
assert sys.modules["inspect"] is inspect
assert dataclasses.inspect is inspect
assert str(inspect.signature(lambda a, *, b=1: 0)) == "(a, *, b=1)"
"""
    done = run("-c", program, PYTHONPATH=str(ROOT / "scripts"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("inspect_plan", "nowhere holds no plan (no plan.json); make one with scripts/compile.py"),
        ("tune", "nowhere holds no plan (no plan.json); make one with scripts/compile.py"),
    ],
)
def test_scripts_run_with_their_folder_in_front_of_the_path(name, reason):
    """As users start them, from anywhere."""
    checkpoint = () if name == "inspect_plan" else ("checkpoint=x",)
    done = run(ROOT / "scripts" / f"{name}.py", "plan=nowhere", *checkpoint)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {reason}"
    assert not list(Path().iterdir())
