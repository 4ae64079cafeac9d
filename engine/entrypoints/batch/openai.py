"""OpenAI's batch format: rows of ``custom_id``, ``method``, ``url`` and ``body``, for chat and completions.

Source of the shapes: OpenAI's API reference, "Batch" (https://platform.openai.com/docs/api-reference/batch); bodies
and answers are those of its other requests: :mod:`makeready.engine.protocol.openai`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.entrypoints.batch.base import RowError
from makeready.engine.output import Output
from makeready.engine.protocol.asked import Ask, kind_of
from makeready.engine.protocol.openai import answer, body
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.tokenizer import Tokenizer

ROW = ("custom_id", "method", "url", "body")
URLS = (body.CHAT, body.COMPLETIONS)


class OpenAIFormat:
    """``{"custom_id": ..., "body": {...}}`` to ``{"custom_id": ..., "response": {...}, "error": null}``."""

    name = "openai"

    def read(self, fields: Mapping[str, Any]) -> Ask:
        """The request of a row.

        Raises:
            AskError: a field is missing, of the wrong type, unknown, or of something that is not served.
        """
        _check(fields)
        return body.read(fields["url"], fields["body"])

    def answer(
        self,
        fields: Mapping[str, Any],
        outputs: Sequence[Output],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        number: int,
    ) -> dict[str, Any]:
        """A response of status 200 with a chat.completion or text_completion object."""
        identity = _identity(fields, number)
        made = answer.answer(fields["url"], fields["body"], outputs, params, tokenizer, identity)
        return _row(fields, identity, 200, made, None)

    def refusal(
        self, fields: Mapping[str, Any], message: str, field: str | None, number: int
    ) -> dict[str, Any]:
        """A response of status 400; the same reason stands under ``error`` for who looks only there."""
        given = fields.get("body")
        made = answer.refusal(given if isinstance(given, dict) else {}, message, field)
        error = {"code": "invalid_request_error", "message": made["error"]["message"], "line": number}
        return _row(fields, _identity(fields, number), 400, made, error)


def _check(fields: Mapping[str, Any]) -> None:
    """Raise :class:`RowError` for what is not as it must be around a body."""
    missing = [name for name in ROW if name not in fields]
    if missing:
        raise RowError(f"{missing[0]} is missing; a row has {', '.join(ROW)}", missing[0])
    unknown = [name for name in fields if name not in ROW]
    if unknown:
        raise RowError(f"there is no field {unknown[0]!r}; a row has {', '.join(ROW)}", unknown[0])
    if not isinstance(fields["custom_id"], str):
        raise RowError("custom_id must be a string", "custom_id")
    if fields["method"] != "POST":
        raise RowError(f"method is {fields['method']!r}; it must be POST", "method")
    if fields["url"] not in URLS:
        raise RowError(f"url is {fields['url']!r}; it must be {' or '.join(URLS)}", "url")
    if not isinstance(fields["body"], dict):
        raise RowError(f"body must be an object, not {kind_of(fields['body'])}", "body")


def _row(
    fields: Mapping[str, Any], identity: str, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{identity}",
        "custom_id": fields.get("custom_id"),
        "response": {"status_code": status, "request_id": f"req_{identity}", "body": body},
        "error": error,
    }


def _identity(fields: Mapping[str, Any], number: int) -> str:
    """Of the row's place and name, so that a row that runs again has the same one."""
    return hashlib.sha256(f"{number} {fields.get('custom_id')!r}".encode(errors="replace")).hexdigest()[:24]
