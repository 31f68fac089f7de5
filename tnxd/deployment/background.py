"""Background work: answered batches are computed again, for a comparison that nobody waits for.

Copies run beside the lanes, on a thread that the operating system lets run last. A copy begins only while a lane is
free and nothing waits. A copy that finds no such moment is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tnxctl.protocol.strings import nbytes_of
from tnxctl.protocol.wire import MIB, TensorSpec
from tnxd.deployment.version import READY, Version
from tnxd.events import event
from tnxd.executors.execution import Execution, Outcome
from tnxd.models.model import Item, Model
from tnxd.scheduling.device import Batch
from tnxd.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

# Copies that may wait to be computed, and as many again to be compared; bytes of their requests and answers.
_MAX_WAITING = 64
_MAX_WAITING_BYTES = 64 * MIB


class Purpose(Protocol):
    """A reason to compute batches again.

    Attributes:
        plain: whether that is for the network as it is, whatever variant of it serves.
    """

    plain: bool

    def compare(self, copy: Copy) -> None:
        """Compare the outcome of a copy with the answers that were sent. Called on a thread of its own."""

    def skip(self, requests: int) -> None:
        """Count requests that were not computed again, for want of a moment or memory. Called on the loop's thread."""


@dataclass(frozen=True)
class Answered:
    """Requests that have been answered, and their batch.

    Attributes:
        model: the model that answered. items, rows, group, outcomes: as in `Execution`, of these requests alone.
        company: number of requests in the batch. latency_us: of its forward, in microseconds.
        variant: name of the variant of the network that answered; "": the network as it is, or that does not matter.
    """

    model: Model
    items: Sequence[Item]
    rows: Sequence[int]
    group: tuple[int, ...]
    outcomes: Sequence[Outcome]
    company: int
    latency_us: float
    variant: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and outputs."""
        inputs = sum([nbytes_of(array) for item in self.items for array in item if array is not None])
        return inputs + sum(
            [nbytes_of(array) for answer in self.outcomes if isinstance(answer, tuple) for array in answer]
        )


class Copy(Execution):
    """Execution of requests that have been answered, by a model that need not be the same.

    Attributes:
        original: the answered requests; there may be more than are computed again.
        version: computes them. purpose: reason to do so. nbytes: bytes of their inputs and outputs.
    """

    __slots__ = ("nbytes", "original", "purpose", "version")

    def __init__(self, batch: Batch, waiting: _Waiting, rows: Sequence[int], group: tuple[int, ...]) -> None:
        items = waiting.original.items[: len(rows)]
        super().__init__(batch.lane, batch.max_rows, waiting.model, items, rows, group, plain=waiting.purpose.plain)
        self.original = waiting.original
        self.version = waiting.version
        self.purpose = waiting.purpose
        self.nbytes = waiting.nbytes


@dataclass(frozen=True)
class _Waiting:
    original: Answered
    version: Version
    model: Model
    purpose: Purpose
    nbytes: int


class Background:
    """Queue of copies that wait to be computed, and of those that wait to be compared, on a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._nbytes = 0
        self._stopped: set[str] = set()
        self._to_compare: queue.SimpleQueue[Copy] | None = None
        # The difference of the two waits to be compared. Each is written by one thread alone: neither needs a lock.
        self._handed_nbytes = 0
        self._compared_nbytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def stop(self, model: Model) -> None:
        """Take no more copies for a model: one hangs on the background lane of its device, others might elsewhere."""
        self._stopped.add(model.key)

    def keep(self, keys: set[str]) -> None:
        """Forget the stopped models other than these. Args: keys: of models."""
        self._stopped &= keys

    def offer(self, original: Answered, version: Version, purpose: Purpose) -> None:
        """Queue answered requests to be computed again, by a version, if there is room."""
        model = version.model
        assert model is not None
        if model.key in self._stopped:
            return
        nbytes = original.nbytes
        if len(self._waiting) >= _MAX_WAITING or self._nbytes + nbytes > _MAX_WAITING_BYTES:
            purpose.skip(len(original.items))
            return
        self._waiting.append(_Waiting(original, version, model, purpose, nbytes))
        self._nbytes += nbytes

    def next(self, scheduler: Scheduler, now_ns: int) -> tuple[Copy, Batch] | None:
        """A copy to run now where it is in nobody's way, and its batch; None: there is none.

        A copy that can never run is dropped.
        """
        for waiting in list(self._waiting):
            original, version, model = waiting.original, waiting.version, waiting.model
            serves = version.state == READY and version.model is model and model.key not in self._stopped
            if not serves or not any(model.key in each.models for each in scheduler.devices.values() if not each.error):
                self._take(waiting)  # it goes, or hangs, or its device is lost
                waiting.purpose.skip(len(original.items))
                continue
            rows, group = _fitting(original, model)
            batch = scheduler.start_background(model.key, group, sum(rows), now_ns)
            if batch is None:
                continue
            self._take(waiting)
            if len(rows) < len(original.items):
                waiting.purpose.skip(len(original.items) - len(rows))
            return Copy(batch, waiting, rows, group), batch
        return None

    def _take(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        self._nbytes -= waiting.nbytes

    def finished(self, copy: Copy) -> None:
        """Queue a copy that has been computed for its comparison, if there is room."""
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
                key = copy.model.key
                log.exception("comparing %s with %s", copy.original.model.key, key, extra=event("defect", key))
            del copy  # hold no request's memory while waiting for the next
            self._compared_nbytes += nbytes


def _fitting(original: Answered, model: Model) -> tuple[list[int], tuple[int, ...]]:
    """Rows of the requests, from the first, that fit into one batch of a model, and its group; one always fits."""
    batches = bool(model.max_batch_size) == bool(original.model.max_batch_size)
    if not batches or model.joins != original.model.joins:  # then neither is what it was
        item = [(spec, array) for spec, array in zip(model.inputs, original.items[0], strict=True) if array is not None]
        specs = [TensorSpec(spec.name, spec.datatype, array.shape) for spec, array in item]
        bound = model.bind(specs, [array for _, array in item])
        return [bound.rows], bound.group
    rows = original.rows
    count, total = 1, rows[0]
    while count < len(rows) and total + rows[count] <= model.max_batch_size:
        total += rows[count]
        count += 1
    return list(rows[:count]), original.group
