"""Plans that somebody changed and signed again, tried one after the other; run as a script, for a crash ends it.

    python hostile_plans.py FOLDER SEED COUNT

prints what happened to each change, a line of JSON each: refused, ran, or the name of an error that is none of ours.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from makeready.graphs.plan.codec import canonical

ODD_INTEGERS = (-1, 0, 1, 2, 3, 7, 16_000, 2**20, 2**31 - 1, 2**31, 2**40, 2**63, 10**30)
ODD_TEXTS = ("", "x", "../x", "positions", "T", "reference", "int64", "float16", "rows", "\0")
FILES = ("plan.json", "weights.json", "config.json", "programs/decode.json", "programs/extend.json")


def seal(folder: Path) -> None:
    """Give every file the digest and the size that the manifest states."""
    manifest = json.loads((folder / "plan.json").read_text())
    manifest.pop("digest", None)
    for name in manifest["files"] if isinstance(manifest["files"], dict) else ():
        raw = (folder / name).read_bytes()
        manifest["files"][name], manifest["sizes"][name] = hashlib.sha256(raw).hexdigest(), len(raw)
    manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / "plan.json").write_bytes(canonical(manifest))


def change(folder: Path, name: str, edit: Any) -> None:
    """Edit the content of one file of a plan and sign it again."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_bytes(canonical(content))
    seal(folder)


def leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list):
            yield from leaves(value)


def odd(pick: random.Random, value: Any) -> Any:
    """Another value, most often of the same kind."""
    if isinstance(value, bool) or pick.random() < 0.1:
        return pick.choice([None, True, False, [], {}, "x", 3, 0.5, -1])
    if isinstance(value, int):
        return pick.choice([*ODD_INTEGERS, value + 1, value - 1, value * 2, value // 2])
    if isinstance(value, float):
        return pick.choice([0.0, -1.0, 1e308, 5e-324, value * 2])
    if isinstance(value, str):
        return pick.choice(ODD_TEXTS)
    if isinstance(value, list):
        return pick.choice([value[:-1], value[1:], value + value[:1], value[::-1], []])
    return pick.choice([{}, dict(list(value.items())[:-1])]) if isinstance(value, dict) else 1


def main(source: Path, seed: int, count: int) -> None:
    import torch
    from tiny_programs import LLAMA, dummy

    from makeready.engine.llm import LLM, SamplingParams
    from makeready.graphs.plan import artifact
    from makeready.graphs.plan.plan import PlanError

    torch.set_num_threads(1)
    pick = random.Random(seed)
    for number in range(count):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "plan"
            shutil.copytree(source, folder)
            name = pick.choice(FILES)
            content = json.loads((folder / name).read_text())
            places = [
                (node, key)
                for node, key in leaves(content)
                if key not in ("digest", "files", "sizes", "schema")
            ]
            said = []
            for _ in range(pick.choice((1, 1, 1, 2))):
                node, key = pick.choice(places)
                if isinstance(node, list) and not key < len(node):
                    continue
                before = node[key]
                node[key] = odd(pick, before)
                said.append(f"{key}: {before!r:.60} -> {node[key]!r:.60}")
            print(json.dumps([number, name, said]), end=" ", flush=True)
            try:
                (folder / name).write_bytes(canonical(content))
                seal(folder)
            except (AttributeError, KeyError, TypeError, ValueError):
                print('"unsigned"', flush=True)
                continue
            try:
                llm = LLM(dummy(LLAMA), artifact.load(folder), kv_memory_gib=1e-4)
                params = SamplingParams(temperature=0, max_new_tokens=3)
                outputs = llm.generate(token_ids=[[1, 2, 3], [4]], sampling=params)
                outcome = "ran" if all(output.error is None for output in outputs) else "refused rows"
            except PlanError as error:
                outcome = f"refused: {error}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
