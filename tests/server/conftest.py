"""One real server for all tests of a run that need nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import httpx
import pytest
from server_process import WAIT_SECONDS, ServerProcess
from smollm2 import smollm2


@pytest.fixture(autouse=True, scope="session")
def patience() -> Iterator[None]:
    """httpx waits five seconds for an answer, and a busy machine may take longer for any."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get", "head", "options", "post", "request", "stream"):
            patch.setattr(httpx, name, partial(getattr(httpx, name), timeout=WAIT_SECONDS))
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """SmolLM2-135M-Instruct, with log-probabilities of prompts."""
    options = ("plan.max_rows=8", "plan.context_len=512", "plan.max_tokens=128", "plan.max_logprob_tokens=64")
    rpc = ("grpc_port=0",) if find_spec("smg_grpc_proto") else ()
    with ServerProcess(f"checkpoint={smollm2()}", *options, *rpc, "served_model_name=[smol,other]") as made:
        yield made
