"""Projections of few tokens on the present GPU: every way of csrc/few.h beside the floor and Triton's choice.

Matrices of Qwen3-8B, Qwen3-30B-A3B and DeepSeek-V2-Lite, 16 bits, 8 with both kinds of scales, and weights alone of
4 and 8 bits, as GGUF's blocks, too. Weights rotate over enough copies that none is left in L2 when its turn comes
again, and every launch may start before the one ahead has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu import gemm_fp8, gemm_int4, launcher, rates
from benchmarks.gpu.shapes import SPARE, copies
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm import linear_few_cuda, linear_few_int_cuda
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_fp8_triton import linear_fp8_block_cuda, linear_fp8_cuda
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.gemm.linear_int_triton import linear_int_cuda
from makeready.kernels.gemm.linear_triton import linear_cuda

assert isinstance(linear, Contract)
assert isinstance(linear_int, Contract)

ROTATED = 300e6  # bytes of weights that calls rotate over
WRONG = 6e-3  # relative error from which a result is no rounding
# Outputs and inputs.
QWEN3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
QWEN3_30B = {"qkv30": (5120, 2048), "o30": (2048, 4096)}
V2_LITE = {"q_kv_a": (3648, 2048), "o_lite": (2048, 2048), "shared": (5632, 2048), "down_lite": (2048, 2816)}
# Of weights alone: bits, inputs of a group, whether there are offsets.
INTEGERS = {"int4": (4, 128, False), "w8a16": (8, 128, False), "q4_k": (4, 32, True), "q6_k": (8, 16, False)}
KINDS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "bf16": QWEN3_8B | V2_LITE,
    "rows": QWEN3_8B,
    "groups": QWEN3_30B,
    **dict.fromkeys(INTEGERS, QWEN3_8B),
}
_TRITON = {
    "bf16": linear_cuda,
    "rows": linear_fp8_cuda,
    "groups": linear_fp8_block_cuda,
    **dict.fromkeys(INTEGERS, linear_int_cuda),
}
_CONTRACTS = {
    "bf16": linear,
    "rows": gemm_fp8.contract_of("rows"),
    "groups": gemm_fp8.contract_of("groups"),
    **dict.fromkeys(INTEGERS, linear_int),
}
_BYTES = {
    "bf16": (2.0, 2.0),
    "rows": (1.0, 1.0),
    "groups": (1.0, 1.0),
    **{
        kind: (bits / 8 + (4 if offsets else 2) / group, 2.0)
        for kind, (bits, group, offsets) in INTEGERS.items()
    },
}  # weights, tokens

Tensors = dict[str, torch.Tensor]


def operands(kind: str, T: int, N: int, K: int, *, seed: int = 0, device: str = "cuda") -> Tensors:
    """Random operands whose activations are followed by rows that maps may reach; without memory on device meta."""
    if kind in INTEGERS:
        return {"x": gemm_int4.activations(T, K, device), **_integers(kind, N, K, device, seed)}
    if kind != "bf16":
        if device == "meta":
            return gemm_fp8.shapes(T, N, K, kind)
        return gemm_fp8.operands(T, N, K, kind, spare=True, seed=seed)
    x = torch.randn(T + SPARE, K, device=device, dtype=torch.bfloat16)[:T]
    return {"x": x, "weight": torch.randn(N, K, device=device, dtype=torch.bfloat16) * 0.02}


def _integers(kind: str, N: int, K: int, device: str, seed: int) -> Tensors:
    bits, group, offsets = INTEGERS[kind]
    generator = torch.Generator(device).manual_seed(seed) if device != "meta" else None
    tiled = (-(-N // 64), -(-K // group), 64)
    made = {
        "weight": torch.empty(N, -(-K // 128) * 8 * bits, dtype=torch.int16, device=device),
        "weight_scale": torch.empty(tiled, dtype=torch.float16, device=device),
    }
    if offsets:
        made["weight_zero"] = torch.empty(tiled, dtype=torch.float16, device=device)
    if generator is not None:
        made["weight"].random_(-(2**15), 2**15, generator=generator)
        made["weight_scale"].uniform_(0.032 / 2**bits, 0.096 / 2**bits, generator=generator)
        if offsets:
            made["weight_zero"].normal_(0, 0.005, generator=generator)
    return made


def call_of(kind: str, tensors: Tensors) -> OpCall:
    """The call, as a plan has it."""
    attrs: dict[str, Any] = {"out_dtype": "bfloat16"}
    if kind in INTEGERS:
        attrs = {"bits": INTEGERS[kind][0], "group": INTEGERS[kind][1]}
    if kind == "groups":
        attrs = {**attrs, "block": 128}
    return launcher.op_call(_CONTRACTS[kind], tensors, attrs, spare=True)


def cases(kinds: Sequence[str], tokens: Sequence[int]) -> Iterator[tuple[str, str, int, int, int]]:
    """Kind, matrix, its outputs and inputs, tokens."""
    for kind in kinds:
        for name, (N, K) in KINDS[kind].items():
            for T in tokens:
                yield kind, name, N, K, T


def ways_of(kind: str, call: OpCall) -> list[Candidate]:
    """Triton's first, then all of the kernel's own, the cheapest first by its model."""
    kernel = linear_few_int_cuda if kind in INTEGERS else linear_few_cuda
    own = [kernel.candidate(call, way) for way in kernel.ways(call)] if kernel.applies(call) else []
    return [_TRITON[kind](call)[0], *own]


def measure(note: Callable[[str], None], kinds: Sequence[str], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Of each product: floor, and of the ways tried seconds, seconds predicted and relative error."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def work() -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
        for kind, _, N, K, T in cases(kinds, tokens):
            call = call_of(kind, operands(kind, T, N, K, device="meta"))
            yield call, ways_of(kind, call)

    launcher.prepare(work())
    found: list[dict[str, Any]] = []
    held: list[Tensors] = []
    last = ""
    for kind, name, N, K, T in cases(kinds, tokens):
        if last != kind + name:
            note(f"{kind} {name}")
            held.clear()
            size = N * K * _BYTES[kind][0]
            held += [operands(kind, max(tokens), N, K, seed=i) for i in range(copies(size, over=ROTATED))]
            last = kind + name
        own = operands(kind, T, N, K)
        moving = {key: own[key] for key in ("x", "x_scale") if key in own}
        sets = [{**one, **moving} for one in held]
        call = call_of(kind, sets[0])
        of_weights, of_tokens = _BYTES[kind]
        nbytes = N * K * of_weights + T * K * of_tokens + 2 * T * N
        dtype = "float8_e4m3fn" if of_tokens == 1 else "bfloat16"
        found.append(
            {
                "kind": kind,
                "matrix": name,
                "tokens": T,
                "floor": rates.present().floor(nbytes, 2 * T * N * K, dtype),
                "ways": _time(kind, call, sets),
            }
        )
    return found


def _time(kind: str, call: OpCall, sets: Sequence[Tensors]) -> dict[str, dict[str, float]]:
    wide = {k: v if kind in INTEGERS and k != "x" else v.float() for k, v in sets[0].items()}
    want = _CONTRACTS[kind].reference(**wide, **{**call.attrs, "out_dtype": "float32"})
    made = {}
    for way in ways_of(kind, call):
        if launcher.fits(way, call):
            y = launcher.run(way, call, sets[0])["y"].float()
            made[way.name] = {
                "seconds": launcher.time(way, call, sets),
                "predicted": way.seconds,
                "error": ((y - want).norm() / want.norm()).item(),
            }
    return made


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every wrong result; a line a product: Triton's choice, the model's and the fastest ways, beside the floor."""
    lines = [
        f"WRONG {row['kind']} {row['matrix']} {row['tokens']} {name} is off by {way['error']:.1e}"
        for row in found
        for name, way in row["ways"].items()
        if not way["error"] < WRONG
    ]
    lines.append(
        "kind   matrix      T floor µs Triton µs  model's µs  floor/µs  predicted  fastest of its ways"
    )
    for row in found:
        (triton, *own), ways = list(row["ways"]), row["ways"]
        if not own:
            continue
        fastest = sorted(own, key=lambda name: ways[name]["seconds"])[:3]
        chosen = ways[own[0]]
        lines.append(
            f"{row['kind']:6} {row['matrix']:9} {row['tokens']:3} {1e6 * row['floor']:8.1f} "
            f"{1e6 * ways[triton]['seconds']:9.1f} {1e6 * chosen['seconds']:11.1f} "
            f"{row['floor'] / chosen['seconds']:9.2f} {1e6 * chosen['predicted']:10.1f}  "
            + "  ".join(f"{1e6 * ways[name]['seconds']:.1f} {name}" for name in fastest)
        )
    return lines
