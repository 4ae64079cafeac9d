"""The scripts as functions: a process each would cost three seconds, most of it imports."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
SCRIPTS = ("compile", "generate", "inspect_plan", "bench")

# A checkpoint of 40 kB that needs no file and has no tokenizer.
TINY = (
    "checkpoint=dummy",
    "model=smollm2_135m",
    "model.vocab_size=97",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.max_position_embeddings=64",
)


@cache
def module(name: str) -> ModuleType:
    """scripts/<name>.py, imported under another name."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def script(name: str) -> Callable[..., int]:
    """The script's main, taking the command line as arguments and giving the exit code."""
    main = module(name).main
    return lambda *arguments: main([str(argument) for argument in arguments])
