"""Pages for people: GET / shows a daemon live, GET /docs describes the HTTP interface.

index.html, page.js and page.css are sent as they are, and have all that they need: nothing comes from elsewhere. What
the daemon says reaches the page as JSON and is shown as text; the headers here forbid a browser whatever else it might
run.
"""

from __future__ import annotations

from importlib import resources

from tnxctl.bridge import openapi
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import Headers, Request, Response, json_response
from tnxctl.bridge.page import reference
from tnxctl.bridge.routes import Handler, Routes

HEADERS: Headers = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
"""Headers of every page: scripts, styles and data from this bridge alone, and in no frame of another page."""

HTML = "text/html; charset=utf-8"
_FILES = {
    "/page/page.css": "text/css; charset=utf-8",
    "/page/page.js": "text/javascript; charset=utf-8",
    "/page/icon.svg": "image/svg+xml",
}


def add_to(routes: Routes) -> None:
    """Add the routes of the pages. They need no token, since they tell nothing of the daemon."""
    routes.add("GET", "/", _file("index.html", HTML, "A daemon live: a page for people."), None, gives=HTML)
    for path, media_type in _FILES.items():
        name = path.rpartition("/")[2]
        routes.add("GET", path, _file(name, media_type, f"{name} of that page."), None, gives=media_type)
    routes.add("GET", "/docs", docs, None, gives=HTML)
    routes.add("GET", "/openapi.json", description, None)


def _file(name: str, media_type: str, summary: str) -> Handler:
    response = Response((resources.files(__name__).joinpath(name).read_bytes(),), headers=_headers(media_type))

    async def file(bridge: Bridge, request: Request) -> Response:
        return response

    file.__doc__ = summary
    return file


async def docs(bridge: Bridge, request: Request) -> Response:
    """This description, as a page."""
    return Response((reference.page(_description(bridge)).encode(),), headers=_headers(HTML))


async def description(bridge: Bridge, request: Request) -> Response:
    """This description, as an OpenAPI document."""
    return json_response(_description(bridge))


def _description(bridge: Bridge) -> dict[str, object]:
    told = (route for route in bridge.routes if not route.pattern.startswith("/page/"))
    return openapi.document(told, tokens=bridge.settings.tokens is not None)


def _headers(media_type: str) -> Headers:
    return ((b"content-type", media_type.encode()), *HEADERS)
