"""From a command line to a job: Hydra composes the options, errors become one sentence, no folder is made.

Two things are arranged before Hydra sees the command line. Values that are text or paths are quoted, so
that ``prompt="Well, who's {there}?"`` means what it says. And ``plan=FOLDER`` becomes ``plan.path=FOLDER``
unless FOLDER is the name of a preset, since Hydra knows ``plan`` as a group of options.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from makeready.engine.entrypoints.describe import describe, literals, mappings, option_table, preset_table
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.streams import open_streams, patient_stderr

T = TypeVar("T")

OK, FAILED, MISUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 128 + signal.SIGINT, 128 + 13
TERMINATED = 128 + signal.SIGTERM
ONCE_SECONDS = 1.0  # signals so close to each other are one: launchers pass on what the terminal sent as well


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, as it does before a cluster's queue or a container ends a job."""


def launch(
    script: str | Path, kind: type[T], run: Callable[[T], None], arguments: Sequence[str] | None = None
) -> int:
    """Run a script's job once, or once for each point of a ``--multirun`` sweep.

    Args:
        script: the script's file; its options are in ``../conf/<its name>.yaml``.
        kind: the structured config that types them.
        run: does the job.
        arguments: the command line; None takes the process's.

    Returns:
        Exit code: 0; 1 for a job that failed, 2 for options that cannot be, 130 after Ctrl-C, 143 after
        SIGTERM (both end a sweep), 141 where the reader of stdout went away. The reason is on stderr, in
        a sentence.
    """
    open_streams()
    name, conf = Path(script).stem, Path(script).resolve().parents[1] / "conf"
    ConfigStore.instance().store(name=f"{name}_options", node=kind)
    for key, table in (
        ("options", lambda _root_: option_table(kind, _root_)),
        ("presets", lambda _root_: preset_table(kind, conf)),
    ):
        OmegaConf.register_new_resolver(key, table, replace=True)
    codes = [OK]

    def task(config: DictConfig) -> None:
        if not {INTERRUPTED, TERMINATED}.isdisjoint(codes):
            return
        codes.append(_reported(lambda: run(_job(config, kind, HydraConfig.get().overrides.task))))

    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    given = list(sys.argv[1:] if arguments is None else arguments)
    meanings = describe(kind)
    presets = {path.stem for path in (conf / "plan").glob("*.yaml")} if "plan.max_rows" in meanings else set()
    before = sys.argv
    # Hydra would print errors in several lines and exit; like this they come up here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    folder = presets if "plan.path" in meanings else None
    made = arranged(given, literals(kind), mappings(kind), folder)
    sys.argv = [str(script), *(_by_name(argument, groups) for argument in made)]
    try:
        main = hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)
        with patient_stderr(), _ending():
            codes.append(_reported(main, meanings))
    finally:
        sys.argv = before
    return max(codes)


def arranged(
    arguments: Sequence[str], verbatim: frozenset[str], open_ended: frozenset[str], presets: set[str] | None
) -> list[str]:
    """The command line as Hydra should see it.

    Args:
        arguments: as the shell gave them.
        verbatim: options whose values are quoted; in a sweep, where commas separate values, none is.
        open_ended: options that map any names, for which Hydra wants a ``++``.
        presets: choices of the group ``plan``; None where a plan is not read from a folder.
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    made = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "plan" and presets is not None and not set(value.split(",")) <= presets:
            name = "plan.path"
        if not equals or name.startswith("-"):
            made.append(argument)
        elif name in verbatim and not sweep:
            made.append(f"{name}={quoted(value)}")
        elif any(name == option or name.startswith(option + ".") for option in open_ended):
            made.append(f"++{name}={value}")
        else:
            made.append(f"{name}={value}")
    return made


def _by_name(argument: str, groups: set[str]) -> str:
    """A choice of a group is a name, also where Hydra would read a number, a truth value or null."""
    name, equals, value = argument.partition("=")
    plain = re.fullmatch(r"[-+]?[\d_.]+(e[-+]?\d+)?|[-+]?(inf|nan)|true|false|null|", value, re.IGNORECASE)
    return f"{name}={quoted(value)}" if equals and name.lstrip("+~") in groups and plain else argument


def quoted(text: str) -> str:
    """``text`` so that Hydra and OmegaConf read it back unchanged: no interpolation, no list, no null."""
    safe = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return QuotedString(text=safe, quote=Quote.single).with_quotes()


def _job(config: DictConfig, kind: type[T], overrides: Sequence[str]) -> T:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UsageError(f"{missing[0].removesuffix('.path')}= is missing: {describe(kind)[missing[0]]}")
    job: Any = OmegaConf.to_object(config)
    job.check({override.partition("=")[0].lstrip("+~") for override in overrides})
    return job


def _reported(run: Callable[[], Any], options: Sequence[str] | dict[str, str] = ()) -> int:
    """Run and turn what goes wrong into a sentence on stderr and an exit code."""
    try:
        run()
    except Terminated as interrupt:
        return _say(f"terminated{_after(interrupt)}", TERMINATED)
    except KeyboardInterrupt as interrupt:
        return _say(f"interrupted{_after(interrupt)}", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone. Python would complain about it again when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except UsageError as error:
        return _say(f"{error}", MISUSED)
    except (HydraException, OmegaConfBaseException) as error:
        return _say(explained(error, list(options)), MISUSED)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror or error}", FAILED)
    except MemoryError:
        return _say(
            "there is not enough memory; lower kv.memory_gib, plan.max_rows or plan.context_len", FAILED
        )
    except ValueError as error:
        # Errors that we foresee are classes of our own with a sentence; another ValueError is a bug.
        if not type(error).__module__.startswith("makeready."):
            raise
        return _say(f"{error}", FAILED)
    return OK


@contextmanager
def _ending() -> Iterator[None]:
    """Let SIGTERM end a job as Ctrl-C does, with what it has to say; only the main thread may.

    A second signal would cut that short, so none follows within a second of the first, be it while the
    process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    before = {number: signal.getsignal(number) for number in kinds}
    last = -math.inf

    def end(number: int, frame: Any) -> None:
        nonlocal last
        if time.monotonic() - last > ONCE_SECONDS:
            last = time.monotonic()
            raise kinds[signal.Signals(number)]

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # a shell's background job is not meant by Ctrl-C
            signal.signal(number, end)
    try:
        yield
    finally:
        if last < 0:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say(sentence: str, code: int) -> int:
    print(sentence if code in (INTERRUPTED, TERMINATED) else f"error: {sentence}", file=sys.stderr)
    return code


def _after(interrupt: KeyboardInterrupt) -> str:
    return f"; {interrupt}" if str(interrupt) else ""


def explained(error: Exception, options: list[str]) -> str:
    """A sentence for an error of Hydra's: which option, and what to write instead."""
    message = str(error).strip()
    first = message.splitlines()[0] if message else type(error).__name__
    unknown = re.match(r"Could not override '([^']*)'", message)
    if unknown and unknown[1] not in options:
        return f"there is no option {unknown[1]}{_similar(unknown[1], options)}; --help lists them"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).partition("/")
        return f"{group}={choice} is no choice; choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read as OPTION=VALUE; put a value with commas, braces or quotes "
            f"into quotes of its own, as in 'name=\"a, b\"'"
        )
    if first.startswith("Ambiguous value"):
        return f"{first}; write a list as [a,b], or sweep over the values with --multirun"
    if isinstance(error.__cause__, OmegaConfBaseException):
        reason = str(error.__cause__).splitlines()[0]
        return f"{first.removeprefix('Error merging override ').lstrip('+')}: {reason}"
    return first


def _similar(name: str, options: list[str]) -> str:
    """The option that was perhaps meant: alike as a whole, or in what follows the last dot."""
    by_end = {option.rpartition(".")[2]: option for option in options}
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    near = near or [by_end[end] for end in difflib.get_close_matches(name, list(by_end), n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}" if near else ""
