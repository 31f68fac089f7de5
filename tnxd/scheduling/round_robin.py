"""Deadline-ordered round robin: members take turns, and within a round the earliest due goes first."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Generic, TypeVar

M = TypeVar("M")


# A round takes no newcomers after so many turns, or twice as many as there are members: else a stream of them would
# keep those waiting for good that have had theirs.
_ROUND_TURNS = 64

_ROUNDING = 1e-9  # of a round: three thirds are one


class DeadlineRoundRobin(Generic[M]):
    """Round robin whose rounds are ordered by due time: earliest first, but nobody twice in a round while others wait.

    A member that has had its turn queues for the next round, or for a later one if it took more than a turn's worth
    (deficit round robin; Shreedhar and Varghese, 1995). With a share of 2 it has two turns in a round, with one of 0.5
    one in two rounds. A new member joins the current round, unless that has lasted long. So each waits for about two
    turns of every other at most, however much those others have and however many come; shares aside. Rounds in which
    nobody may go are passed over. Every operation costs at most the logarithm of the number of members.

    Attributes:
        members: those that have something to do; to look at, not to change.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, M]] = []
        self.members: dict[M, tuple[int, int, int, M]] = {}
        self._again: dict[M, int] = {}  # of those who had a turn: the round in which they may have the next one
        self._unpaid: dict[M, float] = {}  # of those with a share: the part of a round that they owe beside it
        self._sweep_at = _ROUND_TURNS
        self._round = 0
        self._served = 0  # turns in this round

    def offer(self, member: M, due: int, serial: int) -> None:
        """Let a member take turns, with something that is due then. Offered again, it moves forward, never back.

        Args:
            serial: unique; the smaller goes first among equally due ones.
        """
        late = self._served >= max(_ROUND_TURNS, 2 * len(self.members))
        entry = (max(self._again.get(member, 0), self._round + late), due, serial, member)
        known = self.members.get(member)
        if known is None or entry < known:
            self.members[member] = entry
            heappush(self._heap, entry)

    def withdraw(self, member: M) -> None:
        """Let a member take no turns: it has nothing to do any more."""
        self.members.pop(member, None)

    def pass_over(self, member: M) -> tuple[int, int, int, M]:
        """Withdraw a member for a moment: `restore` takes what is returned, and gives it its turn back."""
        return self.members.pop(member)

    def restore(self, entry: tuple[int, int, int, M]) -> None:
        """Let a member that was passed over take its turn. The rounds that others had meanwhile come again.

        Without that, who can be passed over would get less than the others, who went through many rounds in its stead.
        """
        self.members[entry[3]] = entry
        heappush(self._heap, entry)
        if entry[0] < self._round:
            self._round = entry[0]
            self._served = 0

    def first(self) -> M | None:
        """Member whose turn it is; None if none has something to do."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if self.members.get(entry[3]) is entry:
                return entry[3]
            heappop(heap)  # moved forward, or withdrawn
        return None

    def served(self, member: M, rounds: int = 1, share: float = 1.0) -> None:
        """End the turn of the member that is `first`, or its turns of several rounds. It is out until offered again.

        Args:
            share: of its turns, relative to those of others.
        """
        entry = self.members.pop(member)
        if entry[0] > self._round:
            self._round = entry[0]
            self._served = 0
        self._served += 1
        if share != 1.0:
            owed = self._unpaid.get(member, 0.0) + rounds / share
            rounds = int(owed + _ROUNDING)
            self._unpaid[member] = owed - rounds
        self._again[member] = self._round + rounds
        if len(self._again) > self._sweep_at:
            self._again = {known: again for known, again in self._again.items() if again > self._round}
            self._unpaid = {known: owed for known, owed in self._unpaid.items() if known in self._again}
            self._sweep_at = max(_ROUND_TURNS, 2 * len(self._again))

    def owed(self, member: M) -> int:
        """Rounds that a member has to let pass before its next turn."""
        return max(self._again.get(member, 0) - self._round, 0)


class ClientRoundRobin:
    """Round robin of clients, and of the connections of each within its turns.

    So nobody gets more by connecting more often. A connection goes by its client's name and its own.
    """

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}  # of clients that have one other than 1, no more than there are keys
        self._clients: DeadlineRoundRobin[str] = DeadlineRoundRobin()
        self._connections: dict[str, DeadlineRoundRobin[bytes]] = {}
        self._sweep_at = _ROUND_TURNS

    def set_share(self, client: str, share: float) -> None:
        """Set the share of a client's turns, relative to those of others; without that, it is 1."""
        if share != 1.0:
            self._shares[client] = share
        else:
            self._shares.pop(client, None)

    def offer(self, client: str, connection: bytes, due: int, serial: int) -> None:
        """Let a connection take turns, see `DeadlineRoundRobin.offer`."""
        connections = self._connections.get(client)
        if connections is None:
            if len(self._connections) >= self._sweep_at:
                self._sweep()
            connections = self._connections[client] = DeadlineRoundRobin()
        connections.offer(connection, due, serial)
        self._clients.offer(client, due, serial)

    def withdraw(self, client: str, connection: bytes) -> None:
        """Let a connection take no turns: it has nothing to do any more."""
        connections = self._connections[client]
        connections.withdraw(connection)
        if not connections.members:
            self._clients.withdraw(client)

    def pass_over(self, client: str, connection: bytes) -> Callable[[], None]:
        """Withdraw a connection for a moment. Returns a function that gives it its turn back."""
        connections = self._connections[client]
        entry = connections.pass_over(connection)
        whole = None if connections.members else self._clients.pass_over(client)

        def restore() -> None:
            connections.restore(entry)
            if whole is not None:
                self._clients.restore(whole)

        return restore

    def first(self) -> tuple[str, bytes] | None:
        """Client and connection whose turn it is; None if none has something to do."""
        client = self._clients.first()
        if client is None:
            return None
        connection = self._connections[client].first()
        assert connection is not None  # else its client would have been withdrawn
        return client, connection

    def served(self, client: str, connection: bytes, rounds: int) -> None:
        """End the turns of the connection that is `first`, see `DeadlineRoundRobin.served`."""
        connections = self._connections[client]
        connections.served(connection, rounds)
        self._clients.served(client, rounds, self._shares.get(client, 1.0) if self._shares else 1.0)
        if connections.members:
            _, due, serial, _ = connections.members[connections.first()]  # type: ignore[index]
            self._clients.offer(client, due, serial)

    def before(self, client: str, connection: bytes) -> int:
        """Turns of others before a connection has its next one: about, and at most."""
        connections = self._connections.get(client)
        others = len(self._clients.members) - (client in self._clients.members)
        if self._shares:
            others += self._more_turns(client)
        if connections is None:
            return others
        siblings = len(connections.members) - (connection in connections.members)
        mine = siblings * (1 + connections.owed(connection))
        return mine + others * (1 + mine + self._clients.owed(client))

    def _more_turns(self, client: str) -> int:
        """Turns that others have in a round beside their first ones."""
        members = self._clients.members
        return sum(
            int(share) for name, share in self._shares.items() if share > 1.0 and name != client and name in members
        )

    def _sweep(self) -> None:
        """Drop the clients of whom nothing is left."""
        self._connections = {name: turns for name, turns in self._connections.items() if turns.members}
        self._sweep_at = max(_ROUND_TURNS, 2 * len(self._connections))
