"""Requests of one model and shape that wait for one device: which of them go into the next batch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable

from tnxd.scheduling.connection_queue import MAX_PASSED_OVER
from tnxd.scheduling.costs import BatchCosts
from tnxd.scheduling.level_queue import QUANTUM_ROWS, LevelQueue
from tnxd.scheduling.placement import Placement
from tnxd.scheduling.request import DEVICE, LEVELS, Request


def _due_ns(request: Request) -> int:
    return request.due_ns


class RequestQueue:
    """Queue of requests on all levels.

    As long as all requests are alike in connection, priority and urgency, which at low load and with a single client
    they are, the queue is a FIFO. The first request that differs turns it into one queue per level, until it is empty.
    Without the FIFO a decision about requests that are alike takes 4 to 8 us longer, which is half as long again.

    Attributes:
        key: model, group, and what each request has for itself alone. exclusive: whether that is the device.
        costs: of batches of such requests on this device.
        placement: the model on this device.
        rows, count: of the requests that wait.
        ready_ns: a batch smaller than the limit waits for company until then; what a full batch left over does not.
        stealable: whether there may be requests that another device may steal; set by the caller.
        doubted_ns: when the costs were last doubted; set by the caller.
    """

    __slots__ = (
        "_fifo",
        "_levels",
        "costs",
        "count",
        "doubted_ns",
        "exclusive",
        "key",
        "placement",
        "ready_ns",
        "rows",
        "stealable",
    )

    def __init__(self, key: tuple[str, tuple[int, ...], int], costs: BatchCosts, placement: Placement) -> None:
        self.key = key
        self.exclusive = key[2] >= DEVICE
        self.costs = costs
        self.placement = placement
        self.rows = 0
        self.count = 0
        self.ready_ns = 0
        self.stealable = False
        self.doubted_ns = 0
        self._fifo: deque[Request] = deque()
        self._levels: list[LevelQueue] | None = None

    # --- in and out ----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> bool:
        """Insert a request. True if its level may have a new head."""
        self.rows += request.rows
        self.count += 1
        if self._levels is None:
            fifo = self._fifo
            if not fifo:
                fifo.append(request)
                return True
            last = fifo[-1]
            if (
                request.peer == last.peer
                and request.priority == last.priority
                and request.due_ns >= last.due_ns
                and request.client == last.client
            ):
                fifo.append(request)
                return False
            self._split_into_levels()
        assert self._levels is not None
        self._levels[request.priority].add(request)
        return True

    def _split_into_levels(self) -> None:
        """Turn the FIFO into one queue per level."""
        self._levels = [LevelQueue() for _ in range(LEVELS)]
        for request in self._fifo:
            self._levels[request.priority].add(request)
        self._fifo.clear()

    def remove(self, request: Request) -> None:
        """Take out a request that waits here, wherever it stands."""
        request.waiting = False
        self.rows -= request.rows
        self.count -= 1
        if self._levels is None:
            self._split_into_levels()  # to take one out of the middle of a FIFO takes as long as that is
        assert self._levels is not None
        self._levels[request.priority].remove(request)
        if not self.count:
            self._reset()

    def _reset(self) -> None:
        """Begin anew, as a FIFO: the queue is empty."""
        self._levels = None
        self.stealable = False

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
            self._reset()
        return batch

    def _take_fifo(self, batch: list[Request], limit: int, ends_ns: int, late: list[Request]) -> int:
        fifo = self._fifo
        rows = 0
        while fifo and (not batch or rows + fifo[0].rows <= limit):
            request = fifo.popleft()
            request.waiting = False
            if request.deadline_ns < ends_ns:
                late.append(request)
                continue
            rows += request.rows
            batch.append(request)
        return rows

    def steal(
        self, level: int, rows: int, now_ns: int, ends_ns: int, eligible: Callable[[Request], bool]
    ) -> list[Request]:
        """Form a batch for another device: requests of that level first, then of the others, the earliest due first.

        Args:
            rows: at most, together.
            ends_ns: when that batch will be over. Requests with earlier deadlines stay.
            eligible: whether a request may go there.
        """
        batch: list[Request] = []
        if self._levels is None:
            self._steal_fifo(batch, rows, now_ns, ends_ns, eligible)
        else:
            rows = self._levels[level].steal(batch, rows, now_ns, ends_ns, eligible)
            for other in self._levels:
                if other.count and rows > 0:
                    rows = other.steal(batch, rows, now_ns, ends_ns, eligible)
        self.rows -= sum([request.rows for request in batch])
        self.count -= len(batch)
        if not self.count:
            self._reset()
        return batch

    def _steal_fifo(
        self, batch: list[Request], rows: int, now_ns: int, ends_ns: int, eligible: Callable[[Request], bool]
    ) -> None:
        fifo = self._fifo
        first = 0 if fifo[0].due_ns < now_ns else bisect_left(fifo, ends_ns, key=_due_ns)
        fifo.rotate(-first)
        left: list[Request] = []
        for _ in range(len(fifo) - first):
            if not rows or len(left) == MAX_PASSED_OVER:
                break
            request = fifo.popleft()
            if request.rows <= rows and request.deadline_ns >= ends_ns and eligible(request):
                request.waiting = False
                rows -= request.rows
                batch.append(request)
            else:
                left.append(request)
        fifo.extendleft(reversed(left))
        fifo.rotate(first)

    def drain(self) -> list[Request]:
        """Take out all requests."""
        everything: list[Request] = []
        for level in range(LEVELS):
            while self.head(level) is not None:
                everything += self.take(level, 0)
        return everything

    # --- questions -----------------------------------------------------------------------------------------------

    def head(self, level: int) -> Request | None:
        """Request of that level whose turn it is; None if none of it waits."""
        if self._levels is None:
            return self._fifo[0] if self._fifo and self._fifo[0].priority == level else None
        first = self._levels[level].first()
        return first[1][2] if first is not None else None

    def has_light_connection(self, level: int) -> bool:
        """Whether one of the newest connections on that level has far fewer requests waiting than the average."""
        return self._levels is not None and self._levels[level].has_light_connection()

    def rows_due(self, level: int, due_ns: int) -> int:
        """Rows of that level that are due by then, about."""
        if self._levels is not None:
            return self._levels[level].due.until(due_ns)
        fifo = self._fifo
        if not fifo or fifo[0].priority != level:
            return 0
        if due_ns >= fifo[-1].due_ns:
            return self.rows
        return self.rows * bisect_right(fifo, due_ns, key=_due_ns) // self.count

    def rows_due_outside(self, begin_ns: int, end_ns: int) -> int:
        """Rows of all levels, about, without those due between the two times. The queue must not be empty."""
        rows = self.rows
        for level in range(LEVELS) if self._levels is not None else (self._fifo[0].priority,):
            rows -= self.rows_due(level, end_ns) - self.rows_due(level, begin_ns)
        return rows

    def rows_ahead(self, request: Request) -> tuple[int, int]:
        """Rows of its level and those above it, and how many of them go before a new request, about.

        The second is smaller where others are due later, or where turns bound what others can put before it.
        """
        level, due_ns = request.priority, request.due_ns
        if self._levels is None:
            if not self._fifo:
                return 0, 0
            last = self._fifo[-1]  # all are alike, and this one is due last
            if last.priority != level:
                return (self.rows, self.rows) if last.priority < level else (0, 0)
            ahead = self.rows if due_ns >= last.due_ns else self.rows_due(level, due_ns)
            if request.peer != last.peer or request.client != last.client:
                ahead = min(ahead, 2 * QUANTUM_ROWS)
            return self.rows, ahead
        above = 0
        for other in self._levels[:level]:
            above += other.rows
        mine = self._levels[level]
        if not mine.count:
            return above, above
        ahead = above + mine.due.until(due_ns)
        if ahead > QUANTUM_ROWS and (before := mine.turns.before(request.client, request.peer)):
            own = mine.connections.get((request.client, request.peer))
            ahead = min(ahead, (before + 1) * (QUANTUM_ROWS + (len(own) if own else 0)))
        return above + mine.rows, ahead
