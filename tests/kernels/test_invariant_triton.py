"""Attention of deterministic plans on GPUs, interpreted: a token gets the same bits in every step.

Interpreted functions need a process of their own; see test_attention_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from attention_interpreted import compiled, emit, interpret, interpreted, numpy_2_4, op_call
from case import int32

from makeready.kernels import registry
from makeready.kernels.attention.mla import mla_extend_attention
from makeready.kernels.attention.paged import extend_attention
from makeready.kernels.contract import Contract

assert isinstance(extend_attention, Contract)
assert isinstance(mla_extend_attention, Contract)
assert numpy_2_4  # a fixture for all tests here


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.fixture(autouse=True)
def places_of_a_product_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a GPU's matrix instructions; NumPy's fp32 product sums the rows of a matrix in different orders."""
    from triton.runtime import interpreter

    product = np.matmul

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return product(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(interpreter.np, "matmul", matmul)


HEADS, KV_HEADS, HEAD_DIM, PAGE, LENGTH = 4, 2, 32, 16, 110
CHUNKS = ((0, LENGTH), (0, 1), (0, 40), (33, 34), (63, 66), (70, 109), (109, 110))


def attend(invariant: bool, window: int, chunks: tuple[tuple[int, int], ...]) -> list[list[torch.Tensor]]:
    """Attention of tokens ``begin : end`` of one sequence, as rows of one step, by candidate: of deterministic
    ones a wide and a narrow tile.
    """
    g = torch.Generator().manual_seed(0)
    pages = -(-LENGTH // PAGE)
    caches = torch.randn(2, pages + 1, PAGE, KV_HEADS, HEAD_DIM, generator=g).half()
    q = torch.randn(LENGTH, HEADS * HEAD_DIM, generator=g).half()
    counts = [end - begin for begin, end in chunks]
    tensors = {
        "q": torch.cat([q[begin:end] for begin, end in chunks]),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": int32([list(range(1, pages + 1))] * len(chunks)),
        "query_start": int32([sum(counts[:r]) for r in range(len(counts))]),
        "query_len": int32(counts),
        "context_len": int32([end for _, end in chunks]),
    }
    attrs = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "scale": 0.2, "window": window}
    call = replace(op_call(extend_attention, tensors, attrs, ""), invariant=invariant, most_rows=4)
    ways = emit(extend_attention, call)
    made = [interpret(candidate, call, tensors)["y"] for candidate in (ways[1:3] if invariant else ways[:1])]
    assert made
    return [list(y.split(counts)) for y in made]


@interpreted
@pytest.mark.parametrize("window", [0, 37])
def test_a_token_gets_the_same_bits_in_every_step(window: int) -> None:
    wholes = [whole for (whole,) in attend(True, window, ((0, LENGTH),))]
    for chunks in (CHUNKS[1:4], CHUNKS[4:]):
        for whole, made in zip(wholes, attend(True, window, chunks), strict=True):
            for (begin, end), y in zip(chunks, made, strict=True):
                assert torch.equal(y, whole[begin:end]), f"tokens {begin} to {end}"


@interpreted
def test_ordinary_attention_does_not() -> None:
    """What is tested here can be seen in the interpreter."""
    ((whole,), *_) = attend(False, 0, ((0, LENGTH),))
    (made, *_) = attend(False, 0, CHUNKS[1:])
    parts = zip(CHUNKS[1:], made, strict=True)
    assert not all(torch.equal(y, whole[begin:end]) for (begin, end), y in parts)


def attend_to_latents(chunks: tuple[tuple[int, int], ...]) -> list[list[torch.Tensor]]:
    """As :func:`attend`, of latents, by ways of deterministic plans."""
    registry.discover("cuda")
    heads, rank, rope = 3, 32, 16
    g = torch.Generator().manual_seed(0)
    pages = -(-LENGTH // PAGE)
    q = torch.randn(LENGTH, heads * (rank + rope), generator=g).half()
    counts = [end - begin for begin, end in chunks]
    tensors = {
        "cache": torch.randn(pages + 1, PAGE, rank + rope, generator=g).half(),
        "q": torch.cat([q[begin:end] for begin, end in chunks]),
        "page_table": int32([list(range(1, pages + 1))] * len(chunks)),
        "query_start": int32([sum(counts[:r]) for r in range(len(counts))]),
        "query_len": int32(counts),
        "context_len": int32([end for _, end in chunks]),
    }
    attrs = {"heads": heads, "rank": rank, "rope": rope, "scale": 0.2, "own": True}
    call = replace(op_call(mla_extend_attention, tensors, attrs, ""), invariant=True, most_rows=4)
    (kernel,) = (k for k in registry.cuda_kernels("mla_extend_attention") if k.name == "latents")
    made = [
        interpret(way, call, tensors) for way in sorted(kernel.candidates(call), key=lambda way: way.name)
    ]
    return [list(torch.cat((x["y"].float(), x["log_sum"]), dim=1).split(counts)) for x in made]


@interpreted
def test_a_token_gets_the_same_bits_from_latents() -> None:
    wholes = [whole for (whole,) in attend_to_latents(((0, LENGTH),))]
    assert wholes
    for chunks in (CHUNKS[1:4], CHUNKS[4:]):
        for whole, made in zip(wholes, attend_to_latents(chunks), strict=True):
            for (begin, end), y in zip(chunks, made, strict=True):
                assert torch.equal(y, whole[begin:end]), f"tokens {begin} to {end}"
