"""Weights from the page cache to the GPU: what each step of it costs, and the loader under several settings.

Writes random weights of the plan's shapes, loads them and checks what arrived. Then come single steps
(mapping, pinning, copying, letting go; reading through pinned buffers instead), whole loads of the
executable under other settings than those in graphs/executable/cuda/pages.py, and the time from process
start to the first token of scripts/generate.py. Needs no torch.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.record import ROOT
from makeready.graphs import children
from makeready.graphs.checkpoint.base import NUMPY_DTYPES, Checkpoint, open_checkpoint
from makeready.graphs.checkpoint.safetensors_file import DTYPES
from makeready.graphs.executable.cuda import pages as cuda_pages
from makeready.graphs.executable.cuda import weights as cuda_weights
from makeready.graphs.executable.cuda.driver import Driver, host_bytes
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.reads import fetch, needs, reads
from makeready.kernels.spec import DTYPE_BYTES

MIB = 2**20
BLOCK = 64 * MIB  # of random bytes, repeated
SIZE = 8 * 2**30  # bytes that single steps are timed with, where the file has them

# Loader settings by name: constants of cuda_pages and cuda_weights, and the interpreter's switch interval.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as they are": {},
    "as they are, again": {},
    "mapped with the device only": {"early": False},
    "never mapped ahead of pinning": {"early": False, "mapped": False},
    "let go window by window": {"PINNED": 0},
    "windows of 64 MiB": {"WINDOW": 64 * MIB},
    "windows of 1 GiB": {"WINDOW": 1024 * MIB},
    "mapped by 4 MiB": {"MAPPED": 4 * MIB},
    "mapped by 64 MiB": {"MAPPED": 64 * MIB},
    "4 threads": {"threads": 4},
    "8 threads": {"threads": 8},
    "16 threads": {"threads": 16},
    "interpreter switches after 0.5 ms": {"switch": 0.0005},
    "through pinned buffers": {"pinned": False},
    "through pinned buffers of 4 MiB, 16 threads": {"pinned": False, "CHUNK": 4 * MIB, "threads": 16},
}


def write_weights(plan: Plan, folder: Path) -> int:
    """A checkpoint of random bytes that ``plan`` accepts; returns its bytes."""
    shapes = {source: need.shape for source, need in needs(w.param for w in plan.weights).items()}
    dtype = plan.options.weight_dtype
    name = next(stored for stored, ours in DTYPES.items() if ours == dtype)
    header, end = {}, 0
    for source, shape in sorted(shapes.items()):
        begin, end = end, end + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        header[source] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).integers(0, 256, BLOCK - 4096 - 6, np.uint8).tobytes()  # odd to pages
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(plan.config)))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(block)):
            file.write(block[: end - begin])
    return end


def check_weights(executable: CudaExecutable, checkpoint: Checkpoint) -> int:
    """Hold the first and the last rows of plain parameters' boxes against the file; returns how many there are."""
    driver, checked = executable._driver, 0
    for weight in executable.plan.weights:
        param = weight.param
        size, shape = DTYPE_BYTES[param.spec.dtype], param.spec.at({})
        for box in (box for o in param.operands if param.derived is None for box in reads(o)):
            if box.number or checkpoint.tensors[box.source].dtype != param.spec.dtype:
                continue
            (first, stop), offset = box.place[0], box.offset(shape)
            for row in (box.within(0, first, first + 1), box.within(0, stop - 1, stop)):
                if row is None or offset is None:
                    continue
                expected = np.ascontiguousarray(fetch(checkpoint, row)).view(np.uint8).reshape(-1)
                found = np.empty(expected.size, np.uint8)
                place = executable._regions.weights + weight.offset + size * (row.offset(shape) or 0)
                driver.to_host(found.ctypes.data, place, found.size, executable._stream)
                driver.synchronize(executable._stream)
                assert np.array_equal(found, expected), f"a row of {box.source} did not arrive"
                checked += 1
    return checked


def timed(run: Callable[[], Any]) -> float:
    """Seconds that ``run`` takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_threads(count: int, parts: list[Any], run: Callable[[Any], None], start: Callable[[], Any]) -> float:
    """Seconds that ``count`` threads take to ``run`` all parts; each calls ``start`` first, untimed."""
    ready, left = threading.Barrier(count + 1), list(reversed(parts))

    def work() -> None:
        start()
        ready.wait()
        while True:
            try:
                part = left.pop()
            except IndexError:
                return
            run(part)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    return timed(lambda: [thread.join() for thread in threads])


@contextmanager
def mapping(path: Path) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """A fresh mapping of a file: bytes, and (address, bytes) of windows of 256 MiB."""
    file = np.memmap(path, np.uint8, mode="r")
    nbytes = min(SIZE, len(file) // (256 * MIB) * (256 * MIB)) or len(file) // 4096 * 4096
    start, step = file.ctypes.data, min(256 * MIB, nbytes)
    yield nbytes, [(start + at, step) for at in range(0, nbytes, step)]
    del file


def single_steps(driver: Driver, path: Path, note: Callable[[str], None]) -> dict[str, float]:
    """GB/s of each step alone, by name; the driver's context is current."""
    device = driver.open(0)
    made: dict[str, float] = {}

    def keep(name: str, nbytes: int, seconds: float) -> None:
        made[name] = nbytes / seconds / 1e9
        note(f"{name}: {made[name]:.1f} GB/s")

    for count in (1, 4, 12):
        with mapping(path) as (nbytes, windows):
            seconds = in_threads(count, windows, lambda w: cuda_pages.map_pages(*w), lambda: None)
            keep(f"map, {count} threads", nbytes, seconds)
            if count == 12:
                keep(
                    "map what is mapped, 1 thread",
                    nbytes,
                    timed(lambda w=windows: _each(cuda_pages.map_pages, w)),
                )
    for count, ahead in ((1, False), (12, False), (1, True), (12, True)):
        with mapping(path) as (nbytes, windows):
            if ahead:
                in_threads(12, windows, lambda w: cuda_pages.map_pages(*w), lambda: None)
            seconds = in_threads(count, windows, lambda w: driver.register(*w), lambda: driver.use(device))
            keep(f"pin {'mapped' if ahead else 'unmapped'} pages, {count} threads", nbytes, seconds)
            if ahead:
                keep(f"copy pinned pages, {count} streams", nbytes, _copy(driver, device, windows, count))
            seconds = in_threads(
                count, windows, lambda w: driver.unregister(w[0]), lambda: driver.use(device)
            )
            keep(f"let go, {count} threads", nbytes, seconds)
    for chunk, count in ((4, 8), (4, 16), (8, 12), (8, 16), (32, 12)):
        if chunk * MIB > path.stat().st_size:
            continue
        nbytes, seconds = _staged(driver, device, path, chunk * MIB, count)
        keep(f"read into pinned buffers of {chunk} MiB, {count} threads", nbytes, seconds)
    driver.release(device)
    return made


def _each(run: Callable[..., None], windows: list[tuple[int, int]]) -> None:
    for window in windows:
        run(*window)


def _copy(driver: Driver, device: Any, windows: list[tuple[int, int]], streams: int) -> float:
    """Seconds to copy pinned windows to the device, each thread in a stream of its own."""
    target, local = driver.allocate(windows[0][1]), threading.local()

    def begin() -> None:
        driver.use(device)
        local.stream = driver.stream()

    def copy(window: tuple[int, int]) -> None:
        driver.to_device(target, *window, local.stream)
        driver.synchronize(local.stream)

    seconds = in_threads(streams, windows, copy, begin)
    driver.free(target)
    return seconds


def _staged(driver: Driver, device: Any, path: Path, chunk: int, count: int) -> tuple[int, float]:
    """Bytes and seconds of reading the file into two pinned buffers a thread and copying them from there."""
    nbytes = min(SIZE, path.stat().st_size) // chunk * chunk
    target, file, local = driver.allocate(chunk), os.open(path, os.O_RDONLY), threading.local()
    held: list[int] = []

    def begin() -> None:
        driver.use(device)
        local.stream, local.turn = driver.stream(), 0
        local.buffers = [(driver.allocate_host(chunk), driver.event()) for _ in range(2)]
        held.extend(address for address, _ in local.buffers)

    def copy(offset: int) -> None:
        local.turn ^= 1
        address, event = local.buffers[local.turn]
        driver.wait(event)
        buffer: Any = host_bytes(address, chunk)
        os.preadv(file, [buffer], offset)
        driver.to_device(target, address, chunk, local.stream)
        driver.record(event, local.stream)

    seconds = in_threads(count, list(range(0, nbytes, chunk)), copy, begin)
    driver.cu.cuCtxSynchronize()
    for address in held:
        driver.free_host(address)
    driver.free(target)
    os.close(file)
    return nbytes, seconds


def load_once(plan: Plan, folder: Path, setting: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of one load under a setting, and of letting the files go behind it."""
    changes: list[Any] = [
        mock.patch.object(cuda_pages if hasattr(cuda_pages, name) else cuda_weights, name, value)
        for name, value in setting.items()
        if name.isupper()
    ]
    if not setting.get("mapped", True):
        changes.append(mock.patch.object(cuda_pages, "map_pages", return_value=None))
    if not setting.get("early", True):
        changes.append(mock.patch.object(cuda_weights, "map_pages", return_value=None))
    if "threads" in setting:
        changes.append(mock.patch.object(cuda_weights, "MOST_THREADS", setting["threads"]))
    if not setting.get("pinned", True):
        changes.append(mock.patch.object(cuda_pages.Pins, "copy", return_value=False))
    before = sys.getswitchinterval()
    sys.setswitchinterval(setting.get("switch", before))
    for change in changes:
        change.start()
    try:
        checkpoint = open_checkpoint(folder)
        begin = time.perf_counter()
        executable = CudaExecutable(plan, checkpoint)
        loaded = time.perf_counter()
        executable._upload.close()
        let_go = time.perf_counter()
        made = {**executable.startup, "load": loaded - begin, "let go": let_go - loaded}
        if not setting:
            made["checked"] = check_weights(executable, checkpoint)
        executable.close()
    finally:
        for change in changes:
            change.stop()
        sys.setswitchinterval(before)
    del executable, checkpoint
    gc.collect()  # unmaps the file
    return made


def first_token(plan_folder: Path, weights: Path) -> float:
    """Seconds of a process that runs scripts/generate.py for one token: start, load, token, end."""
    with tempfile.TemporaryDirectory() as temporary:
        rows, out = Path(temporary) / "in.jsonl", Path(temporary) / "out.jsonl"
        rows.write_text(
            json.dumps({"token_ids": [1, 2, 3, 4], "max_new_tokens": 1, "ignore_eos": True}) + "\n"
        )
        command = [sys.executable, str(ROOT / "scripts" / "generate.py"), f"plan={plan_folder}"]
        command += [f"checkpoint={weights}", f"prompts={rows}", f"output={out}"]
        seconds = timed(lambda: children.run(command).check_returncode())
        assert "token_ids" in out.read_text(), out.read_text()
    return seconds


def measure(plan_folder: Path, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Check and measure everything.

    Args:
        plan_folder: a plan for this machine's GPU.
        folder: where weights are written; as many bytes as the plan's checkpoint has.
    """
    seconds = min(timed(lambda: artifact.load(plan_folder)) for _ in range(3))
    plan = artifact.load(plan_folder)
    note("writing weights")
    write_weights(plan, folder)
    checked = load_once(plan, folder, {}).pop("checked")
    driver = Driver()
    driver.initialise()
    steps = single_steps(driver, folder / "model.safetensors", note)
    loads = {}
    for name, setting in SETTINGS.items():
        note(name)
        loads[name] = load_once(plan, folder, setting)
    return {
        "bytes": sum(weight.nbytes for weight in plan.weights),
        "checked": checked,
        "plan": seconds,
        "steps": steps,
        "loads": loads,
        "first_token": [first_token(plan_folder, folder) for _ in range(4)],
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """Single steps in GB/s, a line a setting in seconds, and whole processes."""
    lines = [
        f"plan read in {found['plan']:.3f} s; {found['checked']:.0f} rows of parameters are what the file holds"
    ]
    for name, rate in found["steps"].items():
        lines.append(f"  {name:<52}{rate:8.1f} GB/s  {2**30 / rate / 1e6:7.1f} ms a GiB")
    phases = ("context", "memory", "buffers", "graphs", "weights", "load", "let go")
    lines.append(f"{'whole loads':<46}{'GB/s':>6}" + "".join(f"{name:>9}" for name in phases) + "   (s)")
    for name, made in found["loads"].items():
        rate = found["bytes"] / made["weights"] / 1e9
        lines.append(f"{name:<46}{rate:6.1f}" + "".join(f"{made[phase]:9.3f}" for phase in phases))
    tokens = " ".join(f"{seconds:.2f}" for seconds in found["first_token"])
    return [*lines, f"generate.py, process start to end with one token: {tokens} s"]
