"""A kernel that faults spoils its process: what would run behind it there runs in a new one, or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    told = yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:  # another worker takes its place
                os._exit(1)
            pytest.exit(f"{item.nodeid} left the GPU's context unusable: {error}", returncode=1)
    return told
