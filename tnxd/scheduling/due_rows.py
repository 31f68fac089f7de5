"""Rows by due time: how many are due by a time, at a cost that does not grow with their number."""

from __future__ import annotations

from itertools import repeat

_ZEROS = repeat(0)


class DueRows:
    """Histogram of rows over their due times, in buckets of three widths: 131 us, 2 ms and 34 ms.

    Each bucket is sixteen of the next finer width. Due times lie within a second of arrival (`Scheduler.add`). A
    fourth width costs as much as it saves; with two, a decision takes up to 15 % longer where thousands wait.
    """

    __slots__ = ("_coarse", "_fine", "_latest_ns", "_medium", "_rows")

    def __init__(self) -> None:
        self._rows = 0
        self._latest_ns = 0
        self._fine: dict[int, int] = {}  # 131 us
        self._medium: dict[int, int] = {}  # 2 ms
        self._coarse: dict[int, int] = {}  # 34 ms

    def change(self, due_ns: int, rows: int) -> None:
        """Add `rows`, which may be negative, to those due at `due_ns`."""
        self._rows += rows
        self._latest_ns = max(self._latest_ns, due_ns)
        key = due_ns >> 17
        for buckets in (self._fine, self._medium, self._coarse):
            count = buckets.get(key, 0) + rows
            if count:
                buckets[key] = count
            else:
                buckets.pop(key, None)
            key >>= 4

    def until(self, due_ns: int) -> int:
        """Rows due at `due_ns` or earlier, and those later in the same bucket of 131 us."""
        if due_ns >= self._latest_ns:
            return self._rows
        fine, medium, coarse = due_ns >> 17, due_ns >> 21, due_ns >> 25
        rows = sum([count for key, count in self._coarse.items() if key < coarse])
        rows += sum(map(self._medium.get, range(coarse << 4, medium), _ZEROS))
        return rows + sum(map(self._fine.get, range(medium << 4, fine + 1), _ZEROS))
