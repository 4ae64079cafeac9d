"""The golden check: a few tokens that the plan's interpreter predicted for these weights, run again at load.

A plan is apart from the weights, and its kernels never ran where it was compiled. So a prediction can lie
beside it: ``golden.json`` holds a prompt, the greedy tokens that the CPU interpreter of the same plan gave
after it, and which other tokens were as good as equal at each step. A device that then gives another token
computes something else: other weights, a broken kernel, broken memory.

The file is no part of the plan's digest, since plans are shared by all weights of one shape.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint, tensor_of
from makeready.graphs.executable.base import Executable
from makeready.graphs.executable.example import Row, example_step
from makeready.graphs.plan import artifact
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.codec import CodecError, canonical, from_json, to_json
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.reads import needs
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket

FILE = "golden.json"
SCHEMA = 1
# Tokens whose logits differ by less may come out in either order, in standard deviations of the step's
# logits. bf16 against fp32 activations swapped tokens of SmolLM2 that were up to 0.012 apart.
TIE = 0.1

# Options that say how fast a plan is and not what it computes.
_INDIFFERENT = frozenset(
    {"max_decode_buckets", "max_extend_buckets", "candidates", "lanes", "traffic", "disabled_passes"}
)
_SAMPLE_ROWS = 3  # of a large tensor: the first, the middle and the last go into the checksum
_SMALL = 2**16  # elements of a tensor that goes in as a whole


@dataclass(frozen=True)
class GoldenStep:
    """One greedy token.

    Attributes:
        token: its id; the next step runs it.
        margin: to the runner-up, in standard deviations of the step's logits.
        near: other ids within :data:`TIE` of it, best first.
    """

    token: int
    margin: float
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Golden:
    """A prediction.

    Attributes:
        model: :func:`model_key` of the plan.
        weights: :func:`weights_checksum`.
        prompt: token ids.
        steps: what follows them.
    """

    schema: int
    model: str
    weights: str
    prompt: tuple[int, ...]
    steps: tuple[GoldenStep, ...]

    @property
    def decided(self) -> int:
        """Steps at which no other token is near."""
        return sum(not step.near for step in self.steps)


def predict(
    plan: Plan,
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    count: int,
    *,
    loading: Callable[[int, int], None] = lambda done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Golden:
    """What ``plan`` should give after ``prompt``, by its CPU interpreter (needs PyTorch and all weights).

    Args:
        count: tokens to predict.
        loading: told how many of how many parameters are loaded.
        progress: told how many of how many tokens are predicted.

    Raises:
        PlanError: the prompt does not fit the plan, or every token is a near tie.
    """
    from makeready.graphs.executable.cpu.executable import CpuExecutable  # imports torch

    pages = _check_length(plan, prompt, count)
    executable = CpuExecutable(plan, checkpoint, pages=pages + 1, progress=loading, interpret=True)
    steps: list[GoldenStep] = []

    def take(bucket: Bucket, token: int) -> int:
        steps.append(_step(executable.operand(bucket, "sample", "logits")[0]))
        progress(len(steps), count)
        return steps[-1].token

    _run(executable, prompt, count, take)
    made = Golden(SCHEMA, model_key(plan), weights_checksum(plan, checkpoint), tuple(prompt), tuple(steps))
    if not made.decided:
        raise PlanError(
            f"all {count} golden tokens are near ties, which prove nothing; take another prompt or more tokens"
        )
    return made


def check(golden: Golden, executable: Executable, checkpoint: Checkpoint) -> None:
    """Run the prediction's prompt on ``executable`` and hold its tokens against the prediction.

    Uses slot 0 and the first pages, so nothing may be running.

    Raises:
        PlanError: the plan or the weights are not those of the prediction, or a token differs that must not.
    """
    plan = executable.plan
    if golden.model != model_key(plan):
        raise PlanError(
            f"{FILE} was made for a plan of another checkpoint or other dtypes; compile with golden=true again"
        )
    if golden.weights != weights_checksum(plan, checkpoint):
        raise PlanError(
            f"the weights in {checkpoint.path} are not those that {FILE} was made for; compile with golden=true "
            "for them, or leave golden out"
        )
    steps = iter(enumerate(golden.steps))
    _check_length(plan, golden.prompt, len(golden.steps), executable.pages)

    def take(bucket: Bucket, token: int) -> int:
        at, step = next(steps)
        if token != step.token and token not in step.near:
            raise PlanError(
                f"the golden check failed at token {at + 1} of {len(golden.steps)}: this machine gives {token}, "
                f"the plan's interpreter {step.token} by a margin of {step.margin:.2f} standard deviations; "
                "check the device and its driver, and compile the plan again"
            )
        return step.token

    _run(executable, golden.prompt, len(golden.steps), take)


def save(golden: Golden, folder: str | Path) -> Path:
    """Write ``golden.json`` into a plan's folder, whole or not at all."""
    path = Path(folder) / FILE
    part = path.with_name(f".{FILE}-{os.getpid()}")
    try:
        part.write_bytes(canonical(asdict(golden)))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load(folder: str | Path) -> Golden:
    """Read the prediction that lies beside a plan.

    Raises:
        PlanError: there is none, or it cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise PlanError(
            f"{folder} holds no {FILE}; compile the plan with golden=true where the weights are, or leave golden out"
        )
    try:
        data = json.loads(artifact.regular_bytes(path))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CodecError(f"is of another version than {SCHEMA}")
        return from_json(Golden, data)
    except ValueError as error:
        raise PlanError(f"{path} cannot be used ({error}); compile with golden=true again") from None


def model_key(plan: Plan) -> str:
    """SHA-256 over what decides which function of the weights a plan computes."""
    options = {k: v for k, v in to_json(plan.options).items() if k not in _INDIFFERENT}
    return hashlib.sha256(canonical({"checkpoint": plan.checkpoint, "options": options})).hexdigest()


def weights_checksum(plan: Plan, checkpoint: Checkpoint) -> str:
    """SHA-256 over rows of every tensor that the plan reads: tells weights apart without reading all."""
    total = hashlib.sha256()
    for name in sorted({tensor_of(name) for name in needs(weight.param for weight in plan.weights)}):
        shape = checkpoint.tensors[name].shape
        total.update(f"{name} {checkpoint.tensors[name].dtype} {shape}".encode())
        if math.prod(shape) <= _SMALL:
            total.update(np.ascontiguousarray(checkpoint.read(name)).tobytes())
            continue
        for part in range(_SAMPLE_ROWS):
            row = (shape[0] - 1) * part // (_SAMPLE_ROWS - 1)
            total.update(np.ascontiguousarray(checkpoint.read(name, slice(row, row + 1))).tobytes())
    return total.hexdigest()


def _step(logits: np.ndarray) -> GoldenStep:
    """The greedy choice from a row of logits."""
    order = np.argsort(-logits, kind="stable")
    below = (logits[order[0]] - logits[order]) / max(float(logits.std()), 1e-30)
    return GoldenStep(int(order[0]), float(below[1]), tuple(order[1:][below[1:] < TIE].tolist()))


def _check_length(plan: Plan, prompt: Sequence[int], count: int, pages: int | None = None) -> int:
    """KV pages that the run takes.

    Raises:
        PlanError: it does not fit the plan's limits, or ``pages`` without the null page.
    """
    limits = plan.limits
    needed = -(-(len(prompt) + count) // limits.page_size)
    if len(prompt) > limits.max_tokens or len(prompt) + count > limits.context_len:
        raise PlanError(
            f"a golden run of {len(prompt)} + {count} tokens does not fit a plan of {limits.max_tokens} tokens a "
            f"step and {limits.context_len} of context; compile with larger limits, or without golden"
        )
    if pages is not None:
        blocks = plan.kv.blocks(pages, limits)
        pages = min((blocks[group.name] for group in plan.kv.paged), default=needed + 1)
    if pages is not None and needed >= pages:
        raise PlanError(f"a golden run needs {needed} KV pages, there are {pages - 1}; raise kv.memory_gib")
    return needed


def _run(executable: Any, prompt: Sequence[int], count: int, take: Callable[[Bucket, int], int]) -> None:
    """Run the prompt, then one token at a time: those that ``take`` makes of (bucket, sampled token)."""
    plan = executable.plan
    table = BucketTable(plan.buckets)
    pages = -(-(len(prompt) + count) // plan.limits.page_size)  # slot 0 gets the first ones
    # All else by default: greedy.
    held = {plan.kv.field(group.name, "pages"): np.arange(1, pages + 1) for group in plan.kv.paged}
    executable.write_slot(0, {"prompt_len": len(prompt), **held})
    ids, before = list(prompt), 0
    for at in range(count):
        bucket = table.covering(EXTEND if at == 0 else DECODE, 1, len(ids))
        results = executable.launch(bucket, example_step(plan, bucket, [Row(0, ids, before)])).wait()
        before += len(ids)
        token = int(results["tokens"][0])
        if token < 0:
            raise PlanError(
                f"logits of token {at} of the golden run are not finite: the model's weights are damaged or its "
                "activations overflow; check the checkpoint"
            )
        ids = [take(bucket, token)]
