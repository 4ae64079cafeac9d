"""Products with GGUF's blocks: every type by every set of instructions against the gguf package's own numbers."""

from __future__ import annotations

import os
import threading

import gguf
import numpy as np
import pytest
import torch
from gguf_inputs import random_blocks

from makeready.kernels import native
from makeready.kernels.gemm.linear_gguf_cpu import VARIANTS, Mapped, has, product
from makeready.kernels.gguf import KINDS, nbytes_of, rows_of, to_8_bits, widened
from makeready.kernels.gguf_dequantize import BLOCK_TYPES

pytestmark = pytest.mark.skipif(not native.available(), reason="the library was not compiled")
# Tokens, inputs, outputs: one of each, odd ones, half a pair of blocks, several panels of 32 outputs and 6 tokens.
SHAPES = [(1, 256, 1), (2, 1024, 31), (9, 512, 33), (14, 768, 70)]
SHORT = [(1, 32, 3), (7, 96, 32), (25, 160, 65)]


def numbers(kind: str, blocks: np.ndarray) -> np.ndarray:
    """float64, as the gguf package reads them."""
    return gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind.upper())).astype(np.float64)


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations as llama.cpp rounds them, but for the scale, which it keeps in fp16."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    q = np.round(groups / np.where(scale > 0, scale, np.float32(np.inf)))
    return (q.astype(np.float64) * scale.astype(np.float64)).reshape(x.shape)


def multiplied(x: torch.Tensor, places: list[np.ndarray], rows: str, bias=None, **how) -> torch.Tensor:
    outputs = sum(count for _, count in rows_of(rows))
    y = torch.full((len(x), outputs), float("nan"))
    call = product(x, Mapped(places), bias, y, rows, **how)
    assert call is not None
    call()
    return y


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_numbers_that_blocks_stand_for(kind, variant):
    if not has(variant):
        pytest.skip(f"this processor has no {variant}")
    for seed, (tokens, width, outputs) in enumerate(
        SHAPES + (SHORT if BLOCK_TYPES[kind].elements == 32 else [])
    ):
        blocks = random_blocks(kind, outputs, width, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, width, generator=generator) * torch.rand(tokens, 1, generator=generator) * 9
        bias = torch.randn(outputs, generator=generator) if seed % 2 else None
        wanted = rounded(x.numpy()) @ numbers(kind, blocks).T + (0 if bias is None else bias.double().numpy())
        made = multiplied(x, [blocks.reshape(-1)], f"{kind}*{outputs}", bias, variant=variant, threads=2)
        # A single sum may cancel: errors are measured against what was added up.
        added = np.abs(rounded(x.numpy())) @ np.abs(numbers(kind, blocks)).T
        assert (np.abs(made.numpy() - wanted) <= 3e-6 * added + 1e-6).all(), (tokens, width, outputs)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_gets_the_same_bits_in_every_batch(kind, variant):
    """Where the instructions are the same; the choice among them follows the number of tokens."""
    if not has(variant):
        pytest.skip(f"this processor has no {variant}")
    blocks = random_blocks(kind, 45, 512).reshape(-1)
    x = torch.randn(15, 512, generator=torch.Generator().manual_seed(3))
    whole = multiplied(x, [blocks], f"{kind}*45", variant=variant, threads=2)
    for first, stop in ((0, 1), (3, 5), (14, 15), (2, 9), (1, 14)):
        part = multiplied(x[first:stop], [blocks], f"{kind}*45", variant=variant, threads=1)
        assert torch.equal(part, whole[first:stop])


def test_parts_of_several_types_lie_anywhere():
    kinds = {"q5_0": 40, "q6_k": 33, "q8_0": 1}
    parts = [random_blocks(kind, count, 512, count).reshape(-1) for kind, count in kinds.items()]
    rows = "+".join(f"{kind}*{count}" for kind, count in kinds.items())
    x = torch.randn(10, 512, generator=torch.Generator().manual_seed(5))
    apart = [multiplied(x, [p], f"{k}*{n}") for p, (k, n) in zip(parts, kinds.items(), strict=True)]
    for places in (parts, [np.concatenate(parts)], [parts[0], np.concatenate(parts[1:])]):
        assert torch.equal(multiplied(x, places, rows), torch.cat(apart, 1))
    with pytest.raises(ValueError, match="several places"):
        multiplied(x, [parts[0][:100], parts[0][100:], *parts[1:]], rows)


@pytest.mark.parametrize("kind", KINDS)
def test_widened_blocks_are_the_packages_numbers(kind):
    blocks = random_blocks(kind, 5, 512)
    made = widened(torch.from_numpy(blocks.reshape(-1)), f"{kind}*5", 512)
    np.testing.assert_array_equal(made.numpy(), numbers(kind, blocks).astype(np.float32))


def test_activations_are_rounded_to_a_127th_of_the_largest_of_32():
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)) * 5
    x[2, 32:64] = 0
    np.testing.assert_array_equal(to_8_bits(x, torch.float64).numpy(), rounded(x.numpy()))
    steps = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    assert ((to_8_bits(x, torch.float32) - x).unflatten(1, (-1, 32)).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("rows", ["", "q4_1", "q4_1*0", "q4_1*-3", "q2_k*4", "q4_1*3+", "q4_1*99999999999"])
def test_what_rows_do_not_say_is_refused(rows):
    with pytest.raises(ValueError, match="do not say"):
        nbytes_of(rows, 256)


def test_loops_of_several_threads_at_once_do_not_meet():
    """Two threads of the interpreter multiply at the same time, each with helpers where the other has none."""
    blocks = random_blocks("q4_0", 4096, 512).reshape(-1)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    wanted = multiplied(x, [blocks], "q4_0*4096", threads=1)
    wrong = []

    def again() -> None:
        for _ in range(10):
            if not torch.equal(multiplied(x, [blocks], "q4_0*4096", threads=3), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    blocks = random_blocks("q4_0", 2048, 512).reshape(-1)
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(2))
    y = torch.zeros(32, 2048)
    call = product(x, Mapped([blocks]), None, y, "q4_0*2048", threads=2)
    assert call is not None
    call()
    wanted = y.numpy().copy()
    child = os.fork()
    if child == 0:
        y.zero_()
        call()
        os._exit(0 if (y.numpy() == wanted).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
