"""What a GPU's clocks and power were while something was measured.

A GPU that comes to the limit of its power lowers its clocks after some ten milliseconds, so short measurements and
long ones of the same work differ. The driver's own tool is asked again and again while others measure.
"""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

EVERY = 20  # milliseconds
_FIELDS = ("clocks.sm", "clocks.mem", "power.draw.instant", "clocks_event_reasons.active")
# Why clocks are below the highest, by bit: nvmlClocksEventReasons of NVIDIA's NVML. An idle GPU's is left out.
_REASONS = {
    0x2: "applications' setting",
    0x4: "power",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
    0x100: "display",
}


@dataclass(frozen=True)
class Sample:
    """Clocks at one time of :func:`time.perf_counter`: MHz, watts, bits of reasons."""

    at: float
    sm: float
    memory: float
    watts: float
    reasons: int


class Clocks:
    """Watches GPU 0 from entering to leaving; without the driver's tool there are no samples."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Clocks:
        query = ["--id=0", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
        try:
            self._process = subprocess.Popen(
                ["nvidia-smi", *query, f"--loop-ms={EVERY}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            return self
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._reader.join()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    sm, memory, watts, reasons = line.split(",")
                    read = float(sm), float(memory), float(watts), int(reasons, 0)
                except ValueError:  # an older driver's error, or "[N/A]"
                    continue
                self._samples.append(Sample(time.perf_counter(), *read))

    def between(self, begin: float, end: float) -> dict[str, Any] | None:
        """Means of a span of :func:`time.perf_counter`, and what held clocks back in it; None without a sample."""
        seen = [sample for sample in list(self._samples) if begin <= sample.at <= end]
        if not seen:
            return None
        bits = 0
        for sample in seen:
            bits |= sample.reasons
        return {
            "samples": len(seen),
            "sm_mhz": sum(s.sm for s in seen) / len(seen),
            "sm_mhz_least": min(s.sm for s in seen),
            "memory_mhz": sum(s.memory for s in seen) / len(seen),
            "watts": sum(s.watts for s in seen) / len(seen),
            "held_back_by": [name for bit, name in _REASONS.items() if bits & bit],
        }


def words(clocks: dict[str, Any] | None) -> str:
    """A span's means as the end of a line; empty without any."""
    if clocks is None:
        return ""
    held = f", held back by {' and '.join(clocks['held_back_by'])}" if clocks["held_back_by"] else ""
    return f"; {clocks['sm_mhz']:.0f} MHz, {clocks['watts']:.0f} W{held}"
