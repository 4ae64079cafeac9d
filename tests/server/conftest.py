"""One real server for all tests of a run that need nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from server_process import ServerProcess
from smollm2 import smollm2


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """SmolLM2-135M-Instruct, with log-probabilities of prompts."""
    options = ("plan.max_rows=8", "plan.context_len=512", "plan.max_tokens=128", "plan.max_logprob_tokens=64")
    rpc = ("grpc_port=0",) if find_spec("smg_grpc_proto") else ()
    with ServerProcess(f"checkpoint={smollm2()}", *options, *rpc, "served_model_name=[smol,other]") as made:
        yield made
