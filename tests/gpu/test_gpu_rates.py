"""What bench takes its floors from, on a real GPU: it is measured, and everything is given back."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

MEASURE = """
import json
from benchmarks.gpu import rates
from makeready.graphs.executable.cuda.driver import Driver
driver = Driver()
driver.initialise()
device = driver.open(0)
first = rates.measure(driver)
driver.use(device)
before = driver.memory()[0]
second = rates.measure(driver)
driver.use(device)
print(json.dumps([first.record(), second.record(), before - driver.memory()[0]]))
"""


def test_rates_are_measured_and_nothing_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2] / "scripts",
    )
    assert done.returncode == 0, done.stderr
    first, second, kept = json.loads(done.stdout.splitlines()[-1])
    if "PYTEST_XDIST_WORKER" not in os.environ:  # others' memory would count
        assert kept == 0
    for found in (first, second):
        assert found["source"] == "measured"
        assert found["bandwidth"] == max(found["copy"], found["reads"])
        assert all(math.isfinite(rate) and rate > 0 for rate in found["flops"].values())
    print(json.dumps(second))
