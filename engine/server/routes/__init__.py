"""Routes, one file a protocol; what is put here is found by itself.

A module has ``ROUTES``, a list of :class:`makeready.engine.server.route.Route`. An endpoint reads its body by a
module of ``engine/protocol``, has the engine run what is asked for (``exchange.start``), and answers, whole or as a
stream.
"""

from __future__ import annotations

import importlib
import pkgutil

from makeready.engine.server.route import Route


def all_routes() -> list[Route]:
    """The routes of every module here, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [route for name in names for route in importlib.import_module(f"{__name__}.{name}").ROUTES]
