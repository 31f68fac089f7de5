"""Routes: what is remembered of paths that were asked for."""

from __future__ import annotations

from typing import Any

import pytest

from tnxctl.bridge import routes as routes_module
from tnxctl.bridge.http import HttpError, Request, Response
from tnxctl.bridge.routes import Routes


async def handler(bridge: Any, request: Request) -> Response:
    return Response()


@pytest.fixture
def routes() -> Routes:
    made = Routes()
    made.add("POST", "/v2/models/{model}/infer", handler, None)
    return made


def test_a_path_that_comes_again_gives_the_same_and_is_nobody_elses(routes: Routes) -> None:
    for _ in range(2):
        route, params = routes.match("POST", "/v2/models/a%20b/infer")
        assert (route.handler, params) == (handler, {"model": "a b"})
        params["model"] = "spoilt"
    assert routes.match("POST", "/v2/models/c/infer")[1] == {"model": "c"}
    for _ in range(2):
        with pytest.raises(HttpError, match="POST alone"):
            routes.match("GET", "/v2/models/c/infer")


def test_what_is_remembered_is_bounded_in_number_and_length(routes: Routes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "_MOST_REMEMBERED", 4)
    names = ["x" * 300, *(f"m{number}" for number in range(9))]
    for name in names:
        assert routes.match("POST", f"/v2/models/{name}/infer")[1] == {"model": name}
        assert len(routes._found) <= 4
        assert all(len(path) <= 256 for _, path in routes._found)
