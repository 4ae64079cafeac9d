"""The golden check as the scripts use it; see :mod:`makeready.graphs.executable.golden`."""

from __future__ import annotations

from pathlib import Path

from makeready.engine.entrypoints.status import Stages
from makeready.engine.llm import LLM
from makeready.engine.text.tokenizer import load_tokenizer
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable import golden
from makeready.graphs.plan.plan import Plan

PROMPT = "The capital of France is"
PROMPT_IDS = 6  # of a checkpoint without a tokenizer
TOKENS = 8  # an 8B model takes the interpreter a second or two for each


def write_golden(plan: Plan, checkpoint: Checkpoint, folder: Path, stages: Stages) -> golden.Golden:
    """Predict golden tokens for the weights of ``checkpoint`` and put them beside the plan in ``folder``."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is not None:
        prompt = tokenizer.encode(PROMPT)
    else:
        prompt = [7 * (at + 1) % plan.config["vocab_size"] for at in range(PROMPT_IDS)]
    stages.begin("predict golden tokens")
    made = golden.predict(
        plan,
        checkpoint,
        prompt,
        TOKENS,
        loading=lambda done, total: stages.note(f"{done} of {total} weights"),
        progress=lambda done, total: stages.note(f"{done} of {total} tokens"),
    )
    golden.save(made, folder)
    return made


def check_golden(llm: LLM, folder: Path) -> golden.Golden:
    """Hold a loaded model against the golden tokens beside its plan in ``folder``.

    Raises:
        PlanError: there are none, they are for other weights, or the model gives others.
    """
    expected = golden.load(folder)
    golden.check(expected, llm.engine.executable, llm.checkpoint)
    return expected


def summary(made: golden.Golden) -> str:
    """How many tokens, and how many of them could be no other."""
    return f"{len(made.steps)} tokens, {made.decided} of them clear"
