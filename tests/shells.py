"""`Client` and `AsyncClient` behind one surface, for tests that run over both."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from peers import (
    PATIENCE_S,
    BlindLoop,
    X,
)
from tnxctl import AsyncClient, Client
from tnxctl.durations import spell
from tnxctl.protocol import wire
from tnxctl.protocol.errors import Unavailable
from tnxctl.results import Result


class SyncShell:
    """`Client` behind the surface that the common tests use."""

    def __init__(self, endpoint: str, **options: Any) -> None:
        self.client = Client(endpoint, **{"timeout": PATIENCE_S, **options})
        self.predict = self.client.predict
        self.submit = self.client.submit
        self.health = self.client.health
        self.metadata = self.client.metadata
        self.close = self.client.close


class AsyncShell:
    """`AsyncClient` behind the same surface: its event loop runs in a thread of its own."""

    new_loop: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    def __init__(self, endpoint: str, **options: Any) -> None:
        self.client = AsyncClient(endpoint, **{"timeout": PATIENCE_S, **options})
        self._loop = self.new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def submit(self, inputs: object, **options: Any) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(self.client.predict(inputs, **options), self._loop)

    def predict(self, inputs: object, **options: Any) -> Result:
        return self.submit(inputs, **options).result()

    def health(self, **options: Any) -> wire.HealthReport:
        return asyncio.run_coroutine_threadsafe(self.client.health(**options), self._loop).result()

    def metadata(self, model: str = "", **options: Any) -> wire.ModelInfo:
        return asyncio.run_coroutine_threadsafe(self.client.metadata(model, **options), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.client.close(), self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlindAsyncShell(AsyncShell):
    new_loop = BlindLoop


Connect = Callable[..., SyncShell | AsyncShell]

SHELLS = {"sync": SyncShell, "asyncio": AsyncShell, "asyncio without add_reader": BlindAsyncShell}


def connecting(shell: type[SyncShell] | type[AsyncShell]) -> Iterator[Connect]:
    """Makes clients of a shell, and closes them in the end."""
    shells: list[SyncShell | AsyncShell] = []

    def make(endpoint: str, **options: Any) -> SyncShell | AsyncShell:
        shells.append(shell(endpoint, **options))
        return shells[-1]

    yield make
    for made in shells:
        made.close()
        if isinstance(made, AsyncShell):
            made.stop()


def call_until_it_says(tnx: Any, reason: str, timeout: float = 0.2) -> None:
    """Call in vain until that is the reason: an attempt takes longer than a call where the machine is busy.

    Args:
        reason: a regular expression. timeout: of a call, in seconds.
    """
    said = ""
    while not re.search(reason, said):
        with pytest.raises(Unavailable, match=f"no connection within {spell(timeout)}: ") as caught:
            tnx.predict(X, timeout=timeout)
        said = caught.value.message
