"""A plan on disk: readable JSON, content-addressed, written atomically, checked when read.

    plan.json               target, limits, options, KV geometry, buckets, memory, and the digests below
    weights.json            recipe and place of every parameter
    programs/<phase>.json   launches and arena buffers; on a GPU the kernel nodes of each bucket
    config.json             the checkpoint's config, normalised
    tuned.json              choices that measured best, by device, where there are any
    binaries.json           compiled kernels, and
    kernels/<key>.cubin     the machine code of each, where the target is a GPU

``plan.json`` carries the SHA-256 of every other JSON file and one over its own remaining content, the
plan's digest; ``binaries.json`` carries that of each kernel. No path, host, time or environment enters any
of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from makeready.graphs.codec import CodecError, canonical, from_json, to_json
from makeready.graphs.plan import SCHEMA, Plan, PlanError

MANIFEST = "plan.json"


def digest(plan: Plan) -> str:
    """SHA-256 of everything the plan says, as 64 hexadecimal digits."""
    return _split(plan)[MANIFEST]["digest"]


def encode(plan: Plan) -> dict[str, bytes]:
    """The plan's files by relative path; the same plan gives the same bytes anywhere."""
    files = {name: canonical(data) for name, data in _split(plan).items()}
    return files | {_cubin(key): plan.cubins[key] for key in sorted(plan.binaries)}


def save(plan: Plan, folder: str | Path) -> Path:
    """Write the plan's files to ``folder``, which appears complete or not at all.

    An older plan in ``folder`` is replaced. A folder that holds anything else is left alone.

    Raises:
        PlanError: ``folder`` exists and holds no plan.
    """
    folder = Path(folder)
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).exists())
    ):
        raise PlanError(f"{folder} exists and is no plan; choose another output folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in encode(plan).items():
            (staging / name).parent.mkdir(exist_ok=True)
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        staging.chmod(0o755)
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def load(folder: str | Path) -> Plan:
    """Read and check the plan in ``folder``.

    Raises:
        PlanError: no plan there, a file is missing or damaged, or the schema is another version's.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise PlanError(f"{folder} holds no plan (no {MANIFEST}); make one with scripts/compile.py")
    manifest = _parse(folder / MANIFEST, _bytes(folder / MANIFEST))
    if manifest.get("schema") != SCHEMA:
        raise PlanError(
            f"{folder}: schema is {manifest.get('schema')!r}, this version reads {SCHEMA}; compile the plan again"
        )
    claimed = manifest.pop("digest", None)
    if claimed != _sha(canonical(manifest)):
        raise PlanError(f"{folder / MANIFEST}: digest does not match its content; compile the plan again")
    data = {k: v for k, v in manifest.items() if k != "files"}
    for name, expected in manifest["files"].items():
        raw = _bytes(folder / name)
        if _sha(raw) != expected:
            raise PlanError(f"{folder / name}: content does not match its digest; compile the plan again")
        _insert(data, name, _parse(folder / name, raw))
    try:
        plan = from_json(Plan, data)
    except CodecError as error:
        raise PlanError(f"{folder}: {error}; compile the plan again") from None
    return replace(plan, cubins={key: _machine_code(plan, key, folder) for key in plan.binaries})


def _machine_code(plan: Plan, key: str, folder: Path) -> bytes:
    raw = _bytes(folder / _cubin(key))
    if _sha(raw) != plan.binaries[key].sha256:
        raise PlanError(f"{folder / _cubin(key)}: content does not match its digest; compile the plan again")
    return raw


def _cubin(key: str) -> str:
    return f"kernels/{key}.cubin"


def _split(plan: Plan) -> dict[str, Any]:
    manifest = to_json(replace(plan, cubins={}))
    files: dict[str, Any] = {
        f"{name}.json": manifest.pop(name)
        for name in ("weights", "config", "binaries", "tuned")
        if name in manifest
    }
    files |= {f"programs/{phase}.json": program for phase, program in manifest.pop("programs").items()}
    manifest["files"] = {name: _sha(canonical(data)) for name, data in sorted(files.items())}
    manifest["digest"] = _sha(canonical(manifest))
    return {MANIFEST: manifest, **files}


def _insert(data: dict[str, Any], name: str, content: Any) -> None:
    """Put a file's content back to where :func:`_split` took it from."""
    folder, _, stem = name.removesuffix(".json").rpartition("/")
    if folder:
        data.setdefault(folder, {})[stem] = content
    else:
        data[stem] = content


def _sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); compile the plan again") from None


def _parse(path: Path, raw: bytes) -> Any:
    try:
        data = json.loads(raw)
    except ValueError:
        raise PlanError(f"{path} is not JSON; compile the plan again") from None
    if not isinstance(data, Mapping | list):
        raise PlanError(f"{path} is not a JSON object; compile the plan again")
    return data


def _replace(staging: Path, folder: Path) -> None:
    """Move ``staging`` to ``folder``; an older plan there is moved aside first and removed last."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.replace(folder, old / "plan")
        os.replace(staging, folder)
        shutil.rmtree(old)
    else:
        os.replace(staging, folder)
