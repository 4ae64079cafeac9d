"""Inputs of the ops of 4-bit floats: blocks and spans that are not full, scales over many orders of magnitude."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from case import NAN, Case, Random, in_columns
from moe_inputs import entries, used

from makeready.kernels.integers import pack_words, tiles
from makeready.kernels.nvfp4 import pairs


def mx_weights(random: Random, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """Words and scales of 2^-12 to 2^4; what fills spans up is anything."""
    scale = random.integers(17, outputs, -(-inputs // 32)) + 115
    return {
        "weight": pack_words(random.integers(16, outputs, -(-inputs // 128) * 128), 4),
        "weight_scale": tiles(scale.to(torch.uint8)),
    }


def nv_weights(random: Random, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """Words, all scales that there are, and a global scale for each output."""
    scale = random.integers(127, outputs, -(-inputs // 16)).to(torch.uint8)
    return {
        "weight": pack_words(random.integers(16, outputs, -(-inputs // 128) * 128), 4),
        "weight_scale": pairs(scale),
        "weight_global_scale": random.uniform(outputs) / 20000,
    }


WEIGHTS = {"mxfp4": mx_weights, "nvfp4": nv_weights}


def linear_mx(op: str) -> Iterator[Case]:
    shapes = [
        (3, 256, 70),
        (1, 32, 1),
        (17, 160, 64),
        (9, 320, 131),
        (5, 96, 33),
        (12, 1000, 200),
        (2, 7, 65),
    ]
    dtypes = [
        ("float32", None, ""),
        ("float32", "float32", ""),
        ("bfloat16", "bfloat16", ""),
        ("float16", None, "float32"),
    ]
    cases = itertools.product(shapes, dtypes, WEIGHTS)
    for seed, ((tokens, inputs, outputs), (act, bias, out), form) in enumerate(cases):
        random = Random(seed)
        operands = {"x": random.normal(tokens, inputs, dtype=act), **WEIGHTS[form](random, outputs, inputs)}
        if bias:
            operands["bias"] = random.normal(outputs, dtype=bias)
        attrs = {"out_dtype": out}
        yield Case(op, f"{form}-{tokens}x{inputs}x{outputs}-{act}-{bias}-{out}", operands, attrs)
        if not seed % 5:
            yield Case(op, "columns", operands | {"x": in_columns(operands["x"])}, attrs)


def quantize_mx(op: str) -> Iterator[Case]:
    shapes = [(70, 256), (1, 32), (3, 200), (130, 576), (5, 7)]
    for seed, ((outputs, inputs), dtype) in enumerate(
        itertools.product(shapes, ("float32", "bfloat16", "float16"))
    ):
        x = Random(seed).normal(outputs, inputs, dtype=dtype, scale=0.02)
        yield Case(op, f"{outputs}x{inputs}-{dtype}", {"x": x})
    yield Case(op, "awkward", {"x": awkward()})


def awkward() -> torch.Tensor:
    """``[5, 160]``: ties of both signs under the least, usual and largest scales, and what is zero or not finite."""
    x = torch.zeros(5, 160)
    ties = torch.arange(32) / 4.0
    for row, size in enumerate((2.0**-127, 2.0**-149 * 4, 1.0, 2.0**125)):
        x[row, :32], x[row, 32:64], x[row, 64:96] = ties * size, -ties * size, (ties / 2 - 7.75) * size
    x[4, 3], x[4, 40], x[4, 70], x[4, 100] = float("nan"), float("inf"), -float("inf"), -0.0
    x[4, 71:96] = 3e38
    return x


def dequantize_mx(op: str) -> Iterator[Case]:
    shapes, dtypes = ((70, 256), (1, 32), (131, 1000), (5, 7)), ("bfloat16", "float32", "float16")
    for seed, ((outputs, inputs), out, form) in enumerate(itertools.product(shapes, dtypes, WEIGHTS)):
        made = WEIGHTS[form](Random(seed), outputs, inputs)
        operands = {name.removeprefix("weight_"): tensor for name, tensor in made.items()}
        yield Case(op, f"{form}-{outputs}x{inputs}-{out}", operands, {"inputs": inputs, "out_dtype": out})


def grouped_linear_mx(op: str) -> Iterator[Case]:
    shapes = [(7, 8, 2, 128, 64), (1, 5, 1, 32, 128), (21, 12, 3, 160, 64), (40, 6, 3, 64, 192)]
    forms = (("float32", "mxfp4"), ("bfloat16", "mxfp4"), ("float32", "nvfp4"), ("bfloat16", "nvfp4"))
    for seed, ((tokens, experts, k, inputs, outputs), (act, form)) in enumerate(
        itertools.product(shapes, forms)
    ):
        for label, where, rows, top_k in entries(tokens, experts, k):
            random = Random(seed)
            x = random.normal(rows, inputs, dtype=act)
            x[used(where, rows, top_k) :] = NAN
            made = [WEIGHTS[form](random, outputs, inputs) for _ in range(experts)]
            stacked = {name: torch.stack([one[name] for one in made]) for name in made[0]}
            unused = where["start"][1:] == where["start"][:-1]
            unused[0] = False  # plans that are deterministic try the machine's products with the first one
            if form == "mxfp4":
                stacked["weight_scale"][unused] = 255  # NaN
            else:
                stacked["weight_global_scale"][unused] = NAN
            attrs = {"top_k": top_k, "out_dtype": ""}
            label = f"{form}-{tokens}x{experts}x{inputs}x{outputs}-{label}-{act}"
            yield Case(op, label, {"x": x, **stacked, **where}, attrs)


def repack_bytes(op: str) -> Iterator[Case]:
    for outputs, inputs in ((70, 256), (1, 32), (64, 160), (131, 2880)):
        q = Random(inputs).integers(256, outputs, inputs // 2).to(torch.uint8)
        yield Case(op, f"{outputs}x{inputs}", {"q": q}, {"inputs": inputs})
