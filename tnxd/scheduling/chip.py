"""Chip: what computes on a device, where its lanes share it, and the time of it that each batch has had.

A lane of a CPU has a core of its own, so batches side by side take as long as alone. Lanes of a GPU share one chip: two
batches side by side take about twice as long, and the device does no more in all.
"""

from __future__ import annotations


class _Share:
    """Share of one batch in the chip.

    Attributes:
        stream: that it is in. work_us: predicted microseconds, if it had the chip to itself; 0: nobody knows.
        since_us, since_ns: the clock of the chip, and the time, when it was first in its stream; 0: it is not yet.
        idle_us: that the chip had nothing to do before it, though requests waited.
    """

    __slots__ = ("idle_us", "since_ns", "since_us", "stream", "work_us")

    def __init__(self, stream: int, work_us: float, idle_us: float) -> None:
        self.stream = stream
        self.work_us = work_us
        self.since_us = 0.0
        self.since_ns = 0
        self.idle_us = idle_us


class Chip:
    """Chip that streams share evenly (processor sharing; Kleinrock, 1967), each with its batches one after the other.

    A stream has the n-th part of the chip while n of them have work. The clock counts the microseconds that each of
    them has had so far: the virtual time of fair queueing (Parekh and Gallager, 1993). So the clock tells what a batch
    has had of the chip, whatever ran beside it, and with that what it would take alone.

    Args:
        streams: of the device. Lane `i` belongs to stream `i % streams`, and any negative lane to one beside them.
    """

    __slots__ = ("_busy", "_busy_ns", "_clock_us", "_ended_ns", "_now_ns", "_shares", "_streams", "streams")

    def __init__(self, streams: int) -> None:
        self.streams = streams
        self._streams: list[list[_Share]] = [[] for _ in range(streams + 1)]  # the last one is the one beside them
        self._shares: dict[int, _Share] = {}  # by lane
        self._busy = 0  # streams with work
        self._busy_ns = 0
        self._clock_us = 0.0
        self._now_ns = 0
        self._ended_ns = 0  # when the last batch was over

    def begin(self, lane: int, work_us: float, now_ns: int, *, waited: bool = False) -> None:
        """Note that a batch begins. Args: waited: whether requests have waited since the last batch was over."""
        self._advance(now_ns)
        idle_us = max(now_ns - self._ended_ns, 0) / 1e3 if waited and not self._busy else 0.0
        stream = lane % self.streams if lane >= 0 else self.streams
        share = self._shares[lane] = _Share(stream, work_us, idle_us)
        batches = self._streams[stream]
        batches.append(share)
        if len(batches) == 1:
            self._busy += 1
            self._is_first(share, now_ns)

    def end(self, lane: int, now_ns: int) -> tuple[float, float]:
        """Note that a batch is over, or hangs and is not waited for.

        Returns:
            Which part of the chip it had since it was first in its stream, up to 1; and the microseconds of the chip
            that it took, with those that went by before it though it waited.
        """
        share = self._shares.pop(lane, None)
        if share is None:
            return 1.0, 0.0  # it has been taken for hung
        self._advance(now_ns)
        self._ended_ns = max(self._ended_ns, now_ns)
        batches = self._streams[share.stream]
        batches.remove(share)
        if not batches:
            self._busy -= 1
        elif not batches[0].since_ns:
            self._is_first(batches[0], now_ns)
        if not share.since_ns:
            return 1.0, share.idle_us
        had_us = self._clock_us - share.since_us
        elapsed_us = (now_ns - share.since_ns) / 1e3
        return min(had_us / elapsed_us, 1.0) if elapsed_us > 0 else 1.0, had_us + share.idle_us

    def _is_first(self, share: _Share, now_ns: int) -> None:
        share.since_us = self._clock_us
        share.since_ns = max(now_ns, 1)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, but for what hangs."""
        return not self._busy

    def busy_ns(self, now_ns: int) -> int:
        """Nanoseconds in which it had work so far. It only grows."""
        self._advance(now_ns)
        return self._busy_ns

    def _advance(self, now_ns: int) -> None:
        if now_ns > self._now_ns:
            if self._busy:
                passed_ns = now_ns - self._now_ns
                self._busy_ns += passed_ns
                self._clock_us += passed_ns / 1e3 / self._busy
            self._now_ns = now_ns

    def load(self, lane: int) -> int:
        """Batches in the stream of a lane."""
        return len(self._streams[lane % self.streams])

    def left_us(self, now_ns: int) -> list[float]:
        """Predicted microseconds of the chip that are left of what runs, by stream."""
        clock_us = self._clock_us
        if self._busy and now_ns > self._now_ns:
            clock_us += (now_ns - self._now_ns) / 1e3 / self._busy
        left = []
        for batches in self._streams[:-1]:
            micros = 0.0
            for share in batches:
                micros += max(share.work_us + share.since_us - clock_us, 0.0) if share.since_ns else share.work_us
            left.append(micros)
        return left

    def delay_us(self, ahead_us: float, work_us: float, now_ns: int, lane: int = -1) -> float:
        """Predicted microseconds by which a batch is done later than if it had the chip to itself from now on.

        It waits for what is before it, and shares the chip with what runs beside it.

        Args:
            ahead_us: microseconds of the chip for what waits before it, which streams take as they become free.
            work_us: of the batch. lane: that it has; -1: one of the stream with the least to do.
        """
        left = self.left_us(now_ns)
        if len(left) == 1:
            return left[0] + ahead_us
        if lane >= 0:
            level = left.pop(lane % self.streams)
        else:
            left.sort()
            level = _filled(left, ahead_us)
            del left[0]
        until = level + work_us
        # Streams advance side by side. By the time that this one is as far as `until`, each other is as far, or has
        # nothing more to do, and the chip has done all of that. Where all are busy, what comes later keeps them so.
        if lane < 0 and level > 0.0:
            return level + len(left) * until
        return level + sum([min(other, until) for other in left])

    def begins_ns(self, work_us: float, now_ns: int, lane: int = -1) -> int:
        """Time at which a batch would begin that has the chip to itself, and is over when one is that begins now.

        Args:
            work_us, lane: of the batch that begins now, as for `delay_us`.
        """
        return now_ns + int(self.delay_us(0.0, work_us, now_ns, lane) * 1e3)


def _filled(left: list[float], ahead_us: float) -> float:
    """Level of the lowest streams once so much work has been shared out among them. Args: left: of all, in order."""
    level = left[0]
    for count in range(1, len(left)):
        step = count * (left[count] - level)
        if step >= ahead_us:
            return level + ahead_us / count
        ahead_us -= step
        level = left[count]
    return level + ahead_us / len(left)
