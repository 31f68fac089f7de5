"""Chip: what computes on a device, where its lanes share it, and the time of it that each batch has had.

A lane of a CPU has a core of its own, so batches side by side take as long as alone. Lanes of a GPU share one chip: two
batches side by side take about twice as long, and the device does no more in all.
"""

from __future__ import annotations


class _Share:
    """What one batch has of the chip.

    Attributes:
        work_us: predicted microseconds, if it had the chip to itself; 0: nobody knows.
        started_ns: when it began. since_us: the clock of the chip when it was first in its lane; None: it is not yet.
        idle_us: that the chip had nothing to do before it, though requests waited.
    """

    __slots__ = ("idle_us", "lane", "since_us", "started_ns", "work_us")

    def __init__(self, lane: int, work_us: float, started_ns: int, idle_us: float) -> None:
        self.lane = lane
        self.work_us = work_us
        self.started_ns = started_ns
        self.since_us: float | None = None
        self.idle_us = idle_us


class Chip:
    """Chip that lanes share evenly (processor sharing; Kleinrock, 1967), each with its batches one after the other.

    A lane has the n-th part of the chip while n lanes have work. The clock counts the microseconds that each of them
    has had so far: the virtual time of fair queueing (Parekh and Gallager, 1993). So the clock tells what a batch has
    had of the chip, whatever ran beside it, and with that what it would take alone.

    What overlaps in truth, the copies of one batch and the layers of another, makes batches cheaper here than they are
    alone, as long as they run beside others.

    Args:
        lanes: of the device. slots: batches that each of them takes at a time: the one of number `i` belongs to the
            lane `i // slots`, and any negative number to a lane beside them.
    """

    __slots__ = ("_busy", "_clock_us", "_ended_ns", "_lanes", "_now_ns", "_shares", "slots")

    def __init__(self, lanes: int, slots: int = 1) -> None:
        self.slots = slots
        self._lanes: list[list[_Share]] = [[] for _ in range(lanes + 1)]  # the last one is the one beside them
        self._shares: dict[int, _Share] = {}  # by slot
        self._busy = 0  # lanes with work
        self._clock_us = 0.0
        self._now_ns = 0
        self._ended_ns = 0  # when the last batch was over

    def begin(self, slot: int, work_us: float, now_ns: int, *, waited: bool = False) -> None:
        """Note that a batch begins. Args: waited: whether requests have waited since the last batch was over."""
        self._advance(now_ns)
        lane = slot // self.slots if slot >= 0 else len(self._lanes) - 1
        idle_us = max(now_ns - self._ended_ns, 0) / 1e3 if waited and not self._busy else 0.0
        share = self._shares[slot] = _Share(lane, work_us, now_ns, idle_us)
        batches = self._lanes[lane]
        batches.append(share)
        if len(batches) == 1:
            self._busy += 1
            share.since_us = self._clock_us

    def end(self, slot: int, now_ns: int) -> tuple[float, float]:
        """Note that a batch is over, or hangs and is not waited for.

        Returns:
            Which part of its time it had the chip for itself, from 0 to 1, as 1 stands for what was alone; and the
            microseconds of the chip that it took, with those that went by before it though it waited.
        """
        share = self._shares.pop(slot, None)
        if share is None:
            return 1.0, 0.0  # it has been taken for hung
        self._advance(now_ns)
        self._ended_ns = max(self._ended_ns, now_ns)
        batches = self._lanes[share.lane]
        first = batches[0] is share
        batches.remove(share)
        if not batches:
            self._busy -= 1
        elif first:
            batches[0].since_us = self._clock_us
        had_us = self._clock_us - share.since_us if share.since_us is not None else 0.0
        elapsed_us = (now_ns - share.started_ns) / 1e3
        return min(had_us / elapsed_us, 1.0) if elapsed_us > 0 else 1.0, had_us + share.idle_us

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, but for what hangs."""
        return not self._busy

    def _advance(self, now_ns: int) -> None:
        if now_ns > self._now_ns:
            if self._busy:
                self._clock_us += (now_ns - self._now_ns) / 1e3 / self._busy
            self._now_ns = now_ns

    def load(self, slot: int) -> int:
        """Batches in the lane of a slot."""
        return len(self._lanes[slot // self.slots])

    def left_us(self, now_ns: int) -> list[float]:
        """Predicted microseconds of the chip that are left of what runs, by lane."""
        clock_us = self._clock_us
        if self._busy and now_ns > self._now_ns:
            clock_us += (now_ns - self._now_ns) / 1e3 / self._busy
        left = []
        for batches in self._lanes[:-1]:
            micros = 0.0
            for share in batches:
                since_us = share.since_us
                micros += share.work_us if since_us is None else max(share.work_us + since_us - clock_us, 0.0)
            left.append(micros)
        return left

    def delay_us(self, ahead_us: float, work_us: float, now_ns: int, slot: int = -1) -> float:
        """Predicted microseconds by which a batch is done later than if it had the chip to itself from now on.

        It waits for what is before it, and shares the chip with what runs beside it.

        Args:
            ahead_us: microseconds of the chip for what waits before it, which lanes take as they become free.
            work_us: of the batch. slot: that it has; -1: that of the lane with the least to do.
        """
        left = self.left_us(now_ns)
        if len(left) == 1:
            return left[0] + ahead_us
        if slot >= 0:
            level = left.pop(slot // self.slots)
        else:
            left.sort()
            level = _filled(left, ahead_us)
            del left[0]
        until = level + work_us
        # Lanes advance side by side. By the time that this one is as far as `until`, each other is as far, or has
        # nothing more to do, and the chip has done all of that. Where all are busy, what comes later keeps them so.
        if slot < 0 and level > 0.0:
            return level + len(left) * until
        return level + sum([min(other, until) for other in left])

    def begins_ns(self, work_us: float, now_ns: int, slot: int = -1) -> int:
        """Time at which a batch would begin that has the chip to itself, and is over when one is that begins now.

        Args:
            work_us, slot: of the batch that begins now, as for `delay_us`.
        """
        return now_ns + int(self.delay_us(0.0, work_us, now_ns, slot) * 1e3)


def _filled(left: list[float], ahead_us: float) -> float:
    """Level of the lowest lanes once so much work has been shared out among them. Args: left: of all, in order."""
    level = left[0]
    for count in range(1, len(left)):
        step = count * (left[count] - level)
        if step >= ahead_us:
            return level + ahead_us / count
        ahead_us -= step
        level = left[count]
    return level + ahead_us / len(left)
