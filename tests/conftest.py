"""What all tests share: one thread for torch, seeds, hypothesis without clocks, and interrupts that arrive."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

# Machines under load miss deadlines, of an example and of making examples; a fixed seed makes failures repeat.
hypothesis.settings.register_profile(
    "makeready",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("makeready")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own is the same whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """A shell has what it runs in the background ignore SIGINT, and so would processes that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and workers of a parallel run would fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
