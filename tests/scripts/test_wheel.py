"""What is in a wheel: the console command and its presets work in an environment of their own, outside the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from scripts_in_process import CONF, ROOT, TINY

from makeready.engine.entrypoints import cli
from makeready.graphs.plan import artifact

pytestmark = pytest.mark.slow
SOURCES = ("engine", "graphs", "kernels", "scripts", "conf")
IGNORED = shutil.ignore_patterns("__pycache__", "_cpu_ops*", "node_modules")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def call(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree; without the C extension, which is optional and takes its time."""
    if not all(map(find_spec, ("pip", "setuptools"))):  # importing setuptools behind distutils fails
        pytest.skip("needs pip and setuptools")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=IGNORED)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    built = call(*pip, "--wheel-dir", "dist", ".", cwd=tree, CC="/bin/false")
    assert built.returncode == 0, built.stderr
    (made,) = (tree / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; what it depends on is lent by this one, whose own makeready is not seen."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    done = call(folder / "bin" / "python", *install, cwd=folder)
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Folders named in a .pth are searched; the .pth files in them, of which one leads to the tree, are not read.
    lent = [p for p in dict.fromkeys((*map(_home, ("torch", "hydra")), sysconfig.get_path("purelib"))) if p]
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in lent))
    return folder


def _home(name: str) -> str:
    """The folder that a package is installed in."""
    module = sys.modules.get(name) or __import__(name)
    return str(Path(str(module.__file__)).parents[1])


def test_every_preset_and_module_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in CONF.rglob("*.yaml"):
        assert f"makeready/conf/{path.relative_to(CONF)}" in names
    for top in ("engine", "graphs", "kernels", "scripts"):
        for path in (ROOT / top).rglob("*.py"):
            assert f"makeready/{path.relative_to(ROOT)}" in names
    for path in (ROOT / "engine/server/page/built").iterdir():
        assert f"makeready/{path.relative_to(ROOT)}" in names
    sources = [path for kind in ("*.cu", "*.h") for path in (ROOT / "kernels" / "csrc").glob(kind)]
    assert sources
    assert {
        f"makeready/{path.relative_to(ROOT)}" for path in sources
    } <= names  # compiled when a plan is made
    assert not [name for name in names if not name.startswith("makeready")]


def test_commands_run_outside_the_tree(environment: Path, tmp_path: Path) -> None:
    makeready, cache = environment / "bin" / "makeready", {"MAKEREADY_CACHE": str(tmp_path / "cache")}
    work = tmp_path / "work"
    work.mkdir()
    (work / "in.jsonl").write_text('{"token_ids": [1, 2, 3]}\n{"token_ids": [4, 5]}\n')

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = call(makeready, *arguments, cwd=work, **cache)
        assert done.returncode == code, done.stderr
        assert str(ROOT) not in done.stdout + done.stderr
        return done

    found = call(environment / "bin" / "python", "-c", WHERE, cwd=work)
    assert found.stdout.split() == [str(environment)] * 3, found.stderr
    assert "makeready compile" in run("--help").stdout
    assert "did you mean compile" in run("compil", code=2).stderr
    made = run("compile", *TINY, "plan.max_rows=2", "plan.weight_dtype=float32", "output=plan")
    assert "cpu, chosen for device cpu" in made.stdout
    assert artifact.load(work / "plan").limits.max_rows == 2
    text = run("inspect", "plan=plan")
    assert "LlamaForCausalLM" in text.stdout
    rows = ("prompts=in.jsonl", "output=out.jsonl", "sampling=greedy", "sampling.max_new_tokens=3")
    run("generate", *TINY, "plan=plan", *rows, "sampling.ignore_eos=true")
    answers = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [len(answer["token_ids"]) for answer in answers] == [3, 3]
    few = ("host.rows=[1]", "host.waiting=[0]", "host.steps=2", "host.repeats=1", "output=bench.json")
    run("bench", "suite=[host]", *few)
    assert json.loads((work / "bench.json").read_text())["host"]
    assert "which has one way to run a call" in run("tune", *TINY, "plan=plan", code=1).stderr


def test_help_names_the_command_as_it_was_called() -> None:
    assert cli._called(["/somewhere/bin/makeready"], "tune") == "makeready tune"
    assert cli._called(["scripts/compile.py"], "tune") == "python scripts/tune.py"


WHERE = """
import makeready.engine.llm, makeready.scripts.main, makeready.graphs.plan.plan
from pathlib import Path
for module in (makeready.engine.llm, makeready.scripts.main, makeready.graphs.plan.plan):
    file = Path(module.__file__)
    print(next(str(p) for p in file.parents if (p / "pyvenv.cfg").exists()))
"""
