"""The group ``scheduler`` of command lines: the fields of SchedulerOptions, with defaults in conf/scheduler."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from omegaconf import MISSING

from makeready.engine.entrypoints.options import UsageError
from makeready.engine.errors import RequestError
from makeready.engine.options import SchedulerOptions


def _settings() -> type:
    # SchedulerOptions itself is frozen, and OmegaConf would let nothing be set; and conf/ states the defaults.
    hints = typing.get_type_hints(SchedulerOptions)
    fields = [(f.name, hints[f.name], MISSING) for f in dataclasses.fields(SchedulerOptions)]
    made = dataclasses.make_dataclass("SchedulerSettings", fields)
    made.__doc__ = SchedulerOptions.__doc__
    return made


SchedulerSettings = _settings()


def scheduler_options(settings: Any, **changes: Any) -> SchedulerOptions:
    """What ``settings`` and ``changes`` to them say, checked.

    Raises:
        UsageError: a value is out of range, or two contradict each other.
    """
    try:
        return SchedulerOptions(**{**dataclasses.asdict(settings), **changes})
    except RequestError as error:
        raise UsageError(str(error)) from None
