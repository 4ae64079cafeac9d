"""scripts/generate.py in processes of its own, forked from one that has imported everything.

A start from nothing costs seconds, most of them imports; like this a job is running after a tenth of one.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "scripts_in_process", "makeready.engine.entrypoints.generate"])


def start(
    folder: Path, arguments: Sequence[str], *, file_bytes: int | None = None, most_rows: int | None = None
) -> multiprocessing.Process:
    """Start a job in ``folder``; its stderr is appended to ``folder/said``, and all signals to it are one.

    Args:
        file_bytes: no file may become longer: to this process the disk is full then.
        most_rows: with this many rows or more in its journal the job waits for a signal, so that whoever sends one
            finds it running, however late.
    """
    environment = {"MAKEREADY_CACHE": os.environ["MAKEREADY_CACHE"]}
    process = CONTEXT.Process(
        target=_job, args=(folder, list(arguments), environment, file_bytes, most_rows), daemon=True
    )
    process.start()
    return process  # type: ignore[return-value]


def _job(
    folder: Path,
    arguments: list[str],
    environment: dict[str, str],
    file_bytes: int | None,
    most_rows: int | None,
) -> None:
    import torch
    from scripts_in_process import script

    from makeready.engine.entrypoints import ending
    from makeready.engine.entrypoints.batch.journal import Journal

    ending.ONCE_SECONDS = 1e9  # however long the machine keeps either side from running between two
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= environment
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    append = Journal.append

    def append_and_wait(journal: Journal, rows: Sequence[Any]) -> None:
        append(journal, rows)
        while most_rows is not None and journal.totals.rows >= most_rows:
            time.sleep(1)

    Journal.append = append_and_wait
    sys.exit(script("generate")(*arguments))
