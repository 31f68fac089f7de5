"""Reports that take long to make, shared by all who ask for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_SHARE = 10
"""Part of the loop's time that making one may take, however often it is asked for: a tenth."""

_CHEAP_NS = 2_000_000
"""Time below which a report is made anew each time: few are so quick in asking that it matters."""


class SharedReport(Generic[T]):
    """Report that is told as it is for nine times as long as it took to make.

    Args:
        make: makes it.
        clock: the steady one. cpu_clock: of this thread, since what other programs do makes nothing dearer. Both in ns.
    """

    def __init__(
        self,
        make: Callable[[], T],
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._make = make
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._kept: tuple[T, int] | None = None  # and until when

    def get(self) -> T:
        """The report, made now or a while ago."""
        if self._kept is not None:
            made, until_ns = self._kept
            if self._clock() < until_ns:
                return made
        began_ns = self._cpu_clock()
        made = self._make()
        took_ns = self._cpu_clock() - began_ns
        self._kept = (made, self._clock() + (_SHARE - 1) * took_ns) if took_ns >= _CHEAP_NS else None
        return made
