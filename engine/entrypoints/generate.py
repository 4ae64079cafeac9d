"""What scripts/generate.py does: one text to stdout, or a file of requests to a file of answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from makeready.engine.entrypoints.batch.base import JobError
from makeready.engine.entrypoints.batch.dry_run import DryRun, dry_run
from makeready.engine.entrypoints.batch.identity import identity
from makeready.engine.entrypoints.batch.job import Rows, open_input, run_local
from makeready.engine.entrypoints.batch.journal import Journal, Totals
from makeready.engine.entrypoints.batch.on_ray import EngineSpec, Fleet
from makeready.engine.entrypoints.batch.output import Files, check_output, open_journal, publish
from makeready.engine.entrypoints.batch.worker import Worker
from makeready.engine.entrypoints.generate_options import GenerateJob
from makeready.engine.entrypoints.golden import check_golden, summary
from makeready.engine.entrypoints.status import Stages, count_rows
from makeready.engine.entrypoints.watch import Watch
from makeready.engine.generation_config import stated_defaults, told
from makeready.engine.llm import LLM
from makeready.engine.output import Output
from makeready.engine.protocol.asked import check_template
from makeready.engine.text.chat import is_template, read_template
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan


def generate_job(job: GenerateJob) -> None:
    """Print a text or run a file; all but the text goes to stderr."""
    check_template(job.chat_template_kwargs)
    job.chat_template = _template_text(job.chat_template)
    plan = None if job.plan.path is None else artifact.load(Path(job.plan.path).expanduser())
    if job.prompts is not None and job.dry_run:
        print("\n".join(_predicted(job, plan, Path(job.prompts).expanduser()).lines()))
        return
    if job.prompts is not None and job.output is not None:
        run_file(job, plan, Path(job.prompts).expanduser(), Path(job.output).expanduser())
        return
    with Watch(job.metrics, job.trace, _say) as watch, load(job, plan) as llm:
        watch.attach(llm.engine)
        prompt: str | Sequence[int] = job.prompt or ""
        if job.chat is not None:
            prompt = llm.render([{"role": "user", "content": job.chat}], **job.chat_template_kwargs)
        watch.finish(print_text(llm, job, prompt))


def load(job: GenerateJob, plan: Plan | None) -> LLM:
    """The model under a plan, or under the one that the options ask for, from the cache or the planner."""
    with Stages() as stages:

        def report(sentence: str) -> None:
            stages.begin("load the model")
            stages.say(sentence)

        stages.begin("read the checkpoint")
        checkpoint = job.open()
        stages.begin("find or compile a plan" if plan is None else "load the model")
        llm = LLM(
            checkpoint,
            plan,
            kv_memory_gib=job.kv.memory_gib,
            scheduler=job.scheduling(),
            chat_template=job.chat_template,
            tool_call_parser=job.tool_call_parser,
            reasoning_parser=job.reasoning_parser,
            generation_config=job.generation_config,
            report=report,
            progress=lambda done, total: stages.note(f"{done} of {total} weights"),
            **(job.plan_fields() if plan is None else {}),
        )
        if job.golden and job.plan.path is not None:
            stages.begin("golden check")
            stages.say(f"as predicted: {summary(check_golden(llm, Path(job.plan.path).expanduser()))}")
        llm.warn = _say
        return llm


def print_text(llm: LLM, job: GenerateJob, prompt: str | Sequence[int]) -> Output:
    """Print one text as it becomes final, and its figures to stderr."""
    began = time.perf_counter()
    # As of a request without parameters, the model's own most tokens end where the context does.
    fit = job.fits(llm.generation_defaults)
    stream = llm.stream(
        prompt, job.params(llm.generation_defaults), add_special_tokens=job.add_special_tokens, fit=fit
    )
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
    return output


def run_file(job: GenerateJob, plan: Plan | None, prompts: Path, output: Path) -> None:
    """Answer a file of requests, from where an earlier start of the same job was cut off."""
    given = open_input(prompts, output, job.format, job.carry)
    files = Files(output)
    check_output(files, overwrite=job.overwrite)
    stated = _stated(job)
    named = identity(job, job.open(), plan, given.identity, stated) | job.row_limit(given.format, stated)
    journal = open_journal(files, named, given.survey, overwrite=job.overwrite)
    if not isinstance(journal, Journal):
        done = count_rows(journal.rows, journal.failed)
        _say(f"{output} is complete: {done}; overwrite=true would run them again")
        _check_some_served(journal, output)
        return
    with journal, Rows(given, journal, files) as rows:
        if journal.totals.rows:
            done = f"{journal.totals.rows:,} of {count_rows(given.survey.count, 0)} are done"
            _say(f"going on with {files.journal}: {done}")
        if rows.left:
            _run(job, plan, given.format, rows)
        assert journal.totals.rows == given.survey.count, "a row was lost"
        with rows.kept():
            publish(files, journal, named, names=given.names)
        _say(f"{rows.summary()}, written to {output}")
        _check_some_served(journal.totals, output)


def _check_some_served(totals: Totals, output: Path) -> None:
    """A job of which every row failed has failed: whatever comes behind it in a pipeline has nothing to work on."""
    if totals.rows == totals.failed:
        raise JobError(f"no row could be served; {output} says of each what is wrong with it")


def _run(job: GenerateJob, plan: Plan | None, format: str, rows: Rows) -> None:
    if job.scale.runner == "local":
        with Watch(job.metrics, job.trace, rows.say) as watch, load(job, plan) as llm:
            llm.warn = rows.say
            watch.attach(llm.engine)
            defaults = llm.generation_defaults
            worker = Worker(
                llm,
                format,
                job.row_fields(format, defaults),
                job.chat_template_kwargs,
                watch.finish,
                carry=job.carry,
                add_special_tokens=job.add_special_tokens,
                fit=job.fits(defaults),
            )
            run_local(worker, rows)
        return
    defaults = _stated(job)
    if defaults:
        _say(told(defaults))
    spec = EngineSpec(
        job.checkpoint if job.model else str(Path(job.checkpoint).expanduser().resolve()),
        job.model,
        plan or _planned(job),
        job.kv.memory_gib,
        format,
        job.row_fields(format, defaults),
        job.chat_template_kwargs,
        job.scheduling(),
        chat_template=job.chat_template,
        tool_call_parser=job.tool_call_parser,
        reasoning_parser=job.reasoning_parser,
        add_special_tokens=job.add_special_tokens,
        fit=job.fits(defaults),
        carry=job.carry,
        beside=job.speculative.beside,
    )
    with Stages() as stages:
        stages.begin("load the model on every engine")
        fleet = Fleet(spec, engines=job.scale.engines, cpus=job.scale.cpus, address=job.scale.address)
    with fleet:
        fleet.run(rows)


def _predicted(job: GenerateJob, plan: Plan | None, prompts: Path) -> DryRun:
    output = prompts if job.output is None else Path(job.output).expanduser()
    given, plan = open_input(prompts, output, job.format, job.carry), plan or _planned(job)
    with Stages() as stages:
        stages.begin("read the rows and predict")
        return dry_run(job, plan, given, stages.say)


def _planned(job: GenerateJob) -> Plan:
    """The plan that the options ask for, made once and here for all engines."""
    # The planner needs torch; a plan that is ready does not.
    from makeready.graphs.planner.compile import Request, compile_plan
    from makeready.graphs.planner.plan_cache import cached_plan

    with Stages() as stages:
        stages.begin("find or compile a plan")
        checkpoint, request = job.open(), Request(**job.plan_fields())
        return cached_plan(checkpoint, request, lambda: compile_plan(checkpoint, request), stages.say)[0]


def _stated(job: GenerateJob) -> dict[str, Any]:
    """Sampling values that the model states, known before it is loaded."""
    return stated_defaults(job.checkpoint) if job.generation_config else {}


def _template_text(given: str | None) -> str | None:
    """The text of a template that is given by its path, as it is now; a name stays for the model to look up."""
    if given is None or is_template(given) or not Path(given).expanduser().is_file():
        return given
    return read_template(given)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)
