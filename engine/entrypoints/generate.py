"""What scripts/generate.py does: one text to stdout, or a file of requests to a file of answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from makeready.engine.entrypoints import rows
from makeready.engine.entrypoints.batch import Batch, LineWriter, read_lines
from makeready.engine.entrypoints.options import GenerateJob
from makeready.engine.entrypoints.status import RowProgress, Stages, count_rows, duration
from makeready.engine.llm import LLM


def generate_job(job: GenerateJob) -> None:
    """Load the model, then print a text or run a file; all but the text goes to stderr."""
    rows.check_template(job.chat_template_kwargs)
    llm = load(job)
    if job.prompts is not None and job.output is not None:
        run_file(llm, job, Path(job.prompts).expanduser(), Path(job.output).expanduser())
    elif job.chat is not None:
        messages = [{"role": "user", "content": job.chat}]
        print_text(llm, job, llm.render(messages, **job.chat_template_kwargs))
    else:
        print_text(llm, job, job.prompt or "")


def load(job: GenerateJob) -> LLM:
    """The model under the plan that the job names, or under one from the cache or the planner."""
    with Stages() as stages:

        def report(sentence: str) -> None:
            stages.begin("load the model")
            stages.say(sentence)

        stages.begin("read the checkpoint")
        checkpoint = job.open()
        stages.begin("load the model" if job.plan.path else "find or compile a plan")
        return LLM(
            checkpoint,
            None if job.plan.path is None else Path(job.plan.path).expanduser(),
            kv_memory_gib=job.kv.memory_gib,
            report=report,
            progress=lambda done, total: stages.note(f"{done} of {total} weights"),
            **(job.plan_fields() if job.plan.path is None else {}),
        )


def print_text(llm: LLM, job: GenerateJob, prompt: str | Sequence[int]) -> None:
    """Print one text as it becomes final, and its figures to stderr."""
    began = time.perf_counter()
    stream = llm.stream(prompt, job.params())
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            output = end.value
            break
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    seconds = time.perf_counter() - began
    print(
        f"{output.prompt_tokens} + {output.completion_tokens} tokens in {seconds:.2f} s "
        f"({output.completion_tokens / seconds:.1f} tokens/s), ended by {output.finish_reason}",
        file=sys.stderr,
    )


def run_file(llm: LLM, job: GenerateJob, prompts: Path, output: Path) -> None:
    """Answer a file of requests, and say how far it got if it is interrupted."""
    with LineWriter(output, overwrite=job.overwrite) as writer, RowProgress() as progress:
        batch = Batch(
            llm,
            read_lines(prompts),
            writer.write,
            sampling=job.params(),
            template=job.chat_template_kwargs,
            size=prompts.stat().st_size,
            progress=progress.update,
        )
        try:
            counts = batch.run()
        except KeyboardInterrupt:
            counts = batch.counts
            held = f"the first {count_rows(counts.rows, counts.failed)}" if counts.rows else "no row yet"
            raise KeyboardInterrupt(f"{output} holds the answers to {held}") from None
    print(
        f"{count_rows(counts.rows, counts.failed)} in {duration(progress.seconds)}, {counts.tokens:,} tokens "
        f"({counts.tokens / progress.seconds:.1f} tokens/s), written to {output}",
        file=sys.stderr,
    )
