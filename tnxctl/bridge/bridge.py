"""Bridge: what all handlers of a worker share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from tnxctl.aio import AsyncClient
from tnxctl.bridge.access import Access
from tnxctl.bridge.addresses import is_loopback
from tnxctl.bridge.bodies import Budget
from tnxctl.bridge.routes import Routes
from tnxctl.bridge.settings import Settings
from tnxctl.bridge.signatures import Signatures
from tnxctl.protocol.errors import DeadlineExceeded, Unavailable
from tnxctl.protocol.roles import Role

T = TypeVar("T")


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
        access: what a request may ask for. budget: of memory for requests.
        trusts_this_host: whether nobody else can reach it, and whoever does needs no token.
        routes: those of all interfaces.
    """

    def __init__(self, settings: Settings, routes: Routes) -> None:
        self.settings = settings
        self.routes = routes
        self.access = access_of(settings)
        self.trusts_this_host = settings.tokens is None and _is_local(settings)
        self.budget = Budget(settings.limits.bodies_bytes)
        endpoints = settings.endpoints
        self.daemons = [AsyncClient(each, timeout=settings.timeout, limits=settings.message) for each in endpoints]
        self.client = self.daemons[0]
        if len(endpoints) > 1:
            self.client = AsyncClient(list(endpoints), timeout=settings.timeout, limits=settings.message)
        self.signatures = Signatures(self.client)

    async def ask_one(self, ask: Callable[[AsyncClient], Awaitable[T]]) -> T:
        """What one daemon says of itself or its models: the first of them that answers, since all serve the same.

        Args:
            ask: asks it, such as `AsyncClient.models`, which a client of several daemons refuses.

        Raises:
            TensorNextError: as `ask` does; of several daemons, the last error.
        """
        for client in self.daemons[:-1]:
            try:
                return await ask(client)
            except (Unavailable, DeadlineExceeded):
                continue
        return await ask(self.daemons[-1])

    async def close(self) -> None:
        """Close the connections to the daemon, or to all of them."""
        for client in (self.client, *self.daemons):
            await client.close()


def access_of(settings: Settings) -> Access:
    """The access that settings give. Without tokens, nobody from another host changes what is served."""
    default = Role.ADMIN if _is_local(settings) else Role.PREDICT
    return Access(None if settings.tokens is None else Path(settings.tokens), default)


def _is_local(settings: Settings) -> bool:
    """Whether this host alone can reach the bridge."""
    return all(is_loopback(address[0]) for address in (settings.listen, settings.grpc) if address is not None)
