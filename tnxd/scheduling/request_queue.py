"""Requests of one model and shape that wait for one device: who of them goes into the next batch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from itertools import islice, repeat
from typing import TYPE_CHECKING

from tnxd.scheduling.costs import BatchCosts
from tnxd.scheduling.request import LEVELS, Request
from tnxd.scheduling.round_robin import ClientRoundRobin

if TYPE_CHECKING:
    from tnxd.scheduling.placement import Placement

# Rows that a connection may put into a batch before it is the next one's turn. Who puts in more, since a request has as
# many, waits for as many more rounds.
_QUANTUM_ROWS = 16

# A connection is modest if others have so many times more waiting, on average, than it has.
_MODEST = 4

# Connections that are looked at for that.
_LOOKED_AT = 8

# Connections, and requests of each, that may be passed over while another device looks for some that it can have.
_MAX_PASSED_OVER = 16

_ZEROS = repeat(0)


class _Due:
    """Rows by when they are due: how many are due by a time, at a cost that does not grow with their number.

    Times are counted in buckets of several widths, each eight of the next finer one.
    """

    __slots__ = ("_coarse", "_coarser", "_fine", "_finest", "_latest_ns", "_rows")

    def __init__(self) -> None:
        self._rows = 0
        self._latest_ns = 0
        self._finest: dict[int, int] = {}  # 131 us
        self._fine: dict[int, int] = {}  # 1 ms
        self._coarse: dict[int, int] = {}  # 8 ms
        self._coarser: dict[int, int] = {}  # 67 ms

    def change(self, due_ns: int, rows: int) -> None:
        """Count so many rows more, or fewer, as due then."""
        self._rows += rows
        self._latest_ns = max(self._latest_ns, due_ns)
        key = due_ns >> 17
        for buckets in (self._finest, self._fine, self._coarse, self._coarser):
            count = buckets.get(key, 0) + rows
            if count:
                buckets[key] = count
            else:
                buckets.pop(key, None)
            key >>= 3

    def until(self, due_ns: int) -> int:
        """Rows that are due by then, or in the same finest bucket."""
        if due_ns >= self._latest_ns:
            return self._rows
        finest, fine, coarse, coarser = due_ns >> 17, due_ns >> 20, due_ns >> 23, due_ns >> 26
        rows = sum([count for key, count in self._coarser.items() if key < coarser])
        rows += sum(map(self._coarse.get, range(coarser << 3, coarse), _ZEROS))
        rows += sum(map(self._fine.get, range(coarse << 3, fine), _ZEROS))
        return rows + sum(map(self._finest.get, range(fine << 3, finest + 1), _ZEROS))


class _Connection:
    """Requests of one connection of a client on one level, the most urgent first.

    They stand in a sorted list: from its middle, another device can take what is not too urgent for it.
    """

    __slots__ = ("client", "entries", "gone", "peer", "start")

    def __init__(self, client: str, peer: bytes) -> None:
        self.client = client
        self.peer = peer
        self.entries: list[tuple[int, int, Request]] = []  # those before `start` have left
        self.start = 0
        self.gone = 0  # entries of requests that were removed

    def __len__(self) -> int:
        return len(self.entries) - self.start

    def add(self, entry: tuple[int, int, Request]) -> bool:
        """Put a request in. True if it is the first now."""
        entries = self.entries
        if not entries or entry > entries[-1]:
            entries.append(entry)
        else:
            insort(entries, entry, self.start)
        return entries[self.start] is entry

    def remove(self) -> None:
        """One of the requests waits no more: once they are the greater part, sweep such entries out."""
        self.gone += 1
        if 2 * self.gone > len(self):
            self.entries = [entry for entry in self.entries[self.start :] if entry[2].waiting]
            self.start = self.gone = 0

    def head(self) -> tuple[int, int, Request] | None:
        """The first request that still waits."""
        while self.start < len(self.entries):
            entry = self.entries[self.start]
            if entry[2].waiting:
                return entry
            self.pop()
            self.gone -= 1
        return None

    def pop(self) -> None:
        """The first entry leaves."""
        self.start += 1
        if 2 * self.start > len(self.entries):  # so each entry is moved once, on average, and none is kept for long
            del self.entries[: self.start]
            self.start = 0

    def steal(self, rows: int, now_ns: int, ends_ns: int, may: Callable[[Request], bool]) -> list[Request]:
        """Take out requests, as `RequestQueue.steal` says."""
        entries = self.entries
        first = last = bisect_left(entries, (ends_ns,), self.start)
        if entries[self.start][0] < now_ns:  # it is worth something for longer, else it would not wait any more
            first = last = self.start
        taken: list[Request] = []
        left: list[tuple[int, int, Request]] = []
        while last < len(entries) and rows > 0 and len(left) < _MAX_PASSED_OVER:
            request = entries[last][2]
            if not request.waiting:
                self.gone -= 1
            elif request.rows <= rows and request.deadline_ns >= ends_ns and may(request):
                rows -= request.rows
                taken.append(request)
            else:
                left.append(entries[last])
            last += 1
        entries[first:last] = left
        return taken


class _Level:
    """Requests of one priority. Clients and their connections take turns; of what one has, the earliest goes first."""

    __slots__ = ("connections", "count", "due", "rows", "turns")

    def __init__(self) -> None:
        self.count = 0
        self.rows = 0
        self.due = _Due()
        self.connections: dict[tuple[str, bytes], _Connection] = {}
        self.turns = ClientRoundRobin()

    def add(self, request: Request) -> None:
        key = request.client, request.peer
        connection = self.connections.get(key)
        if connection is None:
            connection = self.connections[key] = _Connection(*key)
        entry = (request.due_ns, request.serial, request)
        if connection.add(entry):
            self.turns.offer(*key, request.due_ns, request.serial)
        self.count += 1
        self.rows += request.rows
        self.due.change(request.due_ns, request.rows)

    def remove(self, request: Request) -> None:
        self._leaves(request)
        self.connections[request.client, request.peer].remove()

    def _leaves(self, request: Request) -> None:
        self.count -= 1
        self.rows -= request.rows
        self.due.change(request.due_ns, -request.rows)

    def first(self) -> tuple[_Connection, tuple[int, int, Request]] | None:
        """The connection whose turn it is, and the request that it would put forward."""
        while (key := self.turns.first()) is not None:
            connection = self.connections[key]
            head = connection.head()
            if head is not None:
                return connection, head
            self.turns.withdraw(*key)
            del self.connections[key]
        return None

    def _served(self, connection: _Connection, rows: int) -> None:
        """A connection has put so many rows into a batch, and queues for its next turn if it has more."""
        client, peer = connection.client, connection.peer
        self.turns.served(client, peer, max(-(-rows // _QUANTUM_ROWS), 1))
        head = connection.head()
        if head is None:
            del self.connections[client, peer]
        else:
            self.turns.offer(client, peer, head[0], head[1])

    def fill(self, batch: list[Request], rows: int, limit: int, ends_ns: int, late: list[Request]) -> tuple[int, bool]:
        """Append requests to the batch as far as they fit, and to `late` those that it would be too late for.

        Returns its rows, and whether the next one did not fit.
        """
        while (first := self.first()) is not None:
            connection, head = first
            quota = _QUANTUM_ROWS
            next_head: tuple[int, int, Request] | None = head
            taken = full = False
            while next_head is not None and quota > 0:
                request = next_head[2]
                in_time = request.deadline_ns >= ends_ns
                if in_time and batch and rows + request.rows > limit:
                    full = True
                    break
                connection.pop()
                request.waiting = False
                self._leaves(request)
                if in_time:
                    taken = True
                    batch.append(request)
                    rows += request.rows
                    quota -= request.rows or 1
                else:
                    late.append(request)
                next_head = connection.head()
            if taken:
                self._served(connection, _QUANTUM_ROWS - quota)
            if full:
                return rows, True
        return rows, False

    def steal(self, batch: list[Request], rows: int, now_ns: int, ends_ns: int, may: Callable[[Request], bool]) -> int:
        """Append requests for another device, of so many rows at most. Returns how many rows are left of that."""
        passed_over: list[tuple[_Connection, tuple[int, int, Request]]] = []
        while rows > 0 and len(passed_over) < _MAX_PASSED_OVER and (first := self.first()) is not None:
            connection, head = first
            taken = connection.steal(min(rows, _QUANTUM_ROWS), now_ns, ends_ns, may)
            if not taken:
                self.turns.withdraw(connection.client, connection.peer)
                passed_over.append((connection, head))
                continue
            before = rows
            for request in taken:
                request.waiting = False
                self._leaves(request)
                rows -= request.rows
            batch += taken
            self._served(connection, before - rows)
        for connection, head in passed_over:
            self.turns.offer(connection.client, connection.peer, head[0], head[1])
        return rows


def _due_ns(request: Request) -> int:
    return request.due_ns


class RequestQueue:
    """Requests that wait, on all levels.

    As long as all requests are alike in connection, priority and urgency, which at low load and with a single client
    they are, they stand in a plain line. The first one that is different makes it an ordered queue, until it is empty.

    Attributes:
        key: model, group, and whether each rides alone. costs: what batches of them take on this device. placement: the
            model on this device.
        rows, count: of the requests that wait.
        ready_ns: before that, a batch smaller than the limit waits for company; what a full batch left over does not.
        stealable: whether there may be requests that another device could take over; set by the caller.
    """

    __slots__ = ("_fifo", "_levels", "costs", "count", "key", "placement", "ready_ns", "rows", "stealable")

    def __init__(self, key: tuple[str, tuple[int, ...], bool], costs: BatchCosts, placement: Placement) -> None:
        self.key = key
        self.costs = costs
        self.placement = placement
        self.rows = 0
        self.count = 0
        self.ready_ns = 0
        self.stealable = False
        self._fifo: deque[Request] = deque()
        self._levels: list[_Level] | None = None

    def add(self, request: Request) -> bool:
        """Put a request in. True if its level may have a new head."""
        self.rows += request.rows
        self.count += 1
        if self._levels is None:
            line = self._fifo
            if not line:
                line.append(request)
                return True
            last = line[-1]
            if (
                request.peer == last.peer
                and request.priority == last.priority
                and request.due_ns >= last.due_ns
                and request.client == last.client
            ):
                line.append(request)
                return False
            self._order()
        assert self._levels is not None
        self._levels[request.priority].add(request)
        return True

    def _order(self) -> None:
        """Make the plain line an ordered queue."""
        self._levels = [_Level() for _ in range(LEVELS)]
        for request in self._fifo:
            self._levels[request.priority].add(request)
        self._fifo.clear()

    def remove(self, request: Request) -> None:
        """Take a request out that still waits."""
        request.waiting = False
        self.rows -= request.rows
        self.count -= 1
        if self._levels is None:
            self._order()  # to take one out of the middle of a line takes as long as the line
        assert self._levels is not None
        self._levels[request.priority].remove(request)
        if not self.count:
            self._emptied()

    def _emptied(self) -> None:
        self._levels = None
        self.stealable = False

    def head(self, level: int) -> Request | None:
        """The request of that level whose turn it is."""
        if self._levels is None:
            return self._fifo[0] if self._fifo and self._fifo[0].priority == level else None
        first = self._levels[level].first()
        return first[1][2] if first is not None else None

    def has_light_connection(self, level: int) -> bool:
        """Whether there is a connection, among those that came last, that asks for far less than others do."""
        if self._levels is None:
            return False  # there is only one
        connections, count = self._levels[level].connections, self._levels[level].count
        if len(connections) < 2:
            return False
        most = count / (_MODEST * len(connections))
        return any(0 < len(known) <= most for known in islice(reversed(connections.values()), _LOOKED_AT))

    def take(self, level: int, limit: int, ends_ns: int = 0, late: list[Request] | None = None) -> list[Request]:
        """Form a batch: requests of that level first, then of the others as far as there is room.

        Args:
            limit: most rows together; a single request may have more.
            ends_ns: when the batch will be over. Requests with earlier deadlines leave the queue, too, and are
                appended to `late`: others take their room.
        """
        batch: list[Request] = []
        late = [] if late is None else late
        late_before = len(late)
        if self._levels is None:
            rows = self._take_fifo(batch, limit, ends_ns, late)
        else:
            rows, full = self._levels[level].fill(batch, 0, limit, ends_ns, late)
            for other in self._levels:
                if full:
                    break
                if other.count:
                    rows, full = other.fill(batch, rows, limit, ends_ns, late)
        self.rows -= rows
        self.count -= len(batch)
        for request in late[late_before:]:
            self.rows -= request.rows
            self.count -= 1
        if not self.count:
            self._emptied()
        return batch

    def _take_fifo(self, batch: list[Request], limit: int, ends_ns: int, late: list[Request]) -> int:
        line = self._fifo
        rows = 0
        while line and (not batch or rows + line[0].rows <= limit):
            request = line.popleft()
            request.waiting = False
            if request.deadline_ns < ends_ns:
                late.append(request)
                continue
            rows += request.rows
            batch.append(request)
        return rows

    def steal(self, level: int, rows: int, now_ns: int, ends_ns: int, may: Callable[[Request], bool]) -> list[Request]:
        """Form a batch for another device: requests of that level first, then of the others, the earliest due first.

        Args:
            rows: at most, together.
            ends_ns: when that batch will be over. Requests with earlier deadlines stay.
            may: whether a request may go there.
        """
        batch: list[Request] = []
        if self._levels is None:
            self._steal_fifo(batch, rows, now_ns, ends_ns, may)
        else:
            rows = self._levels[level].steal(batch, rows, now_ns, ends_ns, may)
            for other in self._levels:
                if other.count and rows > 0:
                    rows = other.steal(batch, rows, now_ns, ends_ns, may)
        self.rows -= sum([request.rows for request in batch])
        self.count -= len(batch)
        if not self.count:
            self._emptied()
        return batch

    def _steal_fifo(
        self, batch: list[Request], rows: int, now_ns: int, ends_ns: int, may: Callable[[Request], bool]
    ) -> None:
        line = self._fifo
        first = 0 if line[0].due_ns < now_ns else bisect_left(line, ends_ns, key=_due_ns)
        line.rotate(-first)
        left: list[Request] = []
        for _ in range(len(line) - first):
            if not rows or len(left) == _MAX_PASSED_OVER:
                break
            request = line.popleft()
            if request.rows <= rows and request.deadline_ns >= ends_ns and may(request):
                request.waiting = False
                rows -= request.rows
                batch.append(request)
            else:
                left.append(request)
        line.extendleft(reversed(left))
        line.rotate(first)

    def rows_outside(self, begin_ns: int, end_ns: int) -> int:
        """Rows of all levels, about, but those that are due from the one to the other."""
        rows = self.rows
        for level in range(LEVELS) if self._levels is not None else (self._fifo[0].priority,):
            rows -= self.rows_due(level, end_ns) - self.rows_due(level, begin_ns)
        return rows

    def rows_due(self, level: int, due_ns: int) -> int:
        """Rows of that level that are due by then, about."""
        if self._levels is not None:
            return self._levels[level].due.until(due_ns)
        line = self._fifo
        if not line or line[0].priority != level:
            return 0
        if due_ns >= line[-1].due_ns:
            return self.rows
        return self.rows * bisect_right(line, due_ns, key=_due_ns) // self.count

    def rows_ahead(self, request: Request) -> tuple[int, int]:
        """Rows of its level and those above it, and how many of them go before a new request, about.

        The second is smaller where others are due later, or where turns bound what others can put before it.
        """
        level, due_ns = request.priority, request.due_ns
        if self._levels is None:
            if not self._fifo:
                return 0, 0
            last = self._fifo[-1]  # all of the line are alike, and this one is due last
            if last.priority != level:
                return (self.rows, self.rows) if last.priority < level else (0, 0)
            ahead = self.rows if due_ns >= last.due_ns else self.rows_due(level, due_ns)
            if request.peer != last.peer or request.client != last.client:
                ahead = min(ahead, 2 * _QUANTUM_ROWS)
            return self.rows, ahead
        above = 0
        for other in self._levels[:level]:
            above += other.rows
        mine = self._levels[level]
        if not mine.count:
            return above, above
        ahead = above + mine.due.until(due_ns)
        if ahead > _QUANTUM_ROWS and (before := mine.turns.before(request.client, request.peer)):
            own = mine.connections.get((request.client, request.peer))
            ahead = min(ahead, (before + 1) * (_QUANTUM_ROWS + (len(own) if own else 0)))
        return above + mine.rows, ahead

    def drain(self) -> list[Request]:
        """Empty it; returns what waited."""
        everything: list[Request] = []
        for level in range(LEVELS):
            while self.head(level) is not None:
                everything += self.take(level, 0)
        return everything
