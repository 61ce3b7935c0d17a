"""All routes of an app."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute


def all_routes(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, BaseRoute]]:
    """Each route with its whole path. A mount of routes is followed; a mount of another app is a route itself."""
    for route in routes:
        if isinstance(route, Mount) and route.routes:
            for path, inner in all_routes(route.routes):
                yield route.path + path, inner
        else:
            assert isinstance(route, Route | WebSocketRoute | Mount)
            yield route.path, route


def http_routes(routes: Iterable[BaseRoute]) -> list[tuple[str, Route]]:
    """The whole paths and the routes of all HTTP endpoints."""
    return [(path, route) for path, route in all_routes(routes) if isinstance(route, Route)]


def methods_of(route: Route) -> set[str]:
    """The methods that a route answers, in its function or in its class."""
    return set(route.methods or [name for name in METHODS if hasattr(route.endpoint, name.lower())])


def filled(path: str, id: str, item: str = "msg_1") -> str:
    """A path with ids in place of its parameters."""
    return re.sub("{id.*?}", id, path).replace("{item}", item)


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
