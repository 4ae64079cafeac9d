"""SGLang's own HTTP tests against our server, as they are in its wheel.

``MAKEREADY_SGLANG`` names a folder into which the wheel was unpacked (``pip download sglang --no-deps``, unzip). Of
SGLang nothing else is needed: what its kits import beside themselves is stood in for, and tests that use it are among
:data:`EXCEPT`. A test there has to fail, or the list is out of date; of :data:`BY_CHANCE` it may.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
from server_process import ServerProcess
from smollm2 import smollm2

pytestmark = pytest.mark.slow
FOLDER = os.environ.get("MAKEREADY_SGLANG")
KITS = {
    "basic_api_contract_kit": "BasicAPIContractMixin",
    "basic_decode_correctness_kit": "BasicDecodeCorrectnessMixin",
    "basic_scheduler_stress_kit": "BasicSchedulerStressMixin",
    "anthropic_messages_kit": "AnthropicMessagesMixin",
    "ebnf_constrained_kit": "EBNFConstrainedMixin",
    "regex_constrained_kit": "RegexConstrainedMixin",
    "json_constrained_kit": "JSONConstrainedMixin",
    "json_mode_kit": "JSONModeMixin",
    "matched_stop_kit": "MatchedStopMixin",
    "abort_timeout_kit": "AbortAllMixin",
}
# Tests that do not pass, and why.
_FACTS = "it wants answers that a model of 135M does not know"
_LLAMA = "its stop_token_ids are of Llama's vocabulary; ids that a model does not have are refused"
EXCEPT: dict[str, str] = {
    "test_basic_math": _FACTS,
    "test_color_completion": _FACTS,
    "test_concurrent_requests": _FACTS,
    "test_json_generate": _LLAMA,
    "test_mix_json_and_other": _LLAMA,
    "test_count_tokens_with_system": "the template of SmolLM2 has a system prompt of its own, which is longer",
    "test_finish_stop_str": "its chat wants a line to end within 1,000 tokens, which this model's does not",
    "test_tool_result_image_content_conversion": "it asks no server, but SGLang's own classes",
}


# Tests that pass or do not by chance, and why.
_ENDLESS = "three samples at temperature 0.5 have to end a word that the grammar lets go on"
BY_CHANCE: dict[str, str] = {
    "test_ebnf_generate_custom_log_format": _ENDLESS,
    "test_regex_generate_custom_log_format": _ENDLESS,
}


class StandIn(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for whatever the kits import of SGLang."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> Any:
        if fullname.partition(".")[0] != "sglang":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def kits() -> Iterator[tuple[type, str]]:
    """Classes of tests, and the names of theirs."""
    if FOLDER is None:
        return
    sys.meta_path.append(finder := Finder())
    try:
        for name, mixin in KITS.items():
            path = Path(FOLDER) / "sglang/test/kits" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"kit_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kind = getattr(module, mixin)
            yield from ((kind, test) for test in sorted(dir(kind)) if test.startswith("test_"))
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]


def marked() -> Iterator[Any]:
    for kind, test in kits():
        reason = EXCEPT.get(test) or BY_CHANCE.get(test)
        marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=test in EXCEPT),)
        yield pytest.param(kind, test, id=test, marks=marks)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    options = ("plan.max_rows=16", "plan.context_len=8192", "plan.max_logprob_tokens=64")
    with ServerProcess(f"checkpoint={smollm2()}", *options, "served_model_name=[smol]") as made:
        yield made


@pytest.mark.skipif(FOLDER is None, reason="MAKEREADY_SGLANG names no folder with SGLang's wheel")
@pytest.mark.parametrize(("kind", "test"), list(marked()))
def test_a_kit(kind: type, test: str, server: ServerProcess) -> None:
    given = {
        "base_url": server.url,
        "model": "smol",
        "served_model_name": "smol",
        "api_key": "none",
        "client": openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0),
        "process": server.process,
        "abort_all_max_new_tokens": 2000,  # more than fit a context are refused
    }
    case: Any = type(kind.__name__, (kind, unittest.TestCase), given)(test)
    case.setUp()
    getattr(case, test)()
    assert server.process.poll() is None
