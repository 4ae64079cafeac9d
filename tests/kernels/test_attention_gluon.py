"""Extend attention in Gluon without a GPU: which keys its copies bring, machine code, and how it is launched.

There is no interpreter of Gluon; functions that it shares with Triton are interpreted in a process of their own.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from test_extend_tiling import call

from makeready.kernels.attention import extend_tiling
from makeready.kernels.attention.extend_items_triton import keys_of, run_at
from makeready.kernels.attention.extend_triton import extend_attention_cuda
from makeready.kernels.device import Candidate, Descriptor, DeviceLaunch, OpCall, Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted in its own process")
compiled = pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")
RUN, STEP = 64, 128


@triton.jit
def copies(pages, key, length, page, first, token, owned, PAGE: tl.constexpr):
    """Both copies of a step from ``key`` on, and what is said about the places of the step."""
    for run in tl.static_range(2):
        number, slot = run_at(pages, key + 64 * run, length, PAGE, 64)
        tl.store(page + run, number)
        tl.store(first + run, slot)
    place = tl.arange(0, 128)
    token_L, owned_L = keys_of(key, length, place, 64)
    tl.store(token + place, token_L)
    tl.store(owned + place, owned_L.to(tl.int32))


@compiled
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@interpreted
@pytest.mark.parametrize("page", [64, 128, 192])
def test_copies_bring_every_key_once_and_nothing_unwritten(page: int) -> None:
    """A copy brings zeros from outside its page, else the token of each slot."""
    table = torch.arange(100, 200, dtype=torch.int32)
    for length in (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 250, 256, 300, 384):
        for key in range(0, length, STEP):
            pages, first = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
            token, owned = torch.zeros(STEP, dtype=torch.int32), torch.zeros(STEP, dtype=torch.int32)
            copies[(1,)](table, key, length, pages, first, token, owned, PAGE=page)
            seen = []
            for place in range(STEP):
                run = place // RUN
                slot = int(first[run]) + place % RUN
                assert slot < page
                brought = (int(pages[run]) - 100) * page + slot if slot >= 0 else None
                assert brought is None or brought < length, "a slot that holds no token"
                if owned[place]:
                    assert brought == token[place]
                    seen.append(brought)
            assert seen == list(range(key, min(key + STEP, length)))


def _pipelined(of: OpCall) -> tuple[OpCall, Candidate]:
    tensors = {**of.tensors, "y": of.tensors["q"]}
    tensors |= {n: Tensor((of.rows,), "int32", 1, 256) for n in ("query_start", "query_len", "context_len")}
    full = replace(of, tensors=tensors)
    (found,) = (c for c in extend_attention_cuda(full) if c.name.startswith("gluon"))
    return full, found


@compiled
@pytest.mark.parametrize(
    ("heads", "page", "rows"), [((32, 8, 128), 64, 256), ((64, 1, 128), 192, 1), ((3, 3, 64), 128, 70)]
)
def test_machine_code_computes_weights_while_products_run(
    heads: tuple[int, int, int], page: int, rows: int
) -> None:
    aot = pytest.importorskip("makeready.graphs.cuda.aot")
    full, candidate = _pipelined(call(512, rows, page=page, heads=heads))
    (launch,) = candidate.launches
    made = aot.compile_launch(launch, full)
    assert made.spill_bytes <= launch.local_bytes
    assert made.shared <= full.shared_bytes
    assert (made.warps, made.registers) == (12, 168)  # 168 x 384 registers: one block a multiprocessor
    assert made.waits
    _holds_its_maps(launch, made)
    products = 8 + heads[2] // 16
    steps = [kinds for kinds in map(_kinds, _loops(aot, made.cubin)) if kinds.count("H") == products]
    steps = [kinds for kinds in steps if kinds.count("e") == 66]
    assert len(steps) == 4  # with masks and without, of both halves
    for kinds in steps:
        # Both products, the wait for the first, exponentials of 64 weights and two maxima, and only then the
        # wait for the second.
        assert re.fullmatch("H+1e+0", kinds), kinds


def _kinds(body: list[str]) -> str:
    """A letter an instruction that matters: products, waits for all but one and for all, exponentials."""
    names = {"HGMMA": "H", "DEPBAR.LE gsb0, 0x1": "1", "DEPBAR.LE gsb0, 0x0": "0", "MUFU.EX2": "e"}
    return "".join(letter for x in body for name, letter in names.items() if name in x)


def _loops(aot: object, cubin: bytes) -> list[list[str]]:
    """Instructions between the target of each branch backwards and the branch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.cubin"
        path.write_bytes(cubin)
        tool = aot._CUOBJDUMP  # type: ignore[attr-defined]
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    loops = []
    for end, what in found:
        target = re.search(r"BRA 0x([0-9a-f]+)", what)
        if target and int(target[1], 16) < end:
            loops.append([x for at, x in found if int(target[1], 16) <= at <= end])
    return loops


def _holds_its_maps(launch: DeviceLaunch, made: object) -> None:
    """Boxes are those of the descriptors, 128 bytes wide and swizzled so, as shared memory is laid out."""
    for name, layout in made.maps.items():  # type: ignore[attr-defined]
        argument = launch.arguments[name]
        assert isinstance(argument, Descriptor)
        assert layout.block == argument.block
        assert layout.block[-1] * 2 == 128
        assert layout.swizzle == 3  # CU_TENSOR_MAP_SWIZZLE_128B


def test_offered_only_where_it_is_right_for_all_batches() -> None:
    def offered(of: OpCall) -> bool:
        return any(way.gluon for way in extend_tiling.ways(of))

    of = call(512, 8)
    assert offered(of)
    assert not offered(replace(of, features=of.features - {"wgmma"}))
    assert not offered(replace(of, invariant=True))
    assert not offered(call(512, 8, window=100))
    assert not offered(call(512, 8, page=32))
    assert not offered(call(512, 8, cache="float8_e4m3fn"))
    assert not offered(call(512, 8, heads=(24, 8, 128)))  # three heads a group do not divide a tile
    assert not offered(call(512, 8, heads=(8, 1, 256)))
    assert not offered(call(512, 300))


@compiled
def test_scratch_holds_all_parts() -> None:
    full, candidate = _pipelined(call(8192, 256, longest=40_000))
    (way,) = (way for way in extend_tiling.ways(full) if way.gluon)
    slots = way.slots(full)
    assert candidate.zeroed >= slots * 2 * 4
    assert candidate.scratch >= candidate.zeroed + slots * 128 * (128 + 2) * 4
