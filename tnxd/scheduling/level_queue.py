"""Requests of one model, shape and priority that wait for one device: clients and their connections take turns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from tnxd.scheduling.connection_queue import MAX_PASSED_OVER, ConnectionQueue, Entry
from tnxd.scheduling.due_rows import DueRows
from tnxd.scheduling.request import Request
from tnxd.scheduling.round_robin import ClientRoundRobin

QUANTUM_ROWS = 16
"""Quantum of the round robin: rows that a connection may put into a batch in one turn. One that puts in more, since a
request has as many, waits for as many more rounds."""

# A connection is light if others have so many times more requests waiting, on average, than it has.
_LIGHT_FACTOR = 4

# Connections that are looked at for that.
_MAX_LOOKED_AT = 8

# Requests of a connection that are looked at for a batch of several lengths.
_MAX_PICKED_FROM = 256


class LevelQueue:
    """Requests of one priority. Within the turn of a connection, its earliest due request goes first.

    Attributes:
        count, rows: of the requests that wait. due: their rows by due time.
        connections: queues by client and peer. turns: the order of these queues.
    """

    __slots__ = ("connections", "count", "due", "rows", "turns")

    def __init__(self) -> None:
        self.count = 0
        self.rows = 0
        self.due = DueRows()
        self.connections: dict[tuple[str, bytes], ConnectionQueue] = {}
        self.turns = ClientRoundRobin()

    def add(self, request: Request) -> None:
        """Insert a request."""
        key = request.client, request.peer
        connection = self.connections.get(key)
        if connection is None:
            connection = self.connections[key] = ConnectionQueue(*key)
            self.turns.set_share(request.client, request.share)
        entry = (request.due_ns, request.serial, request)
        if connection.add(entry):
            self.turns.offer(*key, request.due_ns, request.serial)
        self.count += 1
        self.rows += request.rows
        self.due.change(request.due_ns, request.rows)

    def remove(self, request: Request) -> None:
        """Count off a request that was withdrawn; `Request.waiting` is False already."""
        self._count_off(request)
        self.connections[request.client, request.peer].remove()

    def _count_off(self, request: Request) -> None:
        self.count -= 1
        self.rows -= request.rows
        self.due.change(request.due_ns, -request.rows)

    def first(self) -> tuple[ConnectionQueue, Entry] | None:
        """Connection whose turn it is, and its head; None if nothing waits."""
        while (key := self.turns.first()) is not None:
            connection = self.connections[key]
            head = connection.head()
            if head is not None:
                return connection, head
            self.turns.withdraw(*key)
            del self.connections[key]
        return None

    def _end_turn(self, connection: ConnectionQueue, rows: int) -> None:
        """Charge a connection for the rows of its turn, and queue it for the next one if it has more."""
        client, peer = connection.client, connection.peer
        self.turns.served(client, peer, max(-(-rows // QUANTUM_ROWS), 1))
        head = connection.head()
        if head is None:
            del self.connections[client, peer]
        else:
            self.turns.offer(client, peer, head[0], head[1])

    def has_light_connection(self) -> bool:
        """Whether one of the newest connections has far fewer requests waiting than the average."""
        connections = self.connections
        if len(connections) < 2:
            return False
        most = self.count / (_LIGHT_FACTOR * len(connections))
        return any(0 < len(queue) <= most for queue in islice(reversed(connections.values()), _MAX_LOOKED_AT))

    def fill(self, batch: list[Request], rows: int, limit: int, ends_ns: int, late: list[Request]) -> tuple[int, bool]:
        """Move requests into a batch as far as they fit, and into `late` those due before the batch ends.

        Returns:
            Rows of the batch, and whether it is full: the next request did not fit.
        """
        while (first := self.first()) is not None:
            connection, head = first
            quota = QUANTUM_ROWS
            next_head: Entry | None = head
            taken = full = False
            while next_head is not None and quota > 0:
                request = next_head[2]
                in_time = request.deadline_ns >= ends_ns
                if in_time and batch and rows + request.rows > limit:
                    full = True
                    break
                connection.pop()
                request.waiting = False
                self._count_off(request)
                if in_time:
                    taken = True
                    batch.append(request)
                    rows += request.rows
                    quota -= request.rows or 1
                else:
                    late.append(request)
                next_head = connection.head()
            if taken:
                self._end_turn(connection, QUANTUM_ROWS - quota)
            if full:
                return rows, True
        return rows, False

    def pick(self, batch: list[Request], room: int, fits: Callable[[Request], bool]) -> int:
        """Move requests of different lengths that fit into a batch, which is padded, by the turns of their connections.

        Args:
            room: rows that the batch has room for. Its first request may have more.

        Returns:
            Rows that are still free.
        """
        passed_over: list[Callable[[], None]] = []
        while (room > 0 or not batch) and (first := self.first()) is not None:
            connection, _ = first
            before, tokens = len(batch), 0
            for _, _, request in connection.entries[connection.start : connection.start + _MAX_PICKED_FROM]:
                rows = request.rows // request.length
                if not request.waiting or (batch and rows > room) or not fits(request):
                    continue
                request.waiting = False
                self.remove(request)
                batch.append(request)
                room -= rows
                tokens += request.rows
                if tokens >= QUANTUM_ROWS or room <= 0:
                    break
            if len(batch) > before:
                self._end_turn(connection, tokens)
            else:
                passed_over.append(self.turns.pass_over(connection.client, connection.peer))
        for restore in reversed(passed_over):
            restore()
        return room

    def steal(
        self, batch: list[Request], rows: int, now_ns: int, ends_ns: int, eligible: Callable[[Request], bool]
    ) -> int:
        """Move requests of at most `rows` rows into a batch for another device. Returns the rows still free in it."""
        passed_over: list[tuple[ConnectionQueue, Entry]] = []
        while rows > 0 and len(passed_over) < MAX_PASSED_OVER and (first := self.first()) is not None:
            connection, head = first
            stolen = connection.steal(min(rows, QUANTUM_ROWS), now_ns, ends_ns, eligible)
            if not stolen:
                self.turns.withdraw(connection.client, connection.peer)
                passed_over.append((connection, head))
                continue
            before = rows
            for request in stolen:
                request.waiting = False
                self._count_off(request)
                rows -= request.rows
            batch += stolen
            self._end_turn(connection, before - rows)
        for connection, head in passed_over:
            self.turns.offer(connection.client, connection.peer, head[0], head[1])
        return rows
