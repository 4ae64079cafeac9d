"""When each kernel of a piece of work ran on the GPU: the driver's own records (CUPTI), through torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path


def kernels(run: Callable[[], object]) -> list[tuple[float, float]]:
    """Start and end in seconds of every kernel that ``run`` launches, ascending by start; ``run`` waits for them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.init()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # Microseconds, as the trace event format has them.
    found = [(e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e.get("cat") == "kernel"]
    return sorted(found)
