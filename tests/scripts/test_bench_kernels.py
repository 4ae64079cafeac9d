"""Suites of single kernels without a GPU: what they launch is cross-compiled, tables are of known figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from benchmarks.gpu import attention, gemm, gemm_fp8, ops, quantize_fp8, sample, shapes, small_ops
from scripts_in_process import script

from makeready.engine.entrypoints import bench_options
from makeready.graphs.cuda.aot import Kernel, compile_kernel, kernel_of
from makeready.kernels.device import Candidate, OpCall

Calls = Iterable[tuple[OpCall, Sequence[Candidate]]]
EVERY = gemm_fp8.KINDS, gemm_fp8.MATRICES
SUITES: dict[str, Callable[[], Calls]] = {
    "gemm": lambda: gemm.calls(sweep=False),
    "gemm_sweep": lambda: gemm.calls(sweep=True),
    "gemm_fp8": lambda: gemm_fp8.calls(gemm_fp8.wanted(*map(list, EVERY), sweep=False)),
    "gemm_fp8_sweep": lambda: gemm_fp8.calls(gemm_fp8.wanted(*map(list, EVERY), sweep=True)),
    "attention": lambda: attention.calls(sweep=False),
    "attention_sweep": lambda: attention.calls(sweep=True),
    "small_ops": lambda: ops.calls(small_ops.cases("meta")),
    "quantize_fp8": lambda: ops.calls(quantize_fp8.cases("meta")),
    "sample": lambda: ops.calls(sample.cases("meta", [1, 64])),
}


@pytest.mark.parametrize("name", SUITES)
def test_what_a_suite_launches_can_be_built(name: str):
    """Every call has ways, whose names differ, and each way's kernels say all that a compiler needs."""
    built: dict[str, Kernel] = {}
    for call, ways in SUITES[name]():
        assert ways, call
        assert len({way.name for way in ways}) == len(ways)
        for launch in (launch for way in ways for launch in way.launches):
            kernel = kernel_of(launch, call, 90)
            built.setdefault(kernel.function, kernel)
            assert all(0 < side < 2**31 for side in launch.grid)
    assert built
    for kernel in built.values():  # one of each function: other tests compile many
        compiled = compile_kernel(kernel)
        assert compiled.cubin
        assert compiled.shared <= 227 * 1024


def test_options_name_what_there_is():
    assert tuple(gemm_fp8.KINDS) == bench_options.FP8_SCALES
    assert tuple(shapes.MATRICES) == bench_options.FP8_MATRICES


def test_copies_rotate_through_more_than_l2():
    assert shapes.copies(1e6, over=150e6, most=16) == 16
    assert shapes.copies(40e6, over=150e6, most=16) * 40e6 >= 150e6
    assert shapes.copies(1e9, over=150e6) == 2


def test_floors_by_hand():
    product = gemm.Product("qkv", 16, 6144, 4096)
    assert product.floor == pytest.approx((6144 * 4096 + 16 * 4096 + 16 * 6144) * 2 / 3e12)
    assert gemm.Product("qkv", 8192, 6144, 4096).floor == pytest.approx(2 * 8192 * 6144 * 4096 / 779e12)
    (decode, *_) = attention.batches(sweep=False)
    assert decode.label == "bf16 1 x (1, 1024)"
    assert decode.floor == pytest.approx((2 * 2 * 8 * 128 * 1024 + 2 * 2 * 4096) / 3e12)
    prompt = attention.Batch(attention.batches(sweep=False)[-1].contract, [(3, 5)], attention.B16)
    assert prompt.operations == 4 * (3 + 4 + 5) * 4096  # queries see 3, 4 and 5 tokens


def test_tables_of_known_figures():
    line = {"op": "rms_norm", "size": 16, "way": "w", "seconds": 2e-6, "floor": 1e-6, "eager": 6e-6}
    assert ops.table([line])[1].split() == ["rms_norm", "16", "2.00", "0.50", "3.00", "w"]
    assert ops.table([{**line, "eager": None}])[1].split() == ["rms_norm", "16", "2.00", "0.50", "w"]
    row = {"matrix": "qkv", "tokens": 4, "floor": 1e-6, "cublas": 3e-6, "chosen": "a", "wrong": ["b"],
           "candidates": {"a": 2e-6, "b": 1e-6}}  # fmt: skip
    wrong, _, found = gemm.gemm_table([row])
    assert wrong == "WRONG qkv 4 b"
    assert found.split() == ["qkv", "4", "a", "2.0", "0.50", "3.0", "1.0", "b"]
    ways = {
        "a": {"seconds": 2e-6, "predicted": 2e-6, "error": 1e-3},
        "b": {"seconds": 1e-6, "predicted": 3e-6, "error": 0.5},
    }
    fp8 = {"scales": "rows", "matrix": "o", "tokens": 4, "floor": 1e-6, "scaled_mm": None, "ways": ways}
    wrong, _, found = gemm_fp8.table([fp8])
    assert wrong == "WRONG rows o 4 b is off by 5.0e-01"
    assert found.split()[:4] == ["rows", "o", "4", "a"]
    assert found.split()[-4:] == ["1.0", "b", "2.0", "a"]
    batch = {"rows": "r", "nbytes": 3e6, "operations": 4e6, "floor": 1e-6, "sdpa": 5e-6, "backend": "flash",
             "seconds": {"a": 2e-6, "b": 1e-6}}  # fmt: skip
    assert attention.table([batch])[1].split() == [
        "r",
        "a",
        "2.0",
        "0.50",
        "1.50",
        "2",
        "5.0",
        "flash",
        "1.0",
        "b",
    ]


@pytest.mark.parametrize("suite", [*SUITES, "load", "load_steps"])
def test_without_a_gpu_a_sentence_says_so(suite: str, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = ["plan=p"] if suite.startswith("load") else []
    options += ["checkpoint=dummy", "model=smollm2_135m"] if suite == "load" else []
    assert script("bench")(f"suite=[{suite}]", *options) in (1, 2)
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "GPU" in said
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["suite=[load_steps]"], "suite load_steps reads a compiled plan in every process; give plan=FOLDER"),
        (["suite=[gemm_fp8]", "gemm_fp8.scales=[tensor]"], "must list some of rows, groups"),
        (["suite=[gemm_fp8_sweep]", "gemm_fp8.matrices=[]"], "must list some of qkv, o, gate_up, down"),
        (["suite=[gemm]", "gemm_fp8.scales=[rows]"], "it is for gemm_fp8, gemm_fp8_sweep"),
        (["suite=[gemm]", "load_steps.weights=x"], "it is for load_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, reason, capsys):
    assert script("bench")(*options) == 2
    assert reason in capsys.readouterr().err
