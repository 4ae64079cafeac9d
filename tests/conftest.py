"""What all tests share: one thread for torch, and hypothesis without clocks."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Machines under load miss per-example deadlines; a fixed seed makes a failure repeat itself.
hypothesis.settings.register_profile("makeready", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("makeready")


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and workers of a parallel run would fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
