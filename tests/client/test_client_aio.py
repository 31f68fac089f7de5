"""`AsyncClient` alone: tasks, event loops, and its end."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest

from peers import (
    PATIENCE_S,
    BlindLoop,
    FakeDaemon,
    X,
    echo,
    equal,
    in_turn,
    silence,
)
from tnxctl import AsyncClient
from tnxctl.protocol import errors
from tnxctl.results import Result


def test_gather() -> None:
    async def main(endpoint: str) -> list[Result]:
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
            return await asyncio.gather(*(tnx.predict(np.array([i])) for i in range(300)))

    with FakeDaemon(echo) as daemon:
        results = asyncio.run(main(daemon.endpoint))
    assert [result.output[0] for result in results] == list(range(300))


def test_a_cancelled_task_forgets_its_call() -> None:
    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(daemon.endpoint, timeout=PATIENCE_S) as tnx:
            with pytest.raises(TimeoutError) as caught:
                await asyncio.wait_for(tnx.predict(X), 0.2)
            assert not isinstance(caught.value, errors.DeadlineExceeded)
            assert tnx._session.idle
            assert daemon.cancels.get(timeout=PATIENCE_S).id == daemon.received.get_nowait().id
            daemon.answer = echo
            assert equal(await tnx.predict(X), X)

    with FakeDaemon(silence) as daemon:
        asyncio.run(main(daemon))


def test_a_client_belongs_to_one_loop() -> None:
    with FakeDaemon(echo) as daemon:
        tnx = AsyncClient(daemon.endpoint, timeout=PATIENCE_S)
        with asyncio.Runner() as runner:
            assert equal(runner.run(tnx.predict(X)), X)
            with asyncio.Runner() as other, pytest.raises(errors.FailedPrecondition, match="another event loop"):
                other.run(tnx.predict(X))
            assert equal(runner.run(tnx.predict(X)), X)
            runner.run(tnx.close())


def test_the_loop_stays_free_while_a_call_waits() -> None:
    async def main(endpoint: str) -> int:
        ticks = 0
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
            await tnx.predict(X)
            call = asyncio.create_task(tnx.predict(X, timeout=0.3))
            while not call.done():
                await asyncio.sleep(0)
                ticks += 1
            with pytest.raises(errors.DeadlineExceeded):
                call.result()
        return ticks

    with FakeDaemon(in_turn(echo, silence)) as daemon:
        assert asyncio.run(main(daemon.endpoint)) > 10


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, BlindLoop])
def test_an_async_client_that_is_dropped_leaves_nothing(loop_factory: Any) -> None:
    async def main(endpoint: str) -> None:
        tnx = AsyncClient(endpoint, timeout=PATIENCE_S)
        await tnx.predict(X)
        del tnx
        gc.collect()
        await asyncio.sleep(0)

    with FakeDaemon(echo) as daemon, asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main(daemon.endpoint))
    gc.collect()


def test_an_async_client_may_outlive_its_loop() -> None:
    async def main(tnx: AsyncClient) -> None:
        await tnx.predict(X)

    with FakeDaemon(echo) as daemon:
        tnx = AsyncClient(daemon.endpoint, timeout=PATIENCE_S)
        asyncio.run(main(tnx))
        del tnx
        gc.collect()
