"""Launch by launch beside the interpreter, on a GPU: nothing differs, and what is spoiled is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from scripted_steps import SMALL, write_checkpoint
from test_gpu_poisoned import target

from makeready.graphs.executable.bisect import as_references, bisect, pages_needed
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.planner.compile import compile_plan

LIMITS: dict[str, Any] = {"max_rows": 8, "max_tokens": 128, "context_len": 256}
PROMPT = [(37 * i) % 1000 for i in range(1, 150)]
ROWS, TOKENS = 3, 4
MODELS = {
    "bfloat16": {},
    "float16": {"activation_dtype": "float16"},
    "fp8": {"quant": "fp8", "kv_dtype": "float8_e4m3fn"},
    "fp8_block": {"quant": "fp8_block"},
    "deterministic": {"deterministic": True},
}


def load(tmp_path, kind: type[CudaExecutable] = CudaExecutable, **fields: Any) -> tuple[Any, CpuExecutable]:
    checkpoint = write_checkpoint(tmp_path, SMALL)
    plan = compile_plan(checkpoint, target=target(), **LIMITS, **fields)
    pages = pages_needed(plan, len(PROMPT), TOKENS, ROWS)
    reference = CpuExecutable(as_references(plan), checkpoint, pages=pages, interpret=True)
    return kind(plan, checkpoint, kv_bytes=plan.kv.nbytes(pages, plan.limits)), reference


@pytest.mark.parametrize("name", MODELS)
def test_no_launch_differs(name: str, tmp_path) -> None:
    device, reference = load(tmp_path, **MODELS[name])
    found = bisect(device, reference, PROMPT, TOKENS, rows=ROWS)
    assert found.difference is None, found.difference.sentence(device.plan)
    assert len(found.tokens) == TOKENS
    print(f"\n{name}: {found.launches} launches, at most {found.nearest:.0%} of what is allowed")
    device.close()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "fp8"])
def test_no_chain_of_one_row_differs(name: str, tmp_path) -> None:
    device, reference = load(tmp_path, **MODELS[name])
    bucket = next(b for b in device.plan.buckets if (b.phase, b.rows) == ("decode", 1))
    assert any(call.stop - call.first > 1 for call in device.calls(bucket)), "nothing runs as one"
    found = bisect(device, reference, PROMPT, TOKENS, rows=1)
    assert found.difference is None, found.difference.sentence(device.plan)
    device.close()


def test_a_spoiled_launch_is_named(tmp_path) -> None:
    class Spoiled(CudaExecutable):
        """A row of what launch 15 of decode steps gives is doubled; it is a launch with one result."""

        def walk(self, bucket: Any, step: Any, stops: Any = None) -> Iterator[int]:
            for done in super().walk(bucket, step, stops):
                if (bucket.phase, done) == ("decode", 15):
                    (name,) = self.plan.programs["decode"].launches[14].results.values()
                    bits = self.peek(bucket, name)
                    bits[1] += 1 << 7  # the exponent of a bfloat16
                    self.poke(bucket, name, bits)
                yield done

    device, reference = load(tmp_path, Spoiled)
    difference = bisect(device, reference, PROMPT, TOKENS, rows=ROWS).difference
    assert difference is not None
    assert (difference.what, difference.bucket.phase, difference.at) == ("result", "decode", 14)
    assert difference.row == 1
    device.close()


def test_a_wrong_parameter_is_named(tmp_path) -> None:
    device, reference = load(tmp_path)
    bucket = device.plan.buckets[0]
    name = next(
        w.param.name for w in device.plan.weights if "layers.1" in w.param.name and "norm" in w.param.name
    )
    bits = device.peek(bucket, name)
    device.poke(bucket, name, bits[::-1].copy())
    difference = bisect(device, reference, PROMPT, 1).difference
    assert difference is not None
    assert (difference.what, difference.layer) == ("parameter", "layer 1")
    assert name in difference.sentence(device.plan)
    device.close()
