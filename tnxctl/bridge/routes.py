"""Routes: which handler answers a method and a path, and which verb of the daemon it stands for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from tnxctl.bridge.http import HttpError, Request, Response
from tnxctl.protocol import wire

Handler = Callable[[Any, Request], Awaitable[Response]]
"""`async def handler(bridge: Bridge, request: Request) -> Response`. It raises HttpError, or an error of `tnxctl`."""


class Route(NamedTuple):
    """One route.

    Attributes:
        method: GET, POST, ...
        pattern: a path, in which {name} stands for any segment: "/v2/models/{model}/infer".
        handler: answers it.
        verb: what it asks of the daemon, whose role it needs (`tnxctl.protocol.roles`); None: nothing that anybody may
            not know.
        names: of the segments, in order.
        takes, gives: types of the JSON documents in the bodies of a request and of its response, or the media type of
            what is no JSON; None: not told. They are for the description of the interface (`openapi.py`).
    """

    method: str
    pattern: str
    handler: Handler
    verb: type[wire.Request] | None
    names: tuple[str, ...]
    takes: Any = None
    gives: Any = None


class _Node:
    """A place in the tree of segments. `any` is what follows a segment with a name."""

    __slots__ = ("any", "children", "routes")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.any: _Node | None = None
        self.routes: dict[str, Route] = {}


class Routes:
    """All routes of a bridge. A segment as it is written goes before one with a name."""

    def __init__(self) -> None:
        self._root = _Node()
        self._fixed: dict[tuple[str, str], Route] = {}  # those without names, which need no walk
        self._found: dict[tuple[str, str], tuple[Route, dict[str, str]]] = {}  # those that were asked for lately

    def add(
        self,
        method: str,
        pattern: str,
        handler: Handler,
        verb: type[wire.Request] | None,
        *,
        takes: Any = None,
        gives: Any = None,
    ) -> None:
        """Add a route. Raises ValueError if there is one for it already."""
        node, names = self._root, []
        for segment in pattern.removeprefix("/").split("/"):
            if segment.startswith("{"):
                names.append(segment[1:-1])
                node.any = node = node.any or _Node()
            else:
                node = node.children.setdefault(segment, _Node())
        if method in node.routes:
            raise ValueError(f"{method} {pattern} has a handler already")
        node.routes[method] = route = Route(method, pattern, handler, verb, tuple(names), takes, gives)
        if not names:
            self._fixed[method, pattern] = route

    def __iter__(self) -> Iterator[Route]:
        yield from _all(self._root)

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """The route for a path as it was sent, percent-encoded, and what its named segments hold, decoded.

        Raises:
            HttpError: there is none (404), none for that method (405), or a segment is not UTF-8 (400).
        """
        route = self._fixed.get((method, path))
        if route is not None:
            return route, {}
        found = self._found.get((method, path))
        if found is None:
            found = self._search(method, path)
            if len(path) <= _MOST_REMEMBERED_CHARACTERS:
                if len(self._found) >= _MOST_REMEMBERED:
                    self._found.clear()
                self._found[method, path] = found
        route, values = found
        return route, values.copy()

    def _search(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        segments = path.removeprefix("/").split("/", _MOST_SEGMENTS)
        methods: set[str] = set()
        for node, values in _matches(self._root, segments, 0, ()):
            route = node.routes.get(method)
            if route is not None:
                return route, dict(zip(route.names, map(_decode, values), strict=True))
            methods |= node.routes.keys()
        if methods:
            if "GET" in methods:
                methods.add("HEAD")
            allowed = ", ".join(sorted(methods))
            raise HttpError(405, f"this path takes {allowed} alone", ((b"allow", allowed.encode()),))
        raise HttpError(404, f"there is nothing at {_excerpt(path)}")


_MOST_SEGMENTS = 16

_MOST_REMEMBERED, _MOST_REMEMBERED_CHARACTERS = 1024, 256
"""Paths that need no walk a second time, and how long they may be: clients ask for a few models again and again."""


def _matches(
    node: _Node, segments: list[str], at: int, values: tuple[str, ...]
) -> Iterator[tuple[_Node, tuple[str, ...]]]:
    """Every place that the segments from `at` on lead to, the most literal first, with the values of its names."""
    if at == len(segments):
        yield node, values
        return
    segment = segments[at]
    child = node.children.get(segment)
    if child is not None:
        yield from _matches(child, segments, at + 1, values)
    if node.any is not None and segment:
        yield from _matches(node.any, segments, at + 1, (*values, segment))


def _all(node: _Node) -> Iterator[Route]:
    yield from node.routes.values()
    for child in node.children.values():
        yield from _all(child)
    if node.any is not None:
        yield from _all(node.any)


def _decode(segment: str) -> str:
    if "%" not in segment:
        return segment
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise HttpError(400, f"{_excerpt(segment)} in the path is not UTF-8") from None


def _excerpt(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
