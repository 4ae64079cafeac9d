"""Sampling and log-probabilities on a GPU against the CPU references on the same logits.

A row is left out where its closest decision lies within ``MARGIN``: exp and log may differ in
their last bit there.
"""

from __future__ import annotations

import importlib

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu.launcher import op_call, run  # noqa: E402
from benchmarks.gpu.sample_rows import MARGIN, margin, requests  # noqa: E402

from makeready.kernels import registry  # noqa: E402
from makeready.kernels.sample.logprobs import token_logprobs  # noqa: E402
from makeready.kernels.sample.sample import sample  # noqa: E402

for module in ("sample", "logprobs"):
    importlib.import_module(f"makeready.kernels.sample.{module}_triton")


def device_runs(op):
    """Tokens and history from every candidate, each run twice with equal results."""
    on_device = {k: v.cuda() for k, v in op.items()}
    call = op_call(sample, on_device)
    for kernel in registry.cuda_kernels("sample"):
        for candidate in kernel.candidates(call):
            first, second = (
                run(candidate, call, {**on_device, "history": on_device["history"].clone()}) for _ in range(2)
            )
            assert first["tokens"].equal(second["tokens"])
            assert first["history"].equal(second["history"])
            yield first["tokens"].cpu(), first["history"].cpu()


def check_sample(op, rows):
    history = op["history"].clone()
    want = sample.reference(**{**op, "history": history})
    clear = [r for r in range(rows) if margin(op, r) > MARGIN]
    assert len(clear) >= rows * 0.7
    for tokens, written in device_runs(op):
        differ = [(r, int(tokens[r]), int(want[r])) for r in clear if tokens[r] != want[r]]
        assert not differ, f"{len(differ)} of {len(clear)} rows differ (row, got, want): {differ[:8]}"
        assert (tokens[rows:] == 0).all()
        for r in range(rows):
            slot, length = int(op["row_slot"][r]), int(op["context_len"][r])
            row = op["history"][slot].clone()
            row[length : length + 1] = tokens[r]
            assert written[slot].equal(row)
        unused = torch.ones(len(history), dtype=torch.bool)
        unused[op["row_slot"][:rows].long()] = False
        assert written[unused].equal(op["history"][unused])


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 64, 256])
def test_sample_small_vocabulary(rows, greedy):
    check_sample(requests(rows, 131, seed=rows, greedy=greedy), rows)


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(49152, 64), (49152, 3), (151936, 1), (151936, 32), (5001, 64)]
)
@pytest.mark.parametrize("spread", [2.5, 0.3])
def test_sample_large_vocabulary(vocabulary, rows, spread):
    check_sample(requests(rows, vocabulary, seed=rows + 1, spread=spread), rows)


def test_greedy_large_vocabulary():
    check_sample(requests(256, 151936, seed=5, greedy=True), 256)


@pytest.mark.parametrize("places", [2, 5])
def test_a_slot_has_masks_of_several_places(places):
    op = requests(64, 49152, seed=places, greedy=True)
    words, slots = 49152 // 32, len(op["masked"])
    masks = torch.randint(-(2**31), 2**31 - 1, (slots, places, words)).int()
    masks[..., 0] |= 1  # a token is left
    op["masked"][:], op["allowed"] = 1, masks.flatten(1)
    check_sample(op, 64)


def test_rows_do_not_depend_on_their_batch():
    rows = 40
    op = requests(rows, 151936, seed=9)
    ((together, _),) = device_runs(op)
    for r in range(0, rows, 3):
        own = {k: op[k][r : r + 1] for k in ("logits", "row_slot", "context_len")}
        ((alone, _),) = device_runs({**op, **own})
        assert alone[0] == together[r]


@pytest.mark.parametrize("vocabulary", [3, 5001, 151936])
def test_rows_that_are_not_finite_have_no_token(vocabulary):
    """A negative id, some id of the vocabulary in the history, and other rows as before."""
    nan, inf = float("nan"), float("inf")
    broken = [nan, -nan, inf]
    for knobs in (
        {},
        {"presence_penalty": 0.25},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 2, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.1},
    ):
        op = requests(9, vocabulary, padding=1, greedy=True)
        for row, value in enumerate(broken * 2):
            op["logits"][row, [0, vocabulary - 1][row % 2]] = value
        op["logits"][6] = -inf
        op["logits"][7] = torch.where(torch.arange(vocabulary) == 1, 3.0, -inf)
        op["logits"][8], op["logits"][8, 0] = -3e38, 3e38
        for name, value in knobs.items():
            op[name][:] = value
        ((tokens, history),) = device_runs(op)
        assert tokens.tolist() == [-1] * 7 + [1, 0, 0]
        written = history[op["row_slot"][:9].long(), op["context_len"][:9].long()]
        assert written.tolist() == [0] * 7 + [1, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e30])
@pytest.mark.parametrize("top_k", [0, 3])
def test_extreme_temperatures(temperature, top_k):
    op = requests(64, 4, padding=0, greedy=True)
    op["logits"] = torch.tensor([[1.0, -float("inf"), 5.0, 4.999]]).repeat(64, 1)
    op["temperature"][:], op["top_k"][:] = temperature, top_k
    ((tokens, _),) = device_runs(op)
    assert set(tokens.tolist()) == ({2} if temperature < 1 else {0, 2, 3})


def test_equal_logits():
    op = requests(20, 20000, padding=0, greedy=True)
    op["logits"][:] = 1.5
    op["temperature"][:] = 1.0
    for name, value in (("top_k", 5), ("top_p", 0.3), ("min_p", 0.5)):
        check_sample({**op, name: torch.full_like(op[name], value)}, 20)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 131), (3, 7), (64, 49152), (8, 151936), (256, 5001)])
def test_token_logprobs(rows, vocabulary):
    draw = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocabulary, generator=draw) * 50).round() / 16  # many equals
    logits[0, vocabulary // 2] += 60.0  # a probability of nearly 1
    top = torch.randint(-1, 24, (rows + 1,), generator=draw).int()
    top[-1] = -1
    op = {
        "logits": logits,
        "tokens": torch.randint(0, vocabulary, (rows,), generator=draw).int(),
        "row_slot": torch.randperm(rows, generator=draw).int(),
        "top_logprobs": top,
    }
    op["tokens"][0] = vocabulary // 2
    wanted = dict(
        zip(("logprob", "top_ids", "top_values"), token_logprobs.reference(**op, max_top=20), strict=True)
    )
    on_device = {k: v.cuda() for k, v in op.items()}
    call = op_call(token_logprobs, on_device, {"max_top": 20})
    for kernel in registry.cuda_kernels("token_logprobs"):
        for candidate in kernel.candidates(call):
            got = run(candidate, call, on_device)
            assert got["top_ids"].cpu().equal(wanted["top_ids"])
            for name in ("logprob", "top_values"):
                torch.testing.assert_close(got[name].cpu(), wanted[name], rtol=2e-6, atol=1e-6)
