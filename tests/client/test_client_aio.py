"""`AsyncClient` alone: tasks, event loops, and its end."""

from __future__ import annotations

import asyncio
import gc
import select
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from peers import (
    PATIENCE_S,
    BlindLoop,
    FakeDaemon,
    Reply,
    Request,
    X,
    echo,
    equal,
    in_turn,
    silence,
)
from tnxctl import AsyncClient
from tnxctl.channels import opening
from tnxctl.channels.libzmq import LibzmqChannel
from tnxctl.link import Link
from tnxctl.loop_driver import LoopDriver
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
            task = asyncio.create_task(tnx.predict(X))
            request = await asyncio.to_thread(daemon.received.get, timeout=PATIENCE_S)
            with pytest.raises(TimeoutError) as caught:
                await asyncio.wait_for(task, 0.01)
            assert not isinstance(caught.value, errors.DeadlineExceeded)
            assert tnx._session.idle
            assert daemon.cancels.get(timeout=PATIENCE_S).id == request.id
            daemon.answer = echo
            assert equal(await tnx.predict(X), X)

    with FakeDaemon(silence) as daemon:
        asyncio.run(main(daemon))


def test_a_late_reply_that_comes_just_before_the_next_call_does_not_hide_its_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "HAS_STREAMS", False)
    wanted = threading.Event()

    def late(request: Request) -> Iterable[tuple[bytes, Reply]]:
        wanted.wait(PATIENCE_S)
        return echo(request)

    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(daemon.endpoint, timeout=PATIENCE_S) as tnx:
            await tnx.predict(X)
            daemon.answer = late
            task = asyncio.create_task(tnx.predict(X))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(3):  # whatever is left to be done for it
                await asyncio.sleep(0)
            daemon.answer = echo
            wanted.set()
            assert isinstance(tnx._driver, LoopDriver)
            assert isinstance(tnx._driver._link, Link)
            channel = tnx._driver._link.channel
            assert isinstance(channel, LibzmqChannel)
            # The loop does not see that the reply has come, but the next call's use of the socket does: libzmq looks
            # for news while it sends unless it has done so within the last millisecond.
            assert select.select([channel.descriptor()[0]], [], [], PATIENCE_S)[0]
            time.sleep(0.01)
            assert equal(await tnx.predict(X, timeout=PATIENCE_S / 2), X)

    with FakeDaemon(echo) as daemon:
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
    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(daemon.endpoint, timeout=PATIENCE_S) as tnx:
            await tnx.predict(X)
            call = asyncio.create_task(tnx.predict(X))
            ticks = 0
            while ticks < 100 or daemon.received.qsize() < 2:
                assert not call.done()
                await asyncio.sleep(0)
                ticks += 1
            answer.set()
            assert equal(await call, X)

    def when_the_loop_has_turned(request: Request) -> Iterable[tuple[bytes, Reply]]:
        answer.wait(PATIENCE_S)
        return echo(request)

    answer = threading.Event()
    with FakeDaemon(in_turn(echo, when_the_loop_has_turned)) as daemon:
        asyncio.run(main(daemon))


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
