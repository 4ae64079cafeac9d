"""What scripts/serve.py can be told; see engine/entrypoints/options.py."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from makeready.engine.entrypoints.options import Job, PlanOrPath, UsageError, check_compiled, literal
from makeready.engine.entrypoints.scheduler_options import SchedulerSettings, scheduler_options
from makeready.engine.options import SchedulerOptions
from makeready.engine.text.formats.base import AUTO, check_parsers
from makeready.engine.text.parts import TextError

# A command line shows in lists of processes; the environment does not.
API_KEY, ADMIN_KEY = "MAKEREADY_API_KEY", "MAKEREADY_ADMIN_KEY"

_TEXTS = {"texts": False}  # a list of texts, taken as they are typed


@dataclass
class ServeJob(Job):
    """Options of scripts/serve.py.

    Attributes:
        host: address to listen at; 0.0.0.0 for all of this machine's.
        port: 0 takes one that is free, and says which.
        grpc_port: port at the same host for SGLang's scheduler over gRPC (docs/server.md); needs the extra grpc. 0 as
            above, null: no gRPC.
        served_model_name: what requests may call the model, the first of which is told; none: the name of its folder
            or file, or its path.
        api_keys: a request has to show one of these (Authorization: Bearer KEY, or x-api-key). Also read from
            MAKEREADY_API_KEY, several with commas. Without any, anybody may ask. /health, /ping and /ready are free.
        admin_key: what routes that change the server want (flush_cache, abort_request). Also read from
            MAKEREADY_ADMIN_KEY. null: any of api_keys.
        cors_origins: web pages of these origins may use the server, such as https://example.com; * for all.
        max_body_mib: of a request.
        strict_fields: refuse fields of a request that are not known. false: the answer's header
            x-makeready-ignored-fields names them.
        drain_seconds: after SIGTERM or Ctrl-C no request is taken, and those that run have so long to end; a second
            signal ends them.
        health_seconds: the engine counts as dead when it gave no sign of life for so long; more than any step takes.
        files_dir: folder for files that clients send (/v1/files) and batches over them (/v1/batches), which go on
            from there when the server is started again. null: neither is served.
        page: show a chat, and what the engine does, to browsers at /.
        otel: send OpenTelemetry traces of requests where OTEL_EXPORTER_OTLP_ENDPOINT, and other variables OTEL_* of
            the environment, say; needs the extra otel.
        ssl_certfile: file of the certificate for https, with the chain.
        ssl_keyfile: file of its key.
        access_log: a line a request of HTTP on stderr.
        chat_template: jinja template to use in place of the model's: a file, the text itself, or the name of one of
            several that the model has.
        tool_call_parser: how the model writes tool calls: deepseekv3, gpt-oss, llama3, mistral, qwen and others, as
            for generate.py. auto: as its chat template tells, or its own response_template; none: calls stay in the
            content.
        reasoning_parser: how it writes reasoning: think, gpt-oss or mistral; auto and none as above.
        generation_config: what requests do not say is taken from the model's generation_config.json.
        chat_template_kwargs: variables of the chat template for requests that do not set them, such as
            chat_template_kwargs.enable_thinking=false.
    """

    plan: PlanOrPath = field(default_factory=PlanOrPath)  # pyright: ignore[reportIncompatibleVariableOverride]
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)  # type: ignore[valid-type]
    host: str = MISSING
    port: int = MISSING
    grpc_port: int | None = None
    served_model_name: list[str] = field(default_factory=list, metadata=_TEXTS)
    api_keys: list[str] = field(default_factory=list, metadata=_TEXTS)
    admin_key: str | None = literal()
    cors_origins: list[str] = field(default_factory=list, metadata=_TEXTS)
    max_body_mib: float = MISSING
    strict_fields: bool = MISSING
    drain_seconds: float = MISSING
    health_seconds: float = MISSING
    files_dir: str | None = literal()
    page: bool = MISSING
    otel: bool = MISSING
    ssl_certfile: str | None = literal()
    ssl_keyfile: str | None = literal()
    access_log: bool = MISSING
    chat_template: str | None = literal()
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    generation_config: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def check(self, given: Collection[str]) -> None:
        super().check(given)
        check_compiled(self.plan, given)
        for name in ("port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 2**16:
                raise UsageError(
                    f"{name}={port} is no port; give one from 1 to 65535, or 0 for any that is free"
                )
        if self.port and self.port == self.grpc_port:
            raise UsageError(f"port and grpc_port are both {self.port}; give one of them another")
        for name in ("max_body_mib", "drain_seconds", "health_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)} must be a number of at least 0")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise UsageError("https needs both ssl_certfile= and ssl_keyfile=")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise UsageError(f"{name}={path} is no file")
        for key in (*self.keys, *([] if self.admin is None else [self.admin])):
            if not key or not key.isascii() or key != key.strip():
                raise UsageError("keys must be ASCII, and neither empty nor with blanks around them")
        self.scheduling()
        try:
            check_parsers(self.tool_call_parser, self.reasoning_parser)
        except TextError as error:
            raise UsageError(str(error)) from None

    def scheduling(self) -> SchedulerOptions:
        """What ``scheduler`` says, checked."""
        return scheduler_options(self.scheduler)

    def plan_fields(self) -> dict[str, Any]:
        """See :meth:`Job.plan_fields`, as data; a deterministic scheduler's plan is compiled to be so."""
        fields = super().plan_fields()
        deterministic = self.plan.deterministic or self.scheduler.deterministic  # type: ignore[attr-defined]
        return fields | {
            "deterministic": deterministic,
            "traffic": dataclasses.asdict(fields["traffic"]),
            "disabled_passes": list(fields["disabled_passes"]),
        }

    @property
    def keys(self) -> list[str]:
        """API keys, those of the environment among them."""
        return [*self.api_keys, *(key for key in os.environ.get(API_KEY, "").split(",") if key)]

    @property
    def admin(self) -> str | None:
        """The admin's key."""
        return self.admin_key if self.admin_key is not None else os.environ.get(ADMIN_KEY) or None

    @property
    def names(self) -> list[str]:
        """What the model may be called."""
        if self.served_model_name:
            return list(self.served_model_name)
        path = Path(self.checkpoint).expanduser()
        own = path.resolve().name.removesuffix(".gguf")
        return list(dict.fromkeys((own, self.checkpoint)))
