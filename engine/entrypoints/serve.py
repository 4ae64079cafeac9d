"""What scripts/serve.py does: a model behind HTTP until a signal ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from makeready.engine.conversation import Parsers
from makeready.engine.entrypoints.ending import Terminated
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.serve_options import ServeJob
from makeready.engine.entrypoints.status import Stages


@contextmanager
def _extra(asked: str, name: str) -> Iterator[None]:
    """What is asked for is imported here, and said to be missing where it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f'{asked} needs {error.name}; install it with: pip install "makeready[{name}]"'
        ) from None


def serve_job(job: ServeJob) -> None:
    """Serve; all that is said goes to stderr."""
    with _extra("serve", "serve"):
        from makeready.engine.remote.messages import Load
        from makeready.engine.server import run
        from makeready.engine.server.settings import ServerSettings
    if job.otel:
        with _extra("otel=true", "otel"):
            from makeready.engine.server import tracing

            tracing.exporter()
    if job.grpc_port is not None:
        with _extra(f"grpc_port={job.grpc_port}", "grpc"):
            from makeready.engine.server.rpc import server as _  # noqa: F401
    load = Load(
        job.checkpoint if job.model else str(Path(job.checkpoint).expanduser()),
        job.model,
        None if job.plan.path is None else str(Path(job.plan.path).expanduser()),
        job.plan_fields(),
        job.kv.memory_gib,
        job.scheduling(),
        job.speculative.beside,
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
    at = run.Listening(job.host, job.port, job.ssl_certfile, job.ssl_keyfile, job.access_log, job.grpc_port)
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
