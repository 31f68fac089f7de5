"""Questions of many clients at a time, of which a daemon is asked one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from test_ready import REPORT

pytest.importorskip("uvicorn", reason="the bridge needs tensornext[http]")

from bridges import SECONDS
from fake_daemon import STATS
from tnxctl.aio import AsyncClient
from tnxctl.bridge import first_wire, reports
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import Request, Response
from tnxctl.bridge.oip import handlers
from tnxctl.bridge.questions import Questions
from tnxctl.bridge.routes import Routes
from tnxctl.bridge.settings import Settings
from tnxctl.protocol.errors import Unavailable

Handler = Callable[[Bridge, Request], Awaitable[Response]]


@pytest.mark.parametrize(
    ("question", "answer", "askers"),
    [
        ("health", REPORT, [first_wire.health, handlers.server_metadata]),
        ("models", (), [reports.models, handlers.repository_index]),
        ("stats", STATS, [reports.stats, handlers.statistics]),
    ],
)
def test_clients_that_ask_at_a_time_share_one_question(
    monkeypatch: pytest.MonkeyPatch, question: str, answer: Any, askers: list[Handler]
) -> None:
    async def run() -> None:
        bridge = Bridge(Settings(endpoints=("ipc:///nowhere",)), Routes())
        asked, answered = 0, asyncio.Event()

        async def ask(client: AsyncClient, *, timeout: float | None = None) -> Any:
            nonlocal asked
            asked += 1
            await answered.wait()
            return answer

        monkeypatch.setattr(AsyncClient, question, ask)
        request = Request("GET", "/", headers={})
        answers = [asyncio.ensure_future(asker(bridge, request)) for asker in askers * 20]
        await asyncio.sleep(0)
        answers[0].cancel()  # a client that goes takes nothing from the others
        answered.set()
        assert {response.status for response in await asyncio.gather(*answers[1:])} == {200}
        assert asked == 1
        await askers[0](bridge, request)  # later: a new question
        assert asked == 2
        await bridge.close()

    asyncio.run(run())


def test_what_differs_is_asked_apart_and_an_error_comes_to_all() -> None:
    async def run() -> None:
        questions, asked = Questions(), []

        async def ask(name: str) -> str:
            asked.append(name)
            await asyncio.sleep(0)
            if name == "bad":
                raise Unavailable("gone")
            return name

        names = ["a", "bad", "b", "bad", "a"]
        found = await asyncio.gather(
            *(questions.share(name, lambda name=name: ask(name)) for name in names),  # type: ignore[misc]
            return_exceptions=True,
        )
        assert [each if isinstance(each, str) else type(each) for each in found] == [
            "a",
            Unavailable,
            "b",
            Unavailable,
            "a",
        ]
        assert asked == ["a", "bad", "b"]

    asyncio.run(run())


@pytest.mark.parametrize("order", [handlers.load, handlers.unload])
def test_who_asks_after_an_order_gets_an_answer_from_after_it(monkeypatch: pytest.MonkeyPatch, order: Handler) -> None:
    async def run() -> None:
        bridge = Bridge(Settings(endpoints=("ipc:///nowhere",)), Routes())
        answers = [asyncio.get_running_loop().create_future() for _ in range(2)]
        left = iter(answers)

        async def models(client: AsyncClient, *, timeout: float | None = None) -> Any:
            return await next(left)

        async def change(client: AsyncClient, model: str) -> Any:
            return ()

        monkeypatch.setattr(AsyncClient, "models", models)
        monkeypatch.setattr(AsyncClient, "load", change)
        monkeypatch.setattr(AsyncClient, "unload", change)
        before = asyncio.ensure_future(bridge.ask_one(AsyncClient.models))
        await asyncio.sleep(0)
        await order(bridge, Request("POST", "/", {"model": "mlp"}))
        after = asyncio.ensure_future(bridge.ask_one(AsyncClient.models))
        await asyncio.sleep(0)
        answers[1].set_result("after")
        async with asyncio.timeout(SECONDS):
            assert await after == "after"
        answers[0].set_result("before")
        assert await before == "before"
        await bridge.close()

    asyncio.run(run())
