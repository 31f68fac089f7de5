"""Quarantine: clients whose last requests failed ride alone. Others pay at most once for a batch shared with them.

A batch that fails is halved and run again until the request at fault stands alone, which costs all others in it.
"""

from __future__ import annotations

# Successes in a row that are asked for in the end: of a client that fails again and again, as good as never.
_MOST = 1024

_MAX_CLIENTS = 4096
_MAX_ADDRESSES = 1024

# So many successes without a failure, of whomever, and it is forgotten where those came from who failed and left.
_CALM = 10_000


class Quarantine:
    """Counts failures and successes of the clients that failed lately.

    After a failure, a client rides alone until one request has succeeded. If it fails again before as many succeed in
    company, twice as many are asked for, and so on, as Ethernet's stations wait after collisions (Metcalfe and Boggs,
    1976). A client that sends something wrong now and then hardly notices, one that does so in every fourth request
    stays.

    A client is a connection, and those are cheap to make: where one has failed and left, whoever comes from the same
    address rides alone until it has succeeded once.

    Attributes:
        active: whether there is anything to ask or to tell.
    """

    def __init__(self) -> None:
        self.active = False
        # How many successes are left, alone as long as that is positive, and how many were asked for.
        self._clients: dict[bytes, tuple[int, int]] = {}
        self._addresses: dict[str, int] = {}
        self._proven: set[bytes] = set()  # those from such addresses that have succeeded, or are known by now
        self._calm = 0

    def holds(self, client: bytes, address: str = "") -> bool:
        """Whether the requests of a client, at that address, ride alone."""
        known = self._clients.get(client)
        if known is None:
            asked = self._addresses.get(address)
            if asked is None or client in self._proven:
                return False
            known = 1, asked
            self._put(client, known)
        return known[0] > 0

    def failed(self, client: bytes) -> None:
        """A model failed at a request of a client."""
        asked = min(2 * self._clients.get(client, (0, 0))[1] or 1, _MOST)
        self._put(client, (asked, asked))
        self._calm = 0

    def succeeded(self, client: bytes) -> None:
        """A request of a client has an answer."""
        known = self._clients.get(client)
        if known is not None:
            left, asked = known
            if left - 1 > -asked:
                self._clients[client] = left - 1, asked
            else:
                del self._clients[client]
                if self._addresses:
                    self._proven.add(client)
        self._calm += 1
        if self._calm >= _CALM:
            self._addresses.clear()
            self._proven.clear()
        self.active = bool(self._clients or self._addresses)

    def left(self, client: bytes, address: str) -> None:
        """A client is gone from that address."""
        self._proven.discard(client)
        known = self._clients.pop(client, None)
        if known is not None:
            if len(self._addresses) >= _MAX_ADDRESSES:
                del self._addresses[next(iter(self._addresses))]
            self._addresses[address] = known[1]

    def _put(self, client: bytes, known: tuple[int, int]) -> None:
        self._clients.pop(client, None)
        if len(self._clients) >= _MAX_CLIENTS:
            del self._clients[next(iter(self._clients))]  # the one whose last failure is longest ago
        self._clients[client] = known
        self.active = True
