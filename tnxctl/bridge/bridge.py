"""Bridge: what all handlers of a worker share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from tnxctl import malloc
from tnxctl.aio import AsyncClient
from tnxctl.bridge.access import Access
from tnxctl.bridge.addresses import is_loopback
from tnxctl.bridge.bodies import Budget
from tnxctl.bridge.browsers import Pages
from tnxctl.bridge.helper import Helper
from tnxctl.bridge.oip.shared_memory import Regions
from tnxctl.bridge.questions import Questions
from tnxctl.bridge.routes import Routes
from tnxctl.bridge.settings import Settings
from tnxctl.bridge.signatures import Signatures
from tnxctl.protocol.errors import DeadlineExceeded, Unavailable
from tnxctl.protocol.roles import Role

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Question(Protocol[T_co]):
    """Asks a daemon something, as methods of `AsyncClient` do."""

    def __call__(self, client: AsyncClient, /, *, timeout: float | None) -> Awaitable[T_co]:
        """The answer."""
        ...


READY_TIMEOUT_S = 1.0
"""Longest wait of a readiness check: probes ask every few seconds, and give up after one by default."""

_QUIET_S = 10.0
"""Seconds after which memory that large requests have left is given back."""

_LEAST_S = 1e-3  # a timeout is above 0


class Bridge:
    """A worker's connection to the daemon, its settings and its routes.

    Made within the event loop that it is used in.

    Raises:
        InvalidArgument: a file with tokens or keys has a mistake.

    Attributes:
        settings: as given.
        client: asks the daemon. The bridge is one client for it, whoever asks the bridge.
        daemons: of several daemons a client for each, to ask what each of them has to say of itself; else `client`.
        signatures: of models that were asked for lately.
        regions: of shared memory that are registered.
        access: what a request may ask for. pages: whose requests are taken. budget: of memory for requests.
        helper: reads and writes long JSON. questions: to daemons, that are under way.
        routes: those of all interfaces.
    """

    def __init__(self, settings: Settings, routes: Routes) -> None:
        self.settings = settings
        self.routes = routes
        self.access = access_of(settings)
        self.pages = Pages(settings)
        self.budget = Budget(settings.limits.bodies_bytes, self._give_back_later)
        self.regions = Regions(settings.shared_memory, self.budget)
        self.helper = Helper()
        self.questions = Questions()
        endpoints = settings.endpoints
        self.daemons = [_client(each, settings) for each in endpoints]
        self.client = self.daemons[0] if len(endpoints) == 1 else _client(endpoints, settings)
        self.signatures = Signatures(self.client)
        self._first = 0  # of the daemons: the one that answered last

    async def ask_one(self, ask: Question[T], timeout: float | None = None) -> T:
        """Answer of one daemon about itself or its models: the first of them that answers, since all serve the same.

        Whoever asks the same meanwhile, and would wait as long, shares the question. The next one goes to the same
        daemon first. So a daemon that is gone costs one of them its time, and not each.

        Args:
            ask: asks it, such as `AsyncClient.models`, which a client of several daemons refuses.
            timeout: seconds for all of them together, of which each gets an equal share; None: as the settings say.

        Raises:
            TensorNextError: as `ask` does; of several daemons, the last error.
        """
        return await self.questions.share((ask, self.client, timeout), lambda: self._ask_one(ask, timeout))

    async def _ask_one(self, ask: Question[T], timeout: float | None) -> T:
        count = len(self.daemons)
        if count == 1:
            return await ask(self.client, timeout=timeout)
        ends = time.monotonic() + (self.settings.timeout if timeout is None else timeout)
        for left in range(count, 1, -1):
            asked = self._first
            try:
                return await ask(self.daemons[asked], timeout=_share(ends, left))
            except (Unavailable, DeadlineExceeded):
                if self._first == asked:  # nobody else has found that out meanwhile
                    self._first = (asked + 1) % count
        return await ask(self.daemons[self._first], timeout=_share(ends, 1))

    async def order(self, asking: Awaitable[T]) -> T:
        """The answer to an order, which changes what is served. Whoever asks after it gets an answer that knows of it.

        Args:
            asking: asks the daemon, and raises what it raises.
        """
        try:
            return await asking
        finally:
            self.questions.forget()

    async def is_ready(self) -> bool:
        """Whether a daemon takes requests."""
        try:
            report = await self.ask_one(AsyncClient.health, min(self.settings.timeout, READY_TIMEOUT_S))
        except (Unavailable, DeadlineExceeded):
            return False
        return report.status == "ready"

    def _give_back_later(self) -> None:
        """Give memory back to the system, after requests that took much of it, unless others come soon."""
        asyncio.get_running_loop().call_later(_QUIET_S, self._give_back)

    def _give_back(self) -> None:
        if not self.budget.held_bytes:
            threading.Thread(target=malloc.trim, name="trim", daemon=True).start()

    async def close(self) -> None:
        """Close the connections to the daemon, or to all of them, and end the helper."""
        await self.helper.close()
        for client in (self.client, *self.daemons):
            await client.close()


def _client(endpoint: str | Sequence[str], settings: Settings) -> AsyncClient:
    return AsyncClient(endpoint, timeout=settings.timeout, limits=settings.message, busy_poll=settings.busy_poll_s)


def _share(ends: float, count: int) -> float:
    """Seconds that one of so many gets of those that are left."""
    return max((ends - time.monotonic()) / count, _LEAST_S)


def access_of(settings: Settings) -> Access:
    """The access that settings give. Without tokens, nobody from another host changes what is served."""
    default = Role.ADMIN if _is_local(settings) else Role.PREDICT
    return Access(None if settings.tokens is None else Path(settings.tokens), default)


def _is_local(settings: Settings) -> bool:
    """Whether this host alone can reach the bridge."""
    return all(is_loopback(address[0]) for address in (settings.listen, settings.grpc) if address is not None)
