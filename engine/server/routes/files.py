"""OpenAI's files and batches, in the folder that the option ``files_dir`` names."""

from __future__ import annotations

import email
import email.policy
from collections.abc import Mapping
from typing import Any

from makeready.engine.entrypoints.batch.openai import URLS
from makeready.engine.protocol.schema import OBJECT, STRING, body_schema
from makeready.engine.server.batches import ENDED, Batch, Batches
from makeready.engine.server.files import Record, Store
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import Answer, Exchange, Route, answer
from makeready.engine.server.routes.openai import shape

MOST_LISTED = 10_000


def _store(exchange: Exchange) -> Store:
    store = exchange.service.store
    if store is None:
        raise ServeError(404, "files are not kept here; start the server with files_dir=FOLDER")
    return store


def _batches(exchange: Exchange) -> Batches:
    _store(exchange)
    assert exchange.service.batches is not None
    return exchange.service.batches


async def _upload(exchange: Exchange) -> Answer:
    store, parts = _store(exchange), parts_of(exchange.headers.get("content-type", ""), exchange.body)
    if "file" not in parts:
        raise ServeError(400, "the form has no file; send it as the part called file", "file")
    purpose = parts.get("purpose", ("", b""))[1].decode(errors="replace")
    if purpose != "batch":
        raise ServeError(400, f"purpose={purpose[:50]!r} is not served; it must be batch", "purpose")
    name, data = parts["file"]
    record = await exchange.service.apart(lambda: store.put(data, name or "upload.jsonl", purpose))
    return answer(record)


def parts_of(kind: str, body: bytes) -> Mapping[str, tuple[str | None, bytes]]:
    """The parts of a form by their names: each one's file name, and what it holds (RFC 7578).

    Raises:
        ServeError: it is no such form.
    """
    if not kind.lower().startswith("multipart/form-data"):
        raise ServeError(400, "a file is sent as multipart/form-data")
    head = f"Content-Type: {kind}\r\n\r\n".encode("latin-1", "replace")
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    found: dict[str, tuple[str | None, bytes]] = {}
    for part in message.iter_parts():  # type: ignore[attr-defined]
        name = part.get_param("name", header="content-disposition")
        if isinstance(name, str):
            data = part.get_payload(decode=True)
            found[name] = part.get_filename(), data if isinstance(data, bytes) else b""
    return found


def _file(exchange: Exchange) -> Record:
    found = _store(exchange).get(exchange.path["id"])
    if found is None:
        raise ServeError(404, f"there is no file {exchange.path['id'][:100]}", "file_id")
    return found


async def _files(exchange: Exchange) -> Answer:
    return answer({"object": "list", "data": list(_store(exchange).all())[:MOST_LISTED], "has_more": False})


async def _one_file(exchange: Exchange) -> Answer:
    return answer(_file(exchange))


async def _content(exchange: Exchange) -> Answer:
    path = _store(exchange).path(_file(exchange).id)
    return Answer(await exchange.service.apart(path.read_bytes), type="application/octet-stream")


async def _delete(exchange: Exchange) -> Answer:
    found = _file(exchange)
    if any(b.input_file_id == found.id and b.status not in ENDED for b in _batches(exchange).all()):
        raise ServeError(400, "a batch still reads the file; cancel it, or wait for its end")
    _store(exchange).remove(found.id)
    return answer({"id": found.id, "object": "file", "deleted": True})


async def _create(exchange: Exchange) -> Answer:
    batches, body = _batches(exchange), exchange.json()
    exchange.ignore([name for name in body if name not in _BATCH])
    file, endpoint = body.get("input_file_id"), body.get("endpoint")
    window, metadata = body.get("completion_window", "24h"), body.get("metadata")
    if not isinstance(file, str) or _store(exchange).get(file) is None:
        raise ServeError(400, f"input_file_id={str(file)[:100]!r} is no file that is here", "input_file_id")
    if endpoint not in URLS:
        raise ServeError(400, f"endpoint must be {' or '.join(URLS)}", "endpoint")
    if window != "24h":
        raise ServeError(
            400, "completion_window must be 24h; a batch runs until it is done", "completion_window"
        )
    if metadata is not None and not isinstance(metadata, dict):
        raise ServeError(400, "metadata must be an object", "metadata")
    return answer(batches.create(endpoint, file, window, metadata))


_BATCH = ("input_file_id", "endpoint", "completion_window", "metadata")


def _batch(exchange: Exchange) -> Batch:
    found = _batches(exchange).get(exchange.path["id"])
    if found is None:
        raise ServeError(404, f"there is no batch {exchange.path['id'][:100]}", "batch_id")
    return found


async def _list(exchange: Exchange) -> Answer:
    made: list[Any] = _batches(exchange).all()[:MOST_LISTED]
    ends: dict[str, Any] = {"first_id": made[0].id, "last_id": made[-1].id} if made else {}
    return answer({"object": "list", "data": made, "has_more": False, **ends})


async def _one(exchange: Exchange) -> Answer:
    return answer(_batch(exchange))


async def _cancel(exchange: Exchange) -> Answer:
    return answer(_batches(exchange).cancel(_batch(exchange)))


_GET = ("GET",)
_UPLOAD = body_schema((), required=("file", "purpose"), file={**STRING, "format": "binary"}, purpose=STRING)
_CREATE = body_schema(
    (),
    required=("input_file_id", "endpoint"),
    input_file_id=STRING,
    endpoint={"enum": list(URLS)},
    completion_window=STRING,
    metadata=OBJECT,
)
ROUTES = [
    Route("/v1/files", _upload, shape, body=_UPLOAD, takes="multipart/form-data"),
    Route("/v1/files", _files, shape, _GET),
    Route("/v1/files/{id}", _one_file, shape, _GET),
    Route("/v1/files/{id}", _delete, shape, ("DELETE",)),
    Route("/v1/files/{id}/content", _content, shape, _GET),
    Route("/v1/batches", _create, shape, body=_CREATE),
    Route("/v1/batches", _list, shape, _GET),
    Route("/v1/batches/{id}", _one, shape, _GET),
    Route("/v1/batches/{id}/cancel", _cancel, shape),
]
