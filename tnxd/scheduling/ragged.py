"""Requests of different lengths that share a batch, padded to its longest: which of them, and when that is cheaper.

The head of the queue is the one whose turn it is. Around its length, the lengths that wait are cut into parts so that
all of them together cost least, each padded to its longest; the batch is the part with the head. Nobody tunes buckets:
what a batch of so many rows and such a length costs was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tnxd.scheduling.cost_surface import CostSurface
from tnxd.scheduling.costs import BatchCosts, CostCurve
from tnxd.scheduling.placement import Placement
from tnxd.scheduling.request import Request
from tnxd.scheduling.request_queue import RequestQueue

_REACHES = (3, 12)
"""Lengths on each side of the head's that are looked at: more of them only where the part with the head goes on to the
last of the fewer, as on a device where short batches cost as much as long ones. The time to plan grows with the square
of their number."""

_WORTH_US = 2_000.0
"""What is done sooner than this, length by length, is not worth the time to plan it."""


class Part(NamedTuple):
    """Lengths that share a batch.

    Attributes:
        shortest, longest: the lengths from the one to the other. rows: of the batch, at most.
        micros: expected of it; 0: nobody knows.
    """

    shortest: int
    longest: int
    rows: int
    micros: float

    @property
    def units(self) -> int:
        """Tokens of the batch, padding included."""
        return self.rows * self.longest


def partition(
    waiting: Sequence[tuple[int, int]], cost: Callable[[int, int], float], most: Callable[[int], int]
) -> list[tuple[int, int]]:
    """Partition of neighbouring lengths into parts of least total cost; of equally cheap ones, that with most parts.

    Args:
        waiting: (length, rows) that wait, ordered by length.
        cost: microseconds of a batch of so many rows and such a length.
        most: rows that a batch of such a length may have; a part with more takes several batches.

    Returns:
        First and last index of each part.
    """
    least = [0.0]
    begins = [0]
    for last in range(len(waiting)):
        length = waiting[last][0]
        limit = max(most(length), 1)
        rows, best, begin = 0, float("inf"), last
        for first in range(last, -1, -1):
            rows += waiting[first][1]
            batches, rest = divmod(rows, limit)
            micros = (cost(limit, length) * batches if batches else 0.0) + (cost(rest, length) if rest else 0.0)
            if least[first] + micros < best:
                best, begin = least[first] + micros, first
        least.append(best)
        begins.append(begin)
    parts = []
    end = len(waiting)
    while end:
        parts.append((begins[end], end - 1))
        end = begins[end]
    return parts[::-1]


class RaggedQueue(RequestQueue):
    """Queue of requests of all lengths. Its rows are tokens, and so are those of its requests and limits.

    So a long text takes more of its client's turns than a short one, and of every limit and forecast what it costs.

    Attributes:
        lengths: rows that wait, by length.
        surface: what batches cost by rows and length.
    """

    __slots__ = ("lengths", "surface")

    def __init__(
        self, key: tuple[str, tuple[int, ...], int], costs: BatchCosts, placement: Placement, surface: CostSurface
    ) -> None:
        super().__init__(key, costs, placement)
        self.lengths: dict[int, int] = {}
        self.surface = surface

    # --- in and out, with the account of lengths -----------------------------------------------------------------

    def add(self, request: Request) -> bool:
        self.lengths[request.length] = self.lengths.get(request.length, 0) + _counted(request)
        return super().add(request)

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._left([request])

    def take(self, level: int, limit: int, ends_ns: int = 0, late: list[Request] | None = None) -> list[Request]:
        late = [] if late is None else late
        late_before = len(late)
        batch = super().take(level, limit, ends_ns, late)
        self._left([*batch, *late[late_before:]])
        return batch

    def steal(
        self, level: int, rows: int, now_ns: int, ends_ns: int, eligible: Callable[[Request], bool]
    ) -> list[Request]:
        """As `RequestQueue.steal`, of the head's length alone."""
        head = self.head(level)
        length = head.length if head is not None else 0
        batch = super().steal(
            level, rows, now_ns, ends_ns, lambda request: request.length == length and eligible(request)
        )
        self._left(batch)
        return batch

    def _left(self, requests: Sequence[Request]) -> None:
        lengths = self.lengths
        for request in requests:
            rows = lengths[request.length] - _counted(request)
            if rows:
                lengths[request.length] = rows
            else:
                del lengths[request.length]

    # --- batches -------------------------------------------------------------------------------------------------

    def part(self, head: Request, limit: int) -> Part:
        """Lengths, and rows of them, that are to share the next batch with the head. Args: limit: most tokens."""
        length, lengths, cost = head.length, self.lengths, self.surface.mean
        own = lengths.get(length, 0)
        at_once = max(head.rows // length, min(own, head.most_rows, limit // length))
        alone = Part(length, length, at_once, cost(at_once, length))
        if len(lengths) < 2 or alone.micros * len(lengths) <= _WORTH_US:
            return alone
        ordered = sorted(lengths)
        place = ordered.index(length)

        def most(longest: int) -> int:
            return min(head.most_rows, limit // longest)

        for reach in _REACHES:
            begin, end = max(place - reach, 0), min(place + reach + 1, len(ordered))
            waiting = [(each, lengths[each]) for each in ordered[begin:end]]
            parts = partition(waiting, cost, most)
            first, last = next(part for part in parts if begin + part[1] >= place)
            stops = (begin + first > begin or not begin) and (last < len(waiting) - 1 or end == len(ordered))
            if stops:
                break
        longest = waiting[last][0]
        rows = min(sum([rows for _, rows in waiting[first : last + 1]]), most(longest))
        if first == last or rows < head.rows // length:
            return alone
        return Part(waiting[first][0], longest, rows, cost(rows, longest))

    def shrink(self, head: Request, part: Part, curve: CostCurve, now_ns: int) -> tuple[Part, float]:
        """The part as large as lets the head be done in time: first without other lengths, then with fewer rows.

        Returns:
            The part, and its predicted microseconds. As it was, if the head is late even alone.
        """
        left_us = (head.deadline_ns - now_ns) / 1e3

        def cost(rows: int, length: int) -> float:
            return self.surface.mean(rows, length) or curve.mean(rows * length)

        length, least = head.length, max(head.rows // head.length, 1)
        most = max(min(part.rows, self.lengths.get(length, 0)), least)
        if cost(least, length) > left_us:
            return part, cost(part.rows, part.longest)
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            if cost(middle, length) <= left_us:
                low = middle
            else:
                high = middle - 1
        micros = cost(low, length)
        return Part(length, length, low, micros), micros

    def take_part(self, level: int, head: Request, part: Part, ends_ns: int, late: list[Request]) -> list[Request]:
        """Form a batch of a part: requests of that level first, then of the others as far as there is room.

        Requests that would be late in it stay, since a smaller batch may come for them; the head, for which there is
        none, leaves the queue and is appended to `late`.
        """
        if head.deadline_ns < ends_ns:
            self._drop_head(head)
            late.append(head)
            return []
        shortest, longest, room, _ = part
        batch: list[Request] = []

        def fits(request: Request) -> bool:
            return shortest <= request.length <= longest and request.deadline_ns >= ends_ns

        if self._levels is None:
            self._pick_fifo(batch, room, fits)
        else:
            room = self._levels[level].pick(batch, room, fits)
            for other in self._levels:
                if other.count and room > 0:
                    room = other.pick(batch, room, fits)
        self.rows -= sum([request.rows for request in batch])
        self.count -= len(batch)
        self._left(batch)
        if not self.count:
            self._reset()
        return batch

    def _drop_head(self, head: Request) -> None:
        if self._levels is not None:
            self.remove(head)
            return
        self._fifo.popleft()
        head.waiting = False
        self.rows -= head.rows
        self.count -= 1
        self._left([head])
        if not self.count:
            self._reset()

    def _pick_fifo(self, batch: list[Request], room: int, fits: Callable[[Request], bool]) -> None:
        fifo = self._fifo
        left: list[Request] = []
        while fifo and (room > 0 or not batch):
            request = fifo.popleft()
            rows = request.rows // request.length
            if fits(request) and (rows <= room or not batch):
                request.waiting = False
                batch.append(request)
                room -= rows
            else:
                left.append(request)
        fifo.extendleft(reversed(left))


def padded(requests: Sequence[Request]) -> tuple[int, int]:
    """Tokens of a batch, padding included, and its longest length."""
    longest = max([request.length for request in requests])
    return longest * sum([request.rows // request.length for request in requests]), longest


def _counted(request: Request) -> int:
    """Rows of a request in the account of lengths: one without rows has a place there, too."""
    return request.rows // (request.length or 1) or 1
