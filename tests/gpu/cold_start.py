"""A process that loads a plan and steps through its buckets without torch; prints figures as JSON.

python cold_start.py CHECKPOINT_OR_dummy CONFIG_JSON PLAN_FOLDER
"""

import time

_START = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from makeready.graphs import artifact  # noqa: E402
from makeready.graphs.checkpoint.base import open_checkpoint  # noqa: E402
from makeready.graphs.executable.cuda import CudaExecutable  # noqa: E402
from makeready.graphs.spec import DECODE, Bucket, step_fields  # noqa: E402

CONTEXT = 1024  # tokens of a decoding row


def arrays(executable: CudaExecutable, bucket: Bucket) -> dict[str, np.ndarray]:
    """A full batch: rows that decode behind a context, or one prompt of the bucket's tokens."""
    limits = executable.plan.limits
    made = {f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in step_fields(limits)}
    rows = bucket.rows if bucket.phase == DECODE else 1
    each = bucket.tokens // rows
    context = min(CONTEXT, limits.context_len) if bucket.phase == DECODE else each
    positions = np.arange(context - each, context)
    table = np.arange(limits.pages_per_row)
    for row in range(rows):
        pages = 1 + (row * limits.pages_per_row + table) % (executable.pages - 1)
        tokens = slice(row * each, (row + 1) * each)
        made["token_ids"][tokens] = np.random.default_rng(row).integers(0, 1000, each)
        made["positions"][tokens] = positions
        made["token_slot"][tokens] = row
        made["kv_slot"][tokens] = pages[positions // limits.page_size] * limits.page_size
        made["kv_slot"][tokens] += (positions % limits.page_size).astype(np.int32)
        made["query_start"][row] = row * each
        made["query_len"][row] = each
        made["context_len"][row] = context
        made["row_slot"][row] = row
        made["page_table"][row] = pages
    return made


def time_bucket(executable: CudaExecutable, bucket: Bucket) -> tuple[float, float]:
    """Milliseconds of a step among many, microseconds that the host takes to launch one."""
    step = arrays(executable, bucket)
    executable.launch(bucket, step).wait()
    begin = time.perf_counter()
    executable.launch(bucket, step)
    host = time.perf_counter() - begin
    executable.launch(bucket, step).wait()
    count = 64 if bucket.phase == DECODE else 5
    begin = time.perf_counter()
    last = [executable.launch(bucket, step) for _ in range(count)][-1]
    last.wait()
    return (time.perf_counter() - begin) / count * 1e3, host * 1e6


def time_slots(executable: CudaExecutable) -> tuple[float, float]:
    """Microseconds to write a slot while the largest step runs; milliseconds until that step ends."""
    plan = executable.plan
    bucket = max(plan.buckets, key=lambda b: b.tokens)
    pending = executable.launch(bucket, arrays(executable, bucket))
    begin = time.perf_counter()
    for slot in range(plan.limits.max_rows):
        executable.write_slot(slot, {"prompt_len": 7 + slot, "temperature": 0.7, "seed": 99 + slot})
    slots = time.perf_counter() - begin
    pending.wait()
    return slots / plan.limits.max_rows * 1e6, (time.perf_counter() - begin) * 1e3


def main(source: str, config: str, folder: str) -> dict[str, Any]:
    imported = time.perf_counter()
    checkpoint = open_checkpoint(source, config=json.loads(config) if source == "dummy" else None)
    plan = artifact.load(folder)
    opened = time.perf_counter()
    executable = CudaExecutable(plan, checkpoint)
    loaded = time.perf_counter()
    bucket = min(plan.buckets)
    executable.launch(bucket, arrays(executable, bucket)).wait()
    stepped = time.perf_counter()
    slot, behind = time_slots(executable)
    return {
        "imports": imported - _START,
        "plan": opened - imported,
        "load": loaded - opened,
        "first_step": stepped - loaded,
        "phases": executable.startup,
        "graph_mib": executable.graph_bytes / 2**20,
        "graphs": len(plan.buckets),
        "nodes": sum(len(plan.programs[b.phase].launches) for b in plan.buckets),
        "pages": executable.pages,
        "weights": sum(w.nbytes for w in plan.weights),
        "slot_us": slot,
        "slots_behind_ms": behind,
        "steps": {str(bucket): time_bucket(executable, bucket) for bucket in plan.buckets},
        "foreign": sorted({m.split(".")[0] for m in sys.modules} & {"torch", "triton", "transformers"}),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
