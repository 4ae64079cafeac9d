"""Triton kernels of the small ops without a GPU: interpreted against the references, and cross-compiled.

Triton decides at import whether kernels are interpreted, so the interpreted tests run in a process of their
own, which ``test_interpreted`` starts.
"""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from benchmarks.gpu.sample_rows import MARGIN, margin, requests
from inputs import BUILDERS

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import OpCall, Pointer, Scalar, Scratch, Tensor
from makeready.kernels.spec import TensorSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

aot = None if INTERPRETED else pytest.importorskip("makeready.graphs.planner.cuda.aot")
if INTERPRETED:
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        """Loop bounds that are tensors of one element, which numpy 2.4 no longer takes for numbers."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_index
if INTERPRETED or aot:
    for module in (
        "norm",
        "elementwise",
        "embedding",
        "rope",
        "sample.sample",
        "sample.logprobs",
        "step.locate",
        "step.draft",
        "step.draft_chain",
        "step.draft_forced",
        "step.hidden",
        "step.draft_tree",
        "step.accept_tree",
        "step.move_entries",
    ):
        importlib.import_module(f"makeready.kernels.{module}_triton")


STEPS = ("locate", "find_pages", "draft_ngram", "accept_drafts", "count_drafts", "next_draft", "pack_drafts")
STEPS += ("force_drafts", "place_before", "hidden_write", "hidden_read", "spread_logits")
STEPS += ("plant_tree", "place_level", "grow_tree", "exclude", "take_parents", "pack_tree", "accept_tree")
STEPS += ("order_results", "place_moves", "move_entries", "move_states")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def op_call(name, operands, attrs, **options):
    """The call of contract ``name`` on CPU tensors (None: absent)."""
    contract = CONTRACTS[name]
    attrs = {**contract.attrs, **attrs}
    tensors = {k: v for k, v in operands.items() if v is not None}
    specs = {k: TensorSpec(tuple(v.shape), _name(v.dtype)) for k, v in tensors.items()}
    results = contract.infer(specs, attrs)
    dims = contract.dims(specs, attrs)
    made = {
        k: Tensor(tuple(v.shape), _name(v.dtype), v.stride(0), math.gcd(v.data_ptr(), 16))
        for k, v in tensors.items()
    }
    made |= {k: Tensor(s.shape, s.dtype, math.prod(map(int, s.shape[1:])), 16) for k, s in results.items()}
    rows = dims.get("R", dims.get("T", 1))
    return OpCall(name, made, attrs, dims, rows, dims.get("T", rows), **options)


def launch_interpreted(candidate, call, operands):
    """Run the launches on CPU tensors; gives the results by name."""
    memory = dict(operands)
    for name, tensor in call.tensors.items():
        if name not in memory:
            dtype = getattr(torch, tensor.dtype)
            poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
            memory[name] = torch.full(tensor.shape, poison, dtype=dtype)
    scratch = torch.full((candidate.scratch + 8,), 0xFF, dtype=torch.uint8)
    for launch in candidate.launches:
        module, _, function = launch.function.partition(":")
        arguments = {}
        for key, value in launch.arguments.items():
            if isinstance(value, Pointer):
                arguments[key] = memory[value.operand]
            elif isinstance(value, Scratch):
                room = scratch[value.offset :]
                size = getattr(torch, value.dtype).itemsize
                arguments[key] = room[: len(room) // size * size].view(getattr(torch, value.dtype))
            else:
                assert isinstance(value, Scalar)
                arguments[key] = value.value
        getattr(importlib.import_module(module), function)[launch.grid](**arguments, **launch.constants)
    return memory


def check_interpreted(name, operands, multiprocessors=132, **attrs):
    contract = CONTRACTS[name]
    attrs = {**contract.attrs, **attrs}
    copies = {k: v.clone() for k, v in operands.items()}
    want = contract.reference(**copies, **attrs)
    want = (want,) if len(contract.outputs) == 1 else want or ()
    call = op_call(name, operands, attrs, multiprocessors=multiprocessors)
    for kernel in registry.cuda_kernels(name):
        for candidate in kernel.candidates(call):
            own = {k: v.clone() if k in contract.writes else v for k, v in operands.items()}
            got = launch_interpreted(candidate, call, own)
            for output, value in zip(contract.outputs, want, strict=True):
                kind = _name(value.dtype)
                if contract.tolerance.exact or not value.is_floating_point():
                    assert got[output.name].equal(value), output.name
                    continue
                error = (got[output.name].double() - value.double()).norm() / value.double().norm()
                assert error <= getattr(contract.tolerance, kind), (output.name, error)
            for written in contract.writes:
                assert got[written].equal(copies[written]), written


@compiled
@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


SHAPES = [(1, 64), (3, 131), (8, 576), (5, 4096)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def columns_of(x, margin=16):
    """``x`` as columns of a wider tensor."""
    wide = torch.full((x.shape[0], x.shape[1] + margin), float("nan"), dtype=x.dtype)
    view = wide[:, margin // 2 : margin // 2 + x.shape[1]]
    return view.copy_(x)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=_name)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norms(tokens, width, dtype):
    x, weight = columns_of(random(tokens, width, dtype=dtype)), random(width, seed=1)
    check_interpreted("rms_norm", {"x": x, "weight": weight}, eps=1e-5)
    residual = random(tokens, width, dtype=dtype, seed=2)
    check_interpreted("add_rms_norm", {"x": x, "residual": residual, "weight": weight}, eps=1e-5)
    check_interpreted("rms_norm", {"x": x, "weight": weight}, eps=1e-5, offset=1.0)
    check_interpreted("add_rms_norm", {"x": x, "residual": residual, "weight": weight}, eps=1e-5, offset=1.0)


@interpreted
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 32, 128), (7, 3, 64), (43, 9, 80)])
def test_head_norms(tokens, heads, head_dim):
    x = columns_of(random(tokens, heads * head_dim))
    operands = {"x": x, "weight": random(head_dim, seed=1)}
    attrs = {"eps": 1e-6, "heads": heads, "head_dim": head_dim}
    check_interpreted("head_rms_norm", operands, multiprocessors=1, **attrs)
    check_interpreted("head_rms_norm", operands, multiprocessors=1, offset=1.0, **attrs)


@interpreted
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (70, 300)])
def test_pointwise(tokens, width):
    x, y = columns_of(random(tokens, width)), random(tokens, width, seed=1)
    check_interpreted("add", {"x": x, "y": y}, multiprocessors=1)
    check_interpreted("multiply", {"x": y, "y": x})
    check_interpreted("concatenate", {"x": x, "y": y}, multiprocessors=1)
    check_interpreted("concatenate", {"x": y, "y": columns_of(random(tokens, 2 * width))})
    check_interpreted("silu", {"x": x})
    gate_up = columns_of(random(tokens, 2 * width, dtype=torch.float16))
    check_interpreted("silu_mul", {"gate_up": gate_up}, multiprocessors=1)
    check_interpreted("gelu_tanh", {"x": x})
    check_interpreted("gelu_tanh_mul", {"gate_up": gate_up}, multiprocessors=1)
    check_interpreted("scale", {"x": x}, by=25.25)
    check_interpreted("scale_columns", {"x": x, "scale": random(width, seed=3)}, multiprocessors=1)
    for gate in (random(tokens, 1, seed=2), columns_of(random(tokens, 1, seed=2))):
        check_interpreted("sigmoid_gate", {"x": x, "gate": gate}, multiprocessors=1)
    for whole in (width, width + 1, -(-width // 128) * 128, width + 300):
        check_interpreted("pad_columns", {"x": x}, width=whole)
        check_interpreted("pad_columns", {"x": gate_up}, width=width + whole, multiprocessors=1)


@interpreted
def test_gathers():
    start = torch.tensor([0, 2, 5, 0], dtype=torch.int32)
    length = torch.tensor([2, 3, 1, 0], dtype=torch.int32)
    operands = {"x": columns_of(random(6, 131)), "query_start": start, "query_len": length}
    check_interpreted("gather_last", operands)
    ids = torch.tensor([4, 0, 9, 9, 3], dtype=torch.int32)
    for width in (64, 3000):
        weight = random(10, width, dtype=torch.float16)
        check_interpreted("embedding", {"ids": ids, "weight": weight}, out_dtype="float32")
        check_interpreted("embedding", {"ids": ids, "weight": weight})
    check_interpreted("rope_rows", {"positions": ids, "table": random(12, 80)})


@interpreted
@pytest.mark.parametrize("op", STEPS)
def test_steps_find_their_places(op):
    for case in BUILDERS[op](op):
        check_interpreted(op, case.operands, **case.attrs)


@interpreted
@pytest.mark.parametrize(("heads", "head_dim", "rotary"), [(32, 128, 128), (3, 64, 64), (5, 80, 32)])
def test_rope(heads, head_dim, rotary):
    rows = torch.randn(7, rotary, generator=torch.Generator().manual_seed(3))
    x = columns_of(random(7, heads * head_dim))
    check_interpreted("rope", {"x": x, "rows": rows}, heads=heads, head_dim=head_dim)


DYNAMIC = {"rotary_dim": 96, "theta": 10000.0, "original_context": 4096}


@interpreted
@pytest.mark.parametrize(
    ("op", "attrs"), [("rope_rows_dynamic", DYNAMIC | {"factor": 4.0}), ("rope_rows_stepped", DYNAMIC)]
)
def test_rope_rows_of_growing_bases(op, attrs):
    operands = {
        "positions": torch.tensor([0, 1, 100, 5000, 9000, 32000, 7, 4095, 4096, 30000], dtype=torch.int32),
        "token_slot": torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 5, 6], dtype=torch.int32),
        "prompt_len": torch.tensor([1, 9000, 3, 4096, 4097, 8192, 16385], dtype=torch.int32),
    }
    call = op_call(op, operands, attrs)
    want = CONTRACTS[op].reference(**operands, **attrs)
    for kernel in registry.cuda_kernels(op):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, operands)["rows"]
            # A last-bit difference of a frequency turns a pair by position * 2**-23.
            margin = 2e-7 * (8 + operands["positions"].unsqueeze(1))
            assert ((got - want).abs() <= margin).all()


@interpreted
def test_logn_rope_rows():
    positions = torch.tensor([0, 2046, 2047, 2048, 5000, 32000, 7], dtype=torch.int32)
    operands = {"rows": random(7, 80), "positions": positions}
    check_interpreted("rope_rows_logn", operands, original_context=2048)


@interpreted
@pytest.mark.parametrize(("rows", "vocabulary", "spread"), [(24, 131, 2.5), (12, 4200, 0.5)])
def test_sample(rows, vocabulary, spread):
    operands = requests(rows, vocabulary, spread=spread)
    call = op_call("sample", operands, {})
    want_history = operands["history"].clone()
    want = CONTRACTS["sample"].reference(**{**operands, "history": want_history})
    clear = [r for r in range(rows) if margin(operands, r) > MARGIN]
    assert len(clear) > rows * 0.8
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, {**operands, "history": operands["history"].clone()})
            differ = [r for r in clear if got["tokens"][r] != want[r]]
            assert not differ, (differ, got["tokens"][differ], want[differ])
            assert (got["tokens"][rows:] == 0).all()
            slots = operands["row_slot"][clear].long()
            assert got["history"][slots].equal(want_history[slots])


@interpreted
@pytest.mark.parametrize("vocabulary", [131, 2100])
def test_branches_are_sampled_as_what_they_are_of(vocabulary):
    """The last tokens of each row come by its branch, those of the history behind it are others' of the slot."""
    rows, deep = 20, 5
    operands = requests(rows, vocabulary)
    want = CONTRACTS["sample"].reference(**{**operands, "history": operands["history"].clone()})
    history, count = operands["history"].clone(), len(operands["row_slot"])
    path, path_len = torch.full((count, deep), 7, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    for r in range(rows):
        slot, length = int(operands["row_slot"][r]), int(operands["context_len"][r])
        path_len[r] = own = min(r % (deep + 1), length - 1)
        path[r, :own] = history[slot, length - own : length]
        history[slot, length - own :] = 1
    branches = operands | {"history": history, "path": path, "path_len": path_len}
    call, clear = op_call("sample", branches, {}), [r for r in range(rows) if margin(operands, r) > MARGIN]
    assert CONTRACTS["sample"].reference(**{**branches, "history": history.clone()}).equal(want)
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            own = {**branches, "history": history.clone()}
            got = launch_interpreted(candidate, call, own)
            assert got["tokens"][clear].equal(want[clear])
            assert own["history"].equal(history)


@interpreted
@pytest.mark.parametrize("vocabulary", [131, 2100])
def test_a_slot_has_masks_of_several_places(vocabulary):
    rows = 12
    operands = requests(rows, vocabulary, greedy=True)
    words, slots = -(-vocabulary // 32), len(operands["masked"])
    masks = torch.randint(-(2**31), 2**31 - 1, (slots, 3, words)).int()
    masks[..., 0] |= 1  # a token is left
    operands["masked"][:], operands["allowed"] = 1, masks.flatten(1)
    own = {**operands, "history": operands["history"].clone()}
    want = CONTRACTS["sample"].reference(**own)
    assert len({int(place) % 3 for place in operands["context_len"][:rows]}) == 3
    call = op_call("sample", operands, {})
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, {**operands, "history": operands["history"].clone()})
            assert got["tokens"].equal(want)


@interpreted
@pytest.mark.parametrize("asked", [1, 4, 7, 10])
def test_rows_of_one_slot_see_the_history_as_it_was(asked):
    """As drafts are sampled behind: every row at the place behind the one before it, written by none but it."""
    rows = 6
    operands = requests(24, 331)
    slot, first = int(operands["row_slot"][asked]), 200
    operands["logits"], operands["row_slot"] = operands["logits"][:rows], torch.full((rows,), slot).int()
    operands["context_len"] = torch.arange(first, first + rows, dtype=torch.int32)
    operands["prompt_len"][slot] = first - 3
    want = []
    for r in range(rows):
        alone = {name: operands[name][r : r + 1] for name in ("logits", "row_slot", "context_len")}
        alone |= {"history": operands["history"].clone()}
        want.append(int(CONTRACTS["sample"].reference(**{**operands, **alone})))
    history = operands["history"].clone()
    history[slot, first : first + rows] = torch.tensor(want, dtype=torch.int32)
    clear = [r for r in range(rows) if margin(operands, r) > MARGIN]
    assert len(clear) >= rows - 1
    made = {"history": operands["history"].clone()}
    assert CONTRACTS["sample"].reference(**{**operands, **made}).tolist() == want
    assert made["history"].equal(history)
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(op_call("sample", operands, {})):
            own = {**operands, "history": operands["history"].clone()}
            got = launch_interpreted(candidate, op_call("sample", operands, {}), own)
            assert [int(got["tokens"][r]) for r in clear] == [want[r] for r in clear]
            assert all(own["history"][slot, first + r] == want[r] for r in clear)
            assert own["history"][:, :first].equal(history[:, :first])


@interpreted
@pytest.mark.parametrize("vocabulary", [131, 4200])
@pytest.mark.parametrize("greedy", [True, False])
def test_sample_refuses_rows_that_are_not_finite(vocabulary, greedy):
    """One number among finite ones, of either sign, in the first chunk or the last; every other row as before."""
    rows, nan, inf = 24, math.nan, math.inf
    operands = requests(rows, vocabulary, greedy=greedy)
    sound = operands["logits"].clone()
    for row, value in enumerate([nan, -nan, inf, nan, -nan, inf]):
        operands["logits"][4 * row, [0, vocabulary - 1][row % 2]] = value
    operands["logits"][22] = -inf
    operands["bias_ids"][operands["row_slot"][22].long()] = -1
    operands["masked"][operands["row_slot"][:24].long()] = 0  # a mask may hide what is not finite
    broken = [0, 4, 8, 12, 16, 20, 22]
    left = [r for r in range(rows) if r not in broken]
    want_history = operands["history"].clone()
    want = CONTRACTS["sample"].reference(**{**operands, "history": want_history})
    clear = [r for r in left if margin({**operands, "logits": sound}, r) > MARGIN]
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(op_call("sample", operands, {})):
            history = operands["history"].clone()
            got = launch_interpreted(
                candidate, op_call("sample", operands, {}), {**operands, "history": history}
            )
            assert got["tokens"][broken].tolist() == [-1] * len(broken)
            assert got["tokens"][clear].equal(want[clear])
            assert (got["tokens"][left] >= 0).all()
            assert (got["tokens"][rows:] == 0).all()
            slots = operands["row_slot"][[*broken, *clear]].long()
            assert got["history"][slots].equal(want_history[slots])


@interpreted
@pytest.mark.parametrize(("vocabulary", "most"), [(7, 20), (131, 3), (9000, 20)])
def test_token_logprobs(vocabulary, most):
    rows = 6
    logits = (random(rows, vocabulary) * 8).round() / 2  # many equals
    logits[1] = -60.0
    logits[1, 5] = 40.0  # a probability of 1
    logits[2, 2:4] = -math.inf
    operands = {
        "logits": columns_of(logits),
        "tokens": torch.tensor([0, 5, 1, 6, 2, 0], dtype=torch.int32),
        "row_slot": torch.tensor([3, 0, 2, 1, 4, 7], dtype=torch.int32),
        "top_logprobs": torch.tensor([20, -1, 5, 0, 20, 0, 0, -1], dtype=torch.int32),
    }
    check_interpreted("token_logprobs", operands, max_top=most)


@interpreted
def test_a_token_that_could_not_be_sampled_has_no_logprob():
    operands = {
        "logits": torch.zeros(2, 4),
        "tokens": torch.tensor([-1, 3], dtype=torch.int32),
        "row_slot": torch.tensor([0, 1], dtype=torch.int32),
        "top_logprobs": torch.tensor([0, 0, -1], dtype=torch.int32),
    }
    call = op_call("token_logprobs", operands, {"max_top": 2})
    for kernel in registry.cuda_kernels("token_logprobs"):
        for candidate in kernel.candidates(call):
            got = launch_interpreted(candidate, call, operands)["logprob"]
            assert got[0].isnan()
            assert got[1] == pytest.approx(-math.log(4))


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def _qwen3_calls(tokens):
    """Calls at the shapes of Qwen3-8B: op, operands, attributes."""
    ints = {"dtype": torch.int32}
    x, weight = _empty(tokens, 4096), _empty(4096)
    yield "rms_norm", {"x": x, "weight": weight}, {"eps": 1e-6}
    yield "add_rms_norm", {"x": x, "residual": x, "weight": weight}, {"eps": 1e-6}
    yield "silu_mul", {"gate_up": _empty(tokens, 24576)}, {}
    yield "gelu_tanh_mul", {"gate_up": _empty(tokens, 24576)}, {}
    yield "gelu_tanh", {"x": x}, {}
    yield "scale", {"x": x}, {"by": 25.25}
    yield "scale_columns", {"x": x, "scale": _empty(4096, dtype=torch.float32)}, {}
    yield "sigmoid_gate", {"x": x, "gate": _empty(tokens, 1, dtype=torch.float32)}, {}
    yield "rms_norm", {"x": x, "weight": weight}, {"eps": 1e-6, "offset": 1.0}
    yield "embedding", {"ids": _empty(tokens, **ints), "weight": _empty(1000, 4096)}, {}
    table = _empty(1000, 128, dtype=torch.float32)
    yield "rope_rows", {"positions": _empty(tokens, **ints), "table": table}, {}
    rows = {"x": x, "rows": _empty(tokens, 128, dtype=torch.float32)}
    yield "rope", rows, {"heads": 32, "head_dim": 128}


def _compile(name, operands, attrs):
    attrs = {**CONTRACTS[name].attrs, **attrs}
    call = op_call(name, operands, attrs, features=frozenset({"pdl"}))
    for kernel in registry.cuda_kernels(name):
        for candidate in kernel.candidates(call):
            for launch in candidate.launches:
                made = aot.compile_launch(launch, call)
                assert made.spill_bytes <= launch.local_bytes
                assert made.waits
                yield made


@compiled
@pytest.mark.parametrize("tokens", [1, pytest.param(8192, marks=pytest.mark.slow)])
def test_cross_compiles_with_wide_accesses(tokens):
    for name, operands, attrs in _qwen3_calls(tokens):
        for made in _compile(name, operands, attrs):
            assert re.search(r"ld\.global\S*\.v4", made.ptx), name
            assert re.search(r"st\.global\S*\.v4", made.ptx), name


@compiled
@pytest.mark.slow
def test_cross_compiles_sampling():
    operands = {k: v.contiguous() for k, v in requests(2, 151936).items()}
    chunks, _ = _compile("sample", operands, {})
    assert re.search(r"ld\.global\S*\.v4", chunks.ptx)
    assert chunks.registers <= 80  # 6 blocks a multiprocessor, which is what reading at full rate takes
    slots = {
        "tokens": operands["row_slot"],
        "row_slot": operands["row_slot"],
        "top_logprobs": operands["top_k"],
    }
    list(_compile("token_logprobs", {"logits": operands["logits"], **slots}, {"max_top": 20}))
    ints = torch.zeros(9, dtype=torch.int32)
    for op in STEPS:
        case = next(iter(BUILDERS[op](op)))
        list(_compile(op, case.operands, case.attrs))
    scaling = {"rotary_dim": 128, "theta": 1e4, "factor": 4.0, "original_context": 4096}
    places = {"positions": ints, "token_slot": ints, "prompt_len": ints}
    list(_compile("rope_rows_dynamic", places, scaling))
    del scaling["factor"]
    list(_compile("rope_rows_stepped", places, scaling))
    rows = {"rows": _empty(9, 128, dtype=torch.float32), "positions": ints}
    list(_compile("rope_rows_logn", rows, {"original_context": 8192}))
