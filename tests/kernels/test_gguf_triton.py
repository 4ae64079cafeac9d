"""GGUF's blocks on a GPU, without one: Triton kernels interpreted against the gguf library's numbers in float64, and
cross-compiled.

Triton decides at import whether kernels are interpreted, so the interpreted tests run in a process of their
own, which ``test_interpreted`` starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from case import Random
from gguf_inputs import random_blocks
from inputs import cases
from interpreted import INTERPRETED, aot, check_interpreted, op_call
from test_fp8_triton import launch
from test_int_triton import HOPPER, MATRICES, experts_call, product_call

from makeready.kernels import embedding_int_triton, gguf_groups_triton, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import linear_few_int_cuda, linear_int_triton
from makeready.kernels.gemm.linear_int_tiling import tilings
from makeready.kernels.gguf import row_bytes
from makeready.kernels.gguf_groups import GROUPS
from makeready.kernels.integers import by_output, unpack_words
from makeready.kernels.moe import experts_int_triton

assert embedding_int_triton
assert gguf_groups_triton

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

LOADS = ("repack_gguf", "scales_gguf", "offsets_gguf")
# Of weights, by the norm: what fp16 scales and offsets round. None where they are the file's.
ROUNDED = {"q4_1": 3e-4, "q5_1": 3e-4, "q4_k": 3e-4, "q5_k": 3e-4, "q6_k": 3e-4, "iq4_xs": 3e-4}


def numbers(kind: str, blocks: np.ndarray) -> torch.Tensor:
    """float64 ``[N, K]``, by the gguf library."""
    made = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(made).double()


def packed(kind: str, blocks: np.ndarray, inputs: int) -> dict[str, torch.Tensor]:
    """Operands of a product, by the references of what loads them."""
    form, raw = GROUPS[kind], torch.from_numpy(blocks.reshape(-1))
    of = {"kind": kind, "row": row_bytes(kind, inputs), "inputs": inputs}
    reference = {name: CONTRACTS[name].reference for name in LOADS}
    made = {
        "weight": reference["repack_gguf"](raw, **of, bits=form.bits),
        "weight_scale": reference["scales_gguf"](raw, **of, group=form.group),
    }
    if form.offsets:
        made["weight_zero"] = reference["offsets_gguf"](raw, **of, group=form.group)
    return made


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_loaded_stands_for_the_files_numbers(kind):
    form, outputs, inputs = GROUPS[kind], 131, 1280
    blocks = random_blocks(kind, outputs, inputs)
    made = packed(kind, blocks, inputs)

    def of_groups(name: str) -> torch.Tensor:
        return by_output(made[name], outputs).double().repeat_interleave(form.group, 1)

    got = (unpack_words(made["weight"], form.bits, inputs) - 2 ** (form.bits - 1)) * of_groups("weight_scale")
    got = got + of_groups("weight_zero") if form.offsets else got
    want = numbers(kind, blocks)
    if kind not in ROUNDED:
        assert torch.equal(got, want)
    else:
        assert 0 < (got - want).norm() / want.norm() <= ROUNDED[kind]


@compiled
@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@interpreted
@pytest.mark.parametrize("op", [*LOADS, "embedding_int"])
def test_weights_are_made_and_fetched(op):
    for case in cases(op):
        check_interpreted(op, case.operands, **case.attrs)


@interpreted
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 131, 512), (17, 70, 1280)])
def test_products(kind, tokens, outputs, inputs):
    """Every height of tiles, blocks so many that tiles are shared."""
    random, blocks = Random(tokens), random_blocks(kind, outputs, inputs)
    operands = {
        "x": random.normal(tokens, inputs, dtype="float16"),
        "bias": random.normal(outputs, dtype="float16"),
    }
    operands |= packed(kind, blocks, inputs)
    want = operands["x"].double() @ numbers(kind, blocks).T + operands["bias"].double()
    attrs = {"bits": GROUPS[kind].bits, "group": GROUPS[kind].group, "out_dtype": "float32"}
    tried = set()
    for multiprocessors in (2, 40):
        call = op_call(
            "linear_int", operands, attrs, features=frozenset({"wgmma"}), multiprocessors=multiprocessors
        )
        product = linear_int_triton.describe(call)
        for way in tilings(product):
            key = (way.t, way.n, way.sharers(product) > 1)
            if key not in tried:
                tried.add(key)
                got = launch(linear_int_triton.emit(call, way, product), call, operands)["y"]
                error = (got.double() - want).norm() / want.norm()
                assert error <= 1e-3, (way.name, error)
    assert any(shared for *_, shared in tried)


@interpreted
@pytest.mark.parametrize("op", ["grouped_linear_int", "grouped_silu_mul_int"])
def test_experts_with_offsets(op):
    for case in [case for case in cases(op) if "offsets" in case.label and "float32" in case.label][::4]:
        operands = {k: v.half() if k == "x" else v for k, v in case.operands.items()}
        attrs = case.attrs | {"out_dtype": "float32"}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in operands.items()}
        arguments = [wide.get(o.name) for o in CONTRACTS[op].inputs]
        want = CONTRACTS[op].reference(*arguments, **attrs | {"out_dtype": "float64"})
        call = op_call(op, operands, attrs, features=frozenset({"wgmma"}), multiprocessors=3)
        way = experts_int_triton.tilings(call)[0]
        got = launch(experts_int_triton.emit(call, way), call, operands)["y"]
        error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
        assert error <= 2e-3, (case.label, way.name, error)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("op", [*LOADS, "embedding_int"])
def test_what_makes_and_fetches_weights_cross_compiles(op):
    kinds = {case.attrs.get("kind", case.label): case for case in cases(op)}
    for case in kinds.values():
        call = op_call(op, case.operands, case.attrs, features=HOPPER)
        for kernel in registry.cuda_kernels(op):
            for candidate in kernel.candidates(call):
                made = aot.compile_launch(candidate.launches[0], call)
                assert made.spill_bytes == 0, case.label
                assert made.waits


def stored_call(kind, T, N, K, **options):
    """A product of :func:`test_int_triton.product_call` whose weights are a type's."""
    form = GROUPS[kind]
    dtype = "float16" if form.offsets else None
    return product_call(T, N, K, form.bits, form.group, zeros=dtype, **options)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_products_cross_compile_without_spilling(kind):
    """The planner's first choices; all ways where GGUF_COMPILE_ALL is set."""
    every, tried = os.environ.get("GGUF_COMPILE_ALL"), {}
    for T in (1, 16, 64, 256, 8192):
        for N, K in MATRICES.values() if every else [MATRICES["down"]]:
            call = stored_call(kind, T, N, K)
            product = linear_int_triton.describe(call)
            for way in tilings(product)[: None if every else 1]:
                key = (way.kind, way.t, way.n, way.warps, way.stages, way.sharers(product) > 1)
                tried.setdefault(key, (call, way, product))
    for call, way, product in tried.values():
        (node,) = linear_int_triton.emit(call, way, product).launches
        made = aot.compile_launch(node, call)
        assert made.spill_bytes == 0, (way.name, made.spill_bytes)
        assert made.waits
        assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, *\{", made.ptx), way.name
        assert way.a_sm * (made.shared + 1024) <= 233472, way.name
        assert way.a_sm * 32 * made.warps * -(-made.registers // 8) * 8 <= 65536, (way.name, made.registers)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q5_k", "q6_k"])
def test_products_of_few_tokens_compile_without_spilling(kind):
    """In CUDA C++: every way of one shape, and one whose results are fp32 as a head's."""
    for T in (1, 16, 24, 64):
        call = stored_call(kind, T, *MATRICES["down"])
        assert linear_few_int_cuda.applies(call)
        calls = [(call, way) for way in linear_few_int_cuda.ways(call)]
        head = stored_call(kind, T, *MATRICES["qkv"], out_dtype="float32")
        assert linear_few_int_cuda.applies(head) == (not GROUPS[kind].offsets)
        calls += [(head, linear_few_int_cuda.ways(head)[0])] if not GROUPS[kind].offsets else []
        for call, way in calls:
            (node,) = linear_few_int_cuda.candidate(call, way).launches
            made = aot.compile_launch(node, call)
            assert made.spill_bytes == 0, (way.name, made.spill_bytes)
            together = 2 if made.shared < 114 * 1024 else 1
            assert together * (made.shared + 1024) <= 233472, way.name
            assert together * 288 * -(-made.registers // 8) * 8 <= 65536, (way.name, made.registers)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_experts_cross_compile_without_spilling(kind):
    form = GROUPS[kind]
    zeros = "float16" if form.offsets else None
    for entries in (128, 4096):
        call = experts_call(entries, form.bits, form.group, zeros, silu=True)
        way = experts_int_triton.tilings(call)[0]
        made = aot.compile_launch(experts_int_triton.emit(call, way).launches[0], call)
        assert made.spill_bytes == 0, (way.name, made.spill_bytes)
        assert made.waits


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_ampere_has_them_too(kind):
    for T in (16, 200):
        call = stored_call(
            kind, T, 4096, 4096, features=frozenset(), shared_bytes=166912, multiprocessors=108
        )
        made = aot.compile_launch(linear_int_triton.candidates(call)[0].launches[0], call, 80)
        assert made.spill_bytes == 0
        assert "mma.sync" in made.ptx


@compiled
def test_groups_of_whole_spans_have_no_offsets():
    call = product_call(16, 256, 512, zeros="float16")
    assert not linear_int_triton.takes(call)
    assert linear_int_triton.takes(product_call(16, 256, 512, zeros="uint8"))
    assert linear_int_triton.takes(stored_call("q6_k", 16, 256, 512))
