"""A plan on disk: readable JSON, content-addressed, written atomically, checked when read.

    plan.json               target, limits, options, KV geometry, buckets, memory, and the digests below
    weights.json            recipe and place of every parameter
    programs/<phase>.json   launches and arena buffers; on a GPU the kernel nodes of each bucket
    loading.json            programs that make parameters while weights are loaded, where there are any
    config.json             the checkpoint's config, normalised
    tuned.json              choices that measured best, by device, where somebody measured
    binaries.json           compiled kernels, and
    kernels/<key>.cubin     the machine code of each, where the target is a GPU
    golden.json             predicted tokens, where they were asked for: no part of the plan (executable/golden.py)

``plan.json`` carries the SHA-256 and the bytes of every other JSON file and a SHA-256 over its own remaining
content, the plan's digest; ``binaries.json`` carries those of each kernel. No path, host, time or environment
enters any of them. ``tuned.json`` stands apart: it names the digest of the plan that it is for, and the plan is
the same with and without it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from makeready.graphs.plan.check import check_plan
from makeready.graphs.plan.check_cuda import KEY
from makeready.graphs.plan.codec import CodecError, canonical, from_json, to_json
from makeready.graphs.plan.plan import SCHEMA, Plan, PlanError

MANIFEST, TUNED = "plan.json", "tuned.json"
PARTS = re.compile(
    r"(weights|loading|config|binaries|programs/[a-z0-9_]{1,64})\.json"
)  # what plan.json may name
MOST_BYTES = 2**30  # of one file: far above any plan's, and short of what would take a machine's memory
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
    raw = regular_bytes(folder / MANIFEST)
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

    Whoever made it may mean ill: only regular files of the stated sizes in ``folder`` are read, and the plan's
    parts are held against each other; see docs/plans.md.

    Raises:
        PlanError: no plan there, a file is missing or damaged, the schema is another version's, or the plan
            contradicts itself.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise PlanError(f"{folder} holds no plan (no {MANIFEST}); make one with scripts/compile.py")
    raw = regular_bytes(folder / MANIFEST)
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
    data = {k: v for k, v in manifest.items() if k not in ("files", "sizes")}
    files, sizes = manifest.get("files"), manifest.get("sizes")
    if not isinstance(files, Mapping) or not isinstance(sizes, Mapping):
        raise PlanError(f"{folder / MANIFEST} does not list the plan's files; compile the plan again")
    for name, expected in files.items():
        if not PARTS.fullmatch(name) or name.removesuffix(".json").partition("/")[0] in manifest:
            raise PlanError(
                f"{folder / MANIFEST} names {name!r}, which is no file of a plan; compile the plan again"
            )
        raw = _stated(folder / name, sizes.get(name), expected)
        _insert(data, name, _parse(folder / name, raw))
    data["tuned"] = _read_tuned(folder, str(claimed))
    try:
        plan = from_json(Plan, data)
    except CodecError as error:
        raise PlanError(f"{folder}: {error}; compile the plan again") from None
    _check_axes(plan, folder)
    try:
        check_plan(plan)
    except PlanError as error:
        raise PlanError(f"{folder}: {error}") from None
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
    raw = regular_bytes(path)
    content = _parse(path, raw)
    if not isinstance(content, Mapping) or not _is_canonical(raw, content) or content.get("plan") != made:
        raise PlanError(f"{path} is damaged or for another plan; delete it, and tune again if you like")
    return content.get("choices")


def _machine_code(plan: Plan, key: str, folder: Path) -> bytes:
    return _stated(folder / _cubin(key), plan.binaries[key].nbytes, plan.binaries[key].sha256)


def _cubin(key: str) -> str:
    assert KEY.fullmatch(key), key
    return f"kernels/{key}.cubin"


def _split(plan: Plan) -> dict[str, Any]:
    manifest = to_json(replace(plan, cubins={}, tuned={}))
    files: dict[str, Any] = {
        f"{name}.json": manifest.pop(name)
        for name in ("weights", "loading", "config", "binaries")
        if name in manifest
    }
    files |= {f"programs/{phase}.json": program for phase, program in manifest.pop("programs").items()}
    written = {name: canonical(data) for name, data in sorted(files.items())}
    manifest["files"] = {name: _sha(raw) for name, raw in written.items()}
    manifest["sizes"] = {name: len(raw) for name, raw in written.items()}
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


def _stated(path: Path, nbytes: Any, sha256: Any) -> bytes:
    """A file's content, where it is what the plan says."""
    raw = regular_bytes(path, nbytes)
    if _sha(raw) != sha256:
        raise PlanError(f"{path}: content does not match its digest; compile the plan again")
    return raw


def regular_bytes(path: Path, nbytes: Any = None) -> bytes:
    """A regular file's content; ``nbytes`` is how long it is said to be, None where nobody said.

    A pipe or a device is neither waited for nor read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); compile the plan again") from None
    held = os.fstat(file)
    if not stat.S_ISREG(held.st_mode):
        os.close(file)
        raise PlanError(f"{path} is no file; compile the plan again")
    with open(file, "rb") as opened:
        if nbytes is not None and held.st_size != nbytes:
            raise PlanError(
                f"{path}: content does not match its digest ({held.st_size} bytes, the plan states {nbytes}); "
                "compile the plan again"
            )
        if held.st_size > MOST_BYTES:
            raise PlanError(
                f"{path} has {held.st_size} bytes, more than any plan's file; compile the plan again"
            )
        try:
            return opened.read(held.st_size)
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
