"""The console command ``makeready``: ``makeready compile ...`` is ``python scripts/compile.py ...``, and so on."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from importlib.metadata import version

COMMANDS = {
    "compile": "make a plan for a checkpoint; needs no GPU",
    "generate": "answer a prompt, or a file of prompts",
    "inspect": "explain a plan as text or as a page",
    "predict": "say what a plan will do on its device, before there is one",
    "serve": "answer requests over HTTP",
    "tune": "choose the fastest of the ways that a plan carries, on the GPU",
    "bisect": "find the launch that computes something else than the interpreter",
    "bench": "measure speed",
}
_MODULES = {
    "bisect": "bisect_plan",
    "inspect": "inspect_plan",
}  # a script's folder leads Python's path: no name of the standard library


def usage() -> str:
    """What there is to say, a line each."""
    lines = [f"  makeready {name:<9} {meaning}" for name, meaning in COMMANDS.items()]
    more = "makeready COMMAND --help lists a command's options; makeready --version prints the version."
    return "\n".join(["usage: makeready COMMAND OPTION=VALUE ...", "", *lines, "", more])


def main(arguments: list[str] | None = None) -> int:
    """Run a command with ``arguments``, or the process's; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(version("makeready"))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}" if near else ""
        print(f"error: makeready has no command {name}{meant}; it has {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Ctrl-C while modules are imported ends without a traceback
    if name in ("bench", "predict"):
        # Its modules find each other under the name that they have where the script is run as a file.
        sys.modules.setdefault("benchmarks", importlib.import_module("makeready.scripts.benchmarks"))
    return importlib.import_module(f"makeready.scripts.{_MODULES.get(name, name)}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
