"""Latent attention of a step's own tokens in CUDA C++, emulated on the CPU, against its reference in float64.

Tokens of no row are NaN, and so are columns of wider buffers and the latents' normed features, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.attention import mla
from makeready.kernels.attention.mla_own_cuda import candidate
from makeready.kernels.contract import Contract
from makeready.kernels.device import OpCall
from makeready.kernels.registry import cuda_kernels

pytestmark = [needs_compiler, pytest.mark.slow]
NAN = float("nan")
B16, F16 = torch.bfloat16, torch.float16
Case = tuple[dict[str, torch.Tensor], dict[str, float]]
assert isinstance(mla.mla_own_attention, Contract)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def make(rows: Sequence[int], heads: int = 2, dtype: torch.dtype = B16, *, steep: float = 1.0) -> Case:
    """A batch of rows with these numbers of tokens; padding is 2 tokens before, 1 between and 3 behind them."""
    random = torch.Generator().manual_seed(len(rows))
    starts, tokens = [], 2
    for r, count in enumerate(rows):
        tokens += r == 1
        starts.append(tokens)
        tokens += count
    tensors = {}
    for name, width, first in (("q", heads * 192, 0), ("kv", heads * 256, 0), ("latent", 576, 512)):
        x = torch.full((tokens + 3, width + 64), NAN)
        for start, count in zip(starts, rows, strict=True):
            x[start : start + count, first:width] = torch.randn(count, width - first, generator=random)
        tensors[name] = (x * (steep if name == "q" else 1)).to(dtype)[:, :width]
    tensors["query_start"] = torch.tensor(starts, dtype=torch.int32)
    tensors["query_len"] = torch.tensor(rows, dtype=torch.int32)
    sizes = {"nope": 128, "rope": 64, "value": 128, "rank": 512}
    return tensors, {"heads": heads, **sizes, "scale": 192**-0.5}


def emulate(emulator: Emulator, case: Case, *, seed: int = 0, grid: int = 2) -> dict[str, torch.Tensor]:
    tensors, attrs = case
    call = op_call("mla_own_attention", tensors, attrs, multiprocessors=grid)
    made = emulator.run(candidate(call), call, tensors, seed=seed)
    return {name: made[name] for name in ("y", "log_sum")}


def error(case: Case, made: dict[str, torch.Tensor]) -> float:
    """Of ``y``, relative, by Frobenius norms; NaN where it has one, infinite where logarithms are off."""
    assert isinstance(mla.mla_own_attention, Contract)
    tensors, attrs = case
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    want, logarithms = mla.mla_own_attention.reference(**wide, **attrs)
    if not torch.allclose(made["log_sum"].double(), logarithms.double(), atol=2e-2):
        return float("inf")
    return float((made["y"].double() - want).norm() / want.norm())


CASES = {
    "edges": make([1, 63, 0, 64, 65, 129], 1),
    "tiles": make([128, 127, 256]),
    "long": make([390, 3], 1),
    "float16": make([70, 1, 130], 1, F16),
    "steep": make([300, 9], 1, steep=20.0),
    "many rows": make([*([0] * 31), 2, *([0] * 5), 66], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulator: Emulator, name: str) -> None:
    case = CASES[name]
    allowed = 5e-3 if case[0]["q"].dtype == B16 else 1e-3
    assert error(case, emulate(emulator, case, seed=list(CASES).index(name))) < allowed


def test_order_and_number_of_blocks_do_not_matter(emulator: Emulator) -> None:
    """To the last bit: no tile is cut, and every launch leaves the counter for the next."""
    case = make([130, 0, 70], 1)
    ways = [emulate(emulator, case, seed=seed, grid=grid) for seed, grid in ((1, 1), (2, 3), (4, 2))]
    assert all(torch.equal(ways[0]["y"], other["y"]) for other in ways[1:])


def test_steps_without_a_row_give_zeros(emulator: Emulator) -> None:
    made = emulate(emulator, make([0, 0], 1))
    assert not made["y"].any()
    assert made["log_sum"].isneginf().all()


TALL = make([300, 70], 1)
FAULTS: dict[str, tuple[str, str]] = {
    "an mbarrier is not arrived at": (
        "      give_back(&bars.v.free[v.place()]);\n      v.next();\n      pack(p, s);",
        "      v.next();\n      pack(p, s);",
    ),
    "bytes are miscounted": ("runs * RUN * KEY * 2", "RUNS * RUN * KEY * 2"),
    "a wait for keys is missing": ('    wait_full(bars.k, k, "attend: k full");\n    my_turn', "    my_turn"),
    "values are copied over those in use": ('wait_free(bars.v, v, "feed: v free");\n', ""),
    "queries are copied over those in use": ('wait_free(bars.q, q, "feed: q free");\n', ""),
    "sums are not rescaled": ("o[j] *= shrink[(j >> 1) & 1]", "o[j] *= 1"),
    "the next token is seen": ("j <= position_a", "j <= position_a + 1"),
    "values of others stay": ("if (key + row < item.length) x", "if (true) x"),
    "rotated features of another token": ("maps.rope, full, RANK, first)", "maps.rope, full, RANK, first + 1)"),
    "the counter is left": ("*counter = 0;", ";"),
    "a turn is not passed on": ("next_turn();\n      wgmma_wait<1>();", "wgmma_wait<1>();"),
    "logarithms of another base": ("(base[h] + log2f(sum[h]))", "(base[h] + logf(sum[h]))"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    """A wrong line makes a wrong number, a NaN, a counter that is not zero, or a report of a deadlock."""
    before, after = FAULTS[fault]
    for path in (*nvrtc.FOLDER.glob("*.h"), nvrtc.FOLDER / "mla_own.cu"):
        text = path.read_text()
        if path.suffix == ".cu":
            assert text.count(before) == 1
            text = text.replace(before, after)
        (tmp_path / path.name).write_text(text)
    emulator = Emulator(tmp_path, tmp_path)

    def right(seed: int) -> bool:
        try:
            return error(TALL, emulate(emulator, TALL, seed=seed)) < 5e-3
        except (AssertionError, RuntimeError):
            return False

    assert not all(right(seed) for seed in (4, 5, 1004, 1005))


def _call(tokens: int, heads: int = 16, **changes: object) -> OpCall:
    tensors, attrs = make([1], heads)
    small = {
        name: torch.empty(tokens, x.shape[1], dtype=x.dtype, device="meta")
        for name, x in tensors.items()
        if x.dim() == 2
    }
    small |= {name: tensors[name].to("meta") for name in ("query_start", "query_len")}
    return op_call("mla_own_attention", small, attrs | changes)


@pytest.mark.parametrize(
    ("tokens", "measured"), [(1024, 19.2), (4096, 134.7), (8192, 519.3), (16384, 2154.3)]
)
def test_the_model_is_near_what_a_prototype_took(tokens: int, measured: float) -> None:
    """Microseconds of 16 heads on one H200; its matrix rate is the H100's by which others are scaled."""
    assert abs(1e6 * candidate(_call(tokens)).seconds / measured - 1) < 0.08


def test_what_it_does_not_do_is_others() -> None:
    (kernel,) = (k for k in cuda_kernels("mla_own_attention") if k.name == "wgmma")
    call = _call(300)
    assert kernel.candidates(call)
    assert not kernel.candidates(replace(call, invariant=True))
    assert not kernel.candidates(replace(call, features=frozenset({"tma", "pdl"})))
    for changes in ({"nope": 64}, {"value": 64}, {"rope": 32}, {"scale": -1.0}):
        assert not kernel.candidates(replace(call, attrs={**call.attrs, **changes}))
    assert not kernel.candidates(op_call("mla_own_attention", *make([3], 2, torch.float32)))
