"""Answered batches that are computed again, for a comparison that nobody waits for.

They run beside the lanes, on a thread that the operating system lets run last, and begin only while a lane is free and
nothing waits. What finds no such moment is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tnxd.executors.execution import Execution, Outcome
from tnxd.models.model import Model
from tnxd.registry import READY, Version
from tnxd.scheduler import Scheduler
from tnxd.work import Batch

log = logging.getLogger(__name__)

# What may wait to be computed, and as much again to be compared. Bytes are those of the requests and their answers.
_MAX_WAITING = 64
_MAX_WAITING_BYTES = 64 * 1024 * 1024


class Purpose(Protocol):
    """Why a batch is computed again."""

    def compare(self, copy: Copy) -> None:
        """Look at what came of a copy. Called on a thread of its own."""

    def skip(self, requests: int) -> None:
        """So many requests are not computed again, for want of a moment or of memory. Called on the loop's thread."""


class Copy(Execution):
    """Requests that have been answered, on their way through a model again.

    Attributes:
        original: the batch that they rode in. start: the first of them there.
        purpose: why. nbytes: of their inputs and outputs.
    """

    __slots__ = ("nbytes", "original", "purpose", "start")

    def __init__(self, batch: Batch, waiting: _Waiting, count: int) -> None:
        original, start = waiting.original, waiting.start
        super().__init__(
            batch,
            waiting.model,
            original.items[start : start + count],
            original.rows[start : start + count],
            original.group,
        )
        self.original = original
        self.start = start
        self.purpose = waiting.purpose
        self.nbytes = waiting.nbytes

    @property
    def answered(self) -> Sequence[Outcome]:
        """What these requests were answered."""
        return self.original.outcomes[self.start : self.start + len(self.items)]


@dataclass(frozen=True)
class _Waiting:
    original: Execution
    version: Version
    model: Model
    purpose: Purpose
    start: int
    stop: int
    nbytes: int


class Background:
    """Copies that wait, and those that wait to be compared. `finished` hands the comparing to a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._nbytes = 0
        self._stopped: set[str] = set()
        self._to_compare: queue.SimpleQueue[Copy] | None = None
        # Their difference waits to be compared. Each is written by one thread alone, so neither needs a lock.
        self._handed_nbytes = 0
        self._compared_nbytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def stop(self, model: Model) -> None:
        """A copy hangs on the one SPARE lane of its device: no more of them, which would do so on the next device."""
        self._stopped.add(model.key)

    def keep(self, keys: set[str]) -> None:
        """Forget what hung of models other than these."""
        self._stopped &= keys

    def offer(
        self, original: Execution, version: Version, purpose: Purpose, start: int = 0, stop: int | None = None
    ) -> None:
        """A batch has been answered: compute requests of it again if there is room.

        Args:
            version: what is to compute them. start, stop: which requests; by default all.
        """
        model = version.model
        assert model is not None
        if model.key in self._stopped:
            return
        items, outcomes = original.items[start:stop], original.outcomes[start:stop]
        nbytes = sum([array.nbytes for item in items for array in item if array is not None])
        nbytes += sum([array.nbytes for answer in outcomes if isinstance(answer, tuple) for array in answer])
        if len(self._waiting) >= _MAX_WAITING or self._nbytes + nbytes > _MAX_WAITING_BYTES:
            purpose.skip(len(items))
            return
        self._waiting.append(_Waiting(original, version, model, purpose, start, start + len(items), nbytes))
        self._nbytes += nbytes

    def next(self, scheduler: Scheduler, now_ns: int) -> Copy | None:
        """A copy to run now, where it is in nobody's way; None if there is none."""
        while self._waiting:
            first = self._waiting[0]
            version, model = first.version, first.model
            if version.state != READY or version.model is not model or model.key in self._stopped:
                self._take()  # it goes, or hangs
                continue
            every = first.original.rows[first.start : first.stop]
            count, rows = _fitting(every, model.max_batch_size)
            batch = scheduler.spare(model.key, first.original.group, rows, now_ns)
            if batch is None:
                return None
            self._take()
            if count < len(every):
                first.purpose.skip(len(every) - count)
            return Copy(batch, first, count)
        return None

    def _take(self) -> None:
        self._nbytes -= self._waiting.popleft().nbytes

    def finished(self, copy: Copy) -> None:
        """A copy has been computed."""
        if self._to_compare is None:
            self._to_compare = queue.SimpleQueue()
            threading.Thread(target=self._compare, args=(self._to_compare,), name="compare", daemon=True).start()
        waiting = self._handed_nbytes - self._compared_nbytes
        if self._to_compare.qsize() < _MAX_WAITING and waiting + copy.nbytes <= _MAX_WAITING_BYTES:
            self._handed_nbytes += copy.nbytes
            self._to_compare.put(copy)
        else:
            copy.purpose.skip(len(copy.items))

    def _compare(self, inbox: queue.SimpleQueue[Copy]) -> None:
        while True:
            copy = inbox.get()
            nbytes = copy.nbytes
            try:
                copy.purpose.compare(copy)
            except Exception:
                log.exception("comparing %s with %s", copy.original.model.key, copy.model.key)
            del copy  # hold no request's memory while waiting for the next
            self._compared_nbytes += nbytes


def _fitting(rows: Sequence[int], limit: int) -> tuple[int, int]:
    """How many requests, from the first, fit into a batch, and their rows; one always does."""
    count, total = 1, rows[0]
    while count < len(rows) and total + rows[count] <= limit:
        total += rows[count]
        count += 1
    return count, total
