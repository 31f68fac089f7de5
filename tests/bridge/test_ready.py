"""Readiness of a bridge, which anybody may ask for."""

from __future__ import annotations

import asyncio

import pytest

from tnxctl.aio import AsyncClient
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.routes import Routes
from tnxctl.bridge.settings import Settings
from tnxctl.protocol.errors import PermissionDenied, Unavailable
from tnxctl.protocol.wire import HealthReport

REPORT = HealthReport(
    v=1,
    id=1,
    status="ready",
    cuda_available=False,
    current_device="cpu",
    gpu_memory_free_mb=0.0,
    version="",
    uptime_s=0.0,
    devices=(),
    models=(),
    queued=0,
    running=0,
    requests=0,
    replies=0,
    errors={},
)


def test_probes_share_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        bridge = Bridge(Settings(endpoints=("ipc:///nowhere",)), Routes())
        answers: list[HealthReport | Exception] = []
        asked, answered = 0, asyncio.Event()

        async def health(client: AsyncClient, *, timeout: float | None = None) -> HealthReport:
            nonlocal asked
            asked += 1
            await answered.wait()
            answer = answers.pop()
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(AsyncClient, "health", health)
        answers.append(REPORT)
        probes = [asyncio.ensure_future(bridge.is_ready()) for _ in range(50)]
        await asyncio.sleep(0)
        probes[0].cancel()  # which takes nothing from the others
        answered.set()
        assert await asyncio.gather(*probes[1:]) == [True] * 49
        assert asked == 1
        answers.append(Unavailable("gone"))
        assert not await bridge.is_ready()
        answers.append(PermissionDenied("no"))
        with pytest.raises(PermissionDenied):
            await bridge.is_ready()
        assert asked == 3
        await bridge.close()

    asyncio.run(run())
