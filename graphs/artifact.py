"""A plan on disk: readable JSON, content-addressed, written atomically, checked when read.

    plan.json               target, limits, options, KV geometry, buckets, memory, and the digests below
    weights.json            recipe and place of every parameter
    programs/<phase>.json   launches and arena buffers; on a GPU the kernel nodes of each bucket
    loading.json            programs that make parameters while weights are loaded, where there are any
    config.json             the checkpoint's config, normalised
    tuned.json              choices that measured best, by device, where somebody measured
    binaries.json           compiled kernels, and
    kernels/<key>.cubin     the machine code of each, where the target is a GPU
    golden.json             predicted tokens, where they were asked for; no part of the plan: graphs/golden.py

``plan.json`` carries the SHA-256 of every other JSON file and one over its own remaining content, the
plan's digest; ``binaries.json`` carries that of each kernel. No path, host, time or environment enters any
of them. ``tuned.json`` stands apart: it names the digest of the plan that it is for, and the plan is the same
with and without it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from makeready.graphs.codec import CodecError, canonical, from_json, to_json
from makeready.graphs.plan import SCHEMA, Plan, PlanError

MANIFEST, TUNED = "plan.json", "tuned.json"
NAMES = re.compile(
    r"(plan|weights|loading|config|tuned|golden|binaries|programs/[^/]+)\.json|programs|kernels|kernels/[^/]+\.cubin"
)


def digest(plan: Plan) -> str:
    """SHA-256 of everything the plan says but what was measured, as 64 hexadecimal digits."""
    return _split(plan)[MANIFEST]["digest"]


def encode(plan: Plan) -> dict[str, bytes]:
    """The plan's files by relative path; the same plan gives the same bytes anywhere."""
    data = _split(plan)
    files = {name: canonical(content) for name, content in data.items()}
    if plan.tuned:
        files[TUNED] = _tuned(plan, data[MANIFEST]["digest"])
    return files | {_cubin(key): plan.cubins[key] for key in sorted(plan.binaries)}


def save(plan: Plan, folder: str | Path) -> Path:
    """Write the plan's files to ``folder``, which appears complete or not at all.

    An older plan in ``folder`` is replaced. A folder that holds anything else is left alone.

    Raises:
        PlanError: ``folder`` exists and holds no plan, or something beside one.
    """
    folder = Path(folder)
    _check_replaceable(folder)
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


def save_tuned(plan: Plan, folder: str | Path) -> None:
    """Write ``plan.tuned`` beside the rest of the plan in ``folder``, all of it or nothing.

    Raises:
        PlanError: there is another plan in ``folder``.
    """
    folder, made = Path(folder), digest(plan)
    raw = _bytes(folder / MANIFEST)
    if _parse(folder / MANIFEST, raw)["digest"] != made:
        raise PlanError(f"{folder} holds another plan than the one that was measured; tune that one")
    with tempfile.NamedTemporaryFile(dir=folder.parent, prefix=f".{folder.name}-", delete=False) as file:
        try:
            file.write(_tuned(plan, made))
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, folder / TUNED)
        except BaseException:
            os.unlink(file.name)
            raise


def _tuned(plan: Plan, made: str) -> bytes:
    return canonical({"plan": made, "choices": to_json(plan.tuned)})


def load(folder: str | Path) -> Plan:
    """Read and check the plan in ``folder``.

    Raises:
        PlanError: no plan there, a file is missing or damaged, or the schema is another version's.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise PlanError(f"{folder} holds no plan (no {MANIFEST}); make one with scripts/compile.py")
    raw = _bytes(folder / MANIFEST)
    manifest = _parse(folder / MANIFEST, raw)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise PlanError(
            f"{folder / MANIFEST}: schema is {schema!r}, this version reads {SCHEMA}; compile the plan again"
        )
    written = _is_canonical(raw, manifest)
    claimed = manifest.pop("digest", None)
    if not written or claimed != _sha(canonical(manifest)):
        raise PlanError(f"{folder / MANIFEST}: digest does not match its content; compile the plan again")
    data = {k: v for k, v in manifest.items() if k != "files"}
    for name, expected in manifest["files"].items():
        raw = _bytes(folder / name)
        if _sha(raw) != expected:
            raise PlanError(f"{folder / name}: content does not match its digest; compile the plan again")
        _insert(data, name, _parse(folder / name, raw))
    data["tuned"] = _read_tuned(folder, str(claimed))
    try:
        plan = from_json(Plan, data)
    except CodecError as error:
        raise PlanError(f"{folder}: {error}; compile the plan again") from None
    _check_axes(plan, folder)
    return replace(plan, cubins={key: _machine_code(plan, key, folder) for key in plan.binaries})


def _check_axes(plan: Plan, folder: Path) -> None:
    """Check that what a plan places depends on axes that its buckets give a length."""
    sizes = [(f"weights of {w.param.name}", w.param.spec, set[str]()) for w in plan.weights]
    for bucket in {b.phase: b for b in plan.buckets}.values():
        program = plan.programs.get(bucket.phase)
        for name, buffer in program.buffers.items() if program is not None else ():
            sizes.append((f"{name} of {bucket.phase} steps", buffer.spec, set(bucket.sizes)))
    for what, spec, known in sizes:
        if not spec.axes <= known:
            axis = min(spec.axes - known)
            raise PlanError(
                f"{folder}: {what}: {spec} depends on axis {axis}, which nothing gives a length; "
                "compile the plan again"
            )


def _read_tuned(folder: Path, made: str) -> Any:
    """The choices in ``tuned.json``; none where there is no such file."""
    path = folder / TUNED
    if not path.exists():
        return {}
    raw = _bytes(path)
    content = _parse(path, raw)
    if not isinstance(content, Mapping) or not _is_canonical(raw, content) or content.get("plan") != made:
        raise PlanError(f"{path} is damaged or for another plan; delete it, and tune again if you like")
    return content.get("choices")


def _machine_code(plan: Plan, key: str, folder: Path) -> bytes:
    raw = _bytes(folder / _cubin(key))
    if _sha(raw) != plan.binaries[key].sha256:
        raise PlanError(f"{folder / _cubin(key)}: content does not match its digest; compile the plan again")
    return raw


def _cubin(key: str) -> str:
    return f"kernels/{key}.cubin"


def _split(plan: Plan) -> dict[str, Any]:
    manifest = to_json(replace(plan, cubins={}, tuned={}))
    files: dict[str, Any] = {
        f"{name}.json": manifest.pop(name)
        for name in ("weights", "loading", "config", "binaries")
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
    except (ValueError, RecursionError):
        raise PlanError(f"{path} is not JSON; compile the plan again") from None
    if not isinstance(data, Mapping | list):
        raise PlanError(f"{path} is not a JSON object; compile the plan again")
    return data


def _is_canonical(raw: bytes, data: Any) -> bool:
    """Whether ``raw`` is what :func:`canonical` writes: a damaged blank or digit may still parse."""
    try:
        return raw == canonical(data)
    except ValueError:  # a number that became infinite
        return False


def _check_replaceable(folder: Path) -> None:
    """Raise unless ``folder`` is absent, empty, or holds the files of a plan and nothing else.

    One walk, which passes over what vanishes meanwhile: another process may be replacing the same plan.
    """
    found = [
        Path(at, name).relative_to(folder).as_posix()
        for at, folders, files in os.walk(folder)
        for name in (*folders, *files)
    ]
    if folder.is_file() or (found and MANIFEST not in found):
        raise PlanError(f"{folder} exists and is no plan; choose another output folder")
    foreign = sorted(name for name in found if not NAMES.fullmatch(name))
    if foreign:
        raise PlanError(
            f"{folder} holds {foreign[0]}, which is no part of a plan; "
            "move it away or choose another output folder"
        )


def _replace(staging: Path, folder: Path) -> None:
    """Move ``staging`` to ``folder``; a plan there is moved aside first and removed last.

    That holds of a plan, too, that another process puts there at the same moment: the last one stays.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        for attempt in itertools.count():
            try:
                os.replace(staging, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            with suppress(FileNotFoundError):
                os.replace(folder, aside / str(attempt))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
