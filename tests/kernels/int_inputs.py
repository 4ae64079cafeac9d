"""Inputs of the ops of weights of 4 and 8 bits: awkward sizes, every size of group, with and without zeros."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from case import NAN, Case, Random, in_columns
from moe_inputs import entries, used

from makeready.kernels.integers import pack_words, tiles

# Tokens, inputs, outputs, bits, group.
SIZES = [
    (3, 256, 70, 4, 128),
    (1, 32, 1, 4, 32),
    (17, 130, 64, 4, 130),
    (9, 320, 131, 4, 64),
    (5, 96, 33, 8, 32),
    (12, 576, 200, 4, 128),  # the last group is shorter
    (2, 200, 65, 8, 200),
    (7, 512, 48, 8, 128),
]


OFFSETS = [(3, 256, 70, 4, 32), (1, 96, 1, 8, 16), (17, 544, 131, 8, 32), (9, 200, 64, 4, 64)]


def offsets(random: Random, outputs: int, inputs: int, group: int) -> torch.Tensor:
    """Tiles of them, as large as weights are."""
    return tiles(random.normal(outputs, -(-inputs // group), dtype="float16"))


def int_weights(random: Random, outputs: int, inputs: int, bits: int, group: int, zeros: bool) -> dict:
    """Words, scales that differ by orders of magnitude, and zeros; what fills spans and tiles up must not count."""
    groups, whole = -(-inputs // group), -(-inputs // 128) * 128
    made = {
        "weight": pack_words(random.integers(2**bits, outputs, whole), bits),
        "weight_scale": tiles(random.normal(outputs, groups).exp().div(2**bits).half()),
    }
    if zeros:
        made["weight_zero"] = tiles(random.integers(2**bits, outputs, groups).to(torch.uint8))
    return made


def linear_int(op: str) -> Iterator[Case]:
    dtypes = [
        ("float32", None, ""),
        ("float32", "float32", ""),
        ("bfloat16", "bfloat16", ""),
        ("float16", None, "float32"),
    ]
    for seed, ((tokens, inputs, outputs, bits, group), (act, bias, out)) in enumerate(
        itertools.product(SIZES, dtypes)
    ):
        random = Random(seed)
        operands = {"x": random.normal(tokens, inputs, dtype=act)}
        operands |= int_weights(random, outputs, inputs, bits, group, zeros=seed % 3 > 0)
        if bias:
            operands["bias"] = random.normal(outputs, dtype=bias)
        attrs = {"bits": bits, "group": group, "out_dtype": out}
        yield Case(op, f"{tokens}x{inputs}x{outputs}-{bits}/{group}-{act}-{bias}-{out}", operands, attrs)
        if not seed % 5:
            yield Case(op, "columns", operands | {"x": in_columns(operands["x"])}, attrs)
    for seed, (tokens, inputs, outputs, bits, group) in enumerate(OFFSETS):
        random = Random(seed)
        operands = {"x": random.normal(tokens, inputs), "bias": random.normal(outputs)}
        operands |= int_weights(random, outputs, inputs, bits, group, zeros=False)
        operands |= {"weight_zero": offsets(random, outputs, inputs, group)}
        attrs = {"bits": bits, "group": group, "out_dtype": ""}
        yield Case(op, f"{tokens}x{inputs}x{outputs}-{bits}/{group}-offsets", operands, attrs)


def grouped_linear_int(op: str) -> Iterator[Case]:
    shapes = [
        (7, 8, 2, 128, 64, 4, 128),
        (1, 5, 1, 64, 128, 8, 32),
        (21, 12, 3, 160, 64, 4, 32),
        (40, 6, 3, 64, 192, 4, 64),
    ]
    for seed, ((tokens, experts, k, inputs, outputs, bits, group), act) in enumerate(
        itertools.product(shapes, ("float32", "bfloat16"))
    ):
        for label, where, rows, top_k in entries(tokens, experts, k):
            random = Random(seed)
            x = random.normal(rows, inputs, dtype=act)
            x[used(where, rows, top_k) :] = NAN
            made = [
                int_weights(random, outputs, inputs, bits, group, zeros=seed % 2 > 0) for _ in range(experts)
            ]
            stacked = {name: torch.stack([one[name] for one in made]) for name in made[0]}
            unused = where["start"][1:] == where["start"][:-1]
            unused[0] = False  # plans that are deterministic try the machine's products with the first one
            stacked["weight_scale"][unused] = NAN
            attrs = {"top_k": top_k, "bits": bits, "group": group, "out_dtype": ""}
            label = f"{tokens}x{experts}x{inputs}x{outputs}-{bits}/{group}-{label}-{act}"
            yield Case(op, label, {"x": x, **stacked, **where}, attrs)
            if group < 128:
                added = torch.stack([offsets(random, outputs, inputs, group) for _ in range(experts)])
                yield Case(op, f"{label}-offsets", {"x": x, **stacked, "weight_zero": added, **where}, attrs)


def embedding_int(op: str) -> Iterator[Case]:
    for seed, (_, inputs, outputs, bits, group) in enumerate(OFFSETS):
        random = Random(seed)
        operands = {"ids": random.integers(outputs, 5).int()}
        operands |= int_weights(random, outputs, inputs, bits, group, zeros=False)
        operands |= {"weight_zero": offsets(random, outputs, inputs, group)} if seed % 2 else {}
        attrs = {
            "bits": bits,
            "group": group,
            "width": inputs,
            "out_dtype": ("float32", "float16")[seed // 2],
        }
        yield Case(op, f"{outputs}x{inputs}-{bits}/{group}", operands, attrs)


def repack_rows(op: str) -> Iterator[Case]:
    for seed, ((_, inputs, outputs, bits, _), ordered) in enumerate(itertools.product(SIZES, (False, True))):
        random = Random(seed)
        q = random.words(outputs, -(-inputs * bits // 32))
        order = {"order": random.permutation(inputs).int()} if ordered else {}
        yield Case(
            op, f"{outputs}x{inputs}-{bits}-{ordered}", {"q": q, **order}, {"bits": bits, "inputs": inputs}
        )


def repack_awq(op: str) -> Iterator[Case]:
    for outputs, inputs in ((8, 32), (64, 128), (200, 320), (72, 1000)):
        yield Case(op, f"{outputs}x{inputs}", {"q": Random(inputs).words(outputs // 8, inputs)})


def repack_pairs(op: str) -> Iterator[Case]:
    for outputs, inputs in ((2, 32), (64, 128), (130, 320), (66, 1000)):
        q = torch.from_numpy(np.random.default_rng(inputs).integers(0, 256, (outputs // 2, inputs), np.uint8))
        yield Case(op, f"{outputs}x{inputs}", {"q": q})


def unpack_zeros(op: str) -> Iterator[Case]:
    for (outputs, groups), bits, plus in itertools.product(((8, 1), (64, 3), (200, 37)), (4, 8), (0, 1)):
        for awq in (False, True)[: 2 if bits == 4 else 1]:
            q = Random(groups).words(outputs * bits // 32, groups)
            attrs = {"bits": bits, "plus": plus, "awq": awq}
            yield Case(op, f"{outputs}x{groups}-{bits}+{plus}-{awq}", {"q": q}, attrs)


def tile_scales(op: str) -> Iterator[Case]:
    for outputs, groups in ((1, 1), (64, 3), (200, 37), (65, 96)):
        yield Case(
            op, f"{outputs}x{groups}", {"scale": Random(groups).normal(outputs, groups, dtype="float16")}
        )
        exponents = Random(groups).integers(256, outputs, groups).to(torch.uint8)
        yield Case(op, f"{outputs}x{groups}-bytes", {"scale": exponents})


def order_of_groups(op: str) -> Iterator[Case]:
    for inputs, group in ((32, 32), (320, 64), (1000, 128), (7, 1)):
        yield Case(op, f"{inputs}/{group}", {"group": (Random(inputs).permutation(inputs) // group).int()})
    yield Case(op, "sorted", {"group": torch.arange(96, dtype=torch.int32) // 32})


def quantize_int(op: str) -> Iterator[Case]:
    shapes = [(70, 256, 4, 128), (1, 128, 4, 128), (3, 200, 4, 128), (130, 576, 4, 128), (5, 96, 8, 32)]
    for seed, ((outputs, inputs, bits, group), dtype) in enumerate(
        itertools.product(shapes, ("float32", "bfloat16", "float16"))
    ):
        x = Random(seed).normal(outputs, inputs, dtype=dtype, scale=0.02)
        yield Case(op, f"{outputs}x{inputs}-{bits}/{group}-{dtype}", {"x": x}, {"bits": bits, "group": group})
    halves = torch.arange(-8.0, 8.0, 0.125)[None].expand(2, 128).contiguous()
    yield Case(op, "halves", {"x": halves * torch.tensor([[7.5 / 8], [0.0]])}, {"bits": 4, "group": 128})


def dequantize_int(op: str) -> Iterator[Case]:
    for seed, ((_, inputs, outputs, bits, group), out) in enumerate(
        itertools.product(SIZES, ("bfloat16", "float32", "float16"))
    ):
        random = Random(seed)
        made = int_weights(random, outputs, inputs, bits, group, zeros=seed % 3 > 0)
        operands = {name.removeprefix("weight_"): x for name, x in made.items()}
        if seed % 2:
            operands["order"] = random.permutation(inputs).int()
        attrs = {"bits": bits, "group": group, "inputs": inputs, "out_dtype": out}
        yield Case(op, f"{outputs}x{inputs}-{bits}/{group}-{out}", operands, attrs)


def gather_columns(op: str) -> Iterator[Case]:
    for tokens, inputs, dtype in itertools.product((1, 9), (7, 576), ("float32", "bfloat16", "float16")):
        random = Random(inputs)
        operands = {
            "x": random.normal(tokens, inputs, dtype=dtype),
            "order": random.permutation(inputs).int(),
        }
        yield Case(op, f"{tokens}x{inputs}-{dtype}", operands)
        yield Case(op, f"{tokens}x{inputs}-{dtype}-columns", operands | {"x": in_columns(operands["x"])})
