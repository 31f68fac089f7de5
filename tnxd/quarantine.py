"""Clients whose last requests failed, and so ride alone: those who would share a batch with them pay once.

A batch that fails is halved and run again until the request at fault stands alone, which costs all others in it.
"""

from __future__ import annotations

# Successes in a row that are asked for in the end: of a client that fails again and again, as good as never.
_MOST = 1024

_MAX_CLIENTS = 4096


class Quarantine:
    """Counts failures and successes of the clients that failed lately.

    After a failure, a client rides alone until one request has succeeded. If it fails again before as many succeed in
    company, twice as many are asked for, and so on, as Ethernet's stations wait after collisions (Metcalfe and Boggs,
    1976). A client that sends something wrong now and then hardly notices, one that does so in every fourth request
    stays.

    Attributes:
        clients: those known -> how many successes are left, alone as long as that is positive, and how many were asked
            for. To look at, not to change: while it is empty there is nothing to ask or to tell.
    """

    def __init__(self) -> None:
        self.clients: dict[bytes, tuple[int, int]] = {}

    def holds(self, client: bytes) -> bool:
        """Whether a client's requests ride alone."""
        return self.clients.get(client, (0, 0))[0] > 0

    def failed(self, client: bytes) -> None:
        """A model failed at a request of a client."""
        asked = min(2 * self.clients.pop(client, (0, 0))[1] or 1, _MOST)
        if len(self.clients) >= _MAX_CLIENTS:
            del self.clients[next(iter(self.clients))]  # the one whose last failure is longest ago
        self.clients[client] = asked, asked

    def succeeded(self, client: bytes) -> None:
        """A request of a client has an answer."""
        known = self.clients.get(client)
        if known is not None:
            left, asked = known
            if left - 1 > -asked:
                self.clients[client] = left - 1, asked
            else:
                del self.clients[client]

    def forget(self, client: bytes) -> None:
        """The client is gone."""
        self.clients.pop(client, None)
