"""Who imports whom: scripts → engine → graphs → kernels, and a runtime without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "graphs", "engine", "scripts")  # each may import those before it
HEAVY = {"torch", "triton", "transformers"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("makeready", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_name(path): path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))}

# What a runtime on CUDA runs: all of it must import without torch.
RUNTIME = sorted(
    name
    for name in MODULES
    if name in {f"makeready.engine.{m}" for m in ("llm", "loop", "scheduler", "remote.host")}
    or name.startswith(
        (
            "makeready.engine.text.",
            "makeready.graphs.checkpoint.",
            "makeready.graphs.executable.cuda.",
            "makeready.graphs.plan.",
        )
    )
    or (name.startswith("makeready.graphs.models.") and name != "makeready.graphs.models.decoder")
)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: none in functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from at_import(node)


def imports(source: str, name: str, *, package: bool = False, late: bool = True) -> Iterator[str]:
    """Every module that a source may import; ``late`` ones, too: in functions and for type checkers.

    ``from a import b`` gives both ``a`` and ``a.b``, since b may be a module.
    """
    base = name.split(".") if package else name.split(".")[:-1]
    tree = ast.parse(source)
    for node in ast.walk(tree) if late else at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def imports_of(name: str, *, late: bool = True) -> list[str]:
    path = MODULES[name]
    return list(imports(path.read_text(), name, package=path.name == "__init__.py", late=late))


def layer_of(name: str) -> str | None:
    first, *rest = name.split(".")
    if first == "makeready":
        return rest[0] if rest and rest[0] in LAYERS else None
    return first if first in LAYERS else None


def backward(name: str, imported: list[str]) -> list[str]:
    """Imports of a later layer, and of a layer by its folder's bare name."""
    rank = LAYERS.index(layer_of(name) or "")
    return [
        other
        for other in imported
        if (layer := layer_of(other)) is not None
        and (LAYERS.index(layer) > rank or (not other.startswith("makeready.") and layer != "scripts"))
    ]


def test_the_finder_sees_every_way_to_import():
    source = """
import makeready.engine.loop as loop
from makeready.graphs.plan import plan
from ..engine import llm
from . import cpu
def late():
    import torch.nn
    import importlib
    importlib.import_module("makeready.engine.text")
if TYPE_CHECKING:
    from makeready.engine.kv.pool import PagePool
"""
    found = set(imports(source, "makeready.graphs.example"))
    assert {
        "makeready.engine.loop",
        "makeready.graphs.plan.plan",
        "makeready.engine.llm",
        "makeready.graphs.cpu",
        "torch.nn",
        "makeready.engine.text",
        "makeready.engine.kv.pool",
    } <= found
    assert set(backward("makeready.graphs.example", sorted(found))) == {
        "makeready.engine",
        "makeready.engine.loop",
        "makeready.engine.llm",
        "makeready.engine.text",
        "makeready.engine.kv.pool",
        "makeready.engine.kv.pool.PagePool",
    }
    early = set(imports(source, "makeready.graphs.example", late=False))
    assert early & found == early
    assert "makeready.engine.llm" in early
    assert not early & {"torch.nn", "makeready.engine.text", "makeready.engine.kv.pool"}
    inside = imports("from . import attention", "makeready.kernels", package=True)
    assert "makeready.kernels.attention" in set(inside)


def test_imports_never_run_backwards():
    assert len(MODULES) > 50
    wrong = {name: found for name in MODULES if (found := backward(name, imports_of(name)))}
    assert not wrong, "imports run scripts → engine → graphs → kernels"


def test_the_plan_knows_no_planner():
    """What the runtime reads imports neither what makes plans nor what runs them."""
    others = ("planner", "passes", "quant", "layers", "steps", "executable")
    wrong = {
        name: found
        for name in MODULES
        if name.startswith("makeready.graphs.plan.")
        and (found := [other for other in imports_of(name) if other.split(".")[2:3] in [[o] for o in others]])
    }
    assert not wrong


def reachable(*names: str) -> set[str]:
    """These modules and all that they import as they are imported."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen and name in MODULES:
            seen.add(name)
            waiting += imports_of(name, late=False)
    return seen


def test_the_scheduler_knows_no_text_and_no_replies():
    """What every rank of a plan would run alike: sequences in, batches out."""
    kinds = [name for name in MODULES if name.startswith("makeready.engine.steps.")]
    found = reachable("makeready.engine.scheduler", "makeready.engine.staging", *kinds)
    assert {"makeready.engine.seats", "makeready.engine.policy", "makeready.engine.sequence"} <= found
    others = ("text", "reply", "feed", "llm", "entrypoints", "protocol")
    assert not {name for name in found if name.startswith(tuple(f"makeready.engine.{o}" for o in others))}
    assert "makeready.engine.text.detokenize" in reachable(
        "makeready.engine.loop"
    )  # or nothing would be found


def test_protocols_know_neither_batch_files_nor_servers():
    protocols = [name for name in MODULES if name.startswith("makeready.engine.protocol.")]
    assert len(protocols) >= 4
    others = tuple(f"makeready.engine.{other}" for other in ("entrypoints", "server", "remote"))
    assert not {name for name in reachable(*protocols) if name.startswith(others)}


def test_the_engines_process_knows_no_server_and_no_http():
    found = reachable("makeready.engine.remote.host")
    assert "makeready.engine.loop" in found
    assert not {
        name for name in found if name.startswith(("makeready.engine.server", "makeready.engine.entrypoints"))
    }
    web = {"starlette", "uvicorn", "httptools", "uvloop", "prometheus_client", "asyncio"}
    assert not {name for name in found if web & {other.split(".")[0] for other in imports_of(name)}}


def test_a_protocol_on_the_way_through_the_server_is_named_by_its_own_files():
    """Adding one touches its folder of bodies and answers, and its file of routes."""
    own = (
        "makeready.engine.protocol.sglang",
        "makeready.engine.server.routes.sglang",
        "makeready.engine.server.rpc",  # SGLang's service
    )
    engine = [name for name in MODULES if name.startswith("makeready.engine.")]
    named = {name for name in engine if any(".sglang" in other for other in imports_of(name))}
    assert named
    assert all(name.startswith(own) for name in named)


@pytest.mark.parametrize("layer", ["engine", "graphs", "kernels"])
def test_layers_are_no_packages_of_their_own(layer):
    """A top-level package called kernels would be taken by transformers for Hugging Face's."""
    assert (ROOT / layer).is_dir()
    assert not (ROOT / layer / "__init__.py").exists()


def test_the_runtime_never_names_torch():
    """Modules that the runtime imports do not name torch, not even in a function.

    What they import late themselves is the planner and the CPU backend, for who asks for these.
    """
    seen: set[str] = set()
    waiting = list(RUNTIME)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        heavy = {other for other in imports_of(name) if other.split(".")[0] in HEAVY}
        assert not heavy, f"{name} imports {heavy}, and a CUDA runtime imports {name}"
        waiting += [other for other in imports_of(name, late=False) if other in MODULES]
    assert {"makeready.engine.llm", "makeready.graphs.plan.artifact", "makeready.kernels.spec"} <= seen


BLOCKED_IMPORT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("the blocker does not block")
failed = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{{name}}: {{error}}")
sys.exit("\\n".join(failed) or None)
"""


def test_the_runtime_imports_without_torch():
    program = BLOCKED_IMPORT.format(heavy=sorted(HEAVY), modules=RUNTIME)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
