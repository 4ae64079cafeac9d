"""Who may ask a server for what."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from enum import Enum

from makeready.engine.server.problem import ServeError
from makeready.engine.server.settings import ServerSettings


class Access(Enum):
    """Who may ask: anyone, who has an API key, or who has the admin's."""

    FREE = "free"
    USER = "user"
    ADMIN = "admin"


def check_access(access: Access, headers: Mapping[str, str], settings: ServerSettings) -> None:
    """Raise :class:`ServeError` where a key is asked for and not shown.

    Args:
        headers: of the request, by names in small letters.
    """
    admin = () if settings.admin_key is None else (settings.admin_key,)
    wanted = admin or settings.api_keys if access is Access.ADMIN else (*settings.api_keys, *admin)
    if access is Access.FREE or not (settings.api_keys if access is Access.USER else wanted):
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    shown = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    # All are compared, each in constant time: how long it takes says nothing of any.
    if not sum(hmac.compare_digest(key.encode(), shown.encode()) for key in wanted):
        what = "the admin's key" if access is Access.ADMIN and admin else "an API key"
        message = f"{what} is needed; send it as Authorization: Bearer KEY"
        raise ServeError(401, message, code="invalid_api_key")
