"""Decode speed against transformers' ``generate`` on the same weights, in turns within one process.

A step's time is (time of ``tokens + 1`` new tokens - time of 1) / ``tokens``: the prompt's cost and the
fixed cost of a call cancel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import summary
from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.inspect.analysis import cost_analysis
from makeready.graphs.plan.spec import DECODE

PROMPT_TOKENS = 32
Generate = Callable[[list[list[int]], int], None]


def decode(
    checkpoint: Path, *, rows: Sequence[int], tokens: int, repeats: int, weight_dtype: str
) -> dict[str, Any]:
    """Measure both engines at every number of rows.

    Args:
        checkpoint: a Hugging Face folder or a GGUF file.
        rows: batch sizes.
        tokens: decode steps of a measurement.
        repeats: measurements of each; ours and theirs take turns.
        weight_dtype: dtype of the weights in both.
    """
    llm = LLM(checkpoint, max_rows=max(rows), weight_dtype=weight_dtype)
    vocabulary = llm.plan.config["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocabulary, (max(rows), PROMPT_TOKENS), generator=generator).tolist()
    engines = {"makeready": _ours(llm), "transformers": _theirs(checkpoint, weight_dtype)}
    bounds = cost_analysis(llm.plan, context=PROMPT_TOKENS + tokens // 2)
    found = []
    for count in rows:
        bucket = llm.engine.buckets.covering(DECODE, count, count)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for generate in engines.values():  # not counted: first calls allocate
            generate(prompts[:count], 2)
        for _ in range(repeats):
            for name, generate in engines.items():
                seconds[name].append(_step_seconds(generate, prompts[:count], tokens))
        ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
        found.append(
            {
                "rows": count,
                "tokens_per_second": {n: summary([count / s for s in all_]) for n, all_ in seconds.items()},
                "ratio": summary(ratios),
                "roofline_tokens_per_second": count / bounds[bucket]["seconds"],
            }
        )
    return {"model": llm.plan.architecture, "weight_dtype": weight_dtype, "tokens": tokens, "decode": found}


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines of text: medians, and the range of the ratios."""
    lines = []
    for row in result["decode"]:
        speeds = {name: s["median"] for name, s in row["tokens_per_second"].items()}
        ratio = row["ratio"]
        lines.append(
            f"decode, {row['rows']} rows: {speeds['makeready']:.1f} tokens/s, "
            f"transformers {speeds['transformers']:.1f}, ratio {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    return lines


def _step_seconds(generate: Generate, prompts: list[list[int]], tokens: int) -> float:
    times = []
    for count in (1, tokens + 1):
        began = time.perf_counter()
        generate(prompts, count)
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / tokens


def _ours(llm: LLM) -> Generate:
    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
        outputs = llm.generate(token_ids=prompts, sampling=params)
        assert all(output.completion_tokens == count for output in outputs)

    return generate


def _theirs(checkpoint: Path, weight_dtype: str) -> Generate:
    import transformers

    where = {"gguf_file": checkpoint.name} if checkpoint.is_file() else {}
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    dtype = getattr(torch, weight_dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).eval()

    def generate(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        assert made.shape[1] == ids.shape[1] + count

    return generate
