"""The commands that need no extra run with what the plain install has, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from scripts_in_process import TINY

PROGRAM = """
import json, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Missing())
sys.argv = ["makeready", *json.loads(sys.argv[2])]
from makeready.scripts.main import main
sys.exit(main())
"""
ROWS = (
    {"token_ids": [1, 2, 3]},
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": [5], "max_tokens": 2},
    },
)


def installed(*names: str) -> set[str]:
    """Distributions and all that they need here, without extras."""
    found: set[str] = set()
    left = list(names)
    while left:
        one = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if one in found:
            continue
        try:
            needs = metadata.requires(one) or []
        except metadata.PackageNotFoundError:  # by its marker not for this Python
            continue
        found.add(one)
        left += [re.split(r"[\s<>=!~;\[(]", need)[0] for need in needs if "extra ==" not in need]
    return found


def all_but(own: set[str]) -> list[str]:
    """Modules that other distributions have."""
    return [
        module
        for module, distributions in metadata.packages_distributions().items()
        if not own & {re.sub(r"[-_.]+", "-", each).lower() for each in distributions}
    ]


def test_a_server_imports_no_other_extra() -> None:
    extra = [
        re.split(r"[\s<>=!~;\[(]", need)[0]
        for need in metadata.requires("makeready") or []
        if re.search(r"extra == .serve.", need)
    ]
    missing = all_but(installed("makeready", *extra))
    assert {"grpc", "opentelemetry", "pyarrow", "triton"} <= set(missing)
    assert not {"msgspec", "starlette"} & set(missing)
    program = PROGRAM.partition("sys.argv =")[0] + "import makeready.engine.server.run"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(missing)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_import_no_extra(tmp_path: Path) -> None:
    missing = all_but(installed("makeready"))
    assert {"msgspec", "starlette", "pyarrow", "transformers", "triton"} <= set(missing)
    assert not {"torch", "hydra", "llguidance", "tokenizers"} & set(missing)
    for at, row in enumerate(ROWS):
        (tmp_path / f"in{at}.jsonl").write_text(json.dumps(row) + "\n")
    commands = [
        ["compile", *TINY, "output=plan"],
        ["inspect", "plan=plan", "html=plan.html"],
        ["predict", "plan=plan"],
        *(
            ["generate", *TINY, "sampling.max_new_tokens=2", f"prompts=in{at}.jsonl", f"output=out{at}.jsonl"]
            for at in range(len(ROWS))
        ),
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(missing), json.dumps(command)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert "error" not in json.loads((tmp_path / "out0.jsonl").read_text())
    assert json.loads((tmp_path / "out1.jsonl").read_text())["response"]["status_code"] == 200
