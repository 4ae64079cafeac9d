"""From a command line to a job: Hydra composes the options, errors become one sentence, no folder is made.

Three things are arranged before Hydra sees the command line. Values that are text or paths are quoted, so
that ``prompt="Well, who's {there}?"`` means what it says. Lists of texts are read as people type them. And
``plan=FOLDER`` becomes ``plan.path=FOLDER`` unless FOLDER is the name of a preset, since Hydra knows ``plan`` as
a group of options.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from makeready.engine.entrypoints.describe import (
    describe,
    literals,
    mappings,
    option_table,
    preset_table,
    switches,
    text_lists,
)
from makeready.engine.entrypoints.ending import Terminated, ending
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.streams import open_streams, patient_stderr
from makeready.engine.entrypoints.texts import texts
from makeready.engine.fields import meant

T = TypeVar("T")

OK, FAILED, MISUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 128 + signal.SIGINT, 128 + 13
TERMINATED = 128 + signal.SIGTERM
_QUESTION = "\N{NULL}???"  # no command line holds a zero byte


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
        ("command", partial(_called, sys.argv[:1])),
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
    try:
        made = arranged(given, literals(kind), mappings(kind), folder, text_lists(kind), switches(kind))
    except UsageError as error:
        return _say(f"{error}", MISUSED)
    sys.argv = [str(script), *(_by_name(argument, groups) for argument in made)]
    try:
        main = hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)
        with patient_stderr(), ending(), _plain_warnings():
            codes.append(_reported(main, meanings))
    finally:
        sys.argv = before
    return max(codes)


def _called(program: Sequence[str], name: str) -> str:
    """How the command ``name`` is called where ``program`` was: by the console command or as a file of the tree."""
    by_console = [Path(path).stem for path in program] == ["makeready"]
    return f"makeready {name.removesuffix('_plan')}" if by_console else f"python scripts/{name}.py"


def arranged(
    arguments: Sequence[str],
    verbatim: frozenset[str],
    open_ended: frozenset[str],
    presets: set[str] | None,
    lists: Mapping[str, bool] = MappingProxyType({}),
    booleans: frozenset[str] = frozenset(),
) -> list[str]:
    """The command line as Hydra should see it.

    Args:
        arguments: as the shell gave them.
        verbatim: options whose values are quoted; in a sweep, where commas separate values, none is.
        open_ended: options that map any names, for which Hydra wants a ``++``.
        presets: choices of the group ``plan``; None where a plan is not read from a folder.
        lists: options that are lists of texts, and whether these have escapes; left to Hydra in a sweep.
        booleans: options that are true or false, for which OmegaConf would take any number or ``on``.

    Raises:
        UsageError: a list that cannot be read, or what is neither true nor false.
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    made = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name.startswith("+hydra") and not name.startswith("++hydra"):
            name = name.lstrip("+")  # Hydra would take any name then, and nobody would read it
        if name == "plan" and presets is not None and not set(value.split(",")) <= presets:
            name = "plan.path"
        if name == "speculative.model":  # a choice of the group ``model`` for another place
            name = "model@speculative.model"
        if not equals or name.startswith("-"):
            made.append(argument)
        elif name in verbatim and not sweep:
            made.append(f"{name}={quoted(value)}")
        elif name in lists and not sweep:
            read = texts(name, value, escapes=lists[name])
            made.append(f"{name}=[{','.join(map(quoted, read))}]")
        elif name in booleans and not sweep and value.lower() not in ("true", "false", "null"):
            raise UsageError(f"{name}={value} must be true or false")
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
    """``text`` so that Hydra and OmegaConf read it back unchanged: no interpolation, no list, no null.

    But for ``???``, OmegaConf's word for what is missing, which nothing escapes; :func:`restored` does.
    """
    text = _QUESTION if text == "???" else text
    safe = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return QuotedString(text=safe, quote=Quote.single).with_quotes()


def _job(config: DictConfig, kind: type[T], overrides: Sequence[str]) -> T:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UsageError(f"{missing[0].removesuffix('.path')}= is missing: {describe(kind)[missing[0]]}")
    job: Any = restored(OmegaConf.to_object(config))
    job.check({override.partition("=")[0].lstrip("+~") for override in overrides})
    return job


def restored(value: Any) -> Any:
    """Options in which texts are as the user gave them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            setattr(value, field.name, restored(getattr(value, field.name)))
        return value
    if isinstance(value, list):
        return [restored(item) for item in value]
    return "???" if value == _QUESTION else value


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
def _plain_warnings() -> Iterator[None]:
    """Print our warnings as sentences, without the place in the code."""
    usual = warnings.formatwarning

    def plain(message: Any, category: type[Warning], *place: Any) -> str:
        ours = category.__module__.startswith("makeready.")
        return f"warning: {message}\n" if ours else usual(message, category, *place)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


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
    """The option that was perhaps meant."""
    near = meant(name, options)
    return f"; did you mean {near}" if near else ""
