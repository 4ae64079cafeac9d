"""Suites of single kernels without a GPU: what they launch is cross-compiled, tables are of known figures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from benchmarks.gpu import (
    attention,
    attention_batches,
    attention_mla,
    gemm,
    gemm_fp8,
    launcher,
    moe,
    ops,
    quantize_fp8,
    rates,
    sample,
    shapes,
    small_ops,
)
from scripts_in_process import script

from makeready.engine.entrypoints import bench_options
from makeready.graphs.plan.devices import DEVICES
from makeready.graphs.planner.cuda.aot import Kernel, compile_kernel, kernel_of
from makeready.kernels.attention import paged
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.device import Candidate, OpCall

Calls = Iterable[tuple[OpCall, Sequence[Candidate]]]
EVERY = gemm_fp8.KINDS, gemm_fp8.MATRICES
SUITES: dict[str, Callable[[], Calls]] = {
    "gemm": lambda: gemm.calls(sweep=False),
    "gemm_sweep": lambda: gemm.calls(sweep=True),
    "gemm_fp8": lambda: gemm_fp8.calls(gemm_fp8.wanted(*map(list, EVERY), sweep=False)),
    "gemm_fp8_sweep": lambda: gemm_fp8.calls(gemm_fp8.wanted(*map(list, EVERY), sweep=True)),
    "attention": lambda: attention.calls(attention.PARTS, sweep=False),
    "attention_sweep": lambda: attention.calls(attention.PARTS, sweep=True),
    "small_ops": lambda: ops.calls(small_ops.cases("meta", small_ops.TOKENS)),
    "quantize_fp8": lambda: ops.calls(quantize_fp8.cases("meta")),
    "sample": lambda: ops.calls(sample.cases("meta", [1, 64])),
    "moe": moe.calls,
}


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.slow
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
    assert attention.PARTS == bench_options.ATTENTION_PARTS


def test_parts_of_attention_are_all_of_it_once():
    def run(parts: Iterable[str]) -> list[OpCall]:
        return [call for call, _ in attention.calls(tuple(parts), sweep=False)]

    alone = [run([part]) for part in attention.PARTS]
    assert all(alone)
    assert sum(map(len, alone)) == len(run(attention.PARTS))
    ops = [{call.op for call in calls} for calls in alone]
    assert not any(a & b for a, b in itertools.combinations(ops, 2))


def test_copies_rotate_through_more_than_l2():
    assert shapes.copies(1e6, over=150e6, most=16) == 16
    assert shapes.copies(40e6, over=150e6, most=16) * 40e6 >= 150e6
    assert shapes.copies(1e9, over=150e6) == 2


def test_floors_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "present", lambda: rates.of_device(DEVICES["h100"]))
    product = gemm.Product("qkv", 16, 6144, 4096)
    assert product.floor == pytest.approx((6144 * 4096 + 16 * 4096 + 16 * 6144) * 2 / 3e12)
    assert gemm.Product("qkv", 8192, 6144, 4096).floor == pytest.approx(2 * 8192 * 6144 * 4096 / 779e12)
    (decode, *_) = attention_batches.batches(sweep=False)
    assert decode.label == "bf16 1 x (1, 1024)"
    assert decode.floor == pytest.approx((2 * 2 * 8 * 128 * 1024 + 2 * 2 * 4096) / 3e12)
    prompt = attention_batches.Batch(paged.extend_attention, [(3, 5)], attention_batches.B16)
    assert isinstance(paged.extend_attention, Contract)
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
    fp8 = {"scales": "rows", "matrix": "o", "tokens": 4, "floor": 1e-6, "torch": None, "ways": ways}
    wrong, _, found = gemm_fp8.table([fp8])
    assert wrong == "WRONG rows o 4 b is off by 5.0e-01"
    assert found.split()[:4] == ["rows", "o", "4", "a"]
    assert found.split()[-4:] == ["1.0", "b", "2.0", "a"]
    batch = {"rows": "r", "nbytes": 3e6, "operations": 4e6, "floor": 1e-6, "sdpa": 5e-6, "backend": "flash",
             "seconds": {"a": 2e-6, "wgmma": 1e-6}}  # fmt: skip
    found = attention.table([batch])[1].split()
    assert found == ["r", "a", "2.0", "0.50", "1.50", "2", "5.0", "flash", "2.0", "1.0", "wgmma"]


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
        (["suite=[gemm_fp8]", "gemm_fp8.scales=[tensor]"], "must list some of rows, groups, integers"),
        (["suite=[gemm_fp8_sweep]", "gemm_fp8.matrices=[]"], "must list some of qkv, o, gate_up, down"),
        (["suite=[attention]", "attention.parts=[mla]"], "must list some of decode, extend, write, latent"),
        (["suite=[attention_sweep]", "attention.parts=[write]"], "no cases but decode and extend"),
        (["suite=[gemm]", "gemm_fp8.scales=[rows]"], "it is for gemm_fp8, gemm_fp8_sweep"),
        (["suite=[gemm]", "load_steps.weights=x"], "it is for load_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, reason, capsys):
    assert script("bench")(*options) == 2
    assert reason in capsys.readouterr().err


class OnTheCpu(TorchFunctionMode):
    """What asks for the device ``cuda`` gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {})}
        if func is torch.Tensor.cuda:
            return args[0].clone()
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **kwargs)


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Suites run from end to end: references instead of kernels, each call timed at a microsecond."""

    def run(way: Candidate, call: OpCall, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        contract = CONTRACTS[call.op]
        made = contract.reference(*(tensors.get(o.name) for o in contract.inputs), **call.attrs)
        results = (made,) if len(contract.outputs) == 1 else (made or ())
        return {**tensors, **{o.name: v for o, v in zip(contract.outputs, results, strict=True)}}

    def check(contract, emit, tensors, attrs) -> None:
        call = launcher.op_call(contract, tensors, attrs)
        assert emit(call)
        run(emit(call)[0], call, tensors)

    def time_each(run_one, sets, reps=20) -> float:
        run_one(sets[0])
        return 1e-6

    def time(way, call, sets, reps=20) -> float:
        names = set(call.tensors) - {o.name for o in CONTRACTS[call.op].outputs}
        assert all(names <= s.keys() for s in sets)
        return 1e-6

    def time_chains(chains, reps=20) -> float:
        assert all(set(call.tensors) <= tensors.keys() for chain in chains for _, call, tensors in chain)
        return 1e-6

    for function in (run, check, time_each, time, time_chains):
        monkeypatch.setattr(launcher, function.__name__, function)
    monkeypatch.setattr(rates, "present", lambda: rates.of_device(DEVICES["h200"]))
    monkeypatch.setattr(launcher, "fits", lambda way, call: True)
    monkeypatch.setattr(launcher, "prepare", lambda work: [None for call, ways in work for _ in ways])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = {
        "MATRICES": {"down": (64, 256), "o": (128, 128)},
        "ROWS": (3, 16),
        "SWEPT": (16,),
        "ROTATED": 1.0,
    }
    few = {
        gemm: {**small, "HEAD": {"lm_head": (96, 64)}, "LOGITS": (2,)},
        gemm_fp8: small,
        attention: {"ROTATED": 1.0, "TOKENS": (5,)},
        attention_batches: {
            "DECODES": ([(1, 40)] * 3, [(1, 9), (1, 70)]), "DECODES_F8": ([(1, 30)] * 2,),
            "EXTENDS": ([(20, 20)] * 2, [(3, 9), (0, 0)]), "EXTENDS_F8": ([(5, 7)],),
            "EXTENDS_OTHER": ([(4, 6)],), "CHECKED": [(2, 7), (1, 30)],
        },
        attention_mla: {
            "ROTATED": 1.0, "DECODES": ((2, 2, 1, 70),), "PROMPTS": ((2, 2, 5, 0),), "PREFIXES": ((2, 1, 3, 9),),
            "CHECKED": ((2, 1, 1, 5),),
        },
        small_ops: {"TOKENS": (3,), "VOCABULARY": 50},
        quantize_fp8: {"TOKENS": (3,), "CHECKED": 4, "MATRICES": ((256, 128),)},
        sample: {"VOCABULARY": 700, "ROWS": (2,)},
        moe: {"QWEN3": moe.Shape("tiny", 5, 2, 128, 128), "TOKENS": (3,)},
        ops: {"ROTATED": 1.0},
    }  # fmt: skip
    for module, constants in few.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    with OnTheCpu():
        yield


@pytest.mark.parametrize("suite", SUITES)
def test_suites_run_from_end_to_end(suite: str, rehearsal, capsys):
    options = ["gemm_fp8.matrices=[down]"] if suite.startswith("gemm_fp8") else []
    assert script("bench")(f"suite=[{suite}]", *options, "output=result.json") == 0
    result = json.loads(Path("result.json").read_text())
    assert result[suite]
    assert result["rates"]["bandwidth"] == 4.5e12
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    assert len(printed.splitlines()) >= 2
