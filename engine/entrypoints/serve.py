"""What scripts/serve.py does: a model behind HTTP until a signal ends it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from makeready.engine.conversation import Parsers
from makeready.engine.entrypoints.cli import Terminated
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.serve_options import ServeJob
from makeready.engine.entrypoints.status import Stages


def serve_job(job: ServeJob) -> None:
    """Serve; all that is said goes to stderr."""
    try:
        from makeready.engine.remote.messages import Load
        from makeready.engine.server import run
        from makeready.engine.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise UsageError(
            f'serve needs {error.name}; install it with: pip install "makeready[serve]"'
        ) from None
    if job.otel:
        try:
            from makeready.engine.server import tracing

            tracing.exporter()
        except ModuleNotFoundError as error:
            raise UsageError(
                f'otel=true needs {error.name}; install it with: pip install "makeready[otel]"'
            ) from None
    load = Load(
        job.checkpoint if job.model else str(Path(job.checkpoint).expanduser()),
        job.model,
        None if job.plan.path is None else str(Path(job.plan.path).expanduser()),
        job.plan_fields(),
        job.kv.memory_gib,
        job.scheduling(),
    )
    settings = ServerSettings(
        job.names,
        job.keys,
        job.admin,
        job.cors_origins,
        int(job.max_body_mib * 2**20),
        job.strict_fields,
        job.drain_seconds,
        job.health_seconds,
        None if job.files_dir is None else Path(job.files_dir).expanduser(),
        job.page,
        job.otel,
        job.chat_template_kwargs,
    )
    at = run.Listening(job.host, job.port, job.ssl_certfile, job.ssl_keyfile, job.access_log)
    parsers = Parsers(job.tool_call_parser, job.reasoning_parser)
    model = run.ModelOptions(parsers, job.chat_template, job.generation_config)
    with Stages() as stages:

        def note(kind: str, text: str) -> None:
            {"stage": stages.begin, "detail": stages.note}.get(kind, stages.say)(text)

        def ready(address: str) -> None:
            stages.end()
            print(f"serving {settings.names[0]} at {address}; Ctrl-C ends", file=sys.stderr)

        ended = run.run(at, load, model, settings, note, ready)
    if ended:
        raise Terminated if ended == signal.SIGTERM else KeyboardInterrupt
